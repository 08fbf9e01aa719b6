"""Feature distillation: the trained module and its task."""

from fd_scale.distill.module import DistillationModule
from fd_scale.distill.task import DistillationTask, built_teachers, codec_of

__all__ = ["DistillationModule", "DistillationTask", "built_teachers", "codec_of"]
