"""Computed randomness and the epoch order made from it."""

import numpy as np
import pytest

from fd_scale.data.order import order
from fd_scale.randomness import hash64, uniform


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2).sum() / expected)


def test_golden_values() -> None:
    """Runs are resumed by later versions: the values are part of the run format."""
    assert int(hash64(0, "order")) == 0x7136B6D2B97859F7
    assert int(hash64(0, "order", 0)) == 0xBD4A465BD85734AC
    assert int(hash64(1, "augment", 3, 7)) == 0x2C5364F230CFDB7C
    assert int(hash64(-1, "augment", 2**63, -1)) == 0x6367739FE98BD036
    assert float(uniform(5, "mixup", 1)) == 0.033497820717274585
    assert order(0, 0, np.arange(10), 10).tolist() == [8, 1, 5, 7, 2, 0, 3, 6, 4, 9]
    assert order(7, 3, np.array([0, 1, 9_999_999]), 10_000_000).tolist() == [2931897, 2907988, 1719601]


def test_hash64_broadcasts_as_single_calls() -> None:
    steps, rows = np.arange(3)[:, None], np.arange(4, dtype=np.int32)
    words = hash64(5, "purpose", steps, rows)
    assert words.shape == (3, 4)
    assert words.dtype == np.uint64
    assert all(words[i, j] == hash64(5, "purpose", i, j) for i in range(3) for j in range(4))


@pytest.mark.parametrize("shift", [0, 8, 32, 56])
def test_neighbouring_counters_give_uniform_bytes(shift: int) -> None:
    words = hash64(0, "purpose", np.arange(2**16))
    counts = np.bincount((words >> np.uint64(shift)).astype(np.uint8), minlength=256)
    # 255 degrees of freedom: mean 255, standard deviation 22.6; the bounds are 5 of those away.
    assert 142 < chi_square(counts) < 368


def test_every_input_bit_flips_half_of_the_output_bits() -> None:
    counters = np.arange(1000, dtype=np.uint64)
    for bit in range(64):
        changed = hash64(0, "purpose", counters ^ np.uint64(1 << bit)) ^ hash64(0, "purpose", counters)
        # Mean of 64,000 fair bits: 32 of 64, standard error 0.13; 6 of those, as 64 bits are tested.
        assert abs(np.bitwise_count(changed).mean() - 32) < 0.8


@pytest.mark.parametrize(
    "other",
    [
        hash64(0, "other purpose", np.arange(2**16)),
        hash64(1, "purpose", np.arange(2**16)),
        hash64(0, "purpose", np.arange(2**16) + 1),
        hash64(0, "purpose", np.arange(2**16), 0),
        hash64(0, "purpose", 0, np.arange(2**16)),
    ],
    ids=["purpose", "seed", "neighbour", "more counters", "counter order"],
)
def test_streams_are_independent(other: np.ndarray) -> None:
    words = hash64(0, "purpose", np.arange(2**16))
    pairs = (words >> np.uint64(60)) * np.uint64(16) + (other >> np.uint64(60))
    # Joint distribution of two 4-bit values, 255 degrees of freedom, bounds as above.
    assert 142 < chi_square(np.bincount(pairs.astype(np.int64), minlength=256)) < 368


def test_uniform_fills_the_unit_interval() -> None:
    values = uniform(0, "purpose", np.arange(100_000))
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    # Standard error of the mean is 0.0009, of the variance (1/12) 0.0002; about 5 of those.
    assert abs(values.mean() - 0.5) < 0.005
    assert abs(values.var() - 1 / 12) < 0.0012


@pytest.mark.parametrize("epoch", [0, 1])
def test_order_is_a_permutation(epoch: int) -> None:
    for num_samples in [*range(1, 130), 1000, 1797, 50_000]:
        ids = order(3, epoch, np.arange(num_samples), num_samples)
        assert np.array_equal(np.sort(ids), np.arange(num_samples)), num_samples


def test_order_of_10_million_samples_has_no_repeats_in_spot_checks() -> None:
    positions = np.concatenate([np.arange(start, start + 20_000) for start in (0, 4_999_999, 9_980_000)])
    ids = order(0, 0, positions, 10_000_000)
    assert ids.min() >= 0
    assert ids.max() < 10_000_000
    assert len(np.unique(ids)) == len(positions)


def test_order_is_the_same_one_by_one() -> None:
    ids = order(1, 2, np.arange(50), 50)
    assert [int(order(1, 2, position, 50)) for position in range(50)] == ids.tolist()
    assert np.array_equal(order(1, 2, np.arange(50).reshape(5, 10), 50), ids.reshape(5, 10))


def test_order_differs_between_epochs_and_seeds() -> None:
    first = order(0, 0, np.arange(1000), 1000)
    for other in (order(0, 1, np.arange(1000), 1000), order(1, 0, np.arange(1000), 1000)):
        # Two random permutations agree in 1 place on average; more than 8 has probability 1e-6.
        assert (first == other).sum() <= 8


def test_every_sample_is_as_likely_at_every_position() -> None:
    counts = np.zeros((7, 7))
    for seed in range(2000):
        counts[np.arange(7), order(seed, 0, np.arange(7), 7)] += 1
    # Rows and columns have fixed sums: 36 degrees of freedom, standard deviation 8.5, 5 of those.
    assert chi_square(counts) < 79
