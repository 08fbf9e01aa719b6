"""Metrics over an evaluation source: the same number on any number of ranks."""

from fd_scale.evaluation.accuracy import Accuracy, AccuracyCounter, reassessed_labels
from fd_scale.evaluation.dense import Predictor
from fd_scale.evaluation.detection import Detection, detection_of
from fd_scale.evaluation.loop import EvaluationSet, Forward, evaluated_batches, mean_over_source
from fd_scale.evaluation.nearest import nearest_neighbours
from fd_scale.evaluation.segmentation import ConfusionCounter, Progress, Segmentation, segmentation_of

__all__ = [
    "Detection",
    "detection_of",
    "Accuracy",
    "AccuracyCounter",
    "ConfusionCounter",
    "EvaluationSet",
    "Forward",
    "Predictor",
    "Progress",
    "Segmentation",
    "evaluated_batches",
    "mean_over_source",
    "nearest_neighbours",
    "reassessed_labels",
    "segmentation_of",
]
