"""Metrics over an evaluation source: the same number on any number of ranks."""

from fd_scale.evaluation.accuracy import Accuracy, AccuracyCounter, reassessed_labels
from fd_scale.evaluation.loop import EvaluationSet, Forward, evaluated_batches, mean_over_source
from fd_scale.evaluation.nearest import nearest_neighbours

__all__ = [
    "Accuracy",
    "AccuracyCounter",
    "EvaluationSet",
    "Forward",
    "evaluated_batches",
    "mean_over_source",
    "nearest_neighbours",
    "reassessed_labels",
]
