"""Smooth L1 to whitened features: the function that the distillation task calls."""

# Shape suffix legend: B = images, L = tokens, D = channels

from torch import Tensor

from fd_kernels.checks import check_floating, check_shape
from fd_kernels.feature_loss.reference import whitened_smooth_l1_reference


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
        ValueError: shapes differ, a dtype is not floating point, or beta or eps is not positive.

    Source: Wei et al. 2022 (arXiv:2205.14141); beta = 2 and eps = 1e-5 as in the released code.
    """
    if pred_BLD.dim() != 3:
        raise ValueError(f"pred_BLD has {pred_BLD.dim()} dimensions; expected 3, (B, L, D)")
    check_shape("target_BLD", target_BLD, pred_BLD.shape, "the shape of pred_BLD")
    check_floating("pred_BLD", pred_BLD)
    check_floating("target_BLD", target_BLD)
    if token_weight_BL is not None:
        check_shape("token_weight_BL", token_weight_BL, pred_BLD.shape[:2], "images and tokens of pred_BLD")
    if beta <= 0:
        raise ValueError(
            f"beta is {beta}; expected a positive number of standard deviations (2.0 as published)"
        )
    if eps <= 0:
        raise ValueError(f"eps is {eps}; expected a positive number (1e-5 as published)")
    return whitened_smooth_l1_reference(
        pred_BLD, target_BLD, beta=beta, eps=eps, token_weight_BL=token_weight_BL
    )
