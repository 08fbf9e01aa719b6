"""Feature distillation: the trained module and its task."""

from fd_scale.distill.module import DistillationModule
from fd_scale.distill.task import DistillationTask

__all__ = ["DistillationModule", "DistillationTask"]
