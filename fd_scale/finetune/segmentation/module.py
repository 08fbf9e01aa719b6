"""Backbone, pyramid of its layers, head and loss of a segmentation.

Shape legend: B = images, H, W = pixels, h, w = places of a map, K = classes, R = residual branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.config import ModelConfig, SegmentationConfig
from fd_scale.data import IGNORED
from fd_scale.errors import UserError
from fd_scale.finetune.segmentation.heads import NORMS, FCNHead, LinearHead, UPerNetHead
from fd_scale.models import build_model, normalize
from fd_scale.models.pyramid import Pyramid


class SegmentationModule(nn.Module):
    """What is trained.

    Args:
        model: the backbone.
        config: head and auxiliary head.
        num_classes: K.
        dtype: of the pixels that the backbone gets.

    Raises:
        UserError: the backbone gives no maps of its layers, or not the wanted ones; or Transformers is missing.
    """

    def __init__(
        self, model: ModelConfig, config: SegmentationConfig, num_classes: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.auxiliary_weight = config.auxiliary_weight
        self.backbone = build_model(model)
        self.backbone.final_norm()  # refuses a model without one before it is trained
        if config.frozen:
            self.backbone.requires_grad_(False)
        norm = NORMS[config.norm]
        self.pyramid = Pyramid(self.backbone, config.layers, norm)
        widths = self.pyramid.channels
        self.head: Any
        if config.head == "upernet":
            self.head = UPerNetHead(widths, config.channels, num_classes, norm)
        elif config.head == "linear":
            self.head = LinearHead(widths, num_classes)
        else:
            if len(widths) < 3:
                raise UserError(
                    f"segmentation.head: mask2former attends to three maps, {model.name} gives {len(widths)}; take "
                    "another head, or a model with more stages"
                )
            self.head = _mask2former().Mask2FormerHead(
                widths, config.channels, config.num_queries, num_classes
            )
        self.gives_queries = config.head == "mask2former"
        self.is_frozen = config.frozen
        self.auxiliary = None
        if config.auxiliary_weight:
            self.auxiliary = FCNHead(
                widths[-2 if len(widths) > 1 else -1], config.channels // 2, num_classes, norm
            )

    def forward(
        self,
        images_BCHW: Tensor,
        masks_BHW: Tensor | None = None,
        drop_path_scale_RB: Tensor | None = None,
        point_seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Segments images.

        Args:
            images_BCHW: uint8, or resized ones in 0..255.
            masks_BHW: uint8, the class of each pixel, `IGNORED` (255) where it has none; none: no loss is wanted.
            drop_path_scale_RB: 0 or 1 / keep probability for each residual branch.
            point_seeds: of each image, for the points at which Mask2Former compares masks.

        Returns:
            `logits`: fp32 (B, K, h, w), at the resolution of the finest map, without gradient. With masks also `loss`
            and, of the auxiliary head, `auxiliary`, which holds its weight: cross entropies summed over the pixels with
            a class, fp32 scalars; of Mask2Former its loss, summed over images with a class.
        """
        pixels_BCHW = normalize(images_BCHW, self.backbone.mean, self.backbone.std).to(self.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            layers = self.backbone.intermediates(pixels_BCHW, self.pyramid.layers, drop_path_scale_RB)
            layers[-1] = self.backbone.final_norm()(layers[-1])
        maps = self.pyramid(layers, *images_BCHW.shape[2:])
        if self.gives_queries:
            decoded = self.head(maps)
            outputs = {"logits": _mask2former().class_scores(decoded[-1]).detach()}
            if masks_BHW is not None:
                assert point_seeds is not None, "the task gives them with masks"
                outputs["loss"] = self.head.loss_sum(decoded, masks_BHW, point_seeds)
            return outputs
        logits_BKhw = self.head(maps)
        outputs = {"logits": logits_BKhw.detach()}
        if masks_BHW is not None:
            outputs["loss"] = cross_entropy_sum(logits_BKhw, masks_BHW)
            if self.auxiliary is not None:
                auxiliary_BKhw = self.auxiliary(maps[-2 if len(maps) > 1 else -1])
                outputs["auxiliary"] = self.auxiliary_weight * cross_entropy_sum(auxiliary_BKhw, masks_BHW)
        return outputs


def _mask2former() -> Any:
    """The module that needs Transformers."""
    try:
        from fd_scale.finetune.segmentation import mask2former
    except ImportError as error:
        raise UserError(
            f"segmentation.head: mask2former is Transformers' ({error}); run: pip install 'fd-scale[hf]'"
        ) from None
    return mask2former


def cross_entropy_sum(logits_BKhw: Tensor, masks_BHW: Tensor) -> Tensor:
    """Sums the cross entropy over the pixels with a class, of logits resized to the masks, bilinear; fp32 scalar."""
    logits_BKHW = F.interpolate(logits_BKhw, size=masks_BHW.shape[1:], mode="bilinear")
    return F.cross_entropy(logits_BKHW, masks_BHW.long(), ignore_index=IGNORED, reduction="sum")
