"""Feature maps as colours.

Shape legend: B = images, L = tokens = h x w, D = channels, H, W = pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def side_by_side(
    images_BCHW: Tensor, target_BLD: Tensor, tokens_BLD: Tensor, grid: tuple[int, int]
) -> np.ndarray:
    """Draws each image beside the teacher's and the student's features.

    The three leading principal components of the teacher's tokens become red, green and blue; the
    student's tokens are projected on the same components, so that equal colours mean equal features.

    Args:
        images_BCHW: uint8 views.
        target_BLD: the teacher's tokens.
        tokens_BLD: the student's projected tokens.
        grid: (h, w), h * w = L.

    Returns:
        uint8 array (B, H, 3 * W, 3): image, teacher, student.
    """
    colours = principal_colours(_whiten(target_BLD), _whiten(tokens_BLD))
    height, width = images_BCHW.shape[-2:]
    panels = [images_BCHW.permute(0, 2, 3, 1).cpu().numpy()]
    for colour in colours:
        maps = colour.transpose(1, 2).unflatten(2, grid)
        large = F.interpolate(maps, size=(height, width), mode="nearest")
        panels.append((large * 255).byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(panels, axis=2)


def principal_colours(tokens_BLD: Tensor, *others: Tensor) -> list[Tensor]:
    """Features as colours: the three leading principal components of some tokens become red, green and blue.

    Args:
        tokens_BLD: whose components these are, and whose values from the 2nd to the 98th percentile are 0 to 1.
        others: tokens of as many channels, projected on the same components.

    Returns:
        For each of them fp32 (B, L, 3) in 0..1; fewer than three components leave channels black.
    """
    flat = tokens_BLD.flatten(0, 1)
    mean = flat.mean(0)
    components = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3]
    colours = [(features - mean) @ components.T for features in (tokens_BLD, *others)]
    low, high = (torch.quantile(colours[0].flatten(0, 1), q, dim=0) for q in (0.02, 0.98))
    scaled = [((colour - low) / (high - low + 1e-6)).clamp(0, 1) for colour in colours]
    return [F.pad(colour, (0, 3 - colour.shape[-1])) for colour in scaled]


def _whiten(tokens_BLD: Tensor) -> Tensor:
    return F.layer_norm(tokens_BLD.float(), tokens_BLD.shape[-1:])
