"""Named model configurations and the one way to build a model."""

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from timm.models.beit import Beit

from fd_scale.errors import UserError
from fd_scale.models.backbone import Backbone
from fd_scale.models.huggingface import HuggingFaceBackbone
from fd_scale.models.swin_v2 import SwinTransformerV2
from fd_scale.models.timm_backbone import TimmBackbone, create_timm_model, is_timm_model, nearest_timm_names
from fd_scale.models.vit import VisionTransformer, use_our_blocks

HUGGING_FACE = "hf:"
"""Prefix of a model name that is a folder or repository of Hugging Face."""

# T to L as published at 256 px with window 8. H and G, of which no weights are public, take the 192 px and
# window 12 of G's pre-training, and the extra norm that Liu et al. 2022 (arXiv:2111.09883) add to both.
_256 = {"img_size": 256, "window_size": 8}
_192 = {"img_size": 192, "window_size": 12, "extra_norm_period": 6}
_SWIN_V2: dict[str, dict[str, Any]] = {
    "swin_v2_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), **_256},
    "swin_v2_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), **_256},
    "swin_v2_base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), **_256},
    "swin_v2_large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), **_256},
    "swin_v2_huge": {"embed_dim": 352, "depths": (2, 2, 18, 2), "num_heads": (11, 22, 44, 88), **_192},
    "swin_v2_giant": {"embed_dim": 512, "depths": (2, 2, 42, 4), "num_heads": (16, 32, 64, 128), **_192},
}

# The student of feature distillation, in the sizes of ViT (arXiv:2010.11929) and DeiT (arXiv:2012.12877).
_VIT: dict[str, dict[str, Any]] = {
    "fd_vit_tiny_patch16": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "fd_vit_small_patch16": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "fd_vit_base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "fd_vit_large_patch16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "fd_vit_large_patch14": {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "fd_vit_huge_patch14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}
_MODELS: dict[str, tuple[type[SwinTransformerV2] | type[VisionTransformer], dict[str, Any]]] = {
    **{name: (SwinTransformerV2, shape) for name, shape in _SWIN_V2.items()},
    **{name: (VisionTransformer, shape) for name, shape in _VIT.items()},
}


def default_img_size(name: str) -> int:
    """Returns the input size of one of our own models, 224 for others."""
    return int(_MODELS[name][1].get("img_size", 224)) if name in _MODELS else 224


def create_model(
    name: str, *, img_size: int | Sequence[int] | None = None, target: str = "feature_map", **overrides: Any
) -> Backbone:
    """Build a model with fresh weights, drawn from torch's global generator (seed it first).

    Args:
        name: one of ours (`swin_v2_base`, `fd_vit_base_patch16`), any timm model
            (`vit_base_patch16_clip_quickgelu_224.openai`), or `hf:FOLDER` with a `config.json` of Transformers.
        img_size: side of the images in pixels; None takes the model's own.
        target: `pooled` or `logits` keep what a timm model needs for them, see `TimmBackbone`.
        overrides: arguments of the model's constructor that replace or add to the named configuration.

    Returns:
        The model, in fp32 on the default device (`with torch.device("meta")` builds it without memory).

    Raises:
        UserError: an unknown name or override (the sentence lists the nearest), or a value that does not fit.
    """
    size = {} if img_size is None else {"img_size": img_size}
    if name in _MODELS:
        model_class, shape = _MODELS[name]
        _check_overrides(name, model_class, overrides)
        return model_class(**(shape | overrides | size))
    if name.startswith(HUGGING_FACE):
        assert isinstance(img_size, int), "the size of a Hugging Face model is resolved before it is built"
        return HuggingFaceBackbone(Path(name.removeprefix(HUGGING_FACE)), img_size, overrides)
    if not is_timm_model(name):
        nearest = [*difflib.get_close_matches(name, _MODELS), *nearest_timm_names(name)] or list(_MODELS)
        raise UserError(
            f"unknown model {name!r}; did you mean {', '.join(nearest)}; any model of timm is known too"
        )
    assert img_size is None or isinstance(img_size, int), "timm's models take square images here"
    model = create_timm_model(name, img_size, overrides)
    if isinstance(model, Beit):
        use_our_blocks(model)
    return TimmBackbone(model, target)


def _check_overrides(model: str, model_class: type, overrides: dict[str, Any]) -> None:
    known = list(inspect.signature(model_class).parameters)
    hints = get_type_hints(model_class.__init__)  # type: ignore[misc]
    for name, value in overrides.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known) or known
            raise UserError(f"unknown argument of {model} {name!r}; did you mean {', '.join(nearest)}")
        if not _is_a(value, hints[name]):
            formatted = inspect.formatannotation(hints[name]).replace("collections.abc.", "")
            raise UserError(f"model.overrides.{name}: got {value!r}, expected {formatted}")


def _is_a(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_is_a(value, part) for part in get_args(hint))
    if get_origin(hint) is Sequence:
        return isinstance(value, list | tuple) and all(_is_a(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)
