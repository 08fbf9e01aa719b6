"""Semantic segmentation: UPerNet or a linear head on the layers of a backbone."""

from fd_scale.finetune.segmentation.module import SegmentationModule
from fd_scale.finetune.segmentation.task import SegmentationTask

__all__ = ["SegmentationModule", "SegmentationTask"]
