"""Smooth L1 to whitened features: the function that the distillation task calls."""

# Shape suffix legend: B = images, L = tokens, D = channels

from typing import Any

import torch
from torch import Tensor

from fd_kernels.checks import check_floating, check_shape
from fd_kernels.dispatch import use_triton
from fd_kernels.feature_loss.reference import whitened_smooth_l1_reference

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_CHANNELS = 8192  # one program holds a row in registers


def whitened_smooth_l1(
    pred_BLD: Tensor,
    target_BLD: Tensor,
    *,
    beta: float = 2.0,
    eps: float = 1e-5,
    token_weight_BL: Tensor | None = None,
) -> Tensor:
    """Smooth L1 between student features and teacher features whitened here, summed over tokens.

    Whitening is a LayerNorm over the channels of each token without affine weights. The mean is taken over
    channels and the sum over images and tokens; the caller divides by the number of tokens.

    Args:
        pred_BLD: student features, (B, L, D), any floating point dtype.
        target_BLD: teacher features before whitening, (B, L, D), any floating point dtype; no gradient
            flows to it.
        beta: switch point between squared and absolute error, in target standard deviations, > 0.
        eps: added to the variance of a token, > 0.
        token_weight_BL: factor of each token's loss, (B, L); no gradient flows to it. None means 1.

    Returns:
        Sum of the token losses, a scalar, fp32 (fp64 where an input is fp64).

    Raises:
        ValueError: shapes differ, a dtype is not floating point, or beta or eps is not positive; or the
            Triton kernel is asked for by `set_implementation` and does not serve the call.

    Source: Wei et al. 2022 (arXiv:2205.14141); beta = 2 and eps = 1e-5 as in the released code.
    """
    if pred_BLD.dim() != 3:
        raise ValueError(f"pred_BLD has {pred_BLD.dim()} dimensions; expected 3, (B, L, D)")
    check_shape("target_BLD", target_BLD, pred_BLD.shape, "the shape of pred_BLD")
    check_floating("pred_BLD", pred_BLD)
    check_floating("target_BLD", target_BLD)
    if token_weight_BL is not None:
        check_shape("token_weight_BL", token_weight_BL, pred_BLD.shape[:2], "images and tokens of pred_BLD")
        if token_weight_BL.is_complex():
            raise ValueError(f"token_weight_BL has dtype {token_weight_BL.dtype}; expected a real one")
    if beta <= 0:
        raise ValueError(
            f"beta is {beta}; expected a positive number of standard deviations (2.0 as published)"
        )
    if eps <= 0:
        raise ValueError(f"eps is {eps}; expected a positive number (1e-5 as published)")

    tensors = [pred_BLD, target_BLD] if token_weight_BL is None else [pred_BLD, target_BLD, token_weight_BL]
    if use_triton("whitened_smooth_l1", *tensors, served=_not_served(pred_BLD, target_BLD)):
        weight_BL = None if token_weight_BL is None else token_weight_BL.detach()
        return _triton_loss(pred_BLD, target_BLD.detach(), weight_BL, beta, eps)
    return whitened_smooth_l1_reference(
        pred_BLD, target_BLD, beta=beta, eps=eps, token_weight_BL=token_weight_BL
    )


def _not_served(pred_BLD: Tensor, target_BLD: Tensor) -> str | None:
    """Why the kernel does not serve this call, or None."""
    for name, tensor in (("pred_BLD", pred_BLD), ("target_BLD", target_BLD)):
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{name} has dtype {tensor.dtype}; expected one of {KERNEL_DTYPES}"
        if not 1 <= tensor.shape[-1] <= KERNEL_CHANNELS:
            return f"{name} has {tensor.shape[-1]} channels; expected 1 to {KERNEL_CHANNELS}"
        if tensor.stride(-1) != 1:
            return f"{name} has stride {tensor.stride(-1)} between channels; expected 1, contiguous channels"
    if pred_BLD.shape[0] * pred_BLD.shape[1] == 0:
        return f"pred_BLD has shape {tuple(pred_BLD.shape)}; expected at least one token"
    return None


# Loss and gradient are two ops over the same kernel: 4 + 6 bytes an element in 16 bits. A forward pass that
# also wrote a gradient for an upstream gradient of 1 would move 6, and scaling it 4 more; see README.md.


@torch.library.custom_op("fd_kernels::whitened_smooth_l1", mutates_args=())
def _triton_loss(
    pred_BLD: Tensor, target_BLD: Tensor, token_weight_BL: Tensor | None, beta: float, eps: float
) -> Tensor:
    from fd_kernels.feature_loss.launch import token_losses  # the reference needs no triton

    # One sum over the losses of tokens, no atomics: the same bits in each run.
    return token_losses(pred_BLD, target_BLD, token_weight_BL, beta, eps).sum()


@torch.library.custom_op("fd_kernels::whitened_smooth_l1_backward", mutates_args=())
def _triton_gradient(
    pred_BLD: Tensor,
    target_BLD: Tensor,
    token_weight_BL: Tensor | None,
    upstream: Tensor,
    beta: float,
    eps: float,
) -> Tensor:
    from fd_kernels.feature_loss.launch import pred_gradient  # the reference needs no triton

    return pred_gradient(pred_BLD, target_BLD, token_weight_BL, upstream, beta, eps)


@_triton_loss.register_fake
def _fake_loss(
    pred_BLD: Tensor, target_BLD: Tensor, token_weight_BL: Tensor | None, beta: float, eps: float
) -> Tensor:
    return pred_BLD.new_empty((), dtype=torch.float32)


@_triton_gradient.register_fake
def _fake_gradient(
    pred_BLD: Tensor,
    target_BLD: Tensor,
    token_weight_BL: Tensor | None,
    upstream: Tensor,
    beta: float,
    eps: float,
) -> Tensor:
    return pred_BLD.new_empty(pred_BLD.shape)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pred_BLD, target_BLD, token_weight_BL, ctx.beta, ctx.eps = inputs
    ctx.save_for_backward(pred_BLD, target_BLD, token_weight_BL)


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
    pred_BLD, target_BLD, token_weight_BL = ctx.saved_tensors
    grad_BLD = _triton_gradient(pred_BLD, target_BLD, token_weight_BL, upstream, ctx.beta, ctx.eps)
    return grad_BLD, None, None, None, None


_triton_loss.register_autograd(_gradients, setup_context=_save_for_gradient)
