"""Pre-training without labels: makes teachers."""

from fd_scale.pretrain.contrastive import ContrastiveTask
from fd_scale.pretrain.masked import MaskedTask

__all__ = ["ContrastiveTask", "MaskedTask"]
