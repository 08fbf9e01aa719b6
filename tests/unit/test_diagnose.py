"""Diagnosis: maps and features with known answers, captured attention against timm's own, and the whole command."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from timm.utils import AttentionExtract
from torch import Tensor

from fd_scale.config import ModelConfig
from fd_scale.diagnose import capture, diagnose, measures, plots, run
from fd_scale.diagnose.blocks import as_map, layouts
from fd_scale.diagnose.capture import AttentionMap, look_at_attention
from fd_scale.diagnose.measures import (
    LayerStatistics,
    bias_share,
    effective_rank,
    feature_statistics,
    head_similarity,
    linear_cka,
    patch_distances,
    patches_only,
)
from fd_scale.diagnose.run import Options, labels, load_backbone
from fd_scale.errors import UserError
from fd_scale.models import SwinTransformerV2, build_model, create_model

reference = sys.modules["fd_kernels.window_attention.reference"]
GRID, STRIDE_PX = (3, 4), (16.0, 8.0)
NUM_PATCHES = 12


def one_layer(map_NN: Tensor, heads: int = 1, prefix: int = 0) -> dict[str, Any]:
    """What is said of a layer whose heads all have one map."""
    probs = map_NN.expand(2, 1, heads, *map_NN.shape)
    layer = LayerStatistics(GRID)
    layer.add(AttentionMap(probs, probs.log(), None, prefix, GRID, STRIDE_PX))
    return layer.numbers()


def seen(model: Any, pixels: Tensor) -> list[AttentionMap]:
    maps: list[AttentionMap] = []
    with torch.no_grad():
        look_at_attention(model, pixels, model(pixels), lambda _, attention: maps.append(attention))
    return maps


def test_a_patch_that_sees_itself_alone() -> None:
    found = one_layer(torch.eye(NUM_PATCHES))
    assert found["distance_px"] == [0.0]
    assert found["head_similarity"] is None, "one head has no pair"
    assert (found["on_diagonal"], found["within_one_patch"]) == (1.0, 1.0)
    assert found["effective_rank"] == pytest.approx(NUM_PATCHES)


def test_uniform_attention() -> None:
    found = one_layer(torch.full((NUM_PATCHES,) * 2, 1 / NUM_PATCHES), heads=3)
    places = [(16.0 * row, 8.0 * column) for row in range(3) for column in range(4)]
    expected = np.mean([math.dist(a, b) for a in places for b in places])
    assert found["distance_px"] == pytest.approx([expected] * 3)
    assert found["on_diagonal"] == pytest.approx(1 / NUM_PATCHES)
    assert found["effective_rank"] == pytest.approx(1.0, abs=1e-3)


def test_one_step_to_the_right() -> None:
    right = torch.zeros(NUM_PATCHES, NUM_PATCHES)
    for row in range(3):
        for column in range(4):
            right[4 * row + column, 4 * row + (column + 1) % 4] = 1  # the last column looks at the first
    found = one_layer(right)
    assert found["distance_px"] == pytest.approx([(3 * 8 + 24) / 4])
    assert found["on_diagonal"] == 0
    assert found["within_one_patch"] == pytest.approx(3 / 4)


def test_prefix_tokens_are_left_out_and_rows_sum_to_one_again() -> None:
    tokens = NUM_PATCHES + 2
    probs = torch.full((tokens, tokens), 0.5 / NUM_PATCHES)
    probs[:, :2] = 0.25
    rest = patches_only(probs.expand(1, 1, 1, -1, -1), 2)
    torch.testing.assert_close(rest[0, 0, 0], torch.full((NUM_PATCHES,) * 2, 1 / NUM_PATCHES))
    assert one_layer(probs, prefix=2)["on_diagonal"] == pytest.approx(1 / NUM_PATCHES)


def test_similarity_of_heads() -> None:
    same = torch.rand(1, 2, 1, 6, 6).softmax(-1)
    assert float(head_similarity(same.expand(-1, -1, 4, -1, -1))) == pytest.approx(1)
    apart = torch.stack([torch.eye(6).roll(shift, 0) for shift in range(3)]).expand(1, 2, -1, -1, -1)
    assert float(head_similarity(apart)) == pytest.approx(0, abs=1e-6)
    half = torch.stack([torch.eye(6), torch.eye(6), torch.eye(6).roll(1, 0)])[None, None]
    assert float(head_similarity(half)) == pytest.approx(1 / 3)
    assert math.isnan(float(head_similarity(same)))


def test_effective_rank() -> None:
    assert float(effective_rank(torch.tensor([2.0, 2.0, 0.0]))) == pytest.approx(2)
    rows = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double()
    found = feature_statistics(torch.cat([rows, torch.zeros(4000, 5)], 1) + 7)
    assert found.effective_rank == pytest.approx(3, rel=0.01)
    np.testing.assert_allclose(
        found.spectrum, np.linalg.eigvalsh(np.cov(rows.T))[::-1].tolist() + [0] * 5, atol=1e-4
    )
    few = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).double()
    expected = np.linalg.eigvalsh(np.cov(few.T))[::-1]
    np.testing.assert_allclose(feature_statistics(few).spectrum, expected, rtol=1e-6, atol=1e-7)


def test_share_of_the_bias() -> None:
    bias = torch.randn(2, 6, 6)
    logits = bias.expand(1, 3, -1, -1, -1)
    assert float(bias_share(logits, bias)) == pytest.approx(1)
    assert float(bias_share(logits, torch.zeros(2, 6, 6))) == 0
    both = bias + bias[..., torch.tensor([1, 0, 3, 2, 5, 4])]  # as much of one as of the other
    assert float(bias_share(both.expand(1, 1, -1, -1, -1), bias)) == pytest.approx(0.5)
    hidden = both.clone()
    hidden[..., 4:] -= 100
    unmasked = (torch.arange(6) < 4).expand(1, 6, 6)
    shown = both[..., :4].expand(1, 1, -1, -1, -1)
    expected = float(bias_share(shown, bias[..., :4]))
    found = float(bias_share(hidden.expand(1, 1, -1, -1, -1), bias, unmasked))
    assert found == pytest.approx(expected, rel=1e-5)


def test_share_of_the_bias_where_logits_are_as_large_as_a_mask() -> None:
    """Beside numpy, which takes pairs of one region of a shifted window of a 6 x 6 grid by their places."""
    torch.manual_seed(0)
    overrides = {"depths": [2], "num_heads": [2], "embed_dim": 16, "patch_size": 4, "window_size": 4}
    model = build_model(ModelConfig(name="swin_v2_tiny", img_size=24, overrides=overrides)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
        if "logit_scale" in name:
            parameter.data.fill_(math.log(100))
    _, shifted = seen(model, torch.randn(2, 3, 24, 24))
    assert shifted.bias is not None
    rest = shifted.logits[:, 0] - shifted.bias
    # The first window is whole, and both that reach over the grid are left out: no pair of it is masked.
    assert shifted.probs.shape[1] == 1
    assert float(rest.min()) < -50, "as large as the mask"
    variances = [x.double().numpy().var(-1) for x in (shifted.bias.expand_as(rest), rest)]
    expected = (variances[0] / (variances[0] + variances[1])).mean()
    found = bias_share(shifted.logits, shifted.bias, shifted.unmasked)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_masked_pairs_of_a_shifted_window() -> None:
    overrides = {"depths": [2], "num_heads": [2], "embed_dim": 16, "patch_size": 4, "window_size": 4}
    model = build_model(ModelConfig(name="swin_v2_tiny", img_size=32, overrides=overrides)).eval()
    plain, shifted = seen(model, torch.randn(1, 3, 32, 32))
    assert plain.unmasked is not None
    assert shifted.unmasked is not None
    assert bool(plain.unmasked.all())
    # Of the last window's four regions of 2 x 2 tokens each sees itself: the others get nothing of random weights.
    np.testing.assert_array_equal(shifted.unmasked, (shifted.probs[0] > 1e-20).all(1))
    assert shifted.unmasked.flatten(1).float().mean(1).tolist() == [1, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("few_rows", [0, measures.FEW_ROWS])
def test_cka_by_rows_and_by_channels(monkeypatch: pytest.MonkeyPatch, few_rows: int) -> None:
    monkeypatch.setattr(measures, "FEW_ROWS", few_rows)
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(200, 5, generator=generator) for _ in range(2))
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator))
    near = x[:, :2] + noise[:, :2]
    found = linear_cka([x, noise], [3 * x @ rotation + 2, noise, near])
    assert [len(row) for row in found] == [3, 3]
    assert found[0][0] == pytest.approx(1)
    assert found[1][1] == pytest.approx(1)
    assert max(found[0][1], found[1][0]) < 0.1
    # As numpy has it, in fp64.
    kernels = [(y - y.mean(0)) @ (y - y.mean(0)).T for y in (x.double().numpy(), near.double().numpy())]
    expected = (kernels[0] * kernels[1]).sum() / np.linalg.norm(kernels[0]) / np.linalg.norm(kernels[1])
    assert found[0][2] == pytest.approx(expected, rel=1e-5)


def test_distances_are_symmetric_and_in_pixels() -> None:
    distance = patch_distances((2, 2), (10.0, 5.0))
    assert distance[0].tolist() == pytest.approx([0, 5, 10, math.hypot(10, 5)])


def test_attention_of_a_vit_is_what_timm_extracts() -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2).eval()
    pixels = torch.randn(2, 3, 64, 64)
    maps = seen(model, pixels)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    extracted = AttentionExtract(model.model, method="hook")(pixels)
    assert len(maps) == len(extracted) == 2
    for found, (name, expected) in zip(maps, extracted.items(), strict=True):
        assert "attn" in name
        torch.testing.assert_close(found.probs[:, 0], expected, rtol=1e-4, atol=1e-6)
        assert (found.num_prefix_tokens, found.shape, found.stride_px) == (1, (4, 4), (16.0, 16.0))


def test_attention_of_swin_is_timms_and_masked_pairs_are_unseen() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": (2,),
        "num_heads": (2,),
    }
    theirs = TimmSwinV2(**shape, window_size=4, num_classes=0).eval()
    config = {"depths": [2], "num_heads": [2], "embed_dim": 16, "patch_size": 4, "window_size": 4}
    ours = build_model(
        ModelConfig(name="swin_v2_tiny", img_size=32, overrides=config | {"shared_bias": False})
    )
    ours.load_state_dict(ours.translate(theirs.state_dict()))
    pixels = torch.randn(3, 3, 32, 32)
    maps = seen(ours.eval(), pixels)
    extracted: list[Tensor] = []
    for block in theirs.layers[0].blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: extracted.append(output))
    theirs.forward_features(pixels)
    for found, expected in zip(maps, extracted, strict=True):
        torch.testing.assert_close(found.probs.flatten(0, 1), expected, rtol=1e-3, atol=1e-6)
        assert (found.shape, found.stride_px, found.probs.shape[1]) == ((4, 4), (4.0, 4.0), 4)
    last_window = maps[1].probs[:, 3]  # of the shifted block: four regions of 2 x 2
    assert float(last_window[..., 0, 2].max()) < 1e-30
    assert float(last_window[..., 0, 1].min()) > 0
    assert maps[0].bias is not None
    torch.testing.assert_close(maps[0].bias, ours.layers[0].blocks[0].attn.position_bias())


@pytest.mark.parametrize(
    "name", ["fd_vit_tiny_patch16", "swin_v2_tiny", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"]
)
def test_every_kind_of_model_is_seen_through_an_equal_path(name: str) -> None:
    size = 56 if name.startswith("eva") else 224 if "window7" in name else 64
    model = load_backbone(f"{name}@none", size)
    maps = seen(model, torch.randn(1, 3, size, size))
    assert len(maps) == 12
    for attention in maps:
        torch.testing.assert_close(attention.probs.sum(-1), torch.ones(attention.probs.shape[:-1]))


def test_an_exported_swin_at_another_size_keeps_the_scale_of_its_biases(tmp_path: Path) -> None:
    """At 64 px the second stage is one window of 8, the third one of 4; at 128 px both are 8."""
    shape = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1], "window_size": 8}
    save_file(create_model("swin_v2_tiny", img_size=64, **shape).state_dict(), tmp_path / "model.safetensors")
    described = {"name": "swin_v2_tiny", "img_size": 64, "overrides": shape}
    (tmp_path / "config.json").write_text(json.dumps({"model": described}))
    model = load_backbone(str(tmp_path), 128)
    assert isinstance(model, SwinTransformerV2)
    assert [stage.blocks[0].attn.window_size[0] for stage in model.layers] == [8, 8, 8]
    assert model.bias_windows == [8, 8, 4]


@pytest.mark.parametrize(("kind", "stages"), [("Swin", 2), ("Swinv2", 3)])
def test_windows_of_transformers(kind: str, stages: int, tmp_path: Path) -> None:
    """A third stage, 4 x 4 tokens, is one window of its own size."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = getattr(transformers, f"{kind}Config")(
        image_size=64, embed_dim=16, depths=[2] * stages, num_heads=[1, 2, 4][:stages], window_size=8
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    maps = seen(load_backbone(f"hf:{tmp_path}@pretrained", 64), torch.randn(1, 3, 64, 64))
    found = [(attention.shape, attention.probs.shape[1], attention.stride_px) for attention in maps]
    expected = [((8, 8), 4, (4, 4)), ((8, 8), 1, (8, 8)), ((4, 4), 1, (16, 16))]
    assert found == [each for each in expected[:stages] for _ in range(2)]


