"""For tests: makes Triton's interpreter treat bf16 as a GPU does.

The interpreter of Triton 3.7 stores bf16 as raw bits in uint16. It truncates on the way down, where a GPU
rounds to nearest even, and multiplies the raw bits of bf16 matrices as if they were integers.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

_convert_float: Callable[..., Any] = interpreter._convert_float
_create_dot: Callable[..., Any] = interpreter.InterpreterBuilder.create_dot


def install_bf16_rounding() -> None:
    """Replace the interpreter's conversions to and from bf16, and its products of bf16 matrices, for good."""
    interpreter._convert_float = _convert_with_rounding
    interpreter.InterpreterBuilder.create_dot = _dot_of_values


def _to_bf16(values: Any) -> Any:
    """Bits of the nearest bf16 of each fp32 value, both NumPy arrays."""
    return torch.tensor(values).bfloat16().view(torch.uint16).numpy()


def _to_fp32(bits: Any) -> Any:
    """Value of bf16 bits as fp32, both NumPy arrays."""
    return torch.tensor(bits).view(torch.bfloat16).float().numpy()


def _convert_with_rounding(values: Any, source: Any, destination: Any, rounding: Any) -> Any:
    """Stands for `interpreter._convert_float`; `rounding` is None for the default."""
    truncates = rounding == interpreter._ir.ROUNDING_MODE.RTZ
    if source == tl.float32 and destination == tl.bfloat16 and not truncates:
        return _to_bf16(values)
    if source == tl.bfloat16 and destination == tl.float32:
        return _to_fp32(values)
    return _convert_float(values, source, destination, rounding)


def _dot_of_values(builder: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
    """Stands for `InterpreterBuilder.create_dot`: a GPU adds exact products of bf16 in fp32."""
    a, b = (
        interpreter.TensorHandle(_to_fp32(side.data), tl.float32)
        if side.dtype.scalar == tl.bfloat16
        else side
        for side in (a, b)
    )
    return _create_dot(builder, a, b, accumulator, *options)
