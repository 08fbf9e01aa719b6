"""Heads, pyramid, loss, prediction and metric of a segmentation, against others' code and plain loops."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.config import ModelConfig, SegmentationConfig
from fd_scale.data import IGNORED, Batch, open_source
from fd_scale.data.mask_transforms import whole_with_mask
from fd_scale.distributed import ALONE
from fd_scale.errors import UserError
from fd_scale.evaluation import ConfusionCounter, EvaluationSet, Predictor, Progress, segmentation_of
from fd_scale.evaluation.dense import offsets
from fd_scale.finetune.segmentation import SegmentationModule
from fd_scale.finetune.segmentation.heads import NORMS, FCNHead, UPerNetHead
from fd_scale.finetune.segmentation.module import cross_entropy_sum
from fd_scale.finetune.segmentation.pictures import colours, error_map, overlay
from fd_scale.models import at_trained_scale, create_model
from fd_scale.models.pyramid import Pyramid
from fd_scale.plan.counts import Meter

SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 4}
MODELS = {
    "swin": ModelConfig(name="swin_v2_tiny", img_size=32, overrides=SWIN | {"drop_path_rate": 0.5}),
    "fd_vit": ModelConfig(
        name="fd_vit_tiny_patch16", img_size=64, overrides={"embed_dim": 32, "depth": 4, "num_heads": 2}
    ),
    "timm vit": ModelConfig(name="test_vit", img_size=64),
    "timm swin": ModelConfig(
        name="swin_tiny_patch4_window7_224", img_size=56,
        overrides={"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    ),
}  # fmt: skip
CONFIG = SegmentationConfig(channels=16)


def randomise(module: nn.Module) -> None:
    """Weights and statistics of norms under which every part shows."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            positive = name.endswith(("running_var", "norm.weight"))
            tensor.copy_(0.5 + noise if positive else (noise - 0.5) / tensor[:1].numel() ** 0.5)


def to_theirs(name: str) -> str:
    """Our name of a weight of the head -> Transformers'."""
    part, _, rest = name.partition(".")
    rest = rest.replace("norm.", "batch_norm.")
    if part == "pooled":
        index, _, rest = rest.partition(".")
        return f"psp_modules.{index}.1.{rest}"
    return {
        "top": "bottleneck.", "lateral": "lateral_convs.", "smooth": "fpn_convs.", "fuse": "fpn_bottleneck.",
        "conv": "convs.0.", "classifier": "classifier.",
    }[part] + rest  # fmt: skip


def test_heads_equal_transformers() -> None:
    theirs_of = pytest.importorskip(
        "transformers.models.upernet.modeling_upernet", reason="needs the extra [hf]"
    )
    from transformers import UperNetConfig

    widths, sides = [8, 16, 32, 64], [24, 12, 6, 3]
    config = UperNetConfig(
        hidden_size=16, num_labels=5, auxiliary_channels=12, auxiliary_num_convs=1, use_auxiliary_head=True
    )
    generator = torch.Generator().manual_seed(1)
    maps = [
        torch.randn(2, width, side, side + 2, generator=generator)
        for width, side in zip(widths, sides, strict=True)
    ]
    pairs: list[tuple[nn.Module, nn.Module, Any, Any]] = [
        (UPerNetHead(widths, 16, 5, NORMS["batch"]), theirs_of.UperNetHead(config, widths), maps, maps),
        (FCNHead(32, 12, 5, NORMS["batch"]), theirs_of.UperNetFCNHead(config, widths), maps[2], maps),
    ]
    for ours, theirs, given, given_theirs in pairs:
        randomise(ours)
        copied = {to_theirs(name): tensor for name, tensor in ours.state_dict().items()}
        theirs.load_state_dict(copied)
        with torch.no_grad():
            found, expected = ours.eval()(given), theirs.eval()(given_theirs)
        assert expected.std() > 1e-2, "the weights show"
        # fp32: sums of some thousand products, in another order at most.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_class_scores_are_not_rounded_to_16_bits() -> None:
    head = FCNHead(8, 16, 5, NORMS["group"]).to(torch.bfloat16)
    map_BDhw = torch.randn(2, 8, 6, 7, dtype=torch.bfloat16)
    with torch.no_grad():
        hidden, logits = head.conv(map_BDhw).double(), head(map_BDhw)
        weight, bias = (each.double() for each in (head.classifier.weight, head.classifier.bias))
    torch.testing.assert_close(logits.double(), F.conv2d(hidden, weight, bias), rtol=1e-5, atol=1e-6)


