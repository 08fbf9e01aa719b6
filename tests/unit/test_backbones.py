"""Models of timm and Transformers as backbones: their own tokens, in one layout."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fd_scale.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from fd_scale.errors import UserError
from fd_scale.models import Backbone, build_model, create_model, load_tensors, read_weights, resolved_model

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def shake(model: nn.Module) -> None:
    """Moves every parameter off its initial value, so that a norm left out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


Expected = Callable[[Any, Tensor], Tensor]


def as_it_is(model: Any, x: Tensor) -> Tensor:
    return model.forward_features(x)


def normed_behind_pooling(model: Any, x: Tensor) -> Tensor:
    return model.fc_norm(model.forward_features(x))


def rows_last(model: Any, x: Tensor) -> Tensor:
    return model.forward_features(x).flatten(1, 2)


def channels_first(model: Any, x: Tensor) -> Tensor:
    return model.head.norm(model.forward_features(x)).flatten(2).transpose(1, 2)


TIMM: dict[str, tuple[int, dict[str, Any], int, bool, Expected]] = {
    "vit_base_patch16_224.dino": (32, VIT, 1, True, as_it_is),
    "vit_base_patch16_224.mae": (32, VIT, 1, True, as_it_is),
    "deit_base_distilled_patch16_224.fb_in1k": (32, VIT, 2, True, as_it_is),
    "vit_base_patch16_clip_quickgelu_224.openai": (32, VIT, 1, True, as_it_is),
    "vit_base_patch16_siglip_256.v2_webli": (32, VIT, 0, False, as_it_is),
    "vit_base_patch14_reg4_dinov2.lvd142m": (28, VIT, 5, True, as_it_is),
    "vit_base_patch16_dinov3.lvd1689m": (32, VIT, 5, True, as_it_is),
    "beit_base_patch16_224.in22k_ft_in22k": (32, VIT, 1, True, normed_behind_pooling),
    "eva02_base_patch14_224.mim_in22k": (28, VIT, 1, True, normed_behind_pooling),
    "swin_base_patch4_window7_224": (56, {"embed_dim": 8, "depths": [1, 1, 2, 1]}, 0, False, rows_last),
    "convnext_base.fb_in22k_ft_in1k": (
        64,
        {"dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        0,
        False,
        channels_first,
    ),
}


@pytest.mark.parametrize("name", TIMM)
def test_tokens_are_timms_after_its_final_norm(name: str) -> None:
    size, shape, num_prefix_tokens, has_cls, expected_tokens = TIMM[name]
    model = build_model(ModelConfig(name=name, img_size=size, overrides=shape)).eval()
    shake(model)
    theirs = timm.create_model(name, **shape, **({} if "convnext" in name else {"img_size": size})).eval()
    theirs.load_state_dict(model.model.state_dict(), strict=False)
    with torch.no_grad():
        tokens, expected = model(images(size)), expected_tokens(theirs, images(size))
    # Equal but for BEiT, whose attention is ours: fp32 sums in another order.
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    rows, columns = model.grid_size(size, size)
    assert (model.num_prefix_tokens, model.has_cls) == (num_prefix_tokens, has_cls)
    assert tokens.shape == (2, num_prefix_tokens + rows * columns, model.num_features)
    unused = [
        name
        for name, parameter in model.named_parameters()
        if torch.autograd.grad(model(images(size)).sum(), parameter, allow_unused=True)[0] is None
    ]
    assert not unused, "ZeRO would wait for the gradients of parameters that nothing reads"
    last, first = model.intermediates(images(size), [-1, 0])
    assert last.shape[1] == tokens.shape[1]
    assert first.shape[1] >= tokens.shape[1]


def test_own_input_of_published_weights() -> None:
    clip = resolved_model(ModelConfig(name="vit_base_patch16_clip_quickgelu_224.openai"))
    assert clip.img_size == 224
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert clip.license == "apache-2.0"
    given = ModelConfig(
        name="vit_base_patch16_clip_quickgelu_224.openai", img_size=64, mean=(0.1, 0.2, 0.3), license="mine"
    )
    assert resolved_model(given).mean == (0.1, 0.2, 0.3)
    assert (resolved_model(given).img_size, resolved_model(given).license) == (64, "mine")
    assert resolved_model(ModelConfig(name="swin_v2_giant")).img_size == 192
    assert resolved_model(resolved_model(clip)) == clip


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        (
            "vit_base_patch16_cilp_224",
            {},
            "unknown model 'vit_base_patch16_cilp_224'.*vit_base_patch16_clip_224",
        ),
        ("vit_base_patch16_clip_quickgelu_224.opneai", {}, "vit_base_patch16_clip_quickgelu_224.openai"),
        ("fd_vit_bsae_patch16", {}, "fd_vit_base_patch16"),
        ("vit_tiny_patch16_224", {"depht": 2}, "timm does not build vit_tiny_patch16_224.*depht"),
        ("vit_tiny_patch16_224", {"img_size": 32}, "the input size is model.img_size"),
        ("hf:/nowhere", {}, "there is no such folder, seen from"),
    ],
)
def test_unknown_models(name: str, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model(ModelConfig(name=name, overrides=overrides))


def test_a_model_without_a_token_grid_is_refused() -> None:
    model = create_model("resnetv2_50", img_size=32).eval()  # has a grid: nothing to refuse
    assert model(images(64)).shape[1] == 4
    vgg: Any = create_model("vit_tiny_patch16_224", img_size=32, **VIT)
    vgg.model.forward_features = lambda x: x.mean((2, 3))
    with pytest.raises(UserError, match="no token grid; as a teacher it can give target pooled"):
        vgg(images(32))
    with pytest.raises(UserError, match="layer 2 is none of the model's 2"):
        create_model("vit_tiny_patch16_224", img_size=32, **VIT).intermediates(images(32), [2])


@pytest.mark.parametrize(
    ("name", "size", "overrides", "words"),
    [
        (
            "vit_tiny_patch16_224",
            30,
            VIT,
            "30 is not a multiple of the patch size 16 .*; the nearest are 16 and 32",
        ),
        (
            "vit_tiny_patch16_224",
            32,
            VIT | {"drop_rate": 0.5},
            r"drop_rate: not for a backbone.*drop_path_rate alone",
        ),
        (
            "vit_tiny_patch16_224",
            32,
            VIT | {"in_chans": 1},
            r"model\.overrides\.in_chans: not for a backbone",
        ),
        ("vit_tiny_patch16_224", 32, VIT | {"checkpoint_path": "a"}, "weights to model.weights"),
        (
            "vit_tiny_patch16_224",
            32,
            VIT | {"drop_path_rate": 1.0},
            "drop_path_rate: got 1.0, expected 0 <= rate < 1",
        ),
        ("crossvit_tiny_240", 240, {}, "CrossVit cannot do without its pooling.*target pooled"),
    ],
)
def test_what_is_no_setting_of_a_backbone(
    name: str, size: int, overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        build_model(ModelConfig(name=name, img_size=size, overrides=overrides))


def test_pooling_without_a_token_grid_and_without_a_classifier() -> None:
    """Also of weights that we exported: they have no classifier."""
    with torch.device("meta"):
        assert (
            build_model(ModelConfig(name="crossvit_tiny_240"), "pooled").pooled(images(240).to("meta")).dim()
            == 2
        )
    pooled = build_model(ModelConfig(name="deit_tiny_patch16_224", img_size=32, overrides=VIT), "pooled")
    exported = create_model("deit_tiny_patch16_224", img_size=32, **VIT)
    load_tensors(pooled, exported.state_dict(), "our export")
    assert pooled.pooled(images(32)).shape == (2, 32)


@pytest.mark.parametrize(
    "name",
    [
        "vit_relpos_small_patch16_224",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("tnt_s_legacy_patch16_224", "swin_s3_tiny_224")
        ),
    ],
)
def test_nothing_is_drawn_in_a_training_forward(name: str) -> None:
    """Models with dropout unasked, and with patches or windows folded into the batch of a residual."""
    model = create_model(name, img_size=224, drop_path_rate=0.3).train()
    assert model.drop_path_rates
    assert max(model.drop_path_rates) == pytest.approx(0.3)
    scale = torch.ones(len(model.drop_path_rates), 2)
    scale[:, 1] = 0
    with torch.no_grad():
        plain, first, second = model(images(224)), model(images(224), scale), model(images(224), scale)
    assert torch.equal(first, second)
    torch.testing.assert_close(first[0], plain[0], rtol=1e-4, atol=1e-4)  # a batch's sums in another order
    assert not torch.equal(first[1], plain[1])


def test_published_positions_are_resampled_by_timm(caplog: pytest.LogCaptureFixture) -> None:
    """DINOv2's 37 x 37 positions in a model of 4 x 4."""
    large = create_model("vit_base_patch14_reg4_dinov2.lvd142m", **VIT)
    small: Any = create_model("vit_base_patch14_reg4_dinov2.lvd142m", img_size=56, **VIT)
    state = large.to_layout(large.state_dict(), "timm") | {
        "head.weight": torch.zeros(1),
        "mask_token": torch.zeros(1),
    }
    assert state["pos_embed"].shape[1] == 37 * 37
    load_tensors(small, state, "DINOv2")
    assert "pos_embed is resampled from (1, 1369, 32) to (1, 16, 32)" in caplog.text
    assert small.model.pos_embed.shape[1] == 16
    assert torch.equal(small.model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    load_tensors(small, small.to_layout(small.state_dict(), "timm"), "again")


def _dinov2_with_registers(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLS has a position of its own, which timm adds to it."""
    cls, positions = own.pop("cls_token"), own.pop("pos_embed")
    place = torch.randn(1, 1, cls.shape[-1])
    return own | {
        "cls_token": cls - place, "pos_embed": torch.cat([place, positions], dim=1),
        "register_tokens": own.pop("reg_token"), "mask_token": torch.zeros(1, 32),
    }  # fmt: skip


def _eva_masked(own: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = {f"norm.{part}": own.pop(f"fc_norm.{part}") for part in ("weight", "bias")}
    return own | norm | {"mask_token": torch.zeros(1, 1, 32), "lm_head.weight": torch.zeros(8, 32)}


PRE_TRAINED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "vit_base_patch14_reg4_dinov2.lvd142m": _dinov2_with_registers,
    "vit_base_patch14_dinov2.lvd142m": lambda own: own | {"mask_token": torch.zeros(1, 32)},
    "vit_base_patch16_224.mae": lambda own: own | {
        "mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8),
        "decoder_blocks.0.norm1.weight": torch.zeros(8), "decoder_pred.bias": torch.zeros(8),
    },
    "fd_vit_tiny_patch16": lambda own: own | {  # BEiT's
        "mask_token": torch.zeros(1, 1, 32), "lm_head.weight": torch.zeros(8, 32), "lm_head.bias": torch.zeros(8),
    },
    "eva02_base_patch14_224.mim_in22k": _eva_masked,
}  # fmt: skip


@pytest.mark.parametrize("name", PRE_TRAINED)
def test_what_pre_training_on_masks_leaves_behind(name: str) -> None:
    """Files as their authors give them out, with decoders, heads and mask tokens."""
    side = 28 if "patch14" in name else 32
    source: Any = create_model(name, img_size=side, **VIT)
    shake(source)
    target = create_model(name, img_size=side, **VIT)
    load_tensors(target, PRE_TRAINED[name](dict(source.model.state_dict())), name)
    torch.testing.assert_close(target(images(side)), source(images(side)), rtol=1e-4, atol=1e-5)


def test_official_swin_v1_keys(caplog: pytest.LogCaptureFixture) -> None:
    """EsViT and SimMIM: patch merging at the end of a stage, buffers, heads, a prefix."""
    shape = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 4]}
    source: Any = create_model("swin_base_patch4_window7_224", img_size=112, **shape)
    shake(source)
    official = {}
    for name, tensor in source.model.state_dict().items():
        for stage in (1, 2):
            name = name.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        official[f"encoder.{name}"] = tensor
    official |= {"encoder.mask_token": torch.zeros(1), "decoder.0.weight": torch.zeros(1)}
    official["encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    official["encoder.head.weight"] = torch.zeros(10, 16)
    target = create_model("swin_base_patch4_window7_224", img_size=112, **shape)
    load_tensors(target, official, "official")
    torch.testing.assert_close(target(images(112)), source(images(112)))
    assert "resampled" not in caplog.text, "of the two patch mergings one took the other's name"


def transformers_models() -> dict[str, Callable[[Any], tuple[Any, int, bool]]]:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    patches = small | {"image_size": 32, "patch_size": 8}
    return {
        "vit": lambda t: (t.ViTModel(t.ViTConfig(**patches)), 1, True),
        "siglip": lambda t: (t.SiglipVisionModel(t.SiglipVisionConfig(**patches)), 0, False),
        "dinov2_registers": lambda t: (
            t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**patches, num_register_tokens=4)), 5, True),
        "dinov3": lambda t: (t.DINOv3ViTModel(t.DINOv3ViTConfig(**patches, num_register_tokens=4)), 5, True),
        "swinv2": lambda t: (
            t.Swinv2Model(t.Swinv2Config(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)),
            0, False),
        "clip": lambda t: (
            t.CLIPModel(t.CLIPConfig(vision_config=patches, text_config=small | {
                "vocab_size": 9, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2})), 1, True),
        "deit": lambda t: (t.DeiTModel(t.DeiTConfig(**patches)), 2, True),
        "mlcd": lambda t: (t.MLCDVisionModel(t.MLCDVisionConfig(**patches)), 1, True),
        "chinese_clip": lambda t: (t.ChineseCLIPVisionModel(t.ChineseCLIPVisionConfig(**patches)), 1, True),
        "beit": lambda t: (t.BeitModel(t.BeitConfig(**patches)), 1, True),
        "convnextv2": lambda t: (
            t.ConvNextV2Model(t.ConvNextV2Config(image_size=64, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])),
            0, False),
        "convnext": lambda t: (
            t.ConvNextModel(t.ConvNextConfig(image_size=64, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])),
            0, False),
    }  # fmt: skip


@pytest.mark.parametrize("kind", transformers_models())
def test_a_hugging_face_folder(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    torch.manual_seed(0)
    theirs, num_prefix_tokens, has_cls = transformers_models()[kind](transformers)
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    model: Backbone = build_model(ModelConfig(name=f"hf:{tmp_path}", weights="pretrained"))
    assert model.mean == (0.1, 0.2, 0.3)
    size = 64 if "convnext" in kind else 32
    vision = theirs.vision_model if kind == "clip" else theirs
    with torch.no_grad():
        expected = vision(pixel_values=images(size)).last_hidden_state
        if kind in ("clip", "mlcd", "chinese_clip"):
            expected = next(part for name, part in vision.named_modules() if name.endswith("post_layernorm"))(
                expected
            )
        elif kind == "beit":
            expected = vision.pooler.layernorm(expected)
        elif "convnext" in kind:
            expected = vision.layernorm(expected.flatten(2).transpose(1, 2))
        torch.testing.assert_close(model.train()(images(size)), expected)  # no dropout, in train mode too
    rows, columns = model.grid_size(size, size)
    assert expected.shape == (2, num_prefix_tokens + rows * columns, model.num_features)
    assert (model.num_prefix_tokens, model.has_cls) == (num_prefix_tokens, has_cls)
    assert len(model.intermediates(images(size), [0, -1])) == 2
    again = build_model(ModelConfig(name=f"hf:{tmp_path}"))
    load_tensors(again, model.to_layout(model.state_dict(), "hf"), "hf names")
    torch.testing.assert_close(again(images(size)), expected)
    # By its path the folder is read as Transformers reads it: what it writes may have other names than its modules.
    by_path = build_model(ModelConfig(name=f"hf:{tmp_path}", weights=str(tmp_path)))
    torch.testing.assert_close(by_path(images(size)), expected)
    with torch.device("meta"):
        nowhere = build_model(ModelConfig(name=f"hf:{tmp_path}"))
    read, own = read_weights(nowhere, str(tmp_path)), model.state_dict()
    assert read.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in read.items())


@pytest.mark.parametrize(
    ("files", "mean", "std", "words"),
    [
        ({"processor_config": {"image_processor": {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}}}, 0.1, 0.2, ""),
        ({"preprocessor_config": {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "do_normalize": False}}, 0, 1, ""),
        ({}, None, None, "by ImageNet's mean"),
    ],
)  # fmt: skip
def test_how_a_hugging_face_folder_normalises(
    files: dict[str, Any], mean: float | None, std: float | None, words: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "vit", "image_size": 32}')
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(text))
    found = resolved_model(ModelConfig(name=f"hf:{tmp_path}"))
    assert found.mean == (IMAGENET_MEAN if mean is None else (mean,) * 3)
    assert found.std == (IMAGENET_STD if std is None else (std,) * 3)
    assert words in caplog.text
    assert bool(words) == bool(caplog.text)


def test_a_model_that_wants_blue_first_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "image_size": 32}')
    (tmp_path / "preprocessor_config.json").write_text('{"do_flip_channel_order": true}')
    with pytest.raises(UserError, match="wants blue in the place of red"):
        resolved_model(ModelConfig(name=f"hf:{tmp_path}"))


def test_an_exports_own_mean_and_deviation(tmp_path: Path) -> None:
    described = {"model": {"name": "swin_v2_tiny", "mean": [0.3] * 3, "std": [0.4] * 3, "license": "MIT"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        found = resolved_model(ModelConfig(name="swin_v2_tiny", weights=str(weights)))
        assert (found.mean, found.std, found.license) == ((0.3,) * 3, (0.4,) * 3, "MIT")
    given = ModelConfig(name="swin_v2_tiny", weights=str(tmp_path), mean=(0.1, 0.1, 0.1))
    assert resolved_model(given).mean == (0.1, 0.1, 0.1)
    other = resolved_model(ModelConfig(name="swin_v2_tiny", weights=str(tmp_path / "other.pth")))
    assert other.mean == IMAGENET_MEAN


@pytest.mark.parametrize("size", [24, 48])
@pytest.mark.parametrize("kind", ["vit", "deit", "clip", "siglip", "dinov2_registers"])
def test_a_hugging_face_folder_at_another_size(kind: str, size: int, tmp_path: Path) -> None:
    """Its position embeddings are resampled as Transformers does; so are those of an export of ours."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    theirs, *_ = transformers_models()[kind](transformers)
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path)
    vision = theirs.vision_model if kind == "clip" else theirs
    given = {} if kind == "dinov2_registers" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = vision(pixel_values=images(size), **given).last_hidden_state
        if kind == "clip":
            expected = vision.post_layernorm(expected)
    section = ModelConfig(name=f"hf:{tmp_path}", img_size=size)
    model = build_model(replace(section, weights="pretrained"))
    own_size = build_model(replace(section, weights="pretrained", img_size=32))
    save_file(own_size.state_dict(), tmp_path / "32.safetensors")
    exported = build_model(replace(section, weights=str(tmp_path / "32.safetensors")))
    for found in (model, exported):
        torch.testing.assert_close(found(images(size)), expected, rtol=1e-4, atol=1e-5)  # fp32 rounding


def test_tables_that_are_not_resampled_are_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    theirs = transformers.BeitModel(transformers_models()["beit"](transformers)[0].config.__class__(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        use_relative_position_bias=True,
    ))  # fmt: skip
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"relative_position_bias_table has shape .* at model\.img_size 64; leave img_size"
    ):
        build_model(ModelConfig(name=f"hf:{tmp_path}", weights="pretrained", img_size=64))


@pytest.mark.parametrize("shape", [(1, 26, 48), (1, 1, 32), (17,)])
def test_positions_of_no_grid_or_another_width_are_named_as_they_are(
    shape: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    transformers_models()["vit"](transformers)[0].save_pretrained(tmp_path)
    model = build_model(ModelConfig(name=f"hf:{tmp_path}"))
    state = model.state_dict() | {"model.embeddings.position_embeddings": torch.zeros(shape)}
    with pytest.raises(
        UserError, match=rf"position_embeddings is {re.escape(str(shape))}, expected \(1, 17, 32\)"
    ):
        load_tensors(model, state, "a file")
    assert "resampled" not in caplog.text


def test_a_classifiers_hugging_face_folder_has_no_pooler(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    theirs, *_ = transformers_models()["vit"](transformers)
    transformers.ViTForImageClassification(theirs.config).eval().save_pretrained(tmp_path)
    model = build_model(ModelConfig(name=f"hf:{tmp_path}", weights="pretrained"))
    tokens_BLD = model(images(32))
    torch.testing.assert_close(model.pooled(images(32)), tokens_BLD[:, 1:].mean(1))


def test_a_hugging_face_folder_without_weights_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    theirs, *_ = transformers_models()["vit"](transformers)
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        build_model(ModelConfig(name=f"hf:{tmp_path}", weights="pretrained"))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json has no setting hiden_size"):
        build_model(ModelConfig(name=f"hf:{tmp_path}", overrides={"hiden_size": 3}))
    with pytest.raises(UserError, match=r"another architecture|cannot be loaded"):
        build_model(
            ModelConfig(name=f"hf:{tmp_path}", weights="pretrained", overrides={"num_hidden_layers": 3})
        )
    with pytest.raises(UserError, match=r"makes no features of 32 px images.*hidden_size"):
        build_model(ModelConfig(name=f"hf:{tmp_path}", overrides={"hidden_size": "a"}))
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(UserError, match="no configuration that Transformers knows"):
        build_model(ModelConfig(name=f"hf:{tmp_path}"))


def test_folders_that_make_no_grid_of_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    for config, words in (
        (transformers.BertConfig(**small), "choose a vision model"),
        (transformers.ViTMAEConfig(**small, image_size=32, patch_size=8), "5 tokens of 32 px, no token grid"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=words):
            build_model(ModelConfig(name=f"hf:{tmp_path}", img_size=32))


def test_an_image_size_of_two_sides(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    transformers.HieraConfig(
        image_size=[64, 64], embed_dim=8, depths=[1, 1], num_heads=[1, 2], query_stride=[2, 2], num_query_pool=1,
        masked_unit_size=[4, 4],
    ).save_pretrained(tmp_path)  # fmt: skip
    assert resolved_model(ModelConfig(name=f"hf:{tmp_path}")).img_size == 64
    model = build_model(ModelConfig(name=f"hf:{tmp_path}"))
    rows, columns = model.grid_size(64, 64)
    assert model(images(64)).shape == (2, rows * columns, 16)
