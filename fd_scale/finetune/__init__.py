"""Fine-tuning on labels."""

from fd_scale.finetune.classification import ClassificationTask

__all__ = ["ClassificationTask"]
