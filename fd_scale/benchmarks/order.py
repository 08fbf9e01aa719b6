"""How well an order shuffles, and what it reads at a time: by shards in windows of several sizes, and over all samples.

Shape legend: N = samples, P = positions, S = shards, K = classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from fd_scale.data.order import ShardOrder, order
from fd_scale.errors import UserError
from fd_scale.log import console

NUM_CLASSES = 1000
_NUM_BUCKETS = 100
_NUM_REPEATS = 20

Ids = npt.NDArray[np.int64]
Order = Callable[[Ids], Ids]


def bench_order(num_shards: int, shard_size: int, batch: int, windows: list[int]) -> dict[str, Any]:
    """Prints a table, a column for each order of one epoch.

    Args:
        num_shards: of the data set.
        shard_size: images in a shard.
        batch: images of a step.
        windows: each with a column; the order over all has the last one.
    """
    if min(num_shards, shard_size, batch, *windows) < 1 or batch > num_shards * shard_size:
        raise UserError("bench order: expected numbers of at least 1, and a batch no larger than all shards")
    size = num_shards * shard_size
    orders: dict[str, Order] = {
        f"window {window}": partial(ShardOrder(np.arange(num_shards + 1) * shard_size, window), 0, 0)
        for window in windows
    }
    orders["over all"] = partial(order, 0, 0, num_samples=size)
    found = {name: _measured(each, size, shard_size, batch) for name, each in orders.items()}
    title = f"{num_shards:,} shards of {shard_size:,}, batch {batch:,}"
    table = Table("", *found, title=title)
    for what in next(iter(found.values())):
        table.add_row(what, *(f"{values[what]:.4g}" for values in found.values()))
    console.print(table)
    return {"shards": num_shards, "shard_size": shard_size, "batch": batch, "orders": found}


def _measured(ordered: Order, size: int, shard_size: int, batch: int) -> dict[str, float]:
    times = []
    for step in range(_NUM_REPEATS):
        began = time.perf_counter()
        ordered(np.arange(step * batch, (step + 1) * batch) % size)
        times.append(time.perf_counter() - began)
    parts = np.array_split(np.arange(size), max(1, size // 2**16))
    ids_P = np.concatenate([ordered(part) for part in parts])
    position_N = np.empty_like(ids_P)
    position_N[ids_P] = np.arange(size)
    batches = ids_P[: size // batch * batch].reshape(-1, batch)
    mixed_N = np.random.default_rng(0).integers(0, NUM_CLASSES, size)
    sorted_N = np.arange(size) * NUM_CLASSES // size
    return {
        "neighbours apart": float(np.abs(np.diff(position_N)).mean() / size),
        "rank correlation": float(np.corrcoef(np.arange(size), position_N)[0, 1]),
        "shards in a batch": float(np.mean([len(np.unique(ids // shard_size)) for ids in batches])),
        "classes in a batch, mixed": float(np.mean([len(np.unique(mixed_N[ids])) for ids in batches])),
        "chi2/dof, mixed": _chi_square(mixed_N[ids_P]),
        "classes in a batch, sorted": float(np.mean([len(np.unique(sorted_N[ids])) for ids in batches])),
        "chi2/dof, sorted": _chi_square(sorted_N[ids_P]),
        "ms a batch": 1000 * float(np.median(times)),
    }


def _chi_square(class_P: npt.NDArray[np.int64]) -> float:
    """Of the dependence of the class on the part of the epoch, by its degrees of freedom: 1 where there is none."""
    bucket_P = np.arange(len(class_P)) * _NUM_BUCKETS // len(class_P)
    counts = np.bincount(bucket_P * NUM_CLASSES + class_P, minlength=_NUM_BUCKETS * NUM_CLASSES)
    counts_BK = counts.reshape(_NUM_BUCKETS, NUM_CLASSES).astype(np.float64)
    counts_BK = counts_BK[:, counts_BK.sum(axis=0) > 0]
    expected_BK = np.outer(counts_BK.sum(axis=1), counts_BK.sum(axis=0)) / counts_BK.sum()
    statistic = ((counts_BK - expected_BK) ** 2 / expected_BK).sum()
    return float(statistic / ((counts_BK.shape[0] - 1) * (counts_BK.shape[1] - 1)))
