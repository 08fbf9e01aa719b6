"""Heads over boxes, in one stage or in three that each begin with the boxes of the one before.

One stage is Mask R-CNN, three are Cascade R-CNN, and three whose masks know of boxes, of each other and of the classes
of places are Hybrid Task Cascade. What runs, and in which order, never depends on the data: an image without objects
has boxes of weight 0, because under ZeRO-3 all ranks gather each layer's weights together.

Shape legend: B = images, C = channels, P = proposals, R = boxes of an image, K = classes, N = objects, m = side of a
mask, 4 = left, top, right, bottom in pixels.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

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
    truth_of,
)
from fd_scale.finetune.detection.heads import (
    BOX_SIDE,
    FUSED_LEVEL,
    MASK_SIDE,
    BoxHead,
    MaskBody,
    MaskPredictor,
)
from fd_scale.finetune.detection.pooling import mask_targets, pooled

POSITIVE_SHARE = 0.25
Kind = Literal["mask_rcnn", "cascade", "htc"]


class Stage(NamedTuple):
    """A box head, and the mask head behind it."""

    iou: float
    """From which a box is an object's, in training."""
    box_weights: tuple[float, float, float, float]
    loss_weight: float
    smooth_l1_beta: float


STAGES: dict[Kind, tuple[Stage, ...]] = {
    "mask_rcnn": (Stage(0.5, (10, 10, 5, 5), 1.0, 1 / 9),),
    "cascade": (
        Stage(0.5, (10, 10, 5, 5), 1.0, 1.0),
        Stage(0.6, (20, 20, 10, 10), 0.5, 1.0),
        Stage(0.7, (30, 30, 15, 15), 0.25, 1.0),
    ),
}
"""Source: Ren et al. 2015 (arXiv:1506.01497), its code; Cai and Vasconcelos 2018 (arXiv:1712.00726), its code."""
STAGES["htc"] = STAGES["cascade"]


class Features(NamedTuple):
    """What boxes are cut from."""

    maps: list[Tensor]
    """fp32 (B, C, h, w), the finest first, without the one that anchors alone use."""
    strides: list[float]
    semantic_BChw: Tensor | None
    """fp32: features of the classes of places; none: there is no such branch."""
    height: int
    """Of what is seen in the images, in pixels."""
    width: int
    dtype: torch.dtype
    """Of the heads."""

    def cut(self, boxes_BR4: Tensor, side: int) -> Tensor:
        """Returns what lies in boxes, (B * R, C, side, side)."""
        found = pooled(self.maps, self.strides, boxes_BR4, side)
        if self.semantic_BChw is not None:
            stride = self.strides[min(FUSED_LEVEL, len(self.strides) - 1)]
            places = pooled([self.semantic_BChw], [stride], boxes_BR4, MASK_SIDE)
            found = found + (places if side == MASK_SIDE else F.adaptive_avg_pool2d(places, side))
        return found.to(self.dtype)


class Samples(NamedTuple):
    """The boxes that a stage learns from; those of objects first."""

    boxes_BR4: Tensor
    valid_BR: Tensor
    """bool: others fill up, and have no weight."""
    positive_BR: Tensor
    """bool: the box is an object's."""
    object_BR: Tensor
    """int64: which one's."""
    labels_BR: Tensor
    """int64: its class; K: background."""
    truth_BR4: Tensor
    """The object's box."""
    given_BR: Tensor
    """bool: the box is no prediction, but an object's own."""


def sampled(
    boxes_BP4: Tensor, valid_BP: Tensor, targets: list[Instances], noise: tuple[Tensor, int], iou: float,
    count: int, num_classes: int,
) -> Samples:  # fmt: skip
    """Chooses boxes, and the objects' own among them.

    Args:
        boxes_BP4: predicted ones.
        valid_BP: bool, which of them are boxes.
        targets: objects of each image.
        noise: keys_B and the number of the stream: what is chosen in an image depends on nothing else.
        iou: from which a box is an object's.
        count: how many, R.
        num_classes: K.

    Source: Ren et al. 2015 (arXiv:1506.01497); objects' boxes among proposals as in its code.
    """
    keys_B, stream = noise
    longest = max(len(objects.boxes_N4) for objects in targets) + boxes_BP4.shape[1]
    rows = []
    for boxes_P4, valid_P, objects, key in zip(boxes_BP4, valid_BP, targets, keys_B, strict=True):
        # Objects come first: how far boxes are filled up depends on the other images of the batch.
        boxes_M4 = torch.cat([objects.boxes_N4, boxes_P4])
        usable_M = torch.cat([~objects.crowd_N, valid_P])
        found = matched(boxes_M4, objects, below=iou, above=iou)
        found = found._replace(positive_M=found.positive_M & usable_M, negative_M=found.negative_M & usable_M)
        noise_M = counter_hash(key, stream, len(boxes_M4))
        picked = chosen(found, noise_M, count, max(1, int(count * POSITIVE_SHARE)))
        object_R = found.object_M[picked.index_R]
        labels_R = torch.full_like(object_R, num_classes)
        if len(objects.labels_N):
            labels_R = torch.where(picked.positive_R, objects.labels_N[object_R], num_classes)
        rows.append(
            (
                boxes_M4[picked.index_R], picked.valid_R, picked.positive_R, object_R, labels_R,
                truth_of(objects, found, picked), picked.index_R < len(objects.boxes_N4),
            )
        )  # fmt: skip
    length = min(count, longest)
    return Samples(*[torch.stack([filled(row, length) for row in rows]) for rows in zip(*rows, strict=True)])


