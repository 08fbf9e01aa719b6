"""Metrics over an evaluation source: the same number on any number of ranks."""

from fd_scale.evaluation.loop import EvaluationSet, Forward, mean_over_source

__all__ = ["EvaluationSet", "Forward", "mean_over_source"]