@pytest.mark.parametrize("kind", ["Swin", "Swinv2"])
def test_windows_of_transformers_that_hold_padding_are_left_out(kind: str, tmp_path: Path) -> None:
    """It is padded before the shift: rows of zeros in windows of the attention's input show where it lies."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = getattr(transformers, f"{kind}Config")(
        image_size=64, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=7
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    model = load_backbone(f"hf:{tmp_path}@pretrained", 64)  # 16 x 16 tokens in 3 x 3 windows
    whole: list[int] = []
    for module in model.modules():
        if type(module).__name__ == f"{kind}Attention":
            module.register_forward_pre_hook(
                lambda _, inputs: whole.append(int((inputs[0] != 0).any(-1).all(-1).sum()))
            )
        elif isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.bias)  # no token is zero but padding
    maps = seen(model, torch.randn(1, 3, 64, 64))
    assert whole[:2] == [4, 1]
    assert [attention.probs.shape[1] for attention in maps] == whole[:2]
    whole.clear()
    pixels = torch.randn(1, 3, 32, 32)  # 8 x 8 tokens: of those that are shifted none is whole
    with torch.no_grad():
        left_out = look_at_attention(model, pixels, model(pixels), lambda _, attention: None)
    assert whole[:2] == [1, 0]
    assert left_out == [None, "padding in each window"]


def test_layers_keep_their_numbers_where_some_are_left_out() -> None:
    """PVT's first stages look at fewer keys; the last has two blocks of eight."""
    model = load_backbone("pvt_v2_b0@none", 64)
    pixels, numbers = torch.randn(1, 3, 64, 64), []
    with torch.no_grad():
        left_out = look_at_attention(model, pixels, model(pixels), lambda number, _: numbers.append(number))
    assert numbers == [6, 7]
    assert (
        left_out
        == ["256 queries and 4 keys"] * 2
        + ["64 queries and 4 keys"] * 2
        + ["16 queries and 4 keys"] * 2
        + [None] * 2
    )


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 17, 6), "tokens"),  # a prefix token and 4 x 4
        ((2, 16, 6), "tokens without prefix"),
        ((2, 6, 8, 8), "first"),
        ((2, 8, 8, 6), "last"),
        ((2, 8, 8, 8), None),
        ((2, 6, 8, 4), None),
        ((2, 15, 6), None),
    ],
)
def test_what_blocks_give_as_maps(shape: tuple[int, ...], expected: str | None) -> None:
    tokens = torch.randn(shape)
    found = as_map(tokens, 1, (4, 4), None)
    if expected is None:
        assert found is None
        return
    values = tokens.numpy()
    if expected.startswith("tokens"):
        values = values[:, -16:].reshape(2, 4, 4, 6)
    if expected != "first":
        values = np.moveaxis(values, -1, 1)
    assert found is not None
    np.testing.assert_array_equal(found, values)


