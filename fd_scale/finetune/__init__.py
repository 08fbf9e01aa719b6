"""Fine-tuning on labels, of the whole model or of a linear classifier alone."""

from fd_scale.finetune.classification import ClassificationTask
from fd_scale.finetune.linear_probe import LinearProbeTask, features_of
from fd_scale.finetune.segmentation import SegmentationTask

__all__ = ["ClassificationTask", "LinearProbeTask", "SegmentationTask", "features_of"]
