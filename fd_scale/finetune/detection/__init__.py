"""Detection and instance segmentation: Mask R-CNN, Cascade R-CNN, Hybrid Task Cascade on the layers of a backbone."""

from fd_scale.finetune.detection.module import DetectionModule
from fd_scale.finetune.detection.task import DetectionTask

__all__ = ["DetectionModule", "DetectionTask"]
