"""Mixup and CutMix of neighbours in the run's stream: a function of (seed, position), the same on any number of ranks.

Shape legend: B = images, two for each pair; P = pairs; H, W = pixels; k = crops of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fd_scale.data import UNLABELLED
from fd_scale.randomness import hash64


class Mixed(NamedTuple):
    """A mixed batch."""

    images: Tensor
    """fp32 (B, 3, H, W), in 0..255."""
    partner_labels: Tensor
    """int64 (B,); -1 where an image is not mixed."""
    weights: Tensor
    """fp32 (B,): an image's own share; the rest is the partner's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """Mixes each image with its neighbour, and the neighbour with it.

    The images at positions 2 i and 2 i + 1 of the run's stream are a pair, which one micro-batch holds; where k crops
    of an image stand side by side, each is one with its like of the next image. (timm's Mixup draws once for a rank's
    batch, which it mixes with itself in reverse; its mode "pair" draws for each pair, as here.)

    Args:
        seed: the run's.
        mixup: both parameters of the beta distribution of an image's own weight; 0: no Mixup.
        cutmix: both parameters of the beta distribution of the area that stays; 0: no CutMix.
        cutmix_share: where both are on, the share of pairs that CutMix mixes.
        crops: k.

    Source: Zhang et al. 2018 (arXiv:1710.09412); Yun et al. 2019 (arXiv:1905.04899), section 3.1.
    """

    seed: int
    mixup: float
    cutmix: float
    cutmix_share: float = 0.5
    crops: int = 1

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor, positions_B: Tensor) -> Mixed:
        """Mixes a micro-batch on its device.

        Args:
            images_BCHW: uint8.
            labels_B: int64; a pair with an image without label (-1) stays as it is.
            positions_B: of each image in the run's stream, int64 on the host, from a multiple of 2 k on.
        """
        device = images_BCHW.device
        B, _, H, W = images_BCHW.shape
        size = 2 * self.crops
        assert B % size == int(positions_B[0]) % size == 0, "a micro-batch holds both of each pair"
        weights_P, boxes_P4 = self._draw(positions_B.view(-1, 2, self.crops)[:, 0].flatten().numpy(), H, W)
        weight_B = self._of_both(weights_P).to(device, non_blocking=True)
        top_B, bottom_B, left_B, right_B = self._of_both(boxes_P4).to(device, non_blocking=True).unbind(1)
        partner_labels_B = self._swapped(labels_B)
        mixed_B = (labels_B != UNLABELLED) & (partner_labels_B != UNLABELLED)
        row_H, column_W = torch.arange(H, device=device), torch.arange(W, device=device)
        in_rows_BH = (row_H >= top_B[:, None]) & (row_H < bottom_B[:, None])
        in_columns_BW = (column_W >= left_B[:, None]) & (column_W < right_B[:, None])
        inside_BHW = in_rows_BH[:, :, None] & in_columns_BW[:, None]
        # CutMix: nothing of the image inside its box, all outside. Mixup has no box.
        own_BHW = torch.where(
            (bottom_B > top_B)[:, None, None], 1.0 - inside_BHW.float(), weight_B[:, None, None]
        )
        own_B1HW = torch.where(mixed_B[:, None, None], own_BHW, 1.0)[:, None]
        partner_BCHW = self._swapped(images_BCHW).float()
        return Mixed(
            torch.lerp(partner_BCHW, images_BCHW.float(), own_B1HW.expand_as(partner_BCHW)),
            torch.where(mixed_B, partner_labels_B, UNLABELLED),
            torch.where(mixed_B, weight_B, 1.0),
        )

    def _draw(self, positions_P: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns each pair's own weight, fp32, and its box: rows from, to, columns from, to; none of Mixup's."""
        weights = np.ones(len(positions_P), dtype=np.float32)
        boxes = np.zeros((len(positions_P), 4), dtype=np.int64)
        numbers_P = positions_P // (2 * self.crops) * self.crops + positions_P % self.crops
        for pair, word in enumerate(hash64(self.seed, "mix", numbers_P).tolist()):
            generator = np.random.Generator(np.random.PCG64(word))
            share = self.cutmix_share if self.mixup and self.cutmix else float(self.cutmix > 0)
            cut = generator.random() < share
            alpha = self.cutmix if cut else self.mixup
            weights[pair] = generator.beta(alpha, alpha)
            if cut:
                boxes[pair] = _box(generator, weights[pair], height, width)
                top, bottom, left, right = boxes[pair]
                weights[pair] = 1 - (bottom - top) * (right - left) / (height * width)
        return weights, boxes

    def _of_both(self, values_P: np.ndarray) -> Tensor:
        """The values of pairs for both images of each."""
        values_nk = torch.from_numpy(values_P).unflatten(0, (-1, 1, self.crops))
        return values_nk.expand(-1, 2, *values_nk.shape[2:]).flatten(0, 2)

    def _swapped(self, x_B: Tensor) -> Tensor:
        """The same with both images of each pair exchanged."""
        return x_B.unflatten(0, (-1, 2, self.crops)).flip(1).flatten(0, 2)


def _box(generator: np.random.Generator, own: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Rows and columns of a box with the image's shape and 1 - `own` of its area, cut where it leaves the image."""
    box: list[int] = []
    for side in (height, width):
        length = int(side * np.sqrt(1 - own))
        start = int(generator.integers(side)) - length // 2
        box += [max(start, 0), min(start + length, side)]
    return box[0], box[1], box[2], box[3]
