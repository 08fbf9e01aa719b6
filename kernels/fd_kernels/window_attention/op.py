"""Shifted-window cosine attention: the function that models call."""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, N = tokens of a window,
#   R = relative positions of a window

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fd_kernels.checks import check_floating, check_heads, check_shape
from fd_kernels.dispatch import use_triton
from fd_kernels.window_attention import launch
from fd_kernels.window_attention.reference import window_attention_reference


def window_attention(
    qkv_BHWE: Tensor,
    bias: Tensor,
    scale_h: Tensor,
    *,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    pad_qkv_E: Tensor | None = None,
) -> Tensor:
    """Scaled cosine attention within (shifted) windows of a token grid.

    The grid is rolled by -shift, padded at the bottom and right to a multiple of the window, and cut into
    windows; the result is put back in place. Queries and keys are L2-normalised; logits, softmax and the
    product with the values are computed in fp32 at least. Across shift regions -100 is added to a logit.

    Args:
        qkv_BHWE: queries, keys and values, (B, H, W, 3 * C), each part laid out as heads x head dim; fp64,
            fp32, bf16 or fp16.
        bias: relative position bias, fp32: of each query and key, (heads, N, N), with N tokens of a window row by
            row; or of each relative position, (heads, (2 * rows - 1) * (2 * columns - 1)), row difference (query
            minus key) by column difference, from the most negative. Large windows want the second: for a window of
            40 x 40 it is 400 times smaller.
        scale_h: factor of the cosine similarity per head, (heads,), above 0: the exponential of the clamped logit
            scale; fp32.
        window_size: rows and columns of a window, any size.
        shift_size: rows and columns of the cyclic shift, each 0 or more and less than the window's.
        pad_qkv_E: queries, keys and values of a zero token (the bias of the projection), (3 * C,), dtype of
            `qkv_BHWE`. Padding positions hold it and stay in the softmax. Needed where the window does not
            divide the grid, unused elsewhere.

    Returns:
        out_BHWC, (B, H, W, C), in the dtype of `qkv_BHWE`.

    On CUDA a Triton kernel runs where it serves the call (fp32, bf16 or fp16; head dim 32, 64 or 128; contiguous
    tensors), elsewhere the PyTorch reference: see `fd_kernels.dispatch`.

    Raises:
        ValueError: a shape, dtype, window or shift does not fit, or `pad_qkv_E` is missing; or the kernel is asked
            for by name and does not serve the call.

    Source: Liu et al. 2022 (arXiv:2111.09883), equation 2; shift: Liu et al. 2021 (arXiv:2103.14030).
    """
    if qkv_BHWE.dim() != 4:
        raise ValueError(f"qkv_BHWE has {qkv_BHWE.dim()} dimensions; expected 4, (B, H, W, 3 * C)")
    if bias.dim() not in (2, 3):
        raise ValueError(
            f"bias has {bias.dim()} dimensions; expected 3, (heads, N, N), or 2, a table for each head"
        )
    _, H, W, E = qkv_BHWE.shape
    heads = len(bias)
    check_floating("qkv_BHWE", qkv_BHWE)
    if len(window_size) != 2 or min(window_size) < 1:
        raise ValueError(f"window_size is {window_size}; expected two positive integers")
    if len(shift_size) != 2 or not all(
        0 <= shift < window for shift, window in zip(shift_size, window_size, strict=True)
    ):
        raise ValueError(
            f"shift_size is {shift_size}; expected two integers, 0 <= shift < window, window_size is {window_size}"
        )
    rows, columns = window_size
    positions = (rows * columns,) * 2 if bias.dim() == 3 else ((2 * rows - 1) * (2 * columns - 1),)
    check_shape("bias", bias, (heads, *positions), f"a window of {window_size} tokens")
    check_shape("scale_h", scale_h, (heads,), "one factor for each head of bias")
    check_heads("qkv_BHWE", E, heads)
    if not (H % window_size[0] or W % window_size[1]):
        pad_qkv_E = None
    elif pad_qkv_E is None:
        raise ValueError(
            f"window {window_size} does not divide the grid {(H, W)}; pass pad_qkv_E, a zero token's qkv"
        )
    else:
        check_shape("pad_qkv_E", pad_qkv_E, (E,), "the last dimension of qkv_BHWE")
        if pad_qkv_E.dtype != qkv_BHWE.dtype:
            raise ValueError(
                f"pad_qkv_E has dtype {pad_qkv_E.dtype}; expected {qkv_BHWE.dtype}, that of qkv_BHWE"
            )
    tensors = [qkv_BHWE, bias, scale_h, *([] if pad_qkv_E is None else [pad_qkv_E])]
    if not use_triton("window_attention", *tensors, served=not_served(*tensors)):
        return window_attention_reference(
            qkv_BHWE, bias, scale_h, window_size=window_size, shift_size=shift_size, pad_qkv_E=pad_qkv_E
        )
    out_BHWC, _ = attention(qkv_BHWE, bias, scale_h, pad_qkv_E, list(window_size), list(shift_size), True)
    return out_BHWC


