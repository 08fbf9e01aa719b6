"""What the trainer needs to know of semantic segmentation.

Shape legend: B = images, C = channels of an image, H, W = pixels, K = classes, h, w = places of a map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.config import Recipe
from fd_scale.data import IGNORED, Batch, Source, TrainLoader, fill_colour
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet, Forward, Predictor, Progress, Segmentation, segmentation_of
from fd_scale.finetune.classes import agreed_classes
from fd_scale.finetune.segmentation.module import SegmentationModule
from fd_scale.finetune.segmentation.pictures import error_map, painted
from fd_scale.models import Backbone, drop_path_scale, dtype_of, set_up_training
from fd_scale.randomness import hash64

NUM_PICTURES = 4


class SegmentationTask:
    """A class for each pixel.

    Args:
        recipe: with its section, resolved.
        evaluation: whole images and masks to measure on; none: there are none.
        source: training images; none: the recipe says how many classes there are.

    Raises:
        UserError: sources and settings do not agree, or the model does not give the layers.
    """

    best_metric = ("miou", +1)

    def __init__(self, recipe: Recipe, evaluation: EvaluationSet | None, source: Source | None) -> None:
        assert recipe.segmentation is not None, "a recipe of task segmentation has its section"
        self.config = recipe.segmentation
        self.num_classes = agreed_classes(recipe, self.config.num_classes, source, evaluation)
        self.seed = recipe.seed
        self.evaluation = evaluation
        dtype = dtype_of(recipe.train.precision)
        self.module = SegmentationModule(recipe.model, self.config, self.num_classes, dtype)
        self.undecayed, self.lr_scales = set_up_training(self.module, recipe)
        self.undecayed |= {
            f"head.{name}.weight"
            for name, part in self.module.head.named_modules()
            if isinstance(part, nn.Embedding)
        }
        self.predictor = predictor_of(recipe, self.num_classes, self.module.backbone)

    def prepare(self, world: World, loader: TrainLoader) -> None:
        """There is nothing beside the module.

        Raises:
            UserError: statistics are wanted of a single image.
        """
        if self.config.norm == "batch" and loader.micro_batch * world.size == 1:
            raise UserError(
                "segmentation.norm: batch has no statistics of one image, whose pooled map is one place; set it to "
                "group, or train.micro_batch to 2 or more"
            )

    def counts(self, batch: Batch) -> dict[str, float]:
        """Cross entropies go over the pixels with a class, the loss of Mask2Former over the images with one."""
        if self.module.gives_queries:
            return {"loss": float((batch.classes != IGNORED).flatten(1).any(1).sum())}
        pixels = float((batch.classes != IGNORED).sum())
        return {"loss": pixels} | ({"auxiliary": pixels} if self.config.auxiliary_weight else {})

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Draws drop path, of a backbone that is trained, and seeds of Mask2Former's points."""
        given: dict[str, Any] = {"images_BCHW": batch.images, "masks_BHW": batch.classes}
        if not self.config.frozen:
            rates = self.module.backbone.drop_path_rates
            given["drop_path_scale_RB"] = drop_path_scale(
                rates, self.seed, batch.positions, batch.images.device
            )
        if self.module.gives_queries:
            seeds = hash64(self.seed, "points", batch.positions.numpy()) >> np.uint64(1)
            given["point_seeds"] = seeds.tolist()
        return given

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """Measures mIoU, mean and overall accuracy over the evaluation source."""
        return {} if self.evaluation is None else self.measure(self.evaluation, forward, world).metrics

    def measure(
        self, evaluation: EvaluationSet, forward: Forward, world: World, progress: Progress | None = None
    ) -> Segmentation:
        """Measures the overlap of predicted and true classes, by class too; see `segmentation_of`."""
        return segmentation_of(evaluation, self.predictor, forward, world, progress)

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Input, truth, prediction and error of some images, side by side."""
        images_BCHW, masks_BHW = batch.images[:NUM_PICTURES], batch.classes[:NUM_PICTURES]
        logits_BKHW = F.interpolate(
            outputs["logits"][:NUM_PICTURES], size=images_BCHW.shape[2:], mode="bilinear"
        )
        rows = []
        for image_CHW, truth_HW, predicted_HW in zip(
            images_BCHW, masks_BHW, logits_BKHW.argmax(1), strict=True
        ):
            truth, predicted = truth_HW.cpu().numpy(), predicted_HW.to(masks_BHW).cpu().numpy()
            parts = [image_CHW.permute(1, 2, 0).cpu().numpy(), painted(truth), painted(predicted)]
            rows.append(np.concatenate([*parts, error_map(predicted, truth)], axis=1))
        return {"image_truth_prediction_error": np.stack(rows)}


def predictor_of(recipe: Recipe, num_classes: int, backbone: Backbone) -> Predictor:
    """Returns how a recipe's images are predicted.

    Raises:
        UserError: whole images are wanted of a model that takes one size.
    """
    section, mean = recipe.segmentation, recipe.model.mean
    assert section is not None, "a recipe of task segmentation has its section"
    assert mean is not None, "the recipe is resolved"
    whole = section.inference == "whole"
    if whole and not backbone.takes_any_size:
        raise UserError(
            f"segmentation.inference: {recipe.model.name} takes images of {recipe.model.size} px alone; set it to slide"
        )
    return Predictor(
        num_classes=num_classes,
        side=recipe.model.size,
        stride=section.stride,
        whole=whole,
        multiple=backbone.layer_shapes()[0][1],
        short_side=recipe.model.size if section.short_side is None else section.short_side,
        scales=tuple(section.scales),
        flip_too=section.flip_too,
        fill=fill_colour(mean),
        batch_size=recipe.train.micro_batch,
    )
