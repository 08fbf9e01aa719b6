"""Where objects may be: boxes of all sizes at every place of the maps, their scores, and the best of them.

Shape legend: B = images, C = channels, A = anchors of a place, h, w = places of a map, M = anchors of all maps,
P = proposals of an image, N = objects.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.data.instances import Instances
from fd_scale.finetune.detection.boxes import (
    chosen,
    clipped,
    counter_hash,
    decoded,
    filled,
    matched,
    regression_errors,
    suppressed,
    truth_of,
)
from fd_scale.finetune.detection.layers import Conv

ASPECT_RATIOS = (0.5, 1.0, 2.0)
SIDE_IN_STRIDES = 8
SAMPLED_ANCHORS = 256
SMOOTH_L1_BETA = 1 / 9
LARGEST_BACKGROUND_IOU, SMALLEST_OBJECT_IOU = 0.3, 0.7
NMS_IOU = 0.7
MOST_OF_A_MAP = {True: 2000, False: 1000}
"""Boxes of a map that go into suppression, in training and else."""
PROPOSALS = 1000
SMALLEST_SIDE_PX = 1e-3
_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


def anchors_of(height: int, width: int, stride: float, device: torch.device) -> Tensor:
    """Returns the anchors of a map, fp32 (h * w * A, 4): a side of 8 strides, in three shapes of one area.

    Args:
        height: h.
        width: w.
        stride: pixels of a place.
        device: where they go.

    Source: Lin et al. 2017 (arXiv:1612.03144), section 4.1; rounded and placed as in torchvision.
    """
    rows = torch.tensor(ASPECT_RATIOS).sqrt()
    halves_A2 = 0.5 * SIDE_IN_STRIDES * stride * torch.stack([1 / rows, rows], dim=1)
    shape_A4 = torch.cat([-halves_A2, halves_A2], dim=1).round().to(device, non_blocking=True)
    y, x = (torch.arange(count, device=device) * stride for count in (height, width))
    y_hw, x_hw = torch.meshgrid(y, x, indexing="ij")
    corner_hw4 = torch.stack([x_hw, y_hw, x_hw, y_hw], dim=-1)
    return (corner_hw4[:, :, None] + shape_A4).flatten(0, 2)


class RegionProposals(nn.Module):
    """A 3 x 3 convolution over each map, and a score and a box for each anchor.

    Args:
        channels: C of the maps.
        strides: pixels of a place of each map.

    Source: Ren et al. 2015 (arXiv:1506.01497).
    """

    def __init__(self, channels: int, strides: list[float]) -> None:
        super().__init__()
        self.strides = strides
        self.hidden = Conv(channels, channels, 3, std=0.01)
        self.objectness = Conv(channels, len(ASPECT_RATIOS), 1, std=0.01)
        self.deltas = Conv(channels, 4 * len(ASPECT_RATIOS), 1, std=0.01)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns of each map logits, (B, h * w * A), and deltas, (B, h * w * A, 4), fp32."""
        logits, deltas = [], []
        for map_BChw in maps:
            hidden_BChw = F.relu(self.hidden(map_BChw))
            logits.append(self.objectness(hidden_BChw).permute(0, 2, 3, 1).flatten(1).float())
            by_place = self.deltas(hidden_BChw).permute(0, 2, 3, 1)
            deltas.append(by_place.flatten(1).unflatten(1, (-1, 4)).float())
        return logits, deltas

    def anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """Returns the anchors of each map, (h * w * A, 4)."""
        return [
            anchors_of(map_BChw.shape[2], map_BChw.shape[3], stride, map_BChw.device)
            for map_BChw, stride in zip(maps, self.strides, strict=True)
        ]

    def proposals(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the best boxes of each image, without gradient.

        Args:
            logits: as `forward` returns them.
            deltas: likewise.
            anchors: of each map.
            height: of what is seen in the images, in pixels.
            width: likewise.

        Returns:
            boxes_BP4, the surest first, and valid_BP: an image with fewer has zeros at its end; P is at least 1.
        """
        boxes, scores, levels = [], [], []
        for level, (logits_BM, deltas_BM4, anchors_M4) in enumerate(
            zip(logits, deltas, anchors, strict=True)
        ):
            # Stable, and not topk: scores that saturate are equal.
            order_BM = logits_BM.detach().argsort(dim=1, descending=True, stable=True)
            best_BM = order_BM[:, : MOST_OF_A_MAP[self.training]]
            near_BM4 = deltas_BM4.detach().gather(1, best_BM[..., None].expand(-1, -1, 4))
            boxes.append(clipped(decoded(near_BM4, anchors_M4[best_BM], _WEIGHTS), height, width))
            scores.append(logits_BM.detach().gather(1, best_BM))
            levels.append(torch.full_like(best_BM, level))
        boxes_BM4, scores_BM, levels_BM = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1)
        sides_BM2 = boxes_BM4[..., 2:] - boxes_BM4[..., :2]
        usable_BM = (sides_BM2 >= SMALLEST_SIDE_PX).all(-1)
        scores_BM = scores_BM.masked_fill(~usable_BM, -torch.inf)
        kept = [
            suppressed(*image, NMS_IOU)[:PROPOSALS]
            for image in zip(boxes_BM4, scores_BM, levels_BM, strict=True)
        ]
        most = max(1, *map(len, kept))
        return (
            torch.stack([filled(boxes_BM4[index][keep], most) for index, keep in enumerate(kept)]),
            torch.stack([filled(usable_BM[index][keep], most) for index, keep in enumerate(kept)]),
        )

    def losses(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        targets: list[Instances],
        keys_B: Tensor,
    ) -> dict[str, Tensor]:
        """Returns `rpn_class` and `rpn_box`: of each image a mean over its sampled anchors, summed over images.

        Args:
            logits: as `forward` returns them.
            deltas: likewise.
            anchors: of each map.
            targets: objects of each image.
            keys_B: int64; the anchors that are sampled are a function of an image's key.
        """
        all_logits_BM, all_deltas_BM4, anchors_M4 = (
            torch.cat(logits, 1),
            torch.cat(deltas, 1),
            torch.cat(anchors),
        )
        class_losses, box_losses = [], []
        for logits_M, deltas_M4, objects, key in zip(
            all_logits_BM, all_deltas_BM4, targets, keys_B, strict=True
        ):
            matches = matched(
                anchors_M4, objects, below=LARGEST_BACKGROUND_IOU, above=SMALLEST_OBJECT_IOU, best_too=True
            )
            noise_M = counter_hash(key, 0, len(anchors_M4))
            picked = chosen(matches, noise_M, SAMPLED_ANCHORS, SAMPLED_ANCHORS // 2)
            count = picked.valid_R.sum().clamp(min=1)
            errors_R = F.binary_cross_entropy_with_logits(
                logits_M[picked.index_R], picked.positive_R.float(), reduction="none"
            )
            class_losses.append((errors_R * picked.valid_R).sum() / count)
            errors_R = regression_errors(
                deltas_M4[picked.index_R], anchors_M4[picked.index_R], truth_of(objects, matches, picked),
                _WEIGHTS, picked.positive_R, SMOOTH_L1_BETA,
            )  # fmt: skip
            box_losses.append(errors_R.sum() / count)
        return {"rpn_class": torch.stack(class_losses).sum(), "rpn_box": torch.stack(box_losses).sum()}
