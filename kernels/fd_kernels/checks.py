"""Checks that the ops share: a wrong argument is one sentence that names it."""

from collections.abc import Sequence

from torch import Tensor


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` holds floating point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; expected a floating point dtype, convert it first"
        )


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Raise ValueError unless `tensor` has the shape `expected`; `meaning` says what that shape is."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected)}, {meaning}")