def test_blocks_with_as_many_channels_as_rows_are_laid_out_as_others() -> None:
    """The first two of FastViT give 64 channels of 64 x 64 places; timm says that all of its maps are NCHW."""
    model = load_backbone("fastvit_sa12@none", 256)
    blocks, image = model.list_blocks(), torch.randn(1, 3, 256, 256)
    assert len(blocks) == 12
    found = layouts(model, blocks, image, (8, 8))
    assert set(found) == {type(block) for block in blocks}
    assert not any(found.values())
    square = torch.randn(1, 8, 8, 8)
    assert as_map(square, 0, (8, 8), False) is square


def test_cka_keeps_the_numbers_of_blocks_where_some_are_left_out() -> None:
    torch.manual_seed(0)
    rows = {0: [torch.randn(8, 3), torch.randn(8, 3)], 2: [torch.randn(8, 4), torch.randn(8, 4)]}
    first = run._Found("a", "a", 32, num_blocks=3, rows=rows)
    second = run._Found("b", "b", 32, num_blocks=2, rows={1: rows[2]})
    found = run._cka(first, second)["layers"]
    assert [[value is None for value in row] for row in found] == [[True, False], [True, True], [True, False]]
    assert found[2][1] == pytest.approx(1)


def test_blocks_of_stages_in_lists_are_found() -> None:
    twins = load_backbone("twins_pcpvt_small@none", 224)
    assert [type(block).__name__ for block in twins.list_blocks()] == ["Block"] * 16
    hybrid = load_backbone("mobilenetv4_conv_small@none", 32)
    assert not hybrid.block_classes() & {torch.nn.Sequential, torch.nn.ModuleList}


