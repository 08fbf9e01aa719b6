"""A detector as a whole: losses and detections against torchvision's, images that do not touch each other, views."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import roi_heads as their_heads
from torchvision.ops import poolers, roi_align

from fd_scale.benchmarks.detection import TorchvisionMaskRCNN
from fd_scale.config import DetectionConfig, ModelConfig
from fd_scale.data.instances import Detections, Instances, packed
from fd_scale.errors import UserError
from fd_scale.finetune.detection import DetectionModule, cascade, module, rpn
from fd_scale.finetune.detection.boxes import decoded
from fd_scale.finetune.detection.layers import SelfAttention
from fd_scale.finetune.detection.module import View, at_places, semantic_error

SIDE, CLASSES, PLACES = 64, 5, 7
COLOURS: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "img_size": SIDE}
MODELS = {
    "swin": ModelConfig(
        name="swin_v2_tiny", **COLOURS,
        overrides={
            "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4,
            "drop_path_rate": 0.5,
        },
    ),
    "vit": ModelConfig(
        name="fd_vit_tiny_patch16", **COLOURS, overrides={"embed_dim": 32, "depth": 2, "num_heads": 2}
    ),
}  # fmt: skip
CONFIGS = {
    "mask_rcnn": DetectionConfig(channels=16, rois_per_image=32),
    "boxes alone": DetectionConfig(channels=16, rois_per_image=32, masks=False, box_head="4conv1fc"),
    "cascade": DetectionConfig(head="cascade", channels=16, rois_per_image=32, box_head="4conv1fc"),
    "htc": DetectionConfig(head="htc", channels=16, rois_per_image=32, semantic_classes=PLACES),
}


def objects(count: int, seed: int, crowd: int = 0) -> Instances:
    """Discs in boxes, and a map of classes with places that have none; the last ones are crowds."""
    generator = torch.Generator().manual_seed(seed)
    sides = 8 + torch.rand(count, 2, generator=generator) * 24
    low = torch.rand(count, 2, generator=generator) * (SIDE - sides)
    boxes_N4 = torch.cat([low, low + sides], dim=1)
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    centres, radii = low + sides / 2, sides / 2
    parts = [
        (x - cx) ** 2 / rx**2 + (y - cy) ** 2 / ry**2 < 1
        for (cx, cy), (rx, ry) in zip(centres, radii, strict=True)
    ]
    masks = packed(torch.stack(parts)) if parts else torch.zeros(0, SIDE, SIDE // 8, dtype=torch.uint8)
    places = torch.randint(0, PLACES, (SIDE, SIDE), generator=generator, dtype=torch.uint8)
    places[: SIDE // 4] = 255
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return Instances(boxes_N4, labels, torch.arange(count) >= count - crowd, masks, places)


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def built(model: str, config: DetectionConfig) -> DetectionModule:
    """With weights under which classes and boxes differ from place to place."""
    torch.manual_seed(0)
    made = DetectionModule(MODELS[model], config, CLASSES, torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith(("rpn", "heads", "semantic")) and parameter.dim() > 1:
                parameter.normal_(std=0.5 / parameter[0].numel() ** 0.5)
            elif name.startswith(("rpn", "heads")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def losses_of(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in outputs.items() if value.requires_grad}


# ---- torchvision


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torchvision's pixels areas, as ours are, and its mask targets 0 or 1."""

    def masks(image: Tensor, rois: Tensor, size: Any, scale: float) -> Tensor:
        return (roi_align(image, rois, size, scale, 2, aligned=True) >= 0.5).float()

    monkeypatch.setattr(
        poolers, "roi_align", lambda *args, **kwargs: roi_align(*args, **kwargs, aligned=True)
    )
    monkeypatch.setattr(their_heads, "roi_align", masks)


