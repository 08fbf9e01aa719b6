"""Student models, the one way to build them, and key layouts of published weights."""

from fd_scale.models.build import (
    BACKBONE,
    build_model,
    drop_path_scale,
    dtype_of,
    load_weights,
    normalize,
    undecayed_parameters,
    weights_sha256,
)
from fd_scale.models.registry import create_model
from fd_scale.models.swin_v2 import SwinTransformerV2
from fd_scale.models.weights import from_timm_swin_v2

__all__ = [
    "BACKBONE",
    "SwinTransformerV2",
    "build_model",
    "create_model",
    "drop_path_scale",
    "dtype_of",
    "from_timm_swin_v2",
    "load_weights",
    "normalize",
    "undecayed_parameters",
    "weights_sha256",
]