@pytest.mark.parametrize(
    ("kind", "block"), [("ViT", "ViTLayer"), ("Swin", "SwinLayer"), ("Dinov2", "Dinov2Layer")]
)
def test_blocks_of_transformers_are_found(kind: str, block: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "Swin":
        sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    config = getattr(transformers, f"{kind}Config")(image_size=32, patch_size=4, **sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    blocks = load_backbone(f"hf:{tmp_path}@pretrained", 32).list_blocks()
    assert [type(each).__name__ for each in blocks] == [block] * 2


def test_what_is_left_out_is_said() -> None:
    shared: dict[str, Any] = {"layers": [{"patches": [7, 7]}], "num_layers": 3, "num_blocks": 0}
    few = [{"layer": 0, "reason": "9 queries and 4 keys"}, {"layer": 1, "reason": "9 queries and 4 keys"}]
    models = [
        shared | {"label": "a", "left_out": few, "blocks_left_out": []},
        shared | {"label": "b", "left_out": [], "blocks_left_out": [0, 2], "num_blocks": 4},
    ]
    assert run.notes({"models": models}) == [
        "a: 1 of 3 layers of attention are seen, without 0, 1: 9 queries and 4 keys",
        "a: no CKA, as its blocks are not known",
        "b: CKA without blocks 0, 2 of 4, whose layout is not known",
    ]
    alone = run.notes({"models": models[1:]})
    assert alone == [], "one model has no CKA"


def test_labels_lie_within_the_picture(tmp_path: Path) -> None:
    """As long as labels become, beside an axis that is shorter."""
    name = "n" * run.LONGEST_LABEL
    pair = {"layers": [[0.5]], "first": name, "second": name}
    picture_HW = np.array(Image.open(plots.similarity([pair], tmp_path)).convert("L"))
    for border in (picture_HW[0], picture_HW[-1], picture_HW[:, 0], picture_HW[:, -1]):
        assert (border == 255).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda map_BhNN, v: map_BhNN @ v, ""),
        (lambda map_BhNN, v: (v.mT @ map_BhNN.clone().float().mT).mT, ""),
        (lambda map_BhNN, v: torch.einsum("bhij,bhjd->bhid", map_BhNN, v), ""),
        (lambda map_BhNN, v: map_BhNN[..., : map_BhNN.shape[-1]] @ v, "by __getitem__"),
        (lambda map_BhNN, v: torch.einsum("bhij,gh->bgij", map_BhNN, torch.ones(2, 2)) @ v, "by einsum"),
        (lambda map_BhNN, v: (map_BhNN.permute(0, 2, 3, 1) @ torch.ones(2, 2))[..., 0] @ v, "by (__)?matmul"),
        (lambda map_BhNN, v: torch.cat([map_BhNN.chunk(2, 1)[0]] * 2, 1) @ v, "by chunk"),
        (lambda map_BhNN, v: map_BhNN.index_fill_(3, torch.tensor([0]), 0.0) @ v, "by index_fill_"),
        (lambda map_BhNN, v: map_BhNN.__setitem__((..., 0), 0.0) or map_BhNN @ v, "by __setitem__"),
    ],
)  # fmt: skip
def test_a_map_is_followed_to_the_values(change: Any, words: str) -> None:
    shown: list[Tensor] = []
    logits, v = torch.randn(1, 2, 5, 5), torch.randn(1, 2, 5, 3)
    expected = logits.softmax(-1) @ v
    with capture._SecondPath("it", lambda logits, probs: shown.append(probs), lambda reason: None):
        if words:
            with pytest.raises(UserError, match=words):
                change(logits.softmax(-1), v)
        else:
            torch.testing.assert_close(change(logits.softmax(-1), v), expected)
    assert shown


