"""Backbone, neck, proposals and heads of a detector.

Shape legend: B = images, H, W = pixels, C = channels, h, w = places of a map, P = proposals, R = residual branches or
boxes, N = detections, K, S = classes of objects and of places, m = side of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.config import DetectionConfig, ModelConfig
from fd_scale.data import IGNORED
from fd_scale.data.instances import Instances
from fd_scale.finetune.detection.boxes import NMS_IOU, softly_suppressed, suppressed
from fd_scale.finetune.detection.cascade import BoxAndMaskHeads, Features
from fd_scale.finetune.detection.heads import FUSED_LEVEL, SemanticHead
from fd_scale.finetune.detection.neck import neck_of
from fd_scale.finetune.detection.rpn import RegionProposals
from fd_scale.models import build_model, normalize

SEMANTIC_WEIGHT = 0.2
"""Source: the released configuration of Hybrid Task Cascade."""
SMALLEST_SIDE_PX = 1e-2
"""Of a detection in a view; as in torchvision."""


class View(NamedTuple):
    """An image as it is looked at once: resized, perhaps mirrored, filled up at its right and lower edges."""

    pixels_CHW: Tensor
    """In 0..255, of a size that the backbone takes."""
    height: int
    """Of what is not filled up, in pixels."""
    width: int
    scale: tuple[float, float]
    """Pixels of the view for one of the image, across and down."""
    mirrored: bool

    def of_image(self, boxes_M4: Tensor) -> Tensor:
        """Returns boxes (..., 4) of the view in pixels of the image."""
        return self._mirrored(boxes_M4) / boxes_M4.new_tensor(self.scale * 2)

    def from_image(self, boxes_M4: Tensor) -> Tensor:
        """Returns boxes (..., 4) of the image in pixels of the view."""
        return self._mirrored(boxes_M4 * boxes_M4.new_tensor(self.scale * 2))

    def _mirrored(self, boxes_M4: Tensor) -> Tensor:
        if not self.mirrored:
            return boxes_M4
        left, top, right, bottom = boxes_M4.unbind(-1)
        return torch.stack([self.width - right, top, self.width - left, bottom], dim=-1)


class DetectionModule(nn.Module):
    """What is trained.

    Args:
        model: the backbone.
        config: neck, heads, and how detections are picked.
        num_classes: K.
        dtype: of the pixels that the backbone gets.

    Raises:
        UserError: the backbone gives no maps of its layers.
    """

    def __init__(
        self, model: ModelConfig, config: DetectionConfig, num_classes: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.config = config
        self.backbone = build_model(model)
        self.backbone.final_norm()  # refuses a model without one before it is trained
        self.neck = neck_of(self.backbone, config.channels, config.global_attention)
        self.strides = self.neck.strides
        self.rpn = RegionProposals(config.channels, [*self.strides, 2 * self.strides[-1]])
        self.semantic = None
        if config.semantic_classes:
            self.semantic = SemanticHead(config.channels, len(self.strides) + 1, config.semantic_classes)
        self.heads = BoxAndMaskHeads(
            config.head, config.channels, num_classes, config.box_head, config.masks, config.rois_per_image
        )

    def forward(
        self,
        images_BCHW: Tensor | None = None,
        targets: list[Instances] | None = None,
        keys_B: Tensor | None = None,
        drop_path_scale_RB: Tensor | None = None,
        views: Sequence[View] | None = None,
    ) -> dict[str, Tensor]:
        """Learns from images, or detects in several views of one: either `images_BCHW` and all with it, or `views`.

        All views of an image go through one call: every rank makes as many calls, and each runs the same layers.

        Args:
            images_BCHW: uint8, of one size.
            targets: objects of each image.
            keys_B: int64; which boxes of an image are learned from is a function of its key.
            drop_path_scale_RB: 0 or 1 / keep probability for each residual branch.
            views: of one image.

        Returns:
            Of images: losses, fp32 scalars that hold their weights, each a sum over images of a mean over what is
            sampled in an image (`rpn_class`, `rpn_box`, `class_1`, `box_1`, `mask_1`, ...) or over pixels with a class
            (`semantic`); and `boxes`, `scores`, `labels` of the last stage. Of views: the fields of `Detections`.
        """
        if views is not None:
            return self._detected(views)
        assert images_BCHW is not None, "images or views"
        assert targets is not None, "images come with their objects"
        assert keys_B is not None, "images come with their keys"
        height, width = images_BCHW.shape[2:]
        maps, logits, deltas = self._maps(images_BCHW, drop_path_scale_RB)
        anchors = self.rpn.anchors(maps)
        outputs = self.rpn.losses(logits, deltas, anchors, targets, keys_B)
        proposals = self.rpn.proposals(logits, deltas, anchors, height, width)
        features, semantic_logits_BShw = self._features(maps, height, width)
        if semantic_logits_BShw is not None:
            loss = semantic_error(semantic_logits_BShw, [objects.semantic_HW for objects in targets])
            outputs["semantic"] = SEMANTIC_WEIGHT * loss
        return outputs | self.heads.losses(features, proposals, targets, keys_B)

    def semantic_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map of the places' classes, for images of so many pixels."""
        stride = self.strides[min(FUSED_LEVEL, len(self.strides) - 1)]
        return math.ceil(height / stride), math.ceil(width / stride)

    def _maps(
        self, images_BCHW: Tensor, drop_path_scale_RB: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Maps of the pyramid, with one more that anchors alone use, and the anchors' logits and deltas."""
        pixels_BCHW = normalize(images_BCHW, self.backbone.mean, self.backbone.std).to(self.dtype)
        layers = self.backbone.intermediates(pixels_BCHW, self.neck.layers, drop_path_scale_RB)
        layers[-1] = self.backbone.final_norm()(layers[-1])
        maps = self.neck(layers, *images_BCHW.shape[2:])
        maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return maps, *self.rpn(maps)

    def _features(self, maps: list[Tensor], height: int, width: int) -> tuple[Features, Tensor | None]:
        semantic_BChw = logits_BShw = None
        if self.semantic is not None:
            logits_BShw, semantic_BChw = self.semantic(maps)
            semantic_BChw = semantic_BChw.float()
        # Boxes are cut in fp32: in bf16 their coordinates would be rounded to multiples of 4 px.
        cut = [map_BChw.float() for map_BChw in maps[:-1]]
        return Features(cut, self.strides, semantic_BChw, height, width, maps[0].dtype), logits_BShw

    def _detected(self, views: Sequence[View]) -> dict[str, Tensor]:
        """All views' boxes compete; masks are the mean over views, each cut at the boxes that are left."""
        all_features, boxes, scores, labels = [], [], [], []
        for view in views:
            maps, logits, deltas = self._maps(view.pixels_CHW[None])
            anchors = self.rpn.anchors(maps)
            proposals_1P4, valid_1P = self.rpn.proposals(logits, deltas, anchors, view.height, view.width)
            features, _ = self._features(maps, view.height, view.width)
            boxes_PK4, scores_PK = self.heads.candidates(features, proposals_1P4)
            # What was moved out of the image has no area there, and no overlap with anything: 0 / 0.
            seen_PK = (boxes_PK4[..., 2:] - boxes_PK4[..., :2] >= SMALLEST_SIDE_PX).all(-1)
            likely_PK = scores_PK > self.config.score_threshold
            row_M, label_M = (likely_PK & seen_PK & valid_1P[0][:, None]).nonzero().T
            found_M4 = boxes_PK4[row_M, label_M.clamp(max=boxes_PK4.shape[1] - 1)]
            all_features.append(features)
            boxes.append(view.of_image(found_M4))
            scores.append(scores_PK[row_M, label_M])
            labels.append(label_M)
        boxes_N4, scores_N, labels_N = self._best(torch.cat(boxes), torch.cat(scores), torch.cat(labels))
        masks_Nmm = boxes_N4.new_zeros(len(boxes_N4), 0, 0)
        if self.config.masks:
            masks_Nmm = self._masks(views, all_features, boxes_N4, labels_N)
        return {"boxes_N4": boxes_N4, "scores_N": scores_N, "labels_N": labels_N, "masks_Nmm": masks_Nmm}

    def _best(self, boxes_M4: Tensor, scores_M: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        most = self.config.max_detections
        # Candidates of equal score keep their order, whatever sorts later.
        order_M = scores_M.argsort(descending=True, stable=True)
        boxes_M4, scores_M, labels_M = boxes_M4[order_M], scores_M[order_M], labels_M[order_M]
        if self.config.soft_nms == "none":
            kept_N = suppressed(boxes_M4, scores_M, labels_M, NMS_IOU)[:most]
            return boxes_M4[kept_N], scores_M[kept_N], labels_M[kept_N]
        kept_N, scores_N = softly_suppressed(boxes_M4, scores_M, labels_M, self.config.soft_nms, most)
        sure_N = scores_N > self.config.score_threshold
        return boxes_M4[kept_N][sure_N], scores_N[sure_N], labels_M[kept_N][sure_N]

    def _masks(
        self, views: Sequence[View], all_features: list[Features], boxes_N4: Tensor, labels_N: Tensor
    ) -> Tensor:
        # Heads run over a box at least: under ZeRO-3 all ranks run them, or none.
        given_R4 = boxes_N4 if len(boxes_N4) else boxes_N4.new_tensor([[0.0, 0.0, 1.0, 1.0]])
        labels_R = labels_N if len(labels_N) else labels_N.new_zeros(1)
        found = []
        for view, features in zip(views, all_features, strict=True):
            masks_Rmm = self.heads.masks(features, view.from_image(given_R4)[None], labels_R)
            found.append(masks_Rmm.flip(-1) if view.mirrored else masks_Rmm)
        return torch.stack(found).mean(0)[: len(boxes_N4)]


def semantic_error(logits_BShw: Tensor, maps: list[Tensor]) -> Tensor:
    """Sums the cross entropy over the places with a class, fp32.

    Args:
        logits_BShw: fp32.
        maps: a map of classes (H, W) of each image, of which each place takes what lies at its centre; (0, 0): none.
    """
    losses = []
    for logits_Shw, map_HW in zip(logits_BShw, maps, strict=True):
        if map_HW.numel() == 0:
            losses.append(0 * logits_Shw.sum())
            continue
        wanted_hw = at_places(map_HW, *logits_Shw.shape[1:]).long()
        losses.append(
            F.cross_entropy(logits_Shw[None], wanted_hw[None], ignore_index=IGNORED, reduction="sum")
        )
    return torch.stack(losses).sum()


def at_places(map_HW: Tensor, height: int, width: int) -> Tensor:
    """Returns what lies at the centres of places, (h, w)."""
    rows, columns = (
        ((torch.arange(count, device=map_HW.device) + 0.5) * length / count).long()
        for count, length in ((height, map_HW.shape[0]), (width, map_HW.shape[1]))
    )
    return map_HW[rows[:, None], columns]
