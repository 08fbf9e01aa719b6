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
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from timm.utils import AttentionExtract
from torch import Tensor

from fd_scale.config import ModelConfig
from fd_scale.diagnose import diagnose, measures
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
from fd_scale.diagnose.run import Options, load_backbone
from fd_scale.errors import UserError
from fd_scale.models import build_model, create_model

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
    shown = both[..., :4].expand(1, 1, -1, -1, -1)
    expected = float(bias_share(shown, bias[..., :4]))
    assert float(bias_share(hidden.expand(1, 1, -1, -1, -1), bias)) == pytest.approx(expected, rel=1e-5)


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
def test_models_side_by_side(tmp_path: Path) -> None:
    names = ["vit_tiny_patch16_224@none", "swin_v2_tiny@none"]
    options = Options(images="digits:test", num_images=4, batch_size=3, img_size=64)
    found = diagnose(names, tmp_path, options)
    assert json.loads((tmp_path / "diagnosis.json").read_text()) == json.loads(json.dumps(found))
    first, second = found["models"]
    assert (first["grid"], second["grid"]) == ([4, 4], [2, 2])
    assert [len(model["layers"]) for model in found["models"]] == [12, 12]
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
    assert "<td>vit_tiny_patch16_224@none</td>" in page
    assert not re.findall(r"(?:src|href)='(?!data:)", page), "it stands alone"
    for model in found["models"]:
        assert min(model["cost"]["seconds"].values()) > 0
        assert min(model["cost"]["peak_gib"].values()) > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18@none", "ResNet has no attention among equally many queries and keys"),
        ("mobilevit_xxs@none", "ByobNet lets .* tokens or channels see each other in each of 4 groups"),
        ("xcit_nano_12_p8_224@none", "lets 32 tokens or channels see each other in each of 1 groups"),
        ("vit_tiny_patch16_224", "expected NAME@pretrained, NAME@PATH, or NAME@none"),
        ("teacher:nowhere", "no recipe.yaml there"),
        ("no_such_model@none", "no_such_model"),
    ],
)
def test_bad_input(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        diagnose([name], tmp_path, Options(images="digits:test", num_images=2, img_size=32))
