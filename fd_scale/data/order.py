"""The order of an epoch: a permutation that is computed position by position, not stored.

Shape legend: P = positions, S = shards, W = shards read at a time.
"""

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
    positions_P = positions.reshape(-1)
    return _shuffled(seed, "order", epoch, positions_P, np.full_like(positions_P, num_samples)).reshape(
        positions.shape
    )


class ShardOrder:
    """An order that reads few shards at a time: the same promises as `order`, and `window` shards in each stretch.

    Shards stand in a circle, in an order of the epoch. Each is cut into `window` pieces. Block k of the epoch holds
    piece 0 of shard k, piece 1 of shard k - 1, and so on, shuffled: from block to block one shard goes and one comes.
    Which samples are in a piece is a permutation of the shard. Shards at the circle's end are read in the first blocks
    and in the last ones.

    Time for a position grows with the logarithm of the number of shards; memory is a table of them.

    Args:
        first_S1: first sample of each shard, rising from 0, and one past the last sample; int64, (S + 1,).
        window: how many shards are read at a time, at least 1; if there are fewer, all.
    """

    def __init__(self, first_S1: npt.NDArray[np.int64], window: int) -> None:
        kept = np.diff(first_S1) > 0
        self.first_S, self.sizes_S = first_S1[:-1][kept], np.diff(first_S1)[kept]
        self.window = min(window, len(self.sizes_S))
        self._table: tuple[tuple[int, int], npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def __call__(
        self, seed: int, epoch: int, position: int | npt.NDArray[np.integer]
    ) -> npt.NDArray[np.int64]:
        """Returns the sample ids at positions of an epoch; arguments and result as of `order`."""
        positions = np.asarray(position, dtype=np.int64)
        circle_S, first_block_S1 = self._circle(seed, epoch)
        places_P = positions.reshape(-1)
        assert ((places_P >= 0) & (places_P < first_block_S1[-1])).all(), positions
        block_P = np.searchsorted(first_block_S1, places_P, side="right") - 1
        inside_P = _shuffled(
            seed,
            "block",
            epoch,
            places_P - first_block_S1[block_P],
            np.diff(first_block_S1)[block_P],
            block_P,
        )
        pieces_W = np.arange(self.window)
        shard_PW = circle_S[(block_P[:, None] - pieces_W) % len(circle_S)]
        begin_PW = self.sizes_S[shard_PW] * pieces_W // self.window
        end_PW = self.sizes_S[shard_PW] * (pieces_W + 1) // self.window
        past_PW = np.cumsum(end_PW - begin_PW, axis=1)
        piece_P = (inside_P[:, None] >= past_PW).sum(axis=1)
        shard_P, end_P, past_P = (
            table_PW[np.arange(len(piece_P)), piece_P] for table_PW in (shard_PW, end_PW, past_PW)
        )
        in_shard_P = _shuffled(
            seed, "shard", epoch, end_P - past_P + inside_P, self.sizes_S[shard_P], shard_P
        )
        return (self.first_S[shard_P] + in_shard_P).reshape(positions.shape)

    def coming(self, seed: int, epoch: int, position: int) -> int | None:
        """Returns the first sample of the shard that comes with the block after a position's; none in the last one."""
        circle_S, first_block_S1 = self._circle(seed, epoch)
        block = int(np.searchsorted(first_block_S1, position, side="right"))
        return int(self.first_S[circle_S[block]]) if block < len(circle_S) else None

    def _circle(self, seed: int, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The shards in the order of an epoch, and the first position of each block, and one past the last."""
        if self._table is None or self._table[0] != (seed, epoch):
            num_shards = len(self.sizes_S)
            circle_S = _shuffled(
                seed, "shards", epoch, np.arange(num_shards), np.full(num_shards, num_shards)
            )
            sizes_S = self.sizes_S[circle_S]
            block_sizes_S = np.zeros_like(sizes_S)
            for piece in range(self.window):
                piece_S = sizes_S * (piece + 1) // self.window - sizes_S * piece // self.window
                block_sizes_S += np.roll(piece_S, piece)
            self._table = (seed, epoch), circle_S, np.concatenate([[0], np.cumsum(block_sizes_S)])
        return self._table[1:]


def _shuffled(
    seed: int,
    purpose: str,
    epoch: int,
    places_P: npt.NDArray[np.int64],
    sizes_P: npt.NDArray[np.int64],
    *which_P: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Returns where a permutation of range(size) takes a place in it, each of its own size and number (`which_P`)."""
    num_columns_P = np.ceil(np.sqrt(sizes_P)).astype(np.int64)  # exact far above any number of samples
    num_rows_P = -(-sizes_P // num_columns_P)
    halves_2P = [places_P % num_columns_P, places_P // num_columns_P]
    for i in range(_NUM_ROUNDS):
        changed, other = i % 2, 1 - i % 2
        size_P = (num_columns_P, num_rows_P)[changed]
        shift_P = hash64(seed, purpose, epoch, i, halves_2P[other], *which_P) % size_P.astype(np.uint64)
        halves_2P[changed] = (halves_2P[changed] + shift_P.astype(np.int64)) % size_P
    found_P = halves_2P[1] * num_columns_P + halves_2P[0]
    outside_P = found_P >= sizes_P
    if outside_P.any():
        which_inner = [which[outside_P] for which in which_P]
        found_P[outside_P] = _shuffled(
            seed, purpose, epoch, found_P[outside_P], sizes_P[outside_P], *which_inner
        )
    return found_P
