"""What a model attends to and what its features are like: numbers and plots, models side by side."""

from fd_scale.diagnose.run import diagnose

__all__ = ["diagnose"]