def test_labels_are_short_and_unlike() -> None:
    long = "vit_so400m_patch14_siglip_gap_896.pali2_10b_pt@weights_of_the_last_night.safetensors"
    names = [
        "a/export",
        "b/export/",
        "teacher:runs/a",
        "vit@/some/where/x.pth",
        "hf:/there/model@pretrained",
        long,
    ]
    found = labels(names)
    assert found[:5] == ["export (1)", "export (2)", "teacher:a", "vit@x.pth", "hf:model@pretrained"]
    assert re.fullmatch(r"vit_so400m.{,30}\.safetensors", found[5])


def test_panels_that_would_be_empty_are_not_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, folder, name: drawn.append(figure) or folder)  # type: ignore[func-returns-value]
    layers = [{"layer": 6, **one_layer(torch.eye(NUM_PATCHES), heads=2)}]
    for share, panels in ((None, 3), (0.5, 4)):
        layers[0]["bias_share"] = share
        plots.curves([{"label": "a", "layers": layers}], tmp_path)
        assert len(drawn[-1].axes) == panels
        assert all(axis.lines[0].get_xdata() == [6] for axis in drawn[-1].axes)
        assert not any(axis.get_legend() for axis in drawn[-1].axes), "no legend over the curves"


def test_what_cannot_be_done_is_refused_before_all_images_are_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looked: list[tuple[str, int]] = []
    look = run._look

    def recorded(one: Any, source: Any, options: Options) -> Any:
        looked.append((one.name, len(source)))
        return look(one, source, options)

    monkeypatch.setattr(run, "_look", recorded)
    options = Options(images="digits:test", num_images=4, img_size=32)
    with pytest.raises(UserError, match="ResNet has no attention"):
        diagnose(["test_vit@none", "resnet18@none"], tmp_path / "out", options)
    assert looked == [("resnet18@none", 1)]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*file/out cannot be written"):
        diagnose(["test_vit@none"], tmp_path / "file" / "out", options)
    assert len(looked) == 1


