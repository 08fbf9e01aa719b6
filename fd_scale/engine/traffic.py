"""What a rank sends in collectives, counted as they are called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

# How often the whole of a collective passes through each member of a ring, (n - 1) / n of it a time. In a broadcast
# or a reduction to one rank all members but one pass it on.
_PASSES = {
    "all_reduce": 2, "all_reduce_coalesced": 2,
    "all_gather": 1, "all_gather_into_tensor": 1, "all_gather_coalesced": 1,
    "reduce_scatter": 1, "reduce_scatter_tensor": 1, "reduce": 1, "broadcast": 1,
}  # fmt: skip


class Traffic:
    """Counts the bytes that this rank sends through a backend, taken as rings.

    Args:
        backend: has the collectives as methods, which are replaced by counting ones.
    """

    def __init__(self, backend: Any) -> None:
        self.sent_bytes = 0.0
        self._inside = False
        for name in _PASSES:
            if hasattr(backend, name):
                setattr(backend, name, self._counting(name, getattr(backend, name)))

    def _counting(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one collective made of others
                return collective(*args, **kwargs)
            given = (*args, *kwargs.values())
            sides = [
                sum(leaf.nbytes for leaf in tree_leaves(side) if isinstance(leaf, Tensor)) for side in given
            ]
            group = next((each for each in given if isinstance(each, dist.ProcessGroup)), None)
            ranks = dist.get_world_size(group)
            self.sent_bytes += _PASSES[name] * max(sides) * (ranks - 1) / ranks
            self._inside = True
            try:
                return collective(*args, **kwargs)
            finally:
                self._inside = False

        return counted


@functools.cache
def traffic_of(backend: Any) -> Traffic:
    """Returns the one counter of a backend, which a process shares between its engines."""
    return Traffic(backend)
