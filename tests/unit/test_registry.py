"""The registry builds published shapes, and says what it does not know."""

from typing import Any

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinTransformerV2
from torch import nn

from fd_scale.errors import UserError
from fd_scale.models import create_model

# name, embed_dim, depths, heads, as published
SHAPES = [
    ("swin_v2_tiny", 96, (2, 2, 6, 2), (3, 6, 12, 24)),
    ("swin_v2_small", 96, (2, 2, 18, 2), (3, 6, 12, 24)),
    ("swin_v2_base", 128, (2, 2, 18, 2), (4, 8, 16, 32)),
    ("swin_v2_large", 192, (2, 2, 18, 2), (6, 12, 24, 48)),
    ("swin_v2_huge", 352, (2, 2, 18, 2), (11, 22, 44, 88)),
    ("swin_v2_giant", 512, (2, 2, 42, 4), (16, 32, 64, 128)),
]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "embed_dim", "depths", "heads"), SHAPES)
def test_parameter_count_equals_timm(
    name: str, embed_dim: int, depths: tuple[int, ...], heads: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        timm_model = TimmSwinTransformerV2(
            img_size=192, window_size=12, embed_dim=embed_dim, depths=depths, num_heads=heads, num_classes=0
        )
        per_block, shared = create_model(name, shared_bias=False), create_model(name)

    # H and G only: one LayerNorm (gain and bias) after every 6th block of a stage.
    has_extra_norms = embed_dim >= 352
    extra_norms = sum(2 * embed_dim * 2**i * (depth // 6) for i, depth in enumerate(depths)) * has_extra_norms
    assert count(per_block) == count(timm_model) + extra_norms
    third_stage: Any = per_block.layers[2]
    normed = [i for i, block in enumerate(third_stage.blocks) if isinstance(block.norm3, nn.LayerNorm)]
    assert normed == (list(range(5, depths[2], 6)) if has_extra_norms else [])
    # One bias MLP (2 -> 512 with bias, 512 -> heads without) a stage instead of one a block.
    removed = sum((depth - 1) * (512 * 3 + 512 * h) for depth, h in zip(depths, heads, strict=True))
    assert count(shared) == count(per_block) - removed
    if name == "swin_v2_giant":
        assert round(count(per_block) / 1e6, 1) == 2997.8
        assert round(count(shared) / 1e6, 1) == 2996.2


def test_overrides_replace_the_named_configuration() -> None:
    with torch.device("meta"):
        model = create_model(
            "swin_v2_tiny", embed_dim=48, depths=(1, 2), num_heads=(3, 6), drop_path_rate=0.2
        )
    assert model.num_features == 96
    # Linear over three blocks, twice for two branches each; fp64 rounding.
    assert model.drop_path_rates == pytest.approx((0, 0, 0.1, 0.1, 0.2, 0.2))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("swin_v2_tniy", {}, "unknown model 'swin_v2_tniy'.*swin_v2_tiny"),
        ("resnet", {}, "unknown model 'resnet'.*resnet50"),
        ("swin_v2_tiny", {"drop_path": 0.1}, "unknown argument of swin_v2_tiny 'drop_path'.*drop_path_rate"),
    ],
)
def test_unknown_names_list_the_nearest(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, **overrides)
