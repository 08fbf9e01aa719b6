"""What the trainer needs to know of the detection of objects.

Shape legend: B = images, C = channels of an image, H, W = pixels, N = objects, R = boxes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fd_scale.config import DetectionConfig, Recipe
from fd_scale.data import IGNORED, Batch, ObjectSource, Source, TrainLoader, object_source
from fd_scale.data.instances import Detections, Instances
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import Detection, EvaluationSet, Forward, Found, Progress, detection_of, found_in
from fd_scale.finetune.classes import agreed_classes
from fd_scale.finetune.detection.boxes import NMS_IOU, suppressed
from fd_scale.finetune.detection.module import DetectionModule, at_places
from fd_scale.finetune.detection.pictures import with_detections, with_truth
from fd_scale.finetune.detection.views import Viewer
from fd_scale.models import drop_path_scale, dtype_of, set_up_training
from fd_scale.randomness import hash64

NUM_PICTURES = 4
SHOWN_SCORE = 0.3


class DetectionTask:
    """A box, a class and a mask for each object.

    Args:
        recipe: with its section, resolved.
        evaluation: whole images to measure on; none: there are none.
        source: training images; none: the recipe says how many classes there are.

    Raises:
        UserError: sources and settings do not agree, or the model does not give the layers.
    """

    best_metric = ("box_ap", +1)

    def __init__(self, recipe: Recipe, evaluation: EvaluationSet | None, source: Source | None) -> None:
        assert recipe.detection is not None, "a recipe of task detection has its section"
        self.config = recipe.detection
        self.num_classes = agreed_classes(recipe, self.config.num_classes, source, evaluation, least=1)
        if source is not None and source.targets == "instances":
            _require_parts(recipe, self.config, object_source(source))
        self.class_names = None if source is None else source.class_names
        self.seed = recipe.seed
        self.evaluation = evaluation
        dtype = dtype_of(recipe.train.precision)
        self.module = DetectionModule(recipe.model, self.config, self.num_classes, dtype)
        self.undecayed, self.lr_scales = set_up_training(self.module, recipe)
        self.viewer = Viewer(recipe, self.module.backbone)

    def prepare(self, world: World, loader: TrainLoader) -> None:
        """There is nothing beside the module."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """Losses are means over an image's samples: they go over images; masks over those with one to learn."""
        images = float(len(batch.instances))
        with_masks = float(sum(_has_mask_to_learn(objects) for objects in batch.instances))
        found = {"rpn_class": images, "rpn_box": images}
        if self.config.semantic_classes:
            size = self.module.semantic_size(*batch.images.shape[2:])
            maps = [objects.semantic_HW for objects in batch.instances if objects.semantic_HW.numel()]
            found["semantic"] = float(
                sum(int((at_places(map_HW, *size) != IGNORED).sum()) for map_HW in maps)
            )
        for stage in range(1, len(self.module.heads.stages) + 1):
            found |= {f"class_{stage}": images, f"box_{stage}": images}
            if self.config.masks:
                found[f"mask_{stage}"] = with_masks
        return found

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Draws drop path, and the keys of what boxes are learned from."""
        device = batch.images.device
        rates = self.module.backbone.drop_path_rates
        keys_B = hash64(self.seed, "sampled boxes", batch.positions.numpy()).view(np.int64)
        return {
            "images_BCHW": batch.images,
            "targets": batch.instances,
            "keys_B": torch.from_numpy(keys_B).to(device, non_blocking=True),
            "drop_path_scale_RB": drop_path_scale(rates, self.seed, batch.positions, device),
        }

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """Measures AP of boxes and of masks over the evaluation source."""
        return {} if self.evaluation is None else self.measure(self.evaluation, forward, world).metrics

    def measure(
        self, evaluation: EvaluationSet, forward: Forward, world: World, progress: Progress | None = None
    ) -> Detection:
        """Measures AP, by class too; see `detection_of`."""
        return detection_of(evaluation, partial(self.detect, forward=forward), world, progress)

    def find(
        self, evaluation: EvaluationSet, forward: Forward, world: World, progress: Progress | None = None
    ) -> list[Found]:
        """Detects without measuring, where there are no annotations; see `found_in`."""
        return found_in(evaluation, partial(self.detect, forward=forward), world, progress)

    def detect(self, image_CHW: Tensor, forward: Forward) -> Detections:
        """Returns what is found in an image, uint8, by one call of the module's forward."""
        return Detections(**forward(views=self.viewer(image_CHW)))

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Truth, and boxes of the last stage, of some images, side by side."""
        rows = []
        found = (outputs[name][:NUM_PICTURES] for name in ("boxes", "scores", "labels"))
        for image_CHW, objects, boxes_R4, scores_R, labels_R in zip(
            batch.images[:NUM_PICTURES], batch.instances[:NUM_PICTURES], *found, strict=True
        ):
            kept_N = suppressed(boxes_R4, scores_R, labels_R, NMS_IOU)
            no_masks_Nmm = boxes_R4.new_zeros(len(kept_N), 0, 0)
            detections = Detections(boxes_R4[kept_N], scores_R[kept_N], labels_R[kept_N], no_masks_Nmm)
            pair = (
                with_truth(image_CHW, objects, self.class_names),
                with_detections(image_CHW, detections, self.class_names, SHOWN_SCORE),
            )
            rows.append(np.concatenate(pair, axis=1))
        return {"truth_prediction": np.stack(rows)}


def _require_parts(recipe: Recipe, config: DetectionConfig, source: ObjectSource) -> None:
    """Refuses heads for which there is nothing to learn from."""
    if config.masks and not source.has_outlines:
        raise UserError(f"detection.masks: {recipe.data.train} has boxes alone; set it to false")
    if config.semantic_classes not in (0, source.num_semantic_classes):
        raise UserError(
            f"detection.semantic_classes: got {config.semantic_classes}, and {recipe.data.train} has maps of pixels "
            f"with {source.num_semantic_classes} classes; give that number, or 0"
        )


def _has_mask_to_learn(objects: Instances) -> bool:
    return objects.has_masks and not bool(objects.crowd_N.all())
