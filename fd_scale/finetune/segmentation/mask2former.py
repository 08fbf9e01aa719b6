"""Mask2Former's decoder, Transformers' own, over the maps of any backbone.

Shape legend: B = images, D = channels of a level, C = channels of the head, K = classes, Q = queries, H, W = pixels of
the images, h, w = rows and columns of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from fd_scale.data import IGNORED

LEAST_SCORE = 1e-6
"""A smaller score's logarithm would outweigh all other windows and sizes of an image."""


class Mask2FormerHead(Mask2FormerPreTrainedModel):
    """Multi-scale deformable attention over the maps, masked attention of queries, a class and a mask for each query.

    Args:
        in_channels: D of each map, the finest first, of four.
        channels: C; a multiple of 32.
        num_queries: Q.
        num_classes: K.

    Source: Cheng et al. 2022 (arXiv:2112.01527); code, initial weights and losses are Transformers'.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_queries: int, num_classes: int) -> None:
        config = Mask2FormerConfig(
            feature_size=channels, mask_feature_size=channels, hidden_dim=channels,
            encoder_feedforward_dim=4 * channels, dim_feedforward=8 * channels,
            num_queries=num_queries,
        )  # fmt: skip
        config.num_labels = num_classes
        super().__init__(config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, list(in_channels))
        # Transformers makes it by `torch.Tensor(...)`, which knows of no `torch.device` around it.
        self.pixel_decoder.level_embed = nn.Parameter(torch.empty(self.pixel_decoder.level_embed.shape))
        self.transformer = Mask2FormerTransformerModule(channels, config)
        self.class_predictor = nn.Linear(channels, num_classes + 1)
        self.weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        self.criterion = Mask2FormerLoss(config, self.weights)
        self.post_init()

    def forward(self, maps: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Returns what each layer of the decoder makes of the queries, the last layer at the end.

        Args:
            maps: (B, D, h, w) each, the finest first.

        Returns:
            `class_queries_logits`, (B, Q, K + 1), the last of no class; `masks_queries_logits`, (B, Q, h, w), of the
            finest map.
        """
        pixels = self.pixel_decoder(list(maps))
        decoded = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        return [
            {
                "class_queries_logits": self.class_predictor(queries_QBC.transpose(0, 1)),
                "masks_queries_logits": masks_BQhw,
            }
            for queries_QBC, masks_BQhw in zip(
                decoded.intermediate_hidden_states, decoded.masks_queries_logits, strict=True
            )
        ]

    def loss_sum(
        self, layers: Sequence[dict[str, Tensor]], masks_BHW: Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """Sums the images' losses, of all layers; fp32 scalar. An image without a class has none.

        Pixels without a class belong to no mask.

        Args:
            layers: what `forward` returns.
            masks_BHW: uint8, the class of each pixel, `IGNORED` (255) where it has none.
            seeds: of each image, by which the points of its masks are drawn.
        """
        layers = [{name: part.float() for name, part in layer.items()} for layer in layers]
        total = masks_BHW.new_zeros((), dtype=torch.float32)
        devices = [masks_BHW.device] if masks_BHW.is_cuda else []
        for index, (mask_HW, seed) in enumerate(zip(masks_BHW, seeds, strict=True)):
            present = mask_HW.unique()
            present = present[present != IGNORED].long()
            counts = float(len(present) > 0)
            # The criterion is a module: under ZeRO-3 all ranks call it equally often, here with an empty mask.
            present = present if counts else present.new_zeros(1)
            of_image = [{name: part[index : index + 1] for name, part in layer.items()} for layer in layers]
            targets = ([(mask_HW == present[:, None, None]).float()], [present])
            # Transformers draws points from the global generator, which knows of no image.
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                losses: dict[str, Tensor] = self.criterion(
                    **of_image[-1],
                    mask_labels=targets[0],
                    class_labels=targets[1],
                    auxiliary_predictions=of_image[:-1],
                )
            total = total + counts * sum(
                weight * loss
                for name, weight in self.weights.items()
                for key, loss in losses.items()
                if key.startswith(name)
            )
        return total


def class_scores(layer: dict[str, Any]) -> Tensor:
    """Returns the logarithm of each class's score at each place, fp32 (B, K, h, w).

    The score is the sum over queries of the class's probability times the mask's.

    Source: Cheng et al. 2021 (arXiv:2107.06278), section 3.4, semantic inference.
    """
    classes_BQK = layer["class_queries_logits"].float().softmax(2)[:, :, :-1]
    scores_BKhw = torch.einsum("bqk,bqhw->bkhw", classes_BQK, layer["masks_queries_logits"].float().sigmoid())
    return scores_BKhw.clamp_min(LEAST_SCORE).log()
