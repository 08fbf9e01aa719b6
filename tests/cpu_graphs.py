"""A stand-in for CUDA graphs on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(values: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


class Recording(TorchDispatchMode):
    """As a CUDA graph: keeps the operations of a context, and replays them on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and not _storages(old) & _storages((args, kwargs)):
                    old.copy_(new)

    def pool(self) -> None:
        return None


@contextmanager
def _graph(recording: Recording, **_: Any) -> Iterator[None]:
    with recording:
        yield


_STREAM = SimpleNamespace(wait_stream=lambda other: None)

STAND_INS: dict[str, Any] = {
    "CUDAGraph": Recording, "graph": _graph, "Stream": lambda: _STREAM, "current_stream": lambda: _STREAM,
    "stream": lambda stream: nullcontext(), "synchronize": lambda: None,
}  # fmt: skip
"""What to put in the place of each in `torch.cuda`."""
