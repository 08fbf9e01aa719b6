"""The order of an epoch: a permutation that is computed position by position, not stored."""

import math

import numpy as np
import numpy.typing as npt

from fd_scale.randomness import hash64

# Each round rewrites one of the two halves. Four rewrites of each leave no trace of the input order.
_NUM_ROUNDS = 8


def order(
    seed: int, epoch: int, position: int | npt.NDArray[np.integer], num_samples: int
) -> npt.NDArray[np.int64]:
    """Returns the sample ids at positions of an epoch's permutation of range(num_samples).

    Time and memory for a position do not depend on `num_samples`. The permutation is the Feistel
    network over pairs (position // columns, position % columns), with rows * columns barely above
    `num_samples`; a result that is no sample goes through the network again until it is one.

    Args:
        seed: seed of the run.
        epoch: number of the epoch; each has its own permutation.
        position: integer or integer array of any shape, each in [0, num_samples).
        num_samples: size of the data set, >= 1.

    Returns:
        int64 array of the shape of `position`.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", generalised Feistel
        network and cycle walking.
    """
    positions = np.asarray(position, dtype=np.int64)
    assert num_samples >= 1, num_samples
    assert ((positions >= 0) & (positions < num_samples)).all(), (positions, num_samples)
    num_columns = math.isqrt(num_samples - 1) + 1  # the square root, rounded up
    num_rows = -(-num_samples // num_columns)
    sizes = (num_columns, num_rows)

    def shuffle(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        halves = [ids % num_columns, ids // num_columns]
        for i in range(_NUM_ROUNDS):
            changed, other = i % 2, 1 - i % 2
            shift = hash64(seed, "order", epoch, i, halves[other]) % np.uint64(sizes[changed])
            halves[changed] = (halves[changed] + shift.astype(np.int64)) % sizes[changed]
        return halves[1] * num_columns + halves[0]

    ids = shuffle(positions.reshape(-1))
    while (outside := ids >= num_samples).any():
        ids[outside] = shuffle(ids[outside])
    return ids.reshape(positions.shape)
