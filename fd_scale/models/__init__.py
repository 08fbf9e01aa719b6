"""Student models, the one way to build them, and key layouts of published weights."""

from fd_scale.models.backbone import Backbone, cls_and_patches
from fd_scale.models.build import (
    BACKBONE,
    at_trained_scale,
    build_model,
    choose_kernels,
    drop_path_scale,
    dtype_of,
    learning_rate_scales,
    normalize,
    set_up_training,
)
from fd_scale.models.layers import Fp32Linear
from fd_scale.models.pretrained import (
    exported_model,
    hub_files,
    model_identity,
    resolved,
    resolved_model,
    weights_path,
)
from fd_scale.models.registry import create_model
from fd_scale.models.swin_v2 import SwinTransformerV2
from fd_scale.models.timm_classifier import timm_classifier
from fd_scale.models.weights import (
    WEIGHTS_FILES,
    interpolate,
    load_tensors,
    load_weights,
    read_weights,
    weights_folder,
    weights_sha256,
)

__all__ = [
    "BACKBONE",
    "WEIGHTS_FILES",
    "Backbone",
    "Fp32Linear",
    "SwinTransformerV2",
    "at_trained_scale",
    "build_model",
    "choose_kernels",
    "cls_and_patches",
    "create_model",
    "drop_path_scale",
    "dtype_of",
    "exported_model",
    "hub_files",
    "interpolate",
    "learning_rate_scales",
    "load_tensors",
    "load_weights",
    "model_identity",
    "normalize",
    "read_weights",
    "resolved",
    "resolved_model",
    "set_up_training",
    "timm_classifier",
    "weights_folder",
    "weights_path",
    "weights_sha256",
]
