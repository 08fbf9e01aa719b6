"""Layouts of names: equal outputs where a library has the layout, an independent renaming where none has."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from safetensors.torch import load_file, save_file
from test_swin_v2 import randomise, relative_error
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinTransformerV2
from torch import Tensor, nn
from transformers import AutoImageProcessor, Swinv2Config, Swinv2ForImageClassification, Swinv2Model

from fd_scale.cli import parts
from fd_scale.config import ModelConfig
from fd_scale.data.transforms import CROP_FRACTION
from fd_scale.errors import UserError
from fd_scale.models import SwinTransformerV2, build_model, load_weights, resolved_model
from fd_scale.models.layouts import LAYOUTS, from_layout, recognise, to_layout
from fd_scale.verbs.export import convert

State = dict[str, Tensor]

# Grids 16, 8 and 4: shifted windows in two stages, one window in the last.
SHAPE: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4}
SIZE = 64
# fp32, the same sums in another order (Hugging Face: three products for queries, keys and values): see
# test_swin_v2.py, which bounds the same models by the same number.
TOLERANCE = 1e-5


def ours(**overrides: Any) -> SwinTransformerV2:
    model = SwinTransformerV2(img_size=SIZE, **(SHAPE | {"shared_bias": False} | overrides))
    randomise(model)
    return model


def timm_model(num_classes: int = 7) -> Any:
    model = TimmSwinTransformerV2(img_size=SIZE, **SHAPE, num_classes=num_classes).eval()
    randomise(model)
    return model


def with_shared_bias_and_extra_norm(model: Any) -> Any:
    """Turns timm's model into that of the authors of feature distillation, extra norm in each second block."""
    for stage in model.layers:
        first, second = stage.blocks
        second.attn.cpb_mlp = first.attn.cpb_mlp
        second.enorm = nn.LayerNorm(second.dim)
        second.register_forward_hook(lambda block, _, output: block.enorm(output))
    randomise(model)
    return model


def hugging_face_config(**overrides: Any) -> Any:
    return Swinv2Config(**{"image_size": SIZE, "drop_path_rate": 0.0, **SHAPE, **overrides})


def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def tokens(model: Any) -> Tensor:
    """Tokens (B, L, D) of the same images, whosever the model is."""
    if isinstance(model, TimmSwinTransformerV2):
        return model.forward_features(images()).flatten(1, 2)
    if isinstance(model, Swinv2Model):
        return model.eval()(images()).last_hidden_state
    return model(images())


def assert_same_model(model: nn.Module, other: nn.Module) -> None:
    assert relative_error(tokens(model), tokens(other)) <= TOLERANCE


