"""Anchors, coding, assignment, sampling, pooling, masks, suppression of a detector, against torchvision and loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, box_iou, nms, roi_align

from fd_scale.data.instances import Instances, packed
from fd_scale.finetune.detection import pooling
from fd_scale.finetune.detection.boxes import (
    MAX_LOG_RATIO,
    Matches,
    chosen,
    clipped,
    counter_hash,
    decoded,
    encoded,
    matched,
    regression_errors,
    softly_suppressed,
    suppressed,
)
from fd_scale.finetune.detection.pooling import levels_of, mask_targets, pooled
from fd_scale.finetune.detection.rpn import anchors_of


def boxes(count: int, size: int, seed: int = 0, least: float = 2.0, most: float = 0.5) -> Tensor:
    """fp32 (count, 4) inside of a square."""
    generator = torch.Generator().manual_seed(seed)
    sides = least + torch.rand(count, 2, generator=generator) * size * most
    low = torch.rand(count, 2, generator=generator) * (size - sides).clamp(min=0)
    return torch.cat([low, (low + sides).clamp(max=size)], dim=1)


def instances(boxes_N4: Tensor, crowd: list[int] | None = None, **parts: Any) -> Instances:
    count = len(boxes_N4)
    crowd_N = torch.zeros(count, dtype=torch.bool)
    crowd_N[crowd or []] = True
    defaults = {
        "labels_N": torch.arange(count) % 3, "crowd_N": crowd_N,
        "masks_NHw": torch.zeros(count, 0, 0, dtype=torch.uint8), "semantic_HW": torch.zeros(0, 0, dtype=torch.uint8),
    }  # fmt: skip
    return Instances(boxes_N4=boxes_N4, **(defaults | parts))


def test_anchors_equal_torchvision() -> None:
    strides = [4, 8, 16, 32, 64]
    theirs = AnchorGenerator(tuple((8 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * 5)
    maps = [torch.zeros(1, 1, 256 // stride, 320 // stride) for stride in strides]
    [expected] = theirs(ImageList(torch.zeros(1, 3, 256, 320), [(256, 320)]), maps)
    found = [
        anchors_of(*map_.shape[2:], stride, torch.device("cpu"))
        for map_, stride in zip(maps, strides, strict=True)
    ]
    assert torch.equal(torch.cat(found), expected)
    # A ViT of patch 14: the second place lies 3.5 px further.
    odd = anchors_of(1, 2, 3.5, torch.device("cpu"))
    assert torch.equal(odd[3:] - odd[:3], torch.tensor([3.5, 0.0, 3.5, 0.0]).expand(3, 4))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (30.0, 30.0, 15.0, 15.0)])
def test_coding_equals_torchvision(weights: tuple[float, ...]) -> None:
    theirs = BoxCoder(weights)
    truth, references = boxes(50, 100, seed=1), boxes(50, 100, seed=2)
    deltas = encoded(truth, references, weights)
    expected = theirs.encode_single(truth, references)
    # The same formulas in fp32; centres are sums in another order.
    torch.testing.assert_close(deltas, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        decoded(deltas, references, weights), theirs.decode_single(deltas, references), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(decoded(deltas, references, weights), truth, rtol=1e-5, atol=1e-3)
    huge = torch.full((50, 4), 1e4)
    sides = decoded(huge, references, weights)[:, 2:] - decoded(huge, references, weights)[:, :2]
    torch.testing.assert_close(
        sides, (references[:, 2:] - references[:, :2]) * math.exp(MAX_LOG_RATIO), rtol=1e-3, atol=1
    )
    by_class = deltas[:, None].expand(-1, 7, 4).to(torch.bfloat16)
    assert decoded(by_class, references[:, None], weights).dtype == torch.float32, (
        "coordinates are never bf16"
    )
    assert torch.equal(clipped(torch.tensor([[-1.0, 2, 30, 50]]), 40, 20), torch.tensor([[0.0, 2, 20, 40]]))


@pytest.mark.parametrize(
    ("below", "above", "best_too"), [(0.3, 0.7, True), (0.5, 0.5, False), (0.6, 0.6, False)]
)
def test_assignment_equals_torchvision(below: float, above: float, best_too: bool) -> None:
    """More objects than are compared at a time; objects twice, so that overlaps are equal."""
    objects = torch.cat([boxes(21, 100, seed=3), boxes(21, 100, seed=3)[:5]])
    anchors = torch.cat([boxes(3000, 100, seed=4), objects[:3] + 0.5])
    found = matched(anchors, instances(objects), below=below, above=above, best_too=best_too)
    theirs = Matcher(above, below, allow_low_quality_matches=best_too)(box_iou(objects, anchors))
    positive = theirs >= 0
    assert torch.equal(found.positive_M, positive)
    assert torch.equal(found.negative_M, theirs == Matcher.BELOW_LOW_THRESHOLD)
    assert torch.equal(found.object_M[positive], theirs[positive])
    assert positive.sum() >= 3
    assert found.object_M.max() == 20, "of two equal objects the first, and beyond the first sixteen"


def test_crowds_are_neither_object_nor_background() -> None:
    objects = instances(torch.tensor([[0.0, 0, 10, 10], [20, 20, 60, 60]]), crowd=[1])
    around = torch.tensor(
        [[0.0, 0, 10, 10], [22, 22, 40, 40], [20, 20, 60, 60], [8, 8, 26, 26], [48, 30, 64, 40.0]]
    )
    found = matched(around, objects, below=0.3, above=0.7, best_too=True)
    assert found.positive_M.tolist() == [True, False, False, False, False]
    # The last one lies in the crowd by 12 / 16 of its area, the one before by 1 / 9.
    assert found.negative_M.tolist() == [False, False, False, True, False]
    assert set(found.object_M[found.positive_M].tolist()) == {0}
    none = matched(around, instances(torch.zeros(0, 4)), below=0.3, above=0.7, best_too=True)
    assert not none.positive_M.any()
    assert none.negative_M.all()


def test_an_object_without_any_overlap_makes_no_box_an_object() -> None:
    found = matched(
        torch.tensor([[0.0, 0, 4, 4]]),
        instances(torch.tensor([[50.0, 50, 60, 60]])),
        below=0.3,
        above=0.7,
        best_too=True,
    )
    assert not found.positive_M.any()


def test_the_sample_depends_on_the_key_alone() -> None:
    positive = torch.zeros(1000, dtype=torch.bool)
    positive[::20] = True  # 50
    neither = torch.zeros_like(positive)
    neither[1::20] = True
    matches = Matches(torch.zeros(1000, dtype=torch.int64), positive, ~positive & ~neither)
    noise = counter_hash(torch.tensor(-77), 3, 1000)
    assert noise.min() >= 0
    assert len(noise.unique()) == 1000
    assert torch.equal(noise[:10], counter_hash(torch.tensor(-77), 3, 10)), (
        "of a place, however many there are"
    )
    picked = chosen(matches, noise, 64, 16)
    assert picked.index_R.shape == (64,)
    assert picked.valid_R.all()
    assert picked.positive_R.sum() == 16
    assert picked.positive_R[:16].all(), "they come first"
    assert len(picked.index_R.unique()) == 64
    assert matches.positive_M[picked.index_R[:16]].all()
    assert matches.negative_M[picked.index_R[16:]].all()
    assert torch.equal(picked.index_R, chosen(matches, noise, 64, 16).index_R)
    others = [
        chosen(matches, counter_hash(torch.tensor(key), stream, 1000), 64, 16)
        for key, stream in ((-76, 3), (-77, 4))
    ]
    for other in others:
        assert set(other.index_R.tolist()) != set(picked.index_R.tolist())
    few = chosen(matches._replace(positive_M=positive & (torch.arange(1000) < 60)), noise, 64, 16)
    assert few.positive_R.sum() == 3, "background fills up"
    assert few.valid_R.sum() == 64
    empty = chosen(Matches(matches.object_M, neither, neither & False), noise, 64, 16)
    assert (empty.valid_R.sum(), empty.positive_R.sum()) == (16, 16), "and where there is none, nothing does"


def test_every_box_is_chosen_equally_often() -> None:
    matches = Matches(
        torch.zeros(40, dtype=torch.int64),
        torch.zeros(40, dtype=torch.bool),
        torch.ones(40, dtype=torch.bool),
    )
    counts = torch.zeros(40)
    for key in range(2000):
        counts[chosen(matches, counter_hash(torch.tensor(key), 0, 40), 10, 2).index_R] += 1
    # 500 on average, deviation sqrt(2000 / 4 * 3 / 4) = 19; five of them.
    assert (counts - 500).abs().max() < 97


def test_errors_of_background_are_nothing() -> None:
    """Boxes without area have no deltas; neither the loss nor its gradient may become NaN."""
    deltas = torch.randn(2, 4, requires_grad=True)
    references = torch.tensor([[0.0, 0, 10, 10], [0, 0, 0, 0]])
    truth = torch.tensor([[1.0, 1, 12, 9], [0, 0, 0, 0]])
    errors = regression_errors(deltas, references, truth, (1, 1, 1, 1), torch.tensor([True, False]), 1.0)
    errors.sum().backward()
    assert errors[1] == 0
    assert deltas.grad is not None
    assert deltas.grad[0].abs().min() > 0
    assert torch.equal(deltas.grad[1], torch.zeros(4))


def test_pooling_equals_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the levels of theirs; their samples lie half a pixel away, which `aligned` puts right."""
    import torchvision.ops.poolers as theirs_of

    monkeypatch.setattr(
        theirs_of, "roi_align", lambda *args, **kwargs: roi_align(*args, **kwargs, aligned=True)
    )
    torch.manual_seed(0)
    strides = [4.0, 8.0, 16.0, 32.0]
    maps = [torch.randn(2, 3, int(640 / stride), int(512 / stride)) for stride in strides]
    rois = torch.stack([boxes(40, 512, seed=5, most=0.98), boxes(40, 512, seed=6, most=0.3)])
    assert len(levels_of(rois.flatten(0, 1), strides).unique()) == 4
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = theirs(dict(zip("0123", maps, strict=True)), list(rois), [(640, 512)] * 2)
    found = pooled(maps, strides, rois, 7)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert pooled(maps, strides, rois[:, :0], 7).shape == (0, 3, 7, 7)
    torch.testing.assert_close(
        pooled(maps[1:2], [8.0], rois, 7)[:1],
        roi_align(maps[1][:1], [rois[0, :1]], 7, 1 / 8, 2, aligned=True),
    )


