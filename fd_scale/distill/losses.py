"""Distances between the student's tokens and the target's, each a sum over tokens of a mean over channels.

Shape legend: B = images, L = tokens, D = channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from fd_kernels import whitened_smooth_l1
from torch import Tensor

from fd_scale.config import DistillConfig

Loss = Callable[..., Tensor]
"""(pred_BLD, target_BLD, token_weight_BL=None) -> sum over images and tokens, fp32 scalar."""


def cosine(pred_BLD: Tensor, target_BLD: Tensor, token_weight_BL: Tensor | None = None) -> Tensor:
    """One minus the cosine similarity of each token, summed."""
    loss_BL = 1 - F.cosine_similarity(pred_BLD.float(), target_BLD.detach().float(), dim=-1)
    return _weighted_sum(loss_BL, token_weight_BL)


def squared_error(pred_BLD: Tensor, target_BLD: Tensor, token_weight_BL: Tensor | None = None) -> Tensor:
    """Squared error of each token, mean over channels, summed."""
    loss_BL = (pred_BLD.float() - target_BLD.detach().float()).square().mean(-1)
    return _weighted_sum(loss_BL, token_weight_BL)


def smooth_l1(
    pred_BLD: Tensor, target_BLD: Tensor, token_weight_BL: Tensor | None = None, *, beta: float
) -> Tensor:
    """Smooth L1 to the target as it is, without whitening: mean over channels, summed."""
    loss_BLD = F.smooth_l1_loss(pred_BLD.float(), target_BLD.detach().float(), beta=beta, reduction="none")
    return _weighted_sum(loss_BLD.mean(-1), token_weight_BL)


def _weighted_sum(loss_BL: Tensor, token_weight_BL: Tensor | None) -> Tensor:
    return (loss_BL if token_weight_BL is None else loss_BL * token_weight_BL).sum()


def choose_loss(config: DistillConfig) -> Loss:
    """Returns the recipe's loss; PHI-S is the squared error, to targets that the task has standardised."""
    losses: dict[str, Loss] = {
        "whitened_smooth_l1": partial(whitened_smooth_l1, beta=config.beta),
        "smooth_l1": partial(smooth_l1, beta=config.beta),
        "cosine": cosine,
        "mse": squared_error,
        "phi_s": squared_error,
    }
    return losses[config.loss]
