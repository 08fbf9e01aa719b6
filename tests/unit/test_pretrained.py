"""`weights: pretrained` comes from the cache that a fetch has filled, and from nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from local_hub import LocalHub
from safetensors.torch import save

from fd_scale import hub
from fd_scale.config import ModelConfig, load_recipe, packaged_recipes
from fd_scale.errors import UserError
from fd_scale.models import build_model, create_model, hub_files, weights_path, weights_sha256
from fd_scale.verbs.fetch import named_files

VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def fetch(config: ModelConfig) -> None:
    files = hub_files(config)
    assert files is not None
    hub.fetch(files)


def test_a_timm_name(local_hub: LocalHub) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"
    config = ModelConfig(name=name, img_size=32, overrides=VIT, weights="pretrained")
    torch.manual_seed(0)
    source = create_model(name, img_size=32, **VIT)
    local_hub.files = {
        f"timm/{name}": {"model.safetensors": save(source.to_layout(source.state_dict(), "timm"))}
    }
    with pytest.raises(UserError, match=r"is not in the cache.*fd-scale fetch"):
        build_model(config)
    fetch(config)
    local_hub.requests.clear()
    found = build_model(config)
    assert not local_hub.requests, "a run does not talk to the hub"
    for key, tensor in source.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor)
    path = weights_path(config)
    assert path is not None
    assert len(weights_sha256(path)) == 64


def test_a_hugging_face_repository(local_hub: LocalHub, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    source = transformers.ViTModel(transformers.ViTConfig(**shape, image_size=32, patch_size=8)).eval()
    source.save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    local_hub.files = {"org/vit": files | {"another/config.json": b"{}"}}
    config = ModelConfig(name="hf:org/vit", weights="pretrained")
    with pytest.raises(UserError, match=r"is not in the cache.*fd-scale fetch"):
        build_model(config)
    fetch(config)
    local_hub.requests.clear()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(build_model(config)(images), source(pixel_values=images).last_hidden_state)
    assert not local_hub.requests


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swin_v2_base", "no weights of swin_v2_base are published; give a file or folder"),
        ("vit_base_patch16_18x2_224", "timm has no weights of vit_base_patch16_18x2_224 on the hub"),
        ("vit_tiny_patch16_224.augreg_in99k", r"known: .*vit_tiny_patch16_224\.augreg_in21k"),
        (
            "vit_base_patch16_clip_224.openai",
            r"QuickGELU.*; use vit_base_patch16_clip_quickgelu_224\.openai$",
        ),
    ],
)
def test_names_without_published_weights(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model(ModelConfig(name=name, weights="pretrained"))


def test_local_models_need_no_network(tmp_path: Path) -> None:
    assert hub_files(ModelConfig(name="vit_tiny_patch16_224")) is None
    assert hub_files(ModelConfig(name="swin_v2_base", weights="a.safetensors")) is None
    assert hub_files(ModelConfig(name=f"hf:{tmp_path}", weights="pretrained")) is None
    clip = hub_files(ModelConfig(name="vit_base_patch16_clip_quickgelu_224.openai", weights="pretrained"))
    assert clip is not None
    assert clip.repo == "timm/vit_base_patch16_clip_224.openai"


def test_weights_that_recipes_name_are_published() -> None:
    named = {files.repo for name in packaged_recipes() for files in named_files(load_recipe(name))}
    assert {"timm/vit_base_patch16_clip_224.openai", "timm/vit_large_patch14_clip_336.openai"} <= named


def test_each_name_of_another_activation_has_one_of_its_weights_own() -> None:
    published = {name: timm.get_pretrained_cfg(name) for name in timm.list_pretrained("*_clip_*")}
    others = [name for name, known in published.items() if known.notes and "_quickgelu_" not in name]
    assert len(others) >= 17
    for name in others:
        own = hub_files(ModelConfig(name=name.replace("_clip_", "_clip_quickgelu_"), weights="pretrained"))
        assert own is not None
        assert own.repo == published[name].hf_hub_id