def test_losses_and_detections_equal_torchvision(aligned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpn, "SAMPLED_ANCHORS", 10**6)
    config = replace(CONFIGS["mask_rcnn"], rois_per_image=10**6)
    ours = built("swin", config)
    peer = TorchvisionMaskRCNN(
        SimpleNamespace(module=ours, config=config, num_classes=CLASSES), everything=True
    )
    image, target = pictures(1), objects(4, seed=1)
    theirs = peer(image, [target])
    found = ours(image, [target], torch.zeros(1, dtype=torch.int64))
    assert set(theirs) == set(losses_of(found))
    for name, expected in theirs.items():
        assert expected > 1e-3, name
        # Means of some thousand fp32 terms, in another order.
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6, msg=name)

    shared = list(ours.neck.parameters())
    gradients, their_gradients = (
        torch.autograd.grad(torch.stack(list(losses.values())).sum(), shared)
        for losses in (losses_of(found), theirs)
    )
    for gradient, expected in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        assert expected.abs().max() > 1e-4

    ours.eval(), peer.eval()
    with torch.no_grad():
        expected = peer(image)
        detections = Detections(**ours(views=[View(image[0].float(), SIDE, SIDE, (1.0, 1.0), False)]))
    assert len(detections.scores_N) == len(expected["scores"]) > 20
    torch.testing.assert_close(detections.scores_N, expected["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(detections.boxes_N4, expected["boxes"], rtol=1e-4, atol=1e-3)
    assert torch.equal(detections.labels_N + 1, expected["labels"])
    torch.testing.assert_close(detections.masks_Nmm, expected["masks"][:, 0], rtol=1e-3, atol=1e-4)


# ---- what holds of every head


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns(model: str, name: str) -> None:
    config = CONFIGS[name]
    if name == "htc" and model == "swin":
        config = replace(config, global_attention=True)
    detector = built(model, config)
    outputs = detector(pictures(2), [objects(3, seed=1), objects(0, seed=2)], torch.tensor([5, -6]))
    losses = losses_of(outputs)
    assert all(value.dtype == torch.float32 and value > 0 for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
    assert without == []
    still = [name for name, parameter in detector.named_parameters() if not parameter.grad.any()]
    # A bias that a softmax cancels is the only one that may rest.
    assert [name for name in still if name.startswith(("rpn", "neck", "semantic", "heads.mask"))] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_to_learn_from_is_no_accident(name: str) -> None:
    """No objects, no masks, crowds alone: every layer runs, losses are finite, and those of masks 0."""
    detector = built("swin", CONFIGS[name])
    bare = objects(2, seed=3)._replace(
        masks_NHw=torch.zeros(2, 0, 0, dtype=torch.uint8), semantic_HW=torch.zeros(0, 0, dtype=torch.uint8)
    )
    for targets in ([objects(0, seed=2)], [objects(2, seed=3, crowd=2)], [bare]):
        detector.zero_grad(set_to_none=True)
        losses = losses_of(detector(pictures(1), targets, torch.tensor([7])))
        assert all(torch.isfinite(value) for value in losses.values())
        assert all(value == 0 for key, value in losses.items() if key.startswith("mask"))
        torch.stack(list(losses.values())).sum().backward()
        for key, parameter in detector.named_parameters():
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("where", ["backbone.patch_embed.proj.weight", "heads.box_heads.0.deltas.weight"])
def test_what_is_no_number_is_a_loss_that_says_so(where: str) -> None:
    """The trainer skips such a step and counts it; nothing breaks on the way."""
    detector = built("swin", CONFIGS["htc"])
    detector.get_parameter(where).data.view(-1)[0] = math.nan
    losses = losses_of(detector(pictures(1), [objects(2, seed=3)], torch.tensor([7])))
    assert not torch.isfinite(torch.stack(list(losses.values())).sum())


@pytest.mark.parametrize("name", ["mask_rcnn", "htc"])
def test_an_image_learns_alike_in_any_batch(name: str) -> None:
    """Losses of a batch are the sums of its images': 2 ranks are 1. Padding, and who else is there, change nothing."""
    detector = built("swin", CONFIGS[name])
    images, keys = pictures(3), torch.tensor([5, -6, 7])
    targets = [objects(5, seed=1, crowd=1), objects(0, seed=2), objects(17, seed=3)]
    together = losses_of(detector(images, targets, keys))
    alone = [losses_of(detector(images[row][None], [targets[row]], keys[row][None])) for row in range(3)]
    for key, value in together.items():
        # fp32, products of matrices of other heights.
        torch.testing.assert_close(value, sum(one[key] for one in alone), rtol=1e-4, atol=1e-6, msg=key)
    other = losses_of(detector(images, targets, keys + 1))
    assert other["class_1"] != together["class_1"], "another key samples other boxes"


def test_bf16_weights_have_fp32_boxes() -> None:
    detector = built("swin", CONFIGS["htc"]).to(torch.bfloat16)
    detector.dtype = torch.bfloat16
    seen: list[torch.dtype] = []
    for layer in (detector.heads.box_heads[0], detector.heads.mask_bodies[0], detector.rpn.hidden):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    losses = losses_of(detector(pictures(1), [objects(3, seed=1)], torch.tensor([5])))
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert set(seen) == {torch.bfloat16}
    with torch.no_grad():
        found = detector.eval()(views=[View(pictures(1)[0].float(), SIDE, SIDE, (1.0, 1.0), False)])
    assert found["boxes_N4"].dtype == found["scores_N"].dtype == torch.float32


# ---- cascade


def test_stages_begin_with_the_boxes_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """IoU 0.5, 0.6, 0.7; weights of the deltas grow, and those of the losses halve."""
    taken: list[tuple[Tensor, Tensor, float, cascade.Samples]] = []

    def spied(boxes: Tensor, valid: Tensor, *, iou: float, **rest: Any) -> cascade.Samples:
        samples = cascade_sampled(boxes, valid, iou=iou, **rest)
        taken.append((boxes, valid, iou, samples))
        return samples

    cascade_sampled = cascade.sampled
    monkeypatch.setattr(cascade, "sampled", spied)
    detector = built("swin", CONFIGS["cascade"])
    deltas: list[Tensor] = []
    for head in detector.heads.box_heads:
        head.register_forward_hook(lambda _, args, out: deltas.append(out[1]))
    detector(pictures(1), [objects(3, seed=1)], torch.tensor([5]))
    assert [iou for _, _, iou, _ in taken] == [0.5, 0.6, 0.7]
    for index, weights in ((0, (10, 10, 5, 5)), (1, (20, 20, 10, 10))):
        samples, (boxes, valid, _, _) = taken[index][3], taken[index + 1]
        expected = decoded(deltas[index][:, 0], samples.boxes_BR4[0], weights).clamp(0, SIDE)
        torch.testing.assert_close(boxes[0], expected)
        assert torch.equal(valid, samples.valid_BR & ~samples.given_BR), (
            "objects' own boxes are no predictions"
        )
    assert [stage.loss_weight for stage in cascade.STAGES["htc"]] == [1, 0.5, 0.25]


def test_what_is_an_object_rises_with_the_stage() -> None:
    truth = Instances(
        torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([3]), torch.tensor([False]),
        torch.zeros(1, 0, 0, dtype=torch.uint8), torch.zeros(0, 0, dtype=torch.uint8),
    )  # fmt: skip
    # IoU 0.55, 0.65, 0.75, 0.1.
    boxes = torch.tensor([[[0.0, 0, 20, 11], [0, 0, 20, 13], [0, 0, 20, 15], [0, 0, 20, 2], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True, True, True, False]])
    for iou, expected in ((0.5, 3), (0.6, 2), (0.7, 1)):
        found = cascade.sampled(boxes, valid, [truth], (torch.tensor([5]), 1), iou, 64, CLASSES)
        assert found.valid_BR.sum() == 5, "and the object's own"
        assert found.positive_BR.sum() == expected + 1
        assert found.given_BR.sum() == 1
        assert sorted(found.labels_BR[found.valid_BR].tolist()) == [3] * (expected + 1) + [CLASSES] * (
            4 - expected
        )


def test_masks_of_htc_know_of_those_before() -> None:
    """As mmdetection's: the mask of a stage reads the features of all before, and learns from the stage's own boxes."""
    detector = built("swin", CONFIGS["htc"]).eval()
    heads = detector.heads
    with torch.no_grad():
        maps, _, _ = detector._maps(pictures(1))
        features, _ = detector._features(maps, SIDE, SIDE)
        boxes, labels = torch.tensor([[[4.0, 4, 40, 30], [10, 20, 60, 64]]]), torch.tensor([1, 4])
        found = heads.masks(features, boxes, labels)
        x = features.cut(boxes, 14)
        chain = [heads.mask_bodies[0].convs(x)]
        for body in heads.mask_bodies[1:]:
            chain.append(body.convs(x + F.relu(body.from_before(chain[-1]))))
        expected = [
            predictor(hidden)[[0, 1], labels].sigmoid()
            for predictor, hidden in zip(heads.mask_predictors, chain, strict=True)
        ]
        torch.testing.assert_close(found, sum(expected) / 3)
        plain = features._replace(semantic_BChw=None)
        assert not torch.equal(features.cut(boxes, 7), plain.cut(boxes, 7)), "the places' classes help boxes"
        assert not torch.equal(x, plain.cut(boxes, 14)), "and masks"


# ---- places, attention, views


def test_the_semantic_loss_goes_over_places_with_a_class() -> None:
    detector = built("swin", CONFIGS["htc"])
    target = objects(1, seed=4)
    assert detector.semantic_size(SIDE, SIDE) == (8, 8)
    wanted = at_places(target.semantic_HW, 8, 8)
    assert torch.equal(wanted, target.semantic_HW[4::8, 4::8]), "the centre of each place"
    logits = torch.randn(1, PLACES, 8, 8)
    expected = -sum(
        float(logits[0, :, y, x].double().log_softmax(0)[int(wanted[y, x])])
        for y in range(8) for x in range(8) if wanted[y, x] != 255
    )  # fmt: skip
    assert float(semantic_error(logits, [target.semantic_HW])) == pytest.approx(expected, rel=1e-5)
    losses = losses_of(detector(pictures(1), [target], torch.tensor([5])))
    assert float(losses["semantic"].detach()) == pytest.approx(0.2 * 48 * 2, rel=0.3), (
        "about ln 7 at 48 places"
    )


def test_global_attention_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = SelfAttention(64), nn.MultiheadAttention(64, 2, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data * 10, torch.randn(192)
    ours.qkv.weight.data, ours.qkv.bias.data = theirs.in_proj_weight.data, theirs.in_proj_bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 64, 3, 5)
    tokens = F.layer_norm(x.flatten(2).mT, (64,))
    expected = x + theirs(tokens, tokens, tokens)[0].mT.unflatten(2, (3, 5))
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    assert SelfAttention(50)(torch.randn(1, 50, 3, 5)).shape == (1, 50, 3, 5), "no heads of 32 channels"
    with pytest.raises(UserError, match=r"detection.global_attention: the blocks of a plain ViT"):
        built("vit", replace(CONFIGS["htc"], global_attention=True))


def test_views_are_one_image() -> None:
    """A view and its mirror image give what the view alone gives, mirrored back, where the model is symmetric."""
    view = View(torch.zeros(3, 8, 8), 6, 8, (2.0, 1.5), True)
    boxes = torch.tensor([[1.0, 2, 3, 4]])
    assert view.from_image(boxes).tolist() == [[2.0, 3, 6, 6]]
    torch.testing.assert_close(view.of_image(view.from_image(boxes)), boxes)
    narrow = view._replace(width=7)
    assert narrow.from_image(boxes).tolist() == [[1.0, 3, 5, 6]]


@pytest.mark.parametrize("soft_nms", ["none", "linear", "gaussian"])
def test_boxes_that_were_moved_out_of_the_image_are_none(soft_nms: Any) -> None:
    config = replace(CONFIGS["mask_rcnn"], score_threshold=0.1, soft_nms=soft_nms, max_detections=1000)
    detector = built("swin", config).eval()
    view = View(pictures(1)[0].float(), SIDE, SIDE, (1.0, 1.0), False)
    with torch.no_grad():
        before = Detections(**detector(views=[view]))
        detector.heads.box_heads[0].deltas.bias[0] = 1e4  # boxes of the first class, far to the right
        after = Detections(**detector(views=[view]))
    others = before.labels_N != 0
    assert 0 < others.sum() < len(others)
    for found, expected in zip(after, before, strict=True):
        torch.testing.assert_close(found, expected[others], rtol=1e-4, atol=1e-4)


def test_a_mirrored_view_is_mirrored_back() -> None:
    detector = built("swin", replace(CONFIGS["mask_rcnn"], score_threshold=0.2)).eval()
    pixels = pictures(1)[0].float()
    with torch.no_grad():
        plain, mirrored = (
            Detections(**detector(views=[View(pixels, SIDE, SIDE, (1.0, 1.0), mirror)]))
            for mirror in (False, True)
        )
    assert len(plain.scores_N) > 5
    assert torch.equal(mirrored.scores_N, plain.scores_N)
    left, top, right, bottom = plain.boxes_N4.unbind(1)
    torch.testing.assert_close(mirrored.boxes_N4, torch.stack([SIDE - right, top, SIDE - left, bottom], 1))
    torch.testing.assert_close(mirrored.masks_Nmm, plain.masks_Nmm.flip(-1), rtol=1e-3, atol=1e-4)


def test_more_views_compete_and_share_masks() -> None:
    detector = built("swin", replace(CONFIGS["cascade"], score_threshold=0.1)).eval()
    image = pictures(1)[0].float()
    one = View(image, SIDE, SIDE, (1.0, 1.0), False)
    half = F.interpolate(image[None], size=(32, 32), mode="bilinear", antialias=True)[0]
    other = View(half, 32, 32, (0.5, 0.5), False)
    with torch.no_grad():
        alone = [Detections(**detector(views=[view])) for view in (one, other)]
        twice = Detections(**detector(views=[one, one]))
        both = Detections(**detector(views=[one, other]))
        none = DetectionModule.__call__(detector, views=[one, other._replace(height=1, width=1)])
    assert len(alone[0].scores_N) > 0
    for found, expected in zip(twice, alone[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    all_scores = torch.cat([one.scores_N for one in alone])
    assert torch.isin(both.scores_N, all_scores).float().mean() > 0.9, "they compete"
    assert both.scores_N.max() == all_scores.max()
    assert none["masks_Nmm"].shape[1:] == (28, 28)
    detector.config = replace(detector.config, score_threshold=0.999)
    with torch.no_grad():
        nothing = Detections(**detector(views=[one]))
    assert [len(part) for part in nothing] == [0, 0, 0, 0]
    assert module.SEMANTIC_WEIGHT == 0.2
