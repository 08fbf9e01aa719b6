"""Metrics over an evaluation source: the same number on any number of ranks."""

from fd_scale.evaluation.accuracy import Accuracy, AccuracyCounter, reassessed_labels
from fd_scale.evaluation.dense import Predictor
from fd_scale.evaluation.detection import (
    Detect,
    Detection,
    Found,
    compact,
    detection_of,
    found_in,
    results_of,
    write_results,
)
from fd_scale.evaluation.loop import EvaluationSet, Forward, evaluated_batches, mean_over_source
from fd_scale.evaluation.nearest import nearest_neighbours
from fd_scale.evaluation.progress import Progress
from fd_scale.evaluation.segmentation import ConfusionCounter, Segmentation, segmentation_of

__all__ = [
    "Accuracy",
    "AccuracyCounter",
    "ConfusionCounter",
    "Detect",
    "Detection",
    "EvaluationSet",
    "Forward",
    "Found",
    "Predictor",
    "Progress",
    "Segmentation",
    "compact",
    "detection_of",
    "evaluated_batches",
    "found_in",
    "mean_over_source",
    "nearest_neighbours",
    "reassessed_labels",
    "results_of",
    "segmentation_of",
    "write_results",
]