def official_names(timm_state: State) -> State:
    """What Microsoft publishes for a timm model: downsampling at the end of a stage, buffers, another head."""
    state = {}
    for name, tensor in timm_state.items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts).replace("head.fc.", "head.")] = tensor
    for stage in range(3):
        for block in range(2):
            attn = f"layers.{stage}.blocks.{block}.attn"
            state[f"{attn}.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
            state[f"{attn}.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
        state[f"layers.{stage}.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    return state


def fd_names(timm_state: State, shared: bool) -> State:
    """What the authors of feature distillation save for a timm model; the head stays away in pre-training."""
    state = {}
    for name, tensor in official_names(timm_state).items():
        parts = name.replace("cpb_mlp", "rpe_mlp").split(".")
        in_bias = "rpe_mlp" in parts or "relative_" in name
        if shared and in_bias and parts[3] != "0":
            continue
        if shared and in_bias:
            parts[2:5] = ["rel_pos_bias"]
        if parts[0] != "head":
            state[".".join(parts)] = tensor
    return state


def prefixed(state: State, prefix: str, **neighbours: Tensor) -> State:
    return {prefix + name: tensor for name, tensor in state.items()} | {
        name.replace("__", "."): tensor for name, tensor in neighbours.items()
    }


def pretraining(state: State) -> State:
    """With the neighbours that SimMIM and feature distillation have beside the encoder."""
    return prefixed(
        state | {"mask_token": torch.zeros(1, 1, 16)},
        "encoder.",
        decoder__0__weight=torch.zeros(8, 64, 1),
        decoder__0__bias=torch.zeros(8),
        feature_model__visual__proj=torch.zeros(2),
    )


@pytest.mark.parametrize(
    ("layout", "wrap"),
    [
        ("timm", lambda state: state),
        ("official", lambda state: {"model": official_names(state), "epoch": 3}),
        ("simmim", lambda state: {"model": without(pretraining(official_names(state)), "feature_model")}),
        ("fd", lambda state: {"model": fd_names(state, shared=False)}),
        ("fd_student", lambda state: {"model": {"student": prefixed(fd_names(state, shared=False), "module.")}}),
        ("fd_encoder", lambda state: {"model": pretraining(fd_names(state, shared=False))}),
    ],
)  # fmt: skip
def test_published_weights_load(tmp_path: Path, layout: str, wrap: Any) -> None:
    theirs, model = timm_model(), ours()
    file = tmp_path / f"{layout}.pth"
    torch.save(wrap(theirs.state_dict()), file)
    assert relative_error(tokens(model), tokens(theirs)) > 0.1
    load_weights(model, str(file))
    assert_same_model(model, theirs)


def without(state: State, neighbour: str) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(neighbour)}


@pytest.mark.parametrize("shared_bias", [True, False])
def test_shared_bias_and_extra_norms_of_the_fd_authors_load(tmp_path: Path, shared_bias: bool) -> None:
    theirs = with_shared_bias_and_extra_norm(timm_model())
    state = fd_names(theirs.state_dict(), shared=True)
    assert "layers.0.rel_pos_bias.rpe_mlp.0.weight" in state
    assert "layers.2.blocks.1.enorm.weight" in state
    torch.save({"model": pretraining(state)}, tmp_path / "fd.pth")
    model = ours(shared_bias=shared_bias, extra_norm_period=2)
    load_weights(model, str(tmp_path / "fd.pth"))
    assert_same_model(model, theirs)


HF_SHAPES = {
    "shift": {},
    # One window in the last two stages, and a bias trained with other windows.
    "pretrained_window": {"window_size": 8, "pretrained_window_sizes": [4, 4, 2]},
}


@pytest.mark.parametrize("shape", HF_SHAPES.values(), ids=HF_SHAPES)
@pytest.mark.parametrize("saved_as", ["model", "shards", "classifier"])
def test_hugging_face_weights_load(tmp_path: Path, saved_as: str, shape: dict[str, Any]) -> None:
    config = hugging_face_config(**shape)
    classifier = Swinv2ForImageClassification(config)
    randomise(classifier)
    theirs = classifier.swinv2
    saved = classifier if saved_as == "classifier" else theirs
    saved.save_pretrained(tmp_path, max_shard_size="60KB" if saved_as == "shards" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (saved_as == "shards")
    model = ours(
        window_size=config.window_size, pretrained_window_size=shape.get("pretrained_window_sizes", 0)
    )
    load_weights(model, str(tmp_path))
    assert_same_model(model, theirs)


def export(model: SwinTransformerV2, folder: Path, layout: str, **overrides: Any) -> Path:
    save_file(model.state_dict(), folder / "ours.safetensors")
    shape = SHAPE | {"shared_bias": False} | overrides
    config = ModelConfig(name="swin_v2_tiny", img_size=SIZE, overrides=shape)
    return convert(str(folder / "ours.safetensors"), folder / layout, config, layout)


@pytest.mark.parametrize("shared_bias", [True, False])
def test_timm_loads_what_we_export(tmp_path: Path, shared_bias: bool) -> None:
    model = ours(shared_bias=shared_bias)
    out = export(model, tmp_path, "timm", shared_bias=shared_bias)
    theirs = timm_model(num_classes=0)
    theirs.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    assert_same_model(theirs, model)
    assert_same_model(timm.create_model(f"local-dir:{out}", pretrained=True).eval(), model)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(name="fd_vit_tiny_patch16", img_size=64, overrides={"depth": 2}),
        ModelConfig(name="fd_vit_tiny_patch16", img_size=64, overrides={"depth": 2, "shared_bias": False}),
        ModelConfig(name="vit_tiny_patch16_224.augreg_in21k", img_size=64, overrides={"depth": 2}),
        ModelConfig(name="convnext_atto", img_size=64),
        ModelConfig(
            name="vit_base_patch16_siglip_224",
            img_size=64,
            overrides={"depth": 1, "embed_dim": 48, "num_heads": 3},
        ),
    ],
    ids=str,
)
def test_timm_builds_what_we_export(tmp_path: Path, config: ModelConfig) -> None:
    """Strictly, from the folder alone; with classes where they are wanted, and the images' mean."""
    config = resolved_model(replace(config, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1)))
    model = build_model(config).eval()
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    out = convert(str(tmp_path / "ours.safetensors"), tmp_path / "timm", config, "timm")
    pixels_BCHW = torch.randn(2, 3, 64, 64)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        expected = model.model.forward_features(pixels_BCHW)
        torch.testing.assert_close(theirs.forward_features(pixels_BCHW), expected, rtol=1e-4, atol=1e-5)
    data = timm.data.resolve_model_data_config(theirs)
    assert (data["input_size"], data["mean"]) == ([3, 64, 64], [0.4, 0.5, 0.6])
    assert data["crop_pct"] == CROP_FRACTION
    if "siglip" in config.name:
        return  # its pooling, which has weights, is not there
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)(pixels_BCHW).shape == (2, 7)


