"""`export` writes the trained backbone alone: the weights that the run ended with, whatever the ZeRO stage."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import pytest
import timm
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import Swinv2Model

from fd_scale.api import export
from fd_scale.checkpoint import newest_checkpoint
from fd_scale.config import ModelConfig
from fd_scale.engine import saved_weights
from fd_scale.errors import UserError
from fd_scale.finetune.classification import ClassificationModule
from fd_scale.models import build_model, create_model, load_weights, normalize, resolved_model

pytestmark = pytest.mark.slow

Values = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2), (3, 2)])
def test_exported_weights_are_the_trained_ones(
    recipe_values: Values, tmp_path: Path, stage: int, ranks: int
) -> None:
    values = recipe_values(train__ds_config=f"zero{stage}", train__steps=3)
    images = cases.probe_images()
    trained = run_ranks(cases.train_and_look, ranks, values)
    out = export(values["run_dir"], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())["model"]
    model = create_model(config["name"], img_size=config["img_size"], **config["overrides"])
    before = model(images)
    load_weights(model, str(out))
    after = model(images).detach()
    # The same weights; the order of sums may differ between a fork with one thread and this process.
    torch.testing.assert_close(after, torch.from_numpy(trained[0]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after, before)
    assert all("projector" not in name for name in load_file(out / "model.safetensors"))


def test_the_fp32_masters_of_16_bit_weights_are_exported(recipe_values: Values, tmp_path: Path) -> None:
    found = {}
    for stage in (0, 1):
        values = recipe_values(
            run_dir=str(tmp_path / f"run{stage}"), train__precision="bf16", train__ds_config=f"zero{stage}"
        )
        run_ranks(cases.train, 1, values)
        found[stage] = load_file(export(values["run_dir"], tmp_path / f"out{stage}") / "model.safetensors")
    assert found[0].keys() == found[1].keys()
    assert any(not torch.equal(weights, weights.bfloat16().float()) for weights in found[0].values())
    for name, weights in found[0].items():
        # The two stages train alike up to the order of sums in bf16 gradients.
        torch.testing.assert_close(weights, found[1][name], rtol=0, atol=2e-3)


def test_an_exported_folder_is_a_starting_point_and_has_a_card(
    recipe_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = recipe_values("contrastive", train__micro_batch=16, train__steps=2)
    run_ranks(cases.train, 1, first)
    teacher = str(export(first["run_dir"], tmp_path / "teacher"))
    model = first["model"] | {"license": "CC0-1.0", "weights": teacher}
    second = recipe_values(
        run_dir=str(tmp_path / "second"), train__steps=2, distill={"teachers": [{"model": model}]}
    )
    run_ranks(cases.train, 1, second)
    card = (export(second["run_dir"], tmp_path / "student") / "README.md").read_text()
    digest = hashlib.sha256((tmp_path / "teacher" / "model.safetensors").read_bytes()).hexdigest()
    for fact in ("license: CC0-1.0", digest, f"weights: {teacher}", "| 2 | train loss |", "task: distill"):
        assert fact in card
    recipe = cases.build_recipe(second)
    assert recipe.distill is not None
    loaded = build_model(recipe.distill.teachers[0].model).state_dict()
    saved = load_file(tmp_path / "teacher" / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    tuned = ModelConfig(name=model["name"], weights=str(tmp_path / "student"))
    assert resolved_model(tuned).license == "CC0-1.0", "what is fine-tuned from it is under its licence"
    assert resolved_model(replace(tuned, weights=f"{tuned.weights}/model.safetensors")).license == "CC0-1.0"
    monkeypatch.chdir(tmp_path / "student")
    assert resolved_model(replace(tuned, weights=None)).license == "unknown", "not that of where one is"


def test_a_run_is_exported_by_other_names(recipe_values: Values, tmp_path: Path) -> None:
    values = recipe_values("contrastive", train__micro_batch=16, train__steps=2)
    run_ranks(cases.train, 1, values)
    images, backbone = cases.probe_images(), cases.build_recipe(values).model
    model = build_model(backbone)
    load_weights(model, str(export(values["run_dir"], tmp_path / "ours")))
    out = export(values["run_dir"], tmp_path / "hf", "hf")
    theirs = Swinv2Model.from_pretrained(out).eval()
    with torch.no_grad():
        # fp32, the same sums in another order
        torch.testing.assert_close(theirs(images).last_hidden_state, model(images), rtol=1e-4, atol=1e-5)
    assert json.loads((out / "config.json").read_text())["model"]["name"] == backbone.name
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1, "who may read one may read all"
    assert "contrastive" in (out / "README.md").read_text()
    for layout in ("fd", "official", "timm", "hf"):
        again = build_model(backbone)
        load_weights(again, str(export(values["run_dir"], tmp_path / layout, layout)))
        state = again.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert export(values["run_dir"], out, "timm") == out, "over a file of the same name"
    # Beside a model.safetensors a model.pth would never be read.
    with pytest.raises(UserError, match=r"hf holds model\.safetensors, .* remove it"):
        export(values["run_dir"], out, "official")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/model.safetensors.tmp").touch()
    export(values["run_dir"], tmp_path / "killed")
    assert not (tmp_path / "killed/model.safetensors.tmp").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    with pytest.raises(UserError, match=r"photos holds a\.png, which is no model's"):
        export(values["run_dir"], tmp_path / "photos")
    with pytest.raises(UserError, match=r"is a run; export it first: fd-scale export"):
        load_weights(model, values["run_dir"])


SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "overrides", "norm", "has_head"),
    [
        ("swin_v2_tiny", SWIN | {"shared_bias": False}, "own", True),
        ("swin_v2_tiny", SWIN, "fresh", False),  # timm's Swin has no norm behind the pooling
        ("fd_vit_tiny_patch16", VIT | {"patch_size": 8}, "fresh", True),
        ("fd_vit_tiny_patch16", VIT | {"patch_size": 8}, "both", False),
        ("vit_tiny_patch16_224", VIT | {"patch_size": 8}, "fresh", True),
        ("vit_tiny_patch16_224", VIT | {"patch_size": 8}, "own", True),
        (
            "convnext_tiny",
            {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
            "own",
            False,
        ),  # its norm is behind the pooling
    ],
)
def test_timm_classifies_as_the_run_does(
    recipe_values: Values, tmp_path: Path, name: str, overrides: dict[str, Any], norm: str, has_head: bool
) -> None:
    values = recipe_values(
        "classification",
        model={"name": name, "img_size": 32, "overrides": overrides},
        train__steps=2,
        optim__lr=0.01,
    )
    values["classification"]["norm"] = norm
    run_ranks(cases.train, 1, values)
    recipe = cases.build_recipe(values)
    assert recipe.classification is not None
    ours = ClassificationModule(recipe.model, recipe.classification, 10, torch.float32)
    saved = saved_weights(newest_checkpoint(Path(values["run_dir"])))
    ours.load_state_dict({name: saved.read(name) for name in ours.state_dict()})
    out = export(values["run_dir"], tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    pixels = normalize(images, ours.backbone.mean, ours.backbone.std)
    cut = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    assert (cut.transforms[0].size, cut.transforms[0].interpolation.value) == (36, "bicubic"), (
        "32 / 0.875, as evaluations"
    )
    card = (out / "README.md").read_text()
    assert ("stays in the run" in card) != has_head
    if has_head:
        assert theirs.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
        found = ours(images, torch.zeros(4, dtype=torch.int64))["logits"]
        torch.testing.assert_close(theirs(pixels), found, rtol=1e-4, atol=1e-4)  # fp32, sums in another order
    else:
        assert theirs.num_classes == 0
    again = build_model(recipe.model)
    load_weights(again, str(out))
    torch.testing.assert_close(
        again.state_dict(), build_model(replace(recipe.model, weights=str(out))).state_dict()
    )
    final = ours.backbone.final_norm() if name != "convnext_tiny" else None
    assert final is None or torch.equal(again.final_norm().weight, final.weight)
