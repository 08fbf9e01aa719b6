"""What lies in boxes: features from maps, and the part of an object's mask.

Shape legend: B = images, C = channels, h, w = places of a map, R = boxes, N = objects, H = rows of pixels, m = side of
what is cut.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import roi_align

SAMPLES = 2
"""Of a cell, in each direction."""
CANONICAL_LEVEL, CANONICAL_SIDE = 4, 224
"""A box of 224 px is cut from the map of stride 2^4."""


def levels_of(boxes_R4: Tensor, strides: list[float]) -> Tensor:
    """Returns the number of the map that each box is cut from, int64 (R,).

    Args:
        boxes_R4: in pixels.
        strides: of the maps, the finest first.

    Source: Lin et al. 2017 (arXiv:1612.03144), equation 1.
    """
    side_R = (boxes_R4[:, 2:] - boxes_R4[:, :2]).clamp(min=0).prod(-1).sqrt()
    level_R = (CANONICAL_LEVEL + (side_R / CANONICAL_SIDE).log2() + 1e-6).floor()
    return (level_R - round(math.log2(strides[0]))).clamp(0, len(strides) - 1).long()


def pooled(maps: list[Tensor], strides: list[float], boxes_BR4: Tensor, side: int) -> Tensor:
    """Cuts boxes out of maps, each from the one that fits its size.

    Args:
        maps: fp32 (B, C, h, w), the finest first.
        strides: pixels of a place of each.
        boxes_BR4: in pixels.
        side: m.

    Returns:
        fp32 (B * R, C, m, m).

    Source: He et al. 2017 (arXiv:1703.06870), RoIAlign; pixels are areas, as in Detectron2's `aligned`.
    """
    numbers_B = torch.arange(len(boxes_BR4), device=boxes_BR4.device, dtype=torch.float32)
    image_BR1 = numbers_B[:, None, None].expand(-1, boxes_BR4.shape[1], 1)
    rois_R5 = torch.cat([image_BR1, boxes_BR4], dim=2).flatten(0, 1)
    if len(maps) == 1:
        return _cut(maps[0], rois_R5, strides[0], side)
    level_R = levels_of(rois_R5[:, 1:], strides)
    order_R = level_R.argsort(stable=True)
    counts = [len(rois_R5)] + [0] * (len(maps) - 1)
    if not level_R.is_meta:
        counts = torch.bincount(level_R, minlength=len(maps)).tolist()
    parts = [
        _cut(map_BChw, rois, stride, side)
        for map_BChw, stride, rois in zip(maps, strides, rois_R5[order_R].split(counts), strict=True)
    ]
    return torch.cat(parts).index_select(0, order_R.argsort())


def _cut(map_BChw: Tensor, rois_R5: Tensor, stride: float, side: int) -> Tensor:
    return roi_align(map_BChw, rois_R5, side, 1 / stride, SAMPLES, aligned=True)


def mask_targets(masks_NHw: Tensor, width: int, object_R: Tensor, boxes_R4: Tensor, side: int) -> Tensor:
    """Cuts boxes out of packed masks: bool (R, m, m), where the mean of four bilinear samples is 0.5 or more.

    Bits are looked up where they lie: unpacked masks of a hundred objects of 1536 px would be 1 GiB.

    Args:
        masks_NHw: uint8, as `Instances.masks_NHw`; N is at least 1.
        width: of the image, in pixels.
        object_R: int64, whose mask.
        boxes_R4: fp32, in pixels.
        side: m.

    Source: RoIAlign as in `pooled`; the threshold as in Detectron2.
    """
    (x_low, x_high, x_share), (y_low, y_high, y_share) = (
        _samples(boxes_R4[:, axis], boxes_R4[:, axis + 2], length, side)
        for axis, length in ((0, width), (1, masks_NHw.shape[1]))
    )

    def bits(rows: Tensor, columns: Tensor) -> Tensor:
        bytes_ = masks_NHw[object_R[:, None, None], rows[:, :, None], (columns >> 3)[:, None, :]]
        return ((bytes_ >> (7 - (columns & 7))[:, None, :].to(torch.uint8)) & 1).float()

    upper = torch.lerp(bits(y_low, x_low), bits(y_low, x_high), x_share[:, None, :])
    lower = torch.lerp(bits(y_high, x_low), bits(y_high, x_high), x_share[:, None, :])
    values = torch.lerp(upper, lower, y_share[:, :, None])
    cells = values.unflatten(2, (side, SAMPLES)).unflatten(1, (side, SAMPLES)).mean((2, 4))
    return cells >= 0.5


def _samples(low_R: Tensor, high_R: Tensor, length: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the samples along an axis the place before, the place behind, and how far it is to that; (R, m * samples)."""
    offsets = (torch.arange(side * SAMPLES, device=low_R.device) + 0.5) / (side * SAMPLES)
    place = low_R[:, None] + (high_R - low_R)[:, None] * offsets - 0.5
    place = place.clamp(0, length - 1)
    before = place.floor()
    return before.long(), (before.long() + 1).clamp(max=length - 1), place - before
