"""Randomness that is computed, not drawn: a function of (seed, purpose, counters) and of nothing else.

A value does not depend on the rank, the worker or the order in which values are asked for, so a
run gives the same numbers on any number of devices and after any resume.
"""

import functools
import hashlib

import numpy as np
import numpy.typing as npt

Counter = int | np.integer | npt.NDArray[np.integer]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


@functools.cache
def _purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def _absorb(state: npt.NDArray[np.uint64], word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = (state ^ word) + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIER_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIER_2
    return mixed ^ (mixed >> np.uint64(31))


def hash64(seed: int, purpose: str, *counters: Counter) -> npt.NDArray[np.uint64]:
    """Returns well-mixed 64-bit words, one for each element of the broadcast counters.

    The values are part of the run format: a change would silently change every resumed run.

    Args:
        seed: seed of the run, taken modulo 2^64.
        purpose: what the words are for ("order", "augment"); different purposes are independent.
        counters: step, epoch, sample id, ...; integers or integer arrays, negative ones modulo 2^64.

    Returns:
        uint64 array of the counters' broadcast shape; shape () when all of them are single integers.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
        number generators"), applied once for each word absorbed.
    """
    words = [np.asarray(seed % 2**64, dtype=np.uint64), *(np.asarray(c).astype(np.uint64) for c in counters)]
    state = np.asarray(_purpose_key(purpose), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for word in words:
            state = _absorb(state, word)
    return np.asarray(state)


def initial_seed(seed: int) -> int:
    """Returns what torch's generator is seeded with before the weights of a run are drawn."""
    return int(hash64(seed, "initialisation")) % 2**63


def uniform(seed: int, purpose: str, *counters: Counter) -> npt.NDArray[np.float64]:
    """Returns float64 values, uniform in [0, 1); arguments and shape are those of `hash64`."""
    top_53_bits = hash64(seed, purpose, *counters) >> np.uint64(11)  # what a float64 holds exactly
    return np.asarray(top_53_bits * 2.0**-53)
