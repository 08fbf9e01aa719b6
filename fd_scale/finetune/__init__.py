"""Fine-tuning: a backbone and a head, on labels, masks or objects."""

from __future__ import annotations

from fd_scale.config import Recipe
from fd_scale.data import Source
from fd_scale.evaluation import EvaluationSet
from fd_scale.finetune.classes import require_trained_classes
from fd_scale.finetune.classification import ClassificationTask
from fd_scale.finetune.detection import DetectionTask
from fd_scale.finetune.linear_probe import LinearProbeTask, features_of
from fd_scale.finetune.segmentation import SegmentationTask

FineTuningTask = ClassificationTask | SegmentationTask | DetectionTask

__all__ = [
    "ClassificationTask",
    "DetectionTask",
    "FineTuningTask",
    "LinearProbeTask",
    "SegmentationTask",
    "features_of",
    "fine_tuning_task",
    "require_trained_classes",
]


def fine_tuning_task(
    recipe: Recipe, evaluation: EvaluationSet | None, source: Source | None
) -> FineTuningTask:
    """Returns the task of a recipe that trains a backbone and a head on what is known of images.

    Args:
        recipe: resolved.
        evaluation: images to measure on; none: there are none.
        source: training images; none: the recipe says how many classes there are.

    Raises:
        UserError: as the tasks.
    """
    if recipe.segmentation is not None:
        return SegmentationTask(recipe, evaluation, source)
    if recipe.detection is not None:
        return DetectionTask(recipe, evaluation, source)
    return ClassificationTask(recipe, evaluation, source)