def test_batch_norm_equals_torch() -> None:
    ours, theirs = NORMS["batch"](6), nn.BatchNorm2d(6)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(0)
    for _ in range(3):
        x = torch.randn(4, 6, 3, 5) * 3 + 1
        given, given_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = ours(given), theirs(given_theirs)
        weights = torch.randn_like(x)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        for pair in (
            (found, expected),
            (given.grad, given_theirs.grad),
            (ours.weight.grad, theirs.weight.grad),
        ):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)  # fp32 sums in another order
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    statistics = ours.running_var.clone()
    ours.to(torch.bfloat16)
    assert (ours.weight.dtype, ours.running_var.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(ours.running_var, statistics)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def mask2former(num_classes: int, queries: int = 7) -> Any:
    """A head of random weights over four maps of a batch of two, and the maps."""
    module = pytest.importorskip("fd_scale.finetune.segmentation.mask2former", reason="needs the extra [hf]")
    torch.manual_seed(0)
    widths, sides = [8, 16, 32, 64], [16, 8, 4, 2]
    maps = [torch.randn(2, width, side, side) for width, side in zip(widths, sides, strict=True)]
    return module, module.Mask2FormerHead(widths, 32, queries, num_classes), maps


def test_mask2former_is_transformers_behind_our_maps() -> None:
    """The whole model of Transformers with our weights and our maps in place of its backbone's."""
    module, head, maps = mask2former(num_classes=5)
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = head.config.to_dict() | {"backbone_config": {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4,
        "num_heads": [1] * 4, "out_features": [f"stage{stage}" for stage in range(1, 5)]}}  # fmt: skip
    theirs = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**config)).eval()
    names = {"pixel_decoder": "model.pixel_level_module.decoder", "transformer": "model.transformer_module"}
    copied = {}
    for name, tensor in head.state_dict().items():
        part, _, rest = name.partition(".")
        copied[f"{names.get(part, part)}.{rest}"] = tensor
    missing, unexpected = theirs.load_state_dict(copied, strict=False)
    assert unexpected == []
    assert all(name.startswith("model.pixel_level_module.encoder.") for name in missing)
    theirs.model.pixel_level_module.encoder.forward = lambda *_, **__: SimpleNamespace(feature_maps=maps)

    masks = torch.randint(0, 4, (2, 64, 64), dtype=torch.uint8)  # of five classes four
    masks[1, :32] = IGNORED
    masks[1, 32:] = 3
    layers = head.eval()(maps)
    found = head.loss_sum(layers, masks, [11, 12])
    expected, scores = 0.0, []
    for index, seed in enumerate((11, 12)):
        of_image = [map_BDhw[index : index + 1] for map_BDhw in maps]
        theirs.model.pixel_level_module.encoder.forward = lambda *_, given=of_image, **__: SimpleNamespace(
            feature_maps=given
        )
        present = [label for label in range(5) if (masks[index] == label).any()]
        torch.manual_seed(seed)
        outputs = theirs(
            torch.zeros(1, 3, 64, 64),
            mask_labels=[torch.stack([(masks[index] == label).float() for label in present])],
            class_labels=[torch.tensor(present)],
        )
        expected += float(outputs.loss.detach())
        probabilities = outputs.class_queries_logits.softmax(2)[0, :, :5]
        scores.append(
            (probabilities.mT @ outputs.masks_queries_logits[0].sigmoid().flatten(1)).view(5, 16, 16)
        )
    # fp32; images alone in place of a batch: matrix products in another order.
    assert found.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        module.class_scores(layers[-1]).exp(), torch.stack(scores), rtol=1e-4, atol=1e-6
    )


