"""Images from disk to batches: sources, decoding, transforms, and a loader that resumes exactly."""

from fd_scale.data.base import UNLABELLED, Source
from fd_scale.data.loader import Batch, TrainLoader, evaluation_batches
from fd_scale.data.mixture import spread
from fd_scale.data.sources import open_source
from fd_scale.data.transforms import (
    Transform,
    contrastive_transform,
    evaluation_transform,
    training_transform,
    training_view,
)

__all__ = [
    "UNLABELLED",
    "Batch",
    "Source",
    "TrainLoader",
    "Transform",
    "contrastive_transform",
    "evaluation_batches",
    "evaluation_transform",
    "open_source",
    "spread",
    "training_transform",
    "training_view",
]
