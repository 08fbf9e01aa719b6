"""Named model configurations and the one way to build a model."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from fd_scale.errors import UserError
from fd_scale.models.swin_v2 import SwinTransformerV2

# T to L as published at 256 px with window 8. H and G, of which no weights are public, take the 192 px and
# window 12 of G's pre-training, and the extra norm that Liu et al. 2022 (arXiv:2111.09883) add to both.
_MODELS: dict[str, dict[str, Any]] = {
    "swin_v2_tiny": {
        "img_size": 256,
        "window_size": 8,
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
    },
    "swin_v2_small": {
        "img_size": 256,
        "window_size": 8,
        "embed_dim": 96,
        "depths": (2, 2, 18, 2),
        "num_heads": (3, 6, 12, 24),
    },
    "swin_v2_base": {
        "img_size": 256,
        "window_size": 8,
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
    },
    "swin_v2_large": {
        "img_size": 256,
        "window_size": 8,
        "embed_dim": 192,
        "depths": (2, 2, 18, 2),
        "num_heads": (6, 12, 24, 48),
    },
    "swin_v2_huge": {
        "img_size": 192,
        "window_size": 12,
        "embed_dim": 352,
        "depths": (2, 2, 18, 2),
        "num_heads": (11, 22, 44, 88),
        "extra_norm_period": 6,
    },
    "swin_v2_giant": {
        "img_size": 192,
        "window_size": 12,
        "embed_dim": 512,
        "depths": (2, 2, 42, 4),
        "num_heads": (16, 32, 64, 128),
        "extra_norm_period": 6,
    },
}


def _check_known(kind: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        nearest = difflib.get_close_matches(name, names) or names
        raise UserError(f"unknown {kind} {name!r}; did you mean {', '.join(nearest)}")


def create_model(name: str, **overrides: Any) -> SwinTransformerV2:
    """Build a model with fresh weights, drawn from torch's global generator (seed it first).

    Args:
        name: a name of the registry, such as `swin_v2_base`.
        overrides: arguments of the model's constructor that replace or add to the named configuration.

    Returns:
        The model, in fp32 on the default device (`with torch.device("meta")` builds it without memory).

    Raises:
        UserError: an unknown name or override (the sentence lists the nearest), or a value that does not fit.
    """
    _check_known("model", name, _MODELS)
    for override in overrides:
        _check_known(f"argument of {name}", override, inspect.signature(SwinTransformerV2).parameters)
    return SwinTransformerV2(**(_MODELS[name] | overrides))