@pytest.mark.parametrize("shape", HF_SHAPES.values(), ids=HF_SHAPES)
@pytest.mark.parametrize("shared_bias", [True, False])
def test_transformers_load_what_we_export(tmp_path: Path, shape: dict[str, Any], shared_bias: bool) -> None:
    overrides: dict[str, Any] = {"window_size": shape.get("window_size", 4), "shared_bias": shared_bias}
    overrides["pretrained_window_size"] = shape.get("pretrained_window_sizes", 0)
    model = ours(**overrides)
    out = export(model, tmp_path, "hf", **overrides)
    theirs, report = Swinv2Model.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_model(theirs, model)
    processor = AutoImageProcessor.from_pretrained(out)
    pixels = processor(torch.rand(3, 70, 90), return_tensors="pt", do_rescale=False)["pixel_values"]
    assert pixels.shape == (1, 3, SIZE, SIZE)


def test_official_and_fd_get_their_own_names(tmp_path: Path) -> None:
    theirs = timm_model(num_classes=0)
    model = ours()
    model.load_state_dict(model.translate(theirs.state_dict()))
    for layout, prefix in (("official", ""), ("fd", "encoder.")):
        names = (
            official_names(theirs.state_dict())
            if layout == "official"
            else fd_names(theirs.state_dict(), shared=False)
        )
        expected = {
            prefix + name: tensor
            for name, tensor in names.items()
            if "relative_" not in name and "attn_mask" not in name
        }
        written = torch.load(export(model, tmp_path, layout) / "model.pth", weights_only=True)
        assert written.keys() == {"model"}
        assert written["model"].keys() == expected.keys()
        assert all(torch.equal(written["model"][name], tensor) for name, tensor in expected.items())


def test_a_shared_bias_and_extra_norms_keep_their_place_with_the_fd_authors(tmp_path: Path) -> None:
    overrides = {"shared_bias": True, "extra_norm_period": 2}
    written = torch.load(
        export(ours(**overrides), tmp_path, "fd", **overrides) / "model.pth", weights_only=True
    )
    theirs = with_shared_bias_and_extra_norm(timm_model(num_classes=0))
    expected = {name for name in fd_names(theirs.state_dict(), shared=True) if "relative_" not in name}
    assert written["model"].keys() == {f"encoder.{name}" for name in expected if "attn_mask" not in name}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared_bias", [True, False])