def test_large_windows_are_seen_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As together; of 2 x 3 windows those of the last column reach over the grid."""
    torch.manual_seed(0)
    overrides = {"depths": [2], "num_heads": [2], "embed_dim": 16, "patch_size": 4, "window_size": 5}
    model = build_model(ModelConfig(name="swin_v2_tiny", img_size=40, overrides=overrides)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    pixels = torch.randn(2, 3, 40, 48)
    found = {}
    for largest in (576, 24):
        monkeypatch.setattr(reference, "LARGEST_TOGETHER", largest)
        layers: list[LayerStatistics] = []

        def look(index: int, attention: AttentionMap, layers: list[LayerStatistics] = layers) -> None:
            layers += [LayerStatistics(attention.shape)] * (index == len(layers))
            layers[index].add(attention)
            assert not attention.is_image

        with torch.no_grad():
            look_at_attention(model, pixels, model(pixels), look)
        found[largest] = [layer.numbers() for layer in layers]
        assert [layer.num_images for layer in layers] == [2 if largest == 576 else 2 * 4] * 2
    for together, one_by_one in zip(*found.values(), strict=True):
        assert together.keys() == one_by_one.keys()
        for key, value in together.items():
            if key != "effective_rank":  # of the first windows, which are others
                assert one_by_one[key] == pytest.approx(value, rel=1e-5), key


def test_a_window_as_large_as_the_last_grid_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Swin's usually are: one of the four windows of the first stage has as many tokens as the second stage."""
    monkeypatch.setattr(reference, "LARGEST_TOGETHER", 24)
    overrides = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "patch_size": 4, "window_size": 5}
    model = build_model(ModelConfig(name="swin_v2_tiny", img_size=40, overrides=overrides)).eval()
    maps = seen(model, torch.randn(2, 3, 40, 40))
    found = [(attention.is_image, attention.stride_px, attention.probs.shape[1]) for attention in maps]
    assert found == [(False, (4.0, 4.0), 1)] * 4 + [(True, (8.0, 8.0), 1)]


