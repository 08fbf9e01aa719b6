"""Image classification: mean over patch tokens, a LayerNorm before or behind it, a linear head.

Shape legend: B = images, L = tokens, D = channels, K = classes.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.config import ClassificationConfig, ModelConfig, Recipe
from fd_scale.data import UNLABELLED, Batch, Source, TrainLoader
from fd_scale.distributed import World
from fd_scale.evaluation import Accuracy, AccuracyCounter, EvaluationSet, Forward, evaluated_batches
from fd_scale.finetune.classes import agreed_classes
from fd_scale.finetune.labels import doubts_of_labels
from fd_scale.finetune.mixing import Mixing
from fd_scale.models import Fp32Linear, build_model, drop_path_scale, dtype_of, normalize, set_up_training

logger = logging.getLogger(__name__)


class ClassificationModule(nn.Module):
    """Backbone, head and loss.

    Source: the fine-tuning code of arXiv 2205.14141: its ViT has `norm: fresh` and `head_init_scale: 0.001`, its Swin
    `norm: own` and `head_init_scale: 1`.
    """

    def __init__(
        self, model: ModelConfig, config: ClassificationConfig, num_classes: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.label_smoothing = config.label_smoothing
        self.norm_of_backbone = config.norm == "fresh"
        self.dtype = dtype
        self.backbone = build_model(model)
        self.norm: nn.Module = nn.Identity()
        if config.norm == "fresh":
            self.backbone.norm_behind_pooling()
        elif config.norm == "both":
            self.norm = nn.LayerNorm(self.backbone.num_features)
        self.head = Fp32Linear(self.backbone.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.mul_(config.head_init_scale)

    def forward(
        self,
        images_BCHW: Tensor,
        labels_B: Tensor,
        partner_labels_B: Tensor | None = None,
        weight_B: Tensor | None = None,
        drop_path_scale_RB: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Classifies images.

        Args:
            images_BCHW: uint8, or mixed and in 0..255.
            labels_B: int64; -1: not labelled, not in the loss.
            partner_labels_B: int64, of the images that were mixed in; -1: none was.
            weight_B: fp32, an image's own share of its loss; the partner's label has the rest.
            drop_path_scale_RB: 0 or 1 / keep probability for each residual branch.

        Returns:
            `loss`: smoothed cross entropy summed over labelled images, fp32 scalar; `logits`: (B, K), fp32,
            without gradient.
        """
        pixels_BCHW = normalize(images_BCHW, self.backbone.mean, self.backbone.std).to(self.dtype)
        tokens_BLD = self.backbone(pixels_BCHW, drop_path_scale_RB)
        logits_BK = self.head(self.normed(tokens_BLD[:, self.backbone.num_prefix_tokens :].mean(1)))
        loss_B = self._losses(logits_BK, labels_B)
        if partner_labels_B is not None and weight_B is not None:
            # Cross entropy is linear in the target: that of the mixed one.
            loss_B = weight_B * loss_B + (1 - weight_B) * self._losses(logits_BK, partner_labels_B)
        return {"loss": loss_B.sum(), "logits": logits_BK.detach()}

    def normed(self, pooled_BD: Tensor) -> Tensor:
        """What the head reads, of the mean of the patch tokens."""
        norm = self.backbone.final_norm() if self.norm_of_backbone else self.norm
        pooled: Tensor = norm(pooled_BD)
        return pooled

    def _losses(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        return F.cross_entropy(
            logits_BK,
            labels_B,
            ignore_index=UNLABELLED,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )


class ClassificationTask:
    """What the trainer needs to know of classification."""

    best_metric = ("top1", +1)

    def __init__(self, recipe: Recipe, evaluation: EvaluationSet | None, source: Source | None) -> None:
        assert recipe.classification is not None, "a recipe of task classification has its section"
        num_classes = agreed_classes(recipe, recipe.classification.num_classes, source, evaluation)
        if source is not None:
            doubts = doubts_of_labels("data.train", source)
            if evaluation is not None:
                doubts += doubts_of_labels("data.evaluation", evaluation.source)
            for doubt in doubts:
                logger.warning("%s", doubt)
        self.seed = recipe.seed
        config = recipe.classification
        self.mixing = None
        if config.mixup or config.cutmix:
            self.mixing = Mixing(
                seed=recipe.seed, mixup=config.mixup, cutmix=config.cutmix, cutmix_share=config.cutmix_share,
                crops=recipe.data.crops,
            )  # fmt: skip
        self.evaluation = evaluation
        dtype = dtype_of(recipe.train.precision)
        self.module = ClassificationModule(recipe.model, recipe.classification, num_classes, dtype)
        self.undecayed, self.lr_scales = set_up_training(self.module, recipe)
        self.rates = self.module.backbone.drop_path_rates

    def prepare(self, world: World, loader: TrainLoader) -> None:
        """There is nothing beside the module."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """The loss goes over labelled images."""
        return {"loss": float((batch.classes != UNLABELLED).sum())}

    evaluation_counts = counts

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Mixes; draws drop path."""
        scale = drop_path_scale(self.rates, self.seed, batch.positions, batch.images.device)
        inputs = {"images_BCHW": batch.images, "labels_B": batch.classes, "drop_path_scale_RB": scale}
        if self.mixing:
            mixed = self.mixing(batch.images, batch.classes, batch.positions)
            inputs |= {
                "images_BCHW": mixed.images, "partner_labels_B": mixed.partner_labels, "weight_B": mixed.weights,
            }  # fmt: skip
        return inputs

    def evaluation_inputs(self, batch: Batch) -> dict[str, Any]:
        """As `inputs`, with nothing drawn: no mixing, no drop path."""
        return {"images_BCHW": batch.images, "labels_B": batch.classes}

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """Measures accuracy and cross entropy (nats) over the evaluation source."""
        return {} if self.evaluation is None else self.accuracy(self.evaluation, forward, world).metrics

    def accuracy(
        self,
        evaluation: EvaluationSet,
        forward: Forward,
        world: World,
        reassessed: list[list[int]] | None = None,
    ) -> Accuracy:
        """Measures accuracy over a source, by class too.

        Args:
            evaluation: images and labels.
            forward: the module's.
            world: ranks, which share the images.
            reassessed: as `AccuracyCounter` takes them.
        """
        counter = AccuracyCounter(self.module.head.out_features, reassessed)
        for batch in evaluated_batches(evaluation, world):
            outputs = forward(**self.evaluation_inputs(batch))
            counter.add(outputs["logits"], batch.classes, batch.positions.tolist())
        return counter.result(world)

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The images as they were cut, before any are mixed."""
        return {"images": batch.images[:8].permute(0, 2, 3, 1).cpu().numpy()}