def test_every_layout_round_trips_bit_exactly(tmp_path: Path, layout: str, shared_bias: bool) -> None:
    norms = {"extra_norm_period": 2} if LAYOUTS[layout].has_extra_norm else {}
    model = ours(shared_bias=shared_bias, **norms)
    before = copy.deepcopy(model.state_dict())
    out = export(model, tmp_path, layout, shared_bias=shared_bias, **norms)
    again = ours(shared_bias=shared_bias, **norms)
    randomise(again, mean_logit_scale=3.0)
    load_weights(again, str(out))
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_told_apart(layout: str) -> None:
    state = to_layout(ours().state_dict(), layout)
    assert recognise(state) == (layout, LAYOUTS[layout].prefixes[0])
    assert recognise({"blocks.0.attn.qkv.weight": 0}) is None


def test_our_modules_weights_load() -> None:
    state = ours().state_dict()
    held = prefixed(state, "backbone.", projectors__weight=torch.zeros(2), norm__weight=torch.ones(64))
    assert from_layout(held, shared_bias=False).keys() == state.keys()


def test_the_blocks_of_a_stage_must_agree_to_share() -> None:
    state = to_layout(ours(shared_bias=True).state_dict(), "timm")
    assert from_layout(state, shared_bias=True).keys() == ours(shared_bias=True).state_dict().keys()
    state["layers.1.blocks.1.attn.cpb_mlp.0.bias"][0] += 1
    with pytest.raises(UserError, match=r"blocks of stage 1 have different position biases.*shared_bias"):
        from_layout(state, shared_bias=True)


@pytest.mark.parametrize("layout", ["timm", "hf", "official"])
def test_extra_norms_need_a_place(layout: str) -> None:
    state = ours(extra_norm_period=2).state_dict()
    with pytest.raises(UserError, match=rf"layout {layout} has no place .*blocks.1.norm3.*; use ours or fd"):
        to_layout(state, layout)


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(UserError, match="unknown layout 'tim'; did you mean timm"):
        to_layout(ours().state_dict(), "tim")


def test_names_beside_the_table_stay() -> None:
    """Nothing is dropped that no list names: strict loading then says that it is unknown."""
    theirs = pretraining(fd_names(timm_model().state_dict(), shared=False))
    theirs |= {"encoder.layers.0.blocks.0.mlp.norm.weight": torch.zeros(1), "queue": torch.zeros(1)}
    found = from_layout(theirs, shared_bias=False)
    assert found.keys() - ours().state_dict().keys() == {"layers.0.blocks.0.mlp.norm.weight", "queue"}


def test_two_names_of_one_tensor_are_refused() -> None:
    state = ours().state_dict()
    held = prefixed(to_layout(state, "official"), "encoder.", patch_embed__norm__bias=torch.zeros(16))
    with pytest.raises(UserError, match=r"are both patch_embed.norm.bias"):
        from_layout(held, shared_bias=False)


@pytest.mark.parametrize(
    "shape",
    [
        {"img_size": (32, 64)},  # the short side is covered by a window in stage 1, the long one is not
        {"window_size": 5},  # shifted windows are padded
        {"img_size": 28, "window_size": 7},  # grids 7 and 4, rounded down to 3
        {"window_size": (4, 2)},
    ],
    ids=["not square", "padded", "odd grid", "window"],
)
def test_windows_that_transformers_has_not(shape: dict[str, Any]) -> None:
    model = SwinTransformerV2(**({"img_size": SIZE} | SHAPE | shape))
    config = ModelConfig(name="swin_v2_tiny", img_size=SIZE)
    assert model.layout_config("official", config) == {}
    with pytest.raises(UserError, match="layout hf: Transformers cannot put windows of"):
        model.layout_config("hf", config)


def test_the_command_line_offers_every_layout() -> None:
    """It names them itself, so that `--help` need not import torch."""
    assert set(parts.LAYOUTS) == set(LAYOUTS)
