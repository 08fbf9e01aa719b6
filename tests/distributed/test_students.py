"""Students and teachers of all kinds train alike on any ZeRO stage and number of ranks."""

from collections.abc import Callable
from typing import Any

import cases
import pytest
from rank_checks import assert_resumes_exactly
from ranks import run_ranks
from test_equality import assert_same

from fd_scale.config import build_recipe

pytestmark = pytest.mark.slow

VIT = {
    "name": "fd_vit_tiny_patch16",
    "img_size": 24,
    "overrides": {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "drop_path_rate": 0.3},
}
TIMM_TEACHER = {
    "name": "vit_tiny_patch16_224",
    "img_size": 32,
    "overrides": {"embed_dim": 24, "depth": 2, "num_heads": 2},
}
# EVA-02 reads the weight of a layer without calling it, ConvNeXt has no token axis, both have timm's drop path.
EVA = {
    "name": "eva02_tiny_patch14_224",
    "img_size": 28,
    "overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.3},
}
CONVNEXT = {
    "name": "convnext_atto",
    "img_size": 64,
    "overrides": {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.3},
}
SWIN_TEACHER = {
    "name": "swin_v2_tiny",
    "img_size": 24,
    "overrides": {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
}

CASES: dict[str, dict[str, Any]] = {
    "vit": {"model": VIT, "distill": {"teachers": [{"model": TIMM_TEACHER}]}},
    "vit, two teachers": {
        "model": VIT,
        "distill": {
            "loss": "phi_s",
            "phi_s_images": 32,
            "teachers": [
                {"model": SWIN_TEACHER, "weight": 2.0, "projector": "mlp"},
                {"model": TIMM_TEACHER, "share": 0.4, "cls_weight": 3.0, "layers": [0, -1]},
            ],
        },
    },
    "eva": {
        "model": EVA,
        "distill": {"loss": "cosine", "teachers": [{"model": TIMM_TEACHER, "target": "pooled"}]},
    },
    "convnext": {"model": CONVNEXT, "distill": {"loss": "mse", "teachers": [{"model": SWIN_TEACHER}]}},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_bare_loop(recipe_values: Callable[..., dict[str, Any]], tmp_path: Any, name: str) -> None:
    settings = CASES[name] | {"train__steps": 4}
    plain = recipe_values(run_dir=str(tmp_path / "plain"), train__micro_batch=16, **settings)
    expected = run_ranks(cases.plain_curve, 1, build_recipe(plain))[0]
    values = recipe_values(
        train__ds_config="zero3", train__micro_batch=4, train__activation_checkpointing="block", **settings
    )
    run_ranks(cases.train, 2, values)
    assert len(expected) == 4
    assert_same(cases.curve(values["run_dir"]), expected)


def test_sigkill_then_resume_is_exact(recipe_values: Callable[..., dict[str, Any]], tmp_path: Any) -> None:
    """Also where targets are standardised, and teachers see only some of the images."""
    settings = CASES["vit, two teachers"] | {"train__ds_config": "zero3", "data__evaluation": "digits:test"}
    whole = recipe_values(run_dir=str(tmp_path / "whole"), **settings)
    killed = recipe_values(**settings)
    assert_resumes_exactly(whole, killed, step=5)
    assert len(cases.curve(whole["run_dir"])) == 6
    assert cases.losses(killed["run_dir"], "evaluation") == cases.losses(whole["run_dir"], "evaluation")
