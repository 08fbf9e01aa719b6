"""What a checkpoint and the run that resumes it must have in common."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from fd_scale.config import Recipe, build_recipe
from fd_scale.models import create_model, resolved
from fd_scale.run_folder import identity

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def recipe_of(recipe_values: Callable[..., dict[str, Any]]) -> Callable[..., Recipe]:
    def make(teacher: dict[str, Any], train: dict[str, Any] | None = None, **distill: Any) -> Recipe:
        values = recipe_values(distill={"teachers": [teacher]} | distill)
        values["train"] |= train or {}
        return resolved(build_recipe(values))

    return make


def of(recipe: Recipe) -> dict[str, Any]:
    return identity(recipe, "data", 0, 1)


def test_what_decides_the_losses_counts(recipe_of: Callable[..., Recipe]) -> None:
    model = {"name": "vit_tiny_patch16_224", "img_size": 32, "overrides": TINY}
    plain = of(recipe_of({"model": model}))
    for changed in (
        recipe_of({"model": model, "share": 0.5}),
        recipe_of({"model": model, "weight": 0.5}),
        recipe_of({"model": model, "cls_weight": 0.5}),
        recipe_of({"model": model, "layers": [0]}),
        recipe_of({"model": model}, loss="mse"),
    ):
        assert of(changed) != plain
    assert of(recipe_of({"model": model}, train={"micro_batch": 4})) == plain
    standardised = of(recipe_of({"model": model}, loss="phi_s"))
    smaller = of(recipe_of({"model": model}, loss="phi_s", train={"micro_batch": 4}))
    assert smaller != standardised, "the rounding of the teacher's features would move the target"


def test_the_number_of_ranks_is_free_but_for_phi_s(recipe_of: Callable[..., Recipe]) -> None:
    model = {"name": "vit_tiny_patch16_224", "img_size": 32, "overrides": TINY}
    plain, standardised = recipe_of({"model": model}), recipe_of({"model": model}, loss="phi_s")
    assert identity(plain, "data", 0, 1) == identity(plain, "data", 0, 2)
    assert identity(standardised, "data", 0, 1) != identity(standardised, "data", 0, 2)


def test_a_teacher_may_be_moved(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    model = {"name": "vit_tiny_patch16_224", "img_size": 32, "overrides": TINY}
    vit = create_model("vit_tiny_patch16_224", img_size=32, **TINY)
    save_file(vit.to_layout(vit.state_dict(), "timm"), tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    first, second = (of(recipe_of({"model": model | {"weights": str(tmp_path / name)}}))
                     for name in ("a.safetensors", "b.safetensors"))  # fmt: skip
    assert first == second
    assert first != of(recipe_of({"model": model}))


def test_a_hugging_face_folder_may_be_moved(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    first, second = (of(recipe_of({"model": {"name": f"hf:{tmp_path / place}", "weights": "pretrained"}}))
                     for place in ("here", "there"))  # fmt: skip
    assert first == second