def not_served(*tensors: Tensor) -> str | None:
    """Why the kernel does not serve a call (qkv, bias, scale, perhaps padding), with what it got and expected."""
    qkv_BHWE, bias, scale_h = tensors[:3]
    head_dim = qkv_BHWE.shape[-1] // (3 * len(bias))
    if qkv_BHWE.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"qkv has dtype {qkv_BHWE.dtype}; expected float32, bfloat16 or float16"
    if bias.dtype != torch.float32 or scale_h.dtype != torch.float32:
        return f"bias and scale have dtypes {bias.dtype} and {scale_h.dtype}; expected float32"
    if head_dim not in launch.HEAD_DIMS:
        return f"a head has {head_dim} channels; expected one of {launch.HEAD_DIMS}"
    if not all(tensor.is_contiguous() for tensor in tensors):
        strides = ", ".join(str(tensor.stride()) for tensor in tensors)
        return f"the tensors have strides {strides}; expected contiguous ones"
    if not qkv_BHWE.numel():
        return f"qkv has shape {tuple(qkv_BHWE.shape)}; expected at least one image and token"
    if max(qkv_BHWE[0].numel(), bias.numel()) >= 2**31 or qkv_BHWE[0, ..., 0].numel() >= launch.PAD_OFFSET:
        shapes = f"{tuple(qkv_BHWE.shape[1:])} and {tuple(bias.shape)}"
        return f"an image and the bias have shapes {shapes}; expected fewer than 2**31 numbers, 2**26 tokens"
    return None


@torch.library.custom_op("fd_kernels::window_attention", mutates_args=())
def attention(
    qkv_BHWE: Tensor,
    bias: Tensor,
    scale_h: Tensor,
    pad_qkv_E: Tensor | None,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """The kernel, for `window_attention` and (`cosine` false, one window an image) `biased_attention`."""
    with torch.cuda.device_of(qkv_BHWE):  # Triton launches on the current device
        return launch.forward(qkv_BHWE, bias, scale_h, pad_qkv_E, window_size, shift_size, cosine)


@attention.register_fake
def _(
    qkv_BHWE: Tensor,
    bias: Tensor,
    scale_h: Tensor,
    pad_qkv_E: Tensor | None,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    B, H, W, E = qkv_BHWE.shape
    plan = launch.plan(qkv_BHWE, bias, scale_h, window_size, shift_size, cosine)
    return qkv_BHWE.new_empty(B, H, W, E // 3), qkv_BHWE.new_empty(plan.rows(B), dtype=torch.float32)


@torch.library.custom_op("fd_kernels::window_attention_backward", mutates_args=())
def _backward(
    grad_BHWC: Tensor,
    qkv_BHWE: Tensor,
    bias: Tensor,
    scale_h: Tensor,
    pad_qkv_E: Tensor | None,
    out_BHWC: Tensor,
    rows_GhPT: Tensor,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(qkv_BHWE):
        return launch.backward(
            grad_BHWC,
            qkv_BHWE,
            bias,
            scale_h,
            pad_qkv_E,
            out_BHWC,
            rows_GhPT,
            window_size,
            shift_size,
            cosine,
        )


@_backward.register_fake
def _(
    grad_BHWC: Tensor,
    qkv_BHWE: Tensor,
    bias: Tensor,
    scale_h: Tensor,
    pad_qkv_E: Tensor | None,
    out_BHWC: Tensor,
    rows_GhPT: Tensor,
    window_size: list[int],
    shift_size: list[int],
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_padding = 0 if pad_qkv_E is None else len(pad_qkv_E)
    return (
        torch.empty_like(qkv_BHWE),
        torch.empty_like(bias),
        torch.empty_like(scale_h),
        scale_h.new_empty(num_padding),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window_size, ctx.shift_size, ctx.cosine = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_BHWC: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_BHWC is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # once: a recomputed block unpacks them once
    pad_qkv_E = saved[3]
    # The sum of an output hands back a gradient without strides.
    *grads, grad_pad_E = _backward(
        grad_BHWC.contiguous(), *saved, ctx.window_size, ctx.shift_size, ctx.cosine
    )
    return (*grads, None if pad_qkv_E is None else grad_pad_E.to(pad_qkv_E.dtype), None, None, None)


attention.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.fd_kernels.window_attention)
def _forward_flops(qkv_shape: Sequence[int], *arguments: Any, out_shape: Any = None, **_: Any) -> int:
    return _products(qkv_shape, arguments[3], 2)


@register_flop_formula(torch.ops.fd_kernels.window_attention_backward)
def _backward_flops(
    grad_shape: Sequence[int], qkv_shape: Sequence[int], *arguments: Any, out_shape: Any = None, **_: Any
) -> int:
    return _products(qkv_shape, arguments[5], 5)


def _products(qkv_shape: Sequence[int], window_size: Sequence[int], count: int) -> int:
    """FLOPs of so many products of N x D by D x N for each window and head, padding left out."""
    B, H, W, E = qkv_shape
    return count * 2 * B * H * W * window_size[0] * window_size[1] * E // 3
