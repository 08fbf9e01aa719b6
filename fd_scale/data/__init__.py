"""Images from disk to batches: sources, decoding, transforms, and a loader that resumes exactly."""

from fd_scale.data.base import (
    IGNORED,
    UNLABELLED,
    Labels,
    ObjectSource,
    Source,
    Targets,
    object_source,
    pixel_source,
)
from fd_scale.data.feature_files import FeatureFiles
from fd_scale.data.instances import Detections, Instances
from fd_scale.data.loader import Batch, TrainLoader, evaluation_batches, view_batches
from fd_scale.data.mask_transforms import fill_colour
from fd_scale.data.mixture import spread, subset
from fd_scale.data.objects import Objects
from fd_scale.data.picture import Picture
from fd_scale.data.sources import open_source, require_targets
from fd_scale.data.transforms import (
    ImageAlone,
    Transform,
    View,
    contrastive_transform,
    evaluation_cut,
    evaluation_transform,
    measuring_transform,
    training_transform,
    training_view,
)

__all__ = [
    "IGNORED",
    "UNLABELLED",
    "Batch",
    "Detections",
    "FeatureFiles",
    "ImageAlone",
    "Instances",
    "Labels",
    "ObjectSource",
    "Objects",
    "Picture",
    "Source",
    "Targets",
    "TrainLoader",
    "Transform",
    "View",
    "contrastive_transform",
    "evaluation_batches",
    "evaluation_cut",
    "evaluation_transform",
    "fill_colour",
    "measuring_transform",
    "object_source",
    "open_source",
    "pixel_source",
    "require_targets",
    "spread",
    "subset",
    "training_transform",
    "training_view",
    "view_batches",
]