def test_mask2former_draws_points_by_image_and_leaves_the_global_generator() -> None:
    _, head, maps = mask2former(num_classes=5)
    masks = torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8)
    layers = head(maps)
    before = torch.get_rng_state()
    both = head.loss_sum(layers, masks, [3, 4]).item()
    assert torch.equal(torch.get_rng_state(), before)
    swapped = [{name: part.flip(0) for name, part in layer.items()} for layer in layers]
    assert head.loss_sum(swapped, masks.flip(0), [4, 3]).item() == pytest.approx(both, rel=1e-6)
    assert head.loss_sum(layers, masks, [5, 4]).item() != pytest.approx(both, rel=1e-6)
    masks[0] = IGNORED
    calls: list[Any] = []
    head.criterion.register_forward_pre_hook(lambda *given: calls.append(given))
    alone = head.loss_sum(layers, masks, [3, 4])
    assert len(calls) == 2, "as often as on other ranks, which ZeRO-3 waits for"
    gradients = torch.autograd.grad(alone, list(layers[0].values()))
    assert all((gradient[0] == 0).all() and gradient[1].abs().max() > 0 for gradient in gradients)
    rest = [{name: part[1:] for name, part in layer.items()} for layer in layers]
    assert alone.item() == pytest.approx(head.loss_sum(rest, masks[1:], [4]).item(), rel=1e-6)


