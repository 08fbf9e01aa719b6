"""The least time that a GPU needs for the bytes, products and exponentials of a call."""

from dataclasses import dataclass

from fd_kernels.benchmarks.shapes import Shape

FEATURE_BYTES, FP32_BYTES = 2, 4
EXP_PER_CLOCK = (
    16  # of one multiprocessor, compute capability 8.0 to 10.0 (CUDA C++ Programming Guide, throughputs)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a GPU does in a second."""

    copy: float
    """Bytes read and written by a large copy."""
    matmul: float
    """FLOPs of a large bf16 matrix product."""
    exp: float | None
    """Exponentials: multiprocessors x highest clock x 16; None where the clock is not known."""


H200 = Rates(copy=4.3e12, matmul=790e12, exp=4.18e12)
"""Measured on one before (`exp`: 132 multiprocessors at 1.98 GHz). A run measures its own."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of a pass, and what sets it."""

    us: float
    bound: str


def floors(shape: Shape, rates: Rates) -> dict[str, Floor] | None:
    """The floor of each pass; None for a whole block, and for attention where `rates.exp` is not known.

    Every input is read once and every output written once (the forward pass also writes one fp32 number a row);
    products and exponentials overlap with that. The backward pass is five products and one exponential a pair; the
    output is none of its inputs, since it could be computed again.
    """
    tokens, C, N = shape.images * shape.tokens, shape.channels, shape.group
    if shape.op == "whitened_smooth_l1":
        elements = tokens * C
        forward = Floor(1e6 * elements * 2 * FEATURE_BYTES / rates.copy, "memory")
        backward = Floor(1e6 * elements * 3 * FEATURE_BYTES / rates.copy, "memory")
    elif shape.op == "block" or rates.exp is None:
        return None
    else:
        pairs, bias = tokens * N * shape.heads, shape.heads * N * N * FP32_BYTES
        kept = tokens * shape.heads * FP32_BYTES

        def floor(num_bytes: int, products: int) -> Floor:
            assert rates.exp is not None, "checked above"
            seconds = {
                "memory": num_bytes / rates.copy,
                "tensor cores": products * 2 * tokens * N * C / rates.matmul,
                "exp": pairs / rates.exp,
            }
            bound = max(seconds, key=seconds.__getitem__)
            return Floor(1e6 * seconds[bound], bound)

        forward = floor(tokens * C * (3 + 1) * FEATURE_BYTES + bias + kept, products=2)  # qkv; out
        backward = floor(tokens * C * (3 + 1 + 3) * FEATURE_BYTES + 2 * bias, products=5)  # qkv, d_out; d_qkv
    bounds = dict.fromkeys((forward.bound, backward.bound))
    return {
        "forward": forward,
        "backward": backward,
        "both": Floor(forward.us + backward.us, " / ".join(bounds)),
    }
