"""Smooth L1 to whitened features in plain PyTorch: the ground truth of the op."""

# Shape suffix legend: B = images, L = tokens, D = channels

import torch
import torch.nn.functional as F
from torch import Tensor


def whitened_smooth_l1_reference(
    pred_BLD: Tensor, target_BLD: Tensor, *, beta: float, eps: float, token_weight_BL: Tensor | None
) -> Tensor:
    """Plain PyTorch form of `fd_kernels.whitened_smooth_l1`, which documents and checks the arguments."""
    dtype = torch.promote_types(torch.promote_types(pred_BLD.dtype, target_BLD.dtype), torch.float32)
    whitened_BLD = F.layer_norm(target_BLD.detach().to(dtype), target_BLD.shape[-1:], eps=eps)
    loss_BLD = F.smooth_l1_loss(pred_BLD.to(dtype), whitened_BLD, reduction="none", beta=beta)
    loss_BL = loss_BLD.mean(dim=-1)
    if token_weight_BL is not None:
        loss_BL = loss_BL * token_weight_BL.detach().to(dtype)
    return loss_BL.sum()