@pytest.mark.parametrize("head", ["upernet", "linear", "mask2former"])
def test_a_frozen_backbone_stays_as_it_is(head: Any) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, head=head, channels=32, auxiliary_weight=0.0, frozen=True)
    module = SegmentationModule(MODELS["swin"], config, 5, torch.float32)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    masks = torch.randint(0, 5, (1, 32, 32), dtype=torch.uint8)
    module(images, masks, point_seeds=[0])["loss"].backward()
    learning = {name.split(".")[0] for name, each in module.named_parameters() if each.grad is not None}
    assert learning == {"head", "pyramid"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("head", ["upernet", "linear", pytest.param("mask2former", marks=pytest.mark.slow)])
def test_every_parameter_learns(name: str, head: Any) -> None:
    """Swin and ViT, ours and timm's: logits at a fourth of the size, and a gradient for every parameter."""
    torch.manual_seed(0)
    model = MODELS[name]
    config = CONFIG if head != "mask2former" else replace(CONFIG, channels=32, auxiliary_weight=0.0)
    config = replace(config, head=head)
    module = SegmentationModule(model, config, 5, torch.float32)
    side = model.size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    masks = torch.randint(0, 5, (2, side, side), dtype=torch.uint8)
    outputs = module(images, masks, point_seeds=[1, 2])
    finest = module.pyramid.sides[0] // (4 if "vit" in name else 1)
    assert outputs["logits"].shape == (2, 5, side // finest, side // finest)
    sum(value for name, value in outputs.items() if name != "logits").backward()
    without = [key for key, parameter in module.named_parameters() if parameter.grad is None]
    assert without == []
    assert torch.equal(module.eval()(images)["logits"], module(images)["logits"])


def test_the_maps_are_the_layers() -> None:
    """Swin: each stage, the last behind the model's own norm. Drop path and recomputation are those of `forward`."""
    torch.manual_seed(0)
    model = create_model("swin_v2_tiny", img_size=32, **SWIN, drop_path_rate=0.5, post_norm_gain_init=1.0)
    pyramid = Pyramid(model, None, NORMS["group"])
    images = torch.randn(2, 3, 32, 48)
    scale = torch.tensor([[0.0, 2.0]]).expand(len(model.drop_path_rates), 2)
    layers = model.intermediates(images, pyramid.layers, scale)
    torch.testing.assert_close(model.final_norm()(layers[-1]), model(images, scale), rtol=0, atol=0)
    assert not torch.equal(layers[-1], model.intermediates(images, [2])[0]), "drop path is applied"
    maps = pyramid(layers, 32, 48)
    assert [tuple(map_.shape[1:]) for map_ in maps] == [(16, 8, 12), (32, 4, 6), (64, 2, 3)]
    # Row 1, column 2 of the first map is token 1 * 12 + 2.
    torch.testing.assert_close(maps[0][:, :, 1, 2], F.layer_norm(layers[0][:, 14], (16,)))
    vit = create_model("fd_vit_tiny_patch16", img_size=64, embed_dim=32, depth=12, num_heads=2)
    pyramid = Pyramid(vit, None, NORMS["group"])
    assert pyramid.layers == [2, 5, 8, 11]
    shapes = [
        tuple(map_.shape[2:])
        for map_ in pyramid(vit.intermediates(torch.randn(1, 3, 64, 64), [2, 5, 8, 11]), 64, 64)
    ]
    assert shapes == [(16, 16), (8, 8), (4, 4), (2, 2)]
    with pytest.raises(UserError, match=r"segmentation.layers: a hierarchical model gives all"):
        Pyramid(model, [0, 1, 2, 2], NORMS["group"])


def test_the_loss_goes_over_pixels_with_a_class() -> None:
    logits = torch.randn(2, 3, 4, 4)
    masks = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    masks[0, :5] = 255
    upsampled = F.interpolate(logits, size=(8, 8), mode="bilinear").log_softmax(1).double()
    expected = sum(
        -float(upsampled[b, int(masks[b, y, x]), y, x])
        for b in range(2) for y in range(8) for x in range(8) if masks[b, y, x] != 255
    )  # fmt: skip
    # 88 pixels in fp32.
    assert float(cross_entropy_sum(logits, masks)) == pytest.approx(expected, rel=1e-5)
    assert float(cross_entropy_sum(logits, torch.full_like(masks, 255))) == 0


def predictor(**changes: Any) -> Predictor:
    settings: dict[str, Any] = {
        "num_classes": 3, "side": 16, "stride": 0.5, "whole": False, "multiple": 4, "short_side": 0, "scales": (1.0,),
        "flip_too": False, "fill": (0, 0, 0), "batch_size": 2,
    }  # fmt: skip
    return Predictor(**(settings | changes))


def network(side: int | None = 16) -> Any:
    """A convolution at a fourth of the resolution; not equal under mirroring, and dependent on where a window lies."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, kernel_size=12, stride=4, padding=4)

    def segment(images_BCHW: Tensor) -> Tensor:
        assert side is None or images_BCHW.shape[2:] == (side, side)
        assert images_BCHW.dtype == torch.float32
        with torch.no_grad():
            return conv(images_BCHW / 64 - 2)

    return segment


def image(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def plainly(settings: Predictor, pixels: Tensor, segment: Any) -> Tensor:
    """Probabilities by whole tensors, as one would write it down: no bands, no batches."""
    height, width = pixels.shape[1:]
    total = torch.zeros(3, height, width, dtype=torch.float64)
    for scale in settings.scales:
        factor = scale * (settings.short_side / min(height, width) if settings.short_side else 1)
        size = (round(height * factor), round(width * factor))
        for flipped in (False, True) if settings.flip_too else (False,):
            resized = pixels[None].float()
            if size != (height, width):
                resized = F.interpolate(resized, size=size, mode="bilinear", antialias=True)
            resized = resized.flip(-1) if flipped else resized
            window = settings.window(*size)
            sums, counts = torch.zeros(1, 3, *size), torch.zeros(size)
            for top in offsets(size[0], window[0], settings.stride):
                for left in offsets(size[1], window[1], settings.stride):
                    part = resized[:, :, top : top + window[0], left : left + window[1]]
                    padded = F.pad(part, (0, window[1] - part.shape[3], 0, window[0] - part.shape[2]))
                    logits = F.interpolate(segment(padded), size=window, mode="bilinear")
                    logits = logits[:, :, : part.shape[2], : part.shape[3]]
                    sums[:, :, top : top + window[0], left : left + window[1]] += logits
                    counts[top : top + window[0], left : left + window[1]] += 1
            logits = F.interpolate(sums / counts, size=(height, width), mode="bilinear").softmax(1)[0]
            total += logits.flip(-1) if flipped else logits
    return total


CASES = {
    "one size": {},
    "stride of a whole window": {"stride": 1.0},
    "resized": {"short_side": 28},
    "larger, several sizes, mirrored": {"short_side": 40, "scales": (0.5, 1.0, 1.25), "flip_too": True},
    "smaller than a window": {"short_side": 10},
    "whole": {"whole": True, "short_side": 22, "flip_too": True},
}


@pytest.mark.parametrize("band_bytes", [1, 1500, 2**28])
@pytest.mark.parametrize("case", CASES)
def test_prediction_equals_whole_tensors(case: str, band_bytes: int) -> None:
    """In bands of a row, of a few, and at once."""
    settings = predictor(**CASES[case], band_bytes=band_bytes)
    segment, pixels = network(None if settings.whole else 16), image(33, 46)
    expected = plainly(settings, pixels, segment)
    calls = 0

    def counted(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return segment(images)

    found = settings(pixels, counted)
    assert (found.shape, found.dtype) == ((33, 46), torch.uint8)
    assert calls == settings.num_calls(33, 46), "each window is computed once, however many bands need it"
    best, second = expected.topk(2, dim=0).values
    clear = best - second > 1e-4  # rounding decides the others
    assert clear.double().mean() > 0.99
    assert torch.equal(found[clear], expected.argmax(0)[clear].to(torch.uint8))
    assert len(found.unique()) > 1


def test_a_window_that_covers_the_image_is_the_whole_image() -> None:
    segment, pixels = network(), image(16, 16)
    covered = predictor(stride=1 / 3)(pixels, segment)
    assert torch.equal(covered, predictor(whole=True)(pixels, segment))
    assert torch.equal(
        covered, F.interpolate(segment(pixels[None].float()), size=16, mode="bilinear")[0].argmax(0)
    )


def test_windows_cover_a_length() -> None:
    assert offsets(40, 16, 0.5) == [0, 8, 16, 24]
    assert offsets(41, 16, 0.5) == [0, 8, 16, 24, 25]
    assert offsets(16, 16, 0.5) == offsets(9, 16, 0.5) == [0]


def test_the_metric_by_hand() -> None:
    """Class 0: 3 hits, union 5. Class 1: 1 hit, union 4. Class 2: predicted only, union 1. Class 3: nowhere."""
    counter = ConfusionCounter(4)
    truth = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 0, 1], [1, 0, 2, 3]], dtype=torch.uint8)
    counter.add(predicted, truth)
    found = counter.result(ALONE)
    np.testing.assert_allclose(found.class_iou, [3 / 5, 1 / 4, 0, np.nan])
    np.testing.assert_allclose(found.class_recall, [3 / 4, 1 / 3, np.nan, np.nan])
    assert found.metrics == pytest.approx(
        {"miou": (3 / 5 + 1 / 4 + 0) / 3, "macc": (3 / 4 + 1 / 3) / 2, "aacc": 4 / 7}
    )
    assert found.worst_classes(5) == [1, 0]
    written = found.to_json(["a", "b", "c", "d"])
    assert written["pixels"] == 7
    assert written["classes"][3] == {"label": 3, "name": "d", "pixels": 0, "iou": None, "acc": None}
    with pytest.raises(UserError, match="no pixel of its masks has a class"):
        ConfusionCounter(2).result(ALONE)


def test_an_evaluation_goes_on_where_one_was_killed(write_shapes: Callable[..., str], tmp_path: Path) -> None:
    images = EvaluationSet(
        source=open_source(write_shapes(tmp_path / "shapes")), transform=whole_with_mask, batch_size=1, num_workers=0
    )  # fmt: skip
    progress = Progress(file=tmp_path / "run.progress", of="this", every=2)
    segment, settings = network(), predictor()
    calls: list[int] = []

    def killed_at(last: float) -> Callable[..., dict[str, Tensor]]:
        calls.clear()

        def forward(images_BCHW: Tensor) -> dict[str, Tensor]:
            calls.append(1)
            if len(calls) > last:
                raise KeyboardInterrupt
            return {"logits": segment(images_BCHW)}

        return forward

    whole = segmentation_of(images, settings, killed_at(math.inf), ALONE)
    per_image = [settings.num_calls(*images.source.read(index)[0].size[::-1]) for index in range(8)]
    assert len(calls) == sum(per_image)
    with pytest.raises(KeyboardInterrupt):
        segmentation_of(images, settings, killed_at(sum(per_image[:5])), ALONE, progress)
    assert [each["num_images"] for each in progress.read()] == [2, 4], "written after every second image"
    resumed = segmentation_of(images, settings, killed_at(math.inf), ALONE, progress)
    assert len(calls) == sum(per_image[4:])
    np.testing.assert_array_equal(resumed.matrix, whole.matrix)
    assert replace(progress, of="another").read() == []


def test_the_metric_equals_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.classification", reason="needs the extra [dev]")
    theirs = torchmetrics.MulticlassJaccardIndex(7, average=None, ignore_index=255)
    counter = ConfusionCounter(7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        truth = torch.randint(0, 6, (9, 11), generator=generator, dtype=torch.uint8)
        predicted = torch.where(torch.rand(9, 11, generator=generator) < 0.6, truth, (truth + 1) % 6)
        truth[:2] = 255
        counter.add(predicted, truth)
        theirs.update(predicted[None].long(), truth[None].long())
    found, expected = counter.result(ALONE), theirs.compute().numpy()
    union = ~np.isnan(found.class_iou)
    assert union.tolist() == [True] * 6 + [False], "class 6 is nowhere; torchmetrics calls that 0"
    np.testing.assert_allclose(found.class_iou[union], expected[union], rtol=1e-6)  # theirs is fp32
    assert found.metrics["miou"] == pytest.approx(float(expected[union].mean()), rel=1e-6)


def test_pictures(make_recipe: Any, write_shapes: Any, tmp_path: Any) -> None:
    from PIL import Image

    from fd_scale.api import build_task

    assert len(np.unique(colours(), axis=0)) == 256
    truth, predicted = np.array([[0, 1, 255]]), np.array([[0, 2, 2]])
    np.testing.assert_array_equal(error_map(predicted, truth)[0], [[255] * 3, [220, 30, 30], [0] * 3])
    page = overlay(Image.new("RGB", (30, 20), "white"), np.zeros((20, 30), dtype=np.uint8), ["ground"])
    assert page.width > 60
    assert page.getpixel((3, 3)) == tuple((255 + value) // 2 for value in colours()[0].tolist())
    recipe = make_recipe(
        "segmentation", data__train=write_shapes(tmp_path / "shapes"), segmentation__num_classes=3
    )
    task = build_task(recipe, None)
    batch = Batch(
        torch.zeros(6, 3, 24, 24, dtype=torch.uint8),
        torch.ones(6, 24, 24, dtype=torch.uint8),
        torch.arange(6),
        0,
    )
    pictures = task.pictures(batch, task.module(**task.inputs(batch)))
    assert pictures["image_truth_prediction_error"].shape == (4, 24, 4 * 24, 3)


@pytest.mark.parametrize("side", [512, 4096])
def test_memory_does_not_grow_with_classes_times_pixels(side: int) -> None:
    """Counted on the meta device; all scores of 4096 x 4096 pixels would take 9.4 GiB."""
    pixels = torch.zeros(3, side, side, dtype=torch.uint8, device="meta")
    settings = predictor(num_classes=150, side=512, stride=2 / 3)

    def segment(images_BCHW: Tensor) -> Tensor:
        return torch.zeros(len(images_BCHW), 150, 128, 128, device="meta")

    with Meter([pixels]) as meter:
        assert settings(pixels, segment).shape == (side, side)
    # Four to five tensors of a band, the image in fp32, and logits of two rows of windows.
    assert meter.peak < 1.4 * 2**30


@pytest.mark.parametrize("shared_bias", [True, False])
def test_another_size_has_the_biases_that_were_trained(shared_bias: bool) -> None:
    """At 32 px the windows of 4 cover the later stages' maps of 4 and 2."""
    trained = replace(MODELS["swin"], overrides=SWIN | {"shared_bias": shared_bias})
    larger = replace(trained, img_size=64, overrides=trained.overrides | {"window_size": 8})
    before, after = (
        create_model(config.name, img_size=config.size, **config.overrides)
        for config in (trained, at_trained_scale(trained, larger))
    )
    randomise(before)
    after.load_state_dict(before.state_dict())
    sides = ([4, 4, 2], [8, 8, 4])
    for old_side, new_side, old, new in zip(*sides, before.layers, after.layers, strict=True):
        old_hNN, new_hNN = (
            (stage if shared_bias else stage.blocks[0].attn).position_bias() for stage in (old, new)
        )
        old_hyx, new_hyx = (
            old_hNN[:, 0].unflatten(1, (old_side, -1)),
            new_hNN[:, 0].unflatten(1, (new_side, -1)),
        )
        torch.testing.assert_close(new_hyx[:, :old_side, :old_side], old_hyx)
        assert not torch.allclose(new_hyx[:, old_side:, :old_side], old_hyx), "it goes on beyond them"
    pretrained = replace(trained, overrides=trained.overrides | {"pretrained_window_size": [6, 6, 3]})
    assert at_trained_scale(pretrained, larger).overrides["pretrained_window_size"] == [6, 6, 3]
    oblong = replace(trained, overrides=trained.overrides | {"window_size": [2, 4]})
    with pytest.raises(UserError, match="windows of 2 x 4 are measured as they were trained"):
        at_trained_scale(oblong, larger)