class BoxAndMaskHeads(nn.Module):
    """See the module.

    Args:
        kind: which of the three.
        channels: C of the maps.
        num_classes: K.
        box_head: kind of the box heads.
        with_masks: whether there are mask heads.
        rois_per_image: boxes that a stage learns from, R.
    """

    def __init__(
        self,
        kind: Kind,
        channels: int,
        num_classes: int,
        box_head: Literal["2fc", "4conv1fc"],
        with_masks: bool,
        rois_per_image: int,
    ) -> None:
        super().__init__()
        self.stages = STAGES[kind]
        self.interleaved = kind == "htc"
        self.num_classes = num_classes
        self.rois_per_image = rois_per_image
        by_class = kind == "mask_rcnn"
        self.box_heads = nn.ModuleList(
            BoxHead(channels, num_classes, box_head, by_class) for _ in self.stages
        )
        numbers = range(len(self.stages)) if with_masks else ()
        self.mask_bodies = nn.ModuleList(
            MaskBody(channels, informed=self.interleaved and number > 0) for number in numbers
        )
        self.mask_predictors = nn.ModuleList(MaskPredictor(channels, num_classes) for _ in numbers)

    def losses(
        self, features: Features, proposals: tuple[Tensor, Tensor], targets: list[Instances], keys_B: Tensor
    ) -> dict[str, Tensor]:
        """Returns losses, and what the last stage makes of its boxes.

        Args:
            features: of the images.
            proposals: boxes_BP4 and valid_BP.
            targets: objects of each image.
            keys_B: see `sampled`.

        Returns:
            `class_1`, `box_1`, `mask_1`, and so on for each stage, with its weight: of each image a mean over its
            sampled boxes (masks: over those of objects, and over the places of a mask), summed over images. Without
            gradient: `boxes` (B, R, 4), `scores` and `labels` (B, R).
        """
        sample = partial(sampled, targets=targets, count=self.rois_per_image, num_classes=self.num_classes)
        boxes_BR4, valid_BR = proposals
        outputs: dict[str, Tensor] = {}
        for index, stage in enumerate(self.stages):
            samples = sample(boxes_BR4, valid_BR, noise=(keys_B, 1 + 2 * index), iou=stage.iou)
            logits_R, deltas_R = self.box_heads[index](features.cut(samples.boxes_BR4, BOX_SIDE))
            class_loss, box_loss = self._box_losses(logits_R, deltas_R, samples, stage)
            outputs[f"class_{index + 1}"] = stage.loss_weight * class_loss
            outputs[f"box_{index + 1}"] = stage.loss_weight * box_loss
            scores_BR, labels_BR, boxes_BR4 = self._best(features, logits_R, deltas_R, samples, stage)
            valid_BR = samples.valid_BR & ~samples.given_BR
            if len(self.mask_bodies):
                if self.interleaved:
                    samples = sample(boxes_BR4, valid_BR, noise=(keys_B, 2 + 2 * index), iou=stage.iou)
                mask_loss = self._mask_loss(index, features, samples, targets)
                outputs[f"mask_{index + 1}"] = stage.loss_weight * mask_loss
        return outputs | {"boxes": boxes_BR4, "scores": scores_BR, "labels": labels_BR}

    def _box_losses(
        self, logits_R: Tensor, deltas_R: Tensor, samples: Samples, stage: Stage
    ) -> tuple[Tensor, Tensor]:
        count_B1 = samples.valid_BR.sum(1, keepdim=True).clamp(min=1)
        errors = F.cross_entropy(logits_R, samples.labels_BR.flatten(), reduction="none")
        class_loss = (errors.view_as(samples.labels_BR) * samples.valid_BR / count_B1).sum()
        own_R4 = self._of_class(deltas_R, samples.labels_BR.flatten())
        errors_BR = regression_errors(
            own_R4.view_as(samples.boxes_BR4), samples.boxes_BR4, samples.truth_BR4, stage.box_weights,
            samples.positive_BR, stage.smooth_l1_beta,
        )  # fmt: skip
        return class_loss, (errors_BR / count_B1).sum()

    def _of_class(self, deltas_R: Tensor, labels_R: Tensor) -> Tensor:
        """Deltas (R, 4) of each box's class; of background, of any."""
        column_R = labels_R.clamp(max=deltas_R.shape[1] - 1)
        return deltas_R.gather(1, column_R[:, None, None].expand(-1, 1, 4))[:, 0]

    @torch.no_grad()
    def _best(
        self, features: Features, logits_R: Tensor, deltas_R: Tensor, samples: Samples, stage: Stage
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and labels of the likeliest classes, and the boxes as this stage corrects them."""
        scores_R, labels_R = logits_R.softmax(1)[:, :-1].max(1)
        own_BR4 = self._of_class(deltas_R, labels_R).view_as(samples.boxes_BR4)
        boxes_BR4 = decoded(own_BR4, samples.boxes_BR4, stage.box_weights)
        like = samples.labels_BR
        return (
            scores_R.view_as(like) * samples.valid_BR,
            labels_R.view_as(like),
            clipped(boxes_BR4, features.height, features.width),
        )

    def _mask_loss(
        self, index: int, features: Features, samples: Samples, targets: list[Instances]
    ) -> Tensor:
        """Of objects' boxes, which come first: the others are left out, but for one where there is none."""
        length = min(max(1, int(self.rois_per_image * POSITIVE_SHARE)), samples.positive_BR.shape[1])
        if not samples.positive_BR.is_meta:  # there, the most that can be
            length = max(1, int(samples.positive_BR.sum(1).max()))
        boxes_BR4, positive_BR = samples.boxes_BR4[:, :length], samples.positive_BR[:, :length]
        labels_R = samples.labels_BR[:, :length].flatten().clamp(max=self.num_classes - 1)
        x_RCmm, hidden_RCmm = features.cut(boxes_BR4, MASK_SIDE), None
        for body in self.mask_bodies[0 if self.interleaved else index : index + 1]:
            hidden_RCmm = body(x_RCmm, hidden_RCmm)
        own_Rmm = _of_labels(self.mask_predictors[index](hidden_RCmm), labels_R)
        wanted, weights = [], []
        for image, objects in enumerate(targets):
            wanted_Rmm = own_Rmm.new_zeros(length, *own_Rmm.shape[1:])
            weight_R = own_Rmm.new_zeros(length)
            if objects.has_masks and len(objects.boxes_N4):
                wanted_Rmm = mask_targets(
                    objects.masks_NHw, features.width, samples.object_BR[image, :length], boxes_BR4[image],
                    own_Rmm.shape[1],
                ).float()  # fmt: skip
                weight_R = positive_BR[image] / positive_BR[image].sum().clamp(min=1)
            wanted.append(wanted_Rmm)
            weights.append(weight_R)
        errors_Rmm = F.binary_cross_entropy_with_logits(own_Rmm, torch.cat(wanted), reduction="none")
        return (errors_Rmm.mean((1, 2)) * torch.cat(weights)).sum()

    def candidates(self, features: Features, boxes_1P4: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what proposals of one image may be: boxes (P, K or 1, 4), and probabilities of the classes (P, K).

        Probabilities are the mean over the stages, each of the boxes that it began with.
        """
        scores_PK, boxes_PK4 = torch.zeros(()), boxes_1P4[0][:, None]
        for index, stage in enumerate(self.stages):
            logits_P, deltas_PK4 = self.box_heads[index](features.cut(boxes_1P4, BOX_SIDE))
            scores_PK = scores_PK.to(logits_P.device) + logits_P.softmax(1)[:, :-1] / len(self.stages)
            boxes_PK4 = clipped(
                decoded(deltas_PK4, boxes_1P4[0][:, None], stage.box_weights), features.height, features.width
            )
            boxes_1P4 = boxes_PK4[None, :, 0]
        return boxes_PK4, scores_PK

    def masks(self, features: Features, boxes_1R4: Tensor, labels_R: Tensor) -> Tensor:
        """Returns the probability of each place of boxes of one image, (R, m, m): the mean over the mask heads."""
        x_RCmm, hidden_RCmm = features.cut(boxes_1R4, MASK_SIDE), None
        found = []
        for body, predictor in zip(self.mask_bodies, self.mask_predictors, strict=True):
            hidden_RCmm = body(x_RCmm, hidden_RCmm)
            found.append(_of_labels(predictor(hidden_RCmm), labels_R).sigmoid())
        return torch.stack(found).mean(0)


def _of_labels(logits_RKmm: Tensor, labels_R: Tensor) -> Tensor:
    """The mask of each box's own class, (R, m, m)."""
    column_R = labels_R.view(-1, 1, 1, 1).expand(-1, 1, *logits_RKmm.shape[2:])
    return logits_RKmm.gather(1, column_R)[:, 0]
