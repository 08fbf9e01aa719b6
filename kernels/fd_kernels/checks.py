"""Checks that the ops share: a wrong argument is one sentence that names it."""

from collections.abc import Sequence

from torch import Tensor


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` holds floating point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; expected a floating point dtype, convert it first"
        )


def check_heads(name: str, channels: int, heads: int) -> None:
    """Raise ValueError unless `channels` are queries, keys and values of so many heads, at least one."""
    if heads < 1 or channels < 1 or channels % (3 * heads):
        raise ValueError(
            f"{name} has {channels} channels, and bias {heads} heads; expected a positive multiple of 3 * heads"
        )


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Raise ValueError unless `tensor` has the shape `expected`; `meaning` says what that shape is."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected)}, {meaning}")