def test_the_rank_of_large_windows_is_of_a_few_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    values = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda maps: taken.append(maps.shape) or values(maps))  # type: ignore[func-returns-value]
    monkeypatch.setattr(measures, "FEW_TOKENS", 3)
    layer = LayerStatistics((2, 2))
    for _ in range(2):
        probs = torch.rand(3, 2, 10, 4, 4)
        layer.add(AttentionMap(probs, probs.log(), None, 0, (2, 2), STRIDE_PX))
    assert taken == [(1, 4, 4, 4)]
    six = LayerStatistics((2, 2))
    probs = torch.rand(3, 2, 6, 4, 4)
    six.add(AttentionMap(probs, probs.log(), None, 0, (2, 2), STRIDE_PX))
    assert taken[1:] == [(1, 4, 4, 4)], "of six heads four, too"


@pytest.mark.slow
def test_models_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average maps of the first one, of 16 patches, are too large: those of the second are drawn alone."""
    monkeypatch.setattr(run, "LARGEST_MAP", 15)
    drawn = {}
    monkeypatch.setattr(
        plots,
        "average_maps",
        lambda maps, folder, draw=plots.average_maps: drawn.update(maps) or draw(maps, folder),
    )
    names = ["vit_tiny_patch16_224@none", "swin_v2_tiny@none"]
    options = Options(images="digits:test", num_images=4, batch_size=3, img_size=64)
    found = diagnose(names, tmp_path, options)
    assert json.loads((tmp_path / "diagnosis.json").read_text()) == json.loads(json.dumps(found))
    first, second = found["models"]
    assert (first["grid"], second["grid"]) == ([4, 4], [2, 2])
    assert [len(model["layers"]) for model in found["models"]] == [12, 12]
    assert list(drawn) == ["swin_v2_tiny@none"]
    assert run.notes(found) == [
        "vit_tiny_patch16_224@none: no average maps, which would be of more than 15 patches"
    ]
    assert len(first["features"]["raw"]["spectrum"]) == 192
    [pair] = found["cka"]
    assert np.array(pair["layers"]).shape == (12, 12)
    for name in (
        "attention_distance",
        "layers",
        "spectrum",
        "average_maps",
        "cka",
        "feature_colours",
        "query_maps",
    ):
        for suffix in ("png", "svg"):
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 1000, name
    page = (tmp_path / "diagnosis.html").read_text()
    assert page.count("<img src='data:image/png;base64,") == 7
    assert "<td>vit_tiny_patch16_224@none</td><td>64 px, 4 x 4</td><td>12 of 12</td>" in page
    assert not re.findall(r"(?:src|href)='(?!data:)", page), "it stands alone"
    for model in found["models"]:
        assert min(model["cost"]["seconds"].values()) > 0
        assert min(model["cost"]["peak_gib"].values()) > 0


def test_a_run_that_is_not_there_has_no_default_images() -> None:
    for name in ("runs/nowhere", "teacher:runs/nowhere"):
        with pytest.raises(UserError, match=r"runs/nowhere does not exist; expected the folder of a run"):
            diagnose([name], None, Options())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18@none", "ResNet has no attention among equally many queries and keys"),
        ("mobilevit_xxs@none", "ByobNet lets .* tokens or channels see each other in each of 4 groups"),
        ("xcit_nano_12_p8_224@none", "lets 32 tokens or channels see each other in each of 1 groups"),
        ("cait_xxs24_224@none", r"Cait changes its attention maps between softmax and values \(by linear\)"),
        ("convit_tiny@none", r"ConVit changes its attention maps between .* \(by another softmax\)"),
        ("vit_dwee_patch16_reg1_gap_256@none", "applies two attention maps to the same values"),
        ("botnet26t_256@none", r"ByobNet has no attention .* \(it has 3-d maps"),
        ("vit_tiny_patch16_224", "expected NAME@pretrained, NAME@PATH, or NAME@none"),
        ("teacher:nowhere", "no recipe.yaml there"),
        ("no_such_model@none", "no_such_model"),
    ],
)
def test_bad_input(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        diagnose([name], tmp_path, Options(images="digits:test", num_images=2, img_size=32))
