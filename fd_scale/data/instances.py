"""What is known of the objects in an image, and what a detector says of them.

Shape legend: N = objects, H, W = pixels, m = side of a mask in its box.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Instances(NamedTuple):
    """The objects of one image, in the pixels of the tensor that the image has become."""

    boxes_N4: Tensor
    """fp32: left, top, right, bottom; edges, so that an object of one pixel has right - left = 1."""
    labels_N: Tensor
    """int64, 0 to classes - 1."""
    crowd_N: Tensor
    """bool: a region of many objects. None is learned there, and what lies there is no background."""
    masks_NHw: Tensor
    """uint8, 8 pixels of a row in each byte, the leftmost in the highest bit; (N, 0, 0): there are no masks."""
    semantic_HW: Tensor
    """uint8, a class of stuff or thing for each pixel, `IGNORED` (255) where there is none; (0, 0): there is no map."""

    @property
    def has_masks(self) -> bool:
        """Whether objects have masks; of an image without objects it is not known."""
        return self.masks_NHw.shape[1] > 0


class Detections(NamedTuple):
    """What a detector finds in one image, the surest first, in the pixels of the image as it was read."""

    boxes_N4: Tensor
    """fp32: left, top, right, bottom."""
    scores_N: Tensor
    """fp32, 0..1."""
    labels_N: Tensor
    """int64, 0 to classes - 1."""
    masks_Nmm: Tensor
    """fp32, 0..1: how likely each place of the box is the object's; (N, 0, 0): boxes alone."""


def in_few_storages(batch: list[Instances]) -> list[Instances]:
    """Returns the same values as parts of one tensor for each field.

    A worker sends each storage as an open file, of which a process may have a thousand.
    """
    columns = []
    for values in zip(*batch, strict=True):
        parts = torch.cat([value.flatten() for value in values]).split([value.numel() for value in values])
        columns.append([part.view(value.shape) for part, value in zip(parts, values, strict=True)])
    return [Instances(*each) for each in zip(*columns, strict=True)]


def packed(masks_NHW: Tensor) -> Tensor:
    """Packs masks, bool or 0 and 1, as `Instances.masks_NHw` holds them; rows are filled up with 0."""
    width = masks_NHW.shape[2]
    bits = torch.nn.functional.pad(masks_NHW.to(torch.uint8), (0, -width % 8)).unflatten(2, (-1, 8))
    return (bits * _weights(masks_NHW)).sum(3, dtype=torch.uint8)


def unpacked(masks_NHw: Tensor, width: int) -> Tensor:
    """Returns masks as uint8, 0 and 1, (N, H, width)."""
    return (masks_NHw[..., None] & _weights(masks_NHw)).ne(0).flatten(2)[:, :, :width].to(torch.uint8)


def _weights(like: Tensor) -> Tensor:
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=like.device)