def test_levels_at_the_borders() -> None:
    # 223.9999 is 224 px but for the rounding of edges.
    sides = torch.tensor([1.0, 111.9, 112, 223.9, 223.9999, 447.9, 448, 5000])
    rois = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert levels_of(rois, [4, 8, 16, 32]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert levels_of(torch.zeros(1, 4), [4, 8]).tolist() == [0], "filling has no area"


def test_mask_targets_equal_roi_align() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(5, 1, 6, 7, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(50, 61), mode="bilinear")[:, 0] > 0.5
    rois = boxes(30, 50, seed=7, least=0.5)
    objects = torch.arange(30) % 5
    found = mask_targets(packed(masks), 61, objects, rois, 14)
    rois_R5 = torch.cat([objects[:, None].float(), rois], dim=1)
    values = roi_align(masks[:, None].float(), rois_R5, 14, 1.0, pooling.SAMPLES, aligned=True)[:, 0]
    differ = found != (values >= 0.5)
    # Where a sum of four bilinear samples is 0.5 but for its rounding, either is right.
    assert not (differ & ((values - 0.5).abs() > 1e-5)).any()
    assert 0.2 < found.float().mean() < 0.8


def plain_soft_nms(
    boxes_M4: Tensor, scores_M: Tensor, labels_M: Tensor, method: str
) -> list[tuple[float, int]]:
    """As in the paper's figure 2, a class after the other, in fp64."""
    result = []
    for label in labels_M.unique().tolist():
        left = {int(index): float(scores_M[index]) for index in torch.where(labels_M == label)[0]}
        while left:
            best = max(left, key=lambda index: left[index])
            result.append((left.pop(best), best))
            for index in left:
                overlap = float(box_iou(boxes_M4[best][None].double(), boxes_M4[index][None].double()))
                if method == "gaussian":
                    left[index] *= math.exp(-(overlap**2) / 0.5)
                elif overlap > 0.5:
                    left[index] *= 1 - overlap
    return sorted(result, reverse=True)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_equals_a_loop(method: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    around = boxes(90, 60, seed=8, least=20)
    scores, labels = torch.rand(90, generator=generator), torch.randint(0, 3, (90,), generator=generator)
    index, found = softly_suppressed(around, scores, labels, method, 60)
    expected = plain_soft_nms(around, scores, labels, method)[:60]
    assert index.tolist() == [number for _, number in expected]
    # A product of some tens of factors in fp32.
    np.testing.assert_allclose(found.numpy(), [score for score, _ in expected], rtol=1e-4)
    assert (found < scores[index] - 0.05).sum() > 5, "some scores fall"
    nothing = softly_suppressed(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), method, 5
    )
    assert [len(part) for part in nothing] == [0, 0]


def test_suppression_keeps_classes_apart() -> None:
    twice = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1)
    scores, labels = torch.tensor([0.1, 0.9, 0.9, 0.5]), torch.tensor([0, 0, 1, 1])
    assert suppressed(twice, scores, labels, 0.5).tolist() == [1, 2], "equal scores in their order"


def test_suppression_of_the_thousandth_class_is_that_of_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    around = boxes(240, 2000, seed=1, least=4, most=0.006)
    around = torch.cat([around, around + 1.5 * torch.randn(240, 4, generator=generator).clamp(-1, 1)])
    scores = torch.rand(480, generator=generator)
    labels = torch.randint(1000, 1200, (240,), generator=generator).repeat(2)
    expected = set()
    for label in labels.unique():
        own = torch.where(labels == label)[0]
        expected |= set(own[nms(around[own], scores[own], 0.5)].tolist())
    assert set(suppressed(around, scores, labels, 0.5).tolist()) == expected
    assert 240 < len(expected) < 480, "some are dropped"
