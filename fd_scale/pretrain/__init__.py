"""Pre-training without labels: makes teachers."""

from fd_scale.pretrain.contrastive import ContrastiveTask

__all__ = ["ContrastiveTask"]
