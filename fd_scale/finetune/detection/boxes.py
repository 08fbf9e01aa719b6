"""Arithmetic of boxes: their coding, which object each one is near, a computed choice of some, and suppression.

All of it is fp32: bf16 would round a coordinate of 1000 px to a multiple of 4.

Shape legend: M = boxes, N = objects, R = chosen boxes; 4 = left, top, right, bottom in pixels, or the four deltas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_area, box_iou

from fd_scale.data.instances import Instances

CROWD_SHARE = 0.7
"""A box of which so much lies in a crowd is no background. Source: Detectron's `TRAIN.CROWD_FILTER_THRESH`."""
MAX_LOG_RATIO = math.log(1000 / 16)
"""Of a side to that of its reference; larger ones come from untrained weights and would overflow."""
SOFT_NMS_SIGMA = 0.5
NMS_IOU = 0.5
OBJECTS_AT_A_TIME = 16
"""Whose overlaps with all anchors are held at a time: images of 1536 px have 590,000 anchors."""

SoftNMS = Literal["none", "linear", "gaussian"]


def encoded(boxes_M4: Tensor, references_M4: Tensor, weights: Sequence[float]) -> Tensor:
    """Returns boxes as deltas from references, fp32 (..., 4): shifts by the reference's sides, logarithms of ratios.

    Args:
        boxes_M4: (..., 4).
        references_M4: likewise, with sides above 0.
        weights: factor of each of the four deltas.

    Source: Girshick et al. 2014 (arXiv:1311.2524), appendix C.
    """
    centres, sizes = _centres_and_sizes(boxes_M4)
    reference_centres, reference_sizes = _centres_and_sizes(references_M4)
    shifts = (centres - reference_centres) / reference_sizes
    deltas_M4 = torch.cat([shifts, (sizes / reference_sizes).log()], dim=-1)
    return deltas_M4 * _on(deltas_M4, weights)


def decoded(deltas_M4: Tensor, references_M4: Tensor, weights: Sequence[float]) -> Tensor:
    """Returns the boxes that deltas mean, fp32 (..., 4); the inverse of `encoded`.

    What is not a number becomes 0: a step that went wrong has a loss that says so, and its boxes are used as indices.
    """
    deltas_M4 = deltas_M4.float() / _on(deltas_M4, weights)
    centres, sizes = _centres_and_sizes(references_M4)
    moved = centres + deltas_M4[..., :2] * sizes
    half = 0.5 * deltas_M4[..., 2:].clamp(max=MAX_LOG_RATIO).exp() * sizes
    return torch.cat([moved - half, moved + half], dim=-1).nan_to_num(0.0)


def clipped(boxes_M4: Tensor, height: float, width: float) -> Tensor:
    """Returns boxes (..., 4) without what lies outside of an image."""
    x = boxes_M4[..., 0::2].clamp(0, width)
    y = boxes_M4[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def _centres_and_sizes(boxes_M4: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes_M4.float()[..., :2], boxes_M4.float()[..., 2:]
    return low + 0.5 * (high - low), high - low


def _on(like: Tensor, weights: Sequence[float]) -> Tensor:
    # Made on the host: torch.tensor(..., device=...) would wait for the GPU.
    return torch.tensor(weights, dtype=torch.float32).to(like.device, non_blocking=True)


class Matches(NamedTuple):
    """Which boxes are objects, and of which."""

    object_M: Tensor
    """int64: the object with the largest overlap, the first of equal ones."""
    positive_M: Tensor
    """bool: the box is to find that object."""
    negative_M: Tensor
    """bool: the box is background; others are neither, and nothing is learned of them."""


def matched(
    boxes_M4: Tensor, objects: Instances, *, below: float, above: float, best_too: bool = False
) -> Matches:
    """Assigns boxes to the objects of an image by intersection over union.

    Args:
        boxes_M4: fp32.
        objects: of the image; boxes that lie in a crowd are neither object nor background.
        below: boxes whose largest overlap is smaller are background.
        above: those whose overlap is at least this are objects.
        best_too: whether an object's best boxes are objects as well, however little they overlap.

    Source: Ren et al. 2015 (arXiv:1506.01497), section 3.1.2; ties as in torchvision's `Matcher`.
    """
    crowd_N = objects.crowd_N
    best_M = boxes_M4.new_zeros(len(boxes_M4))
    object_M = torch.zeros(len(boxes_M4), dtype=torch.int64, device=boxes_M4.device)
    is_best_M = torch.zeros_like(object_M, dtype=torch.bool)
    in_crowd_M = torch.zeros_like(is_best_M)
    for first in range(0, len(crowd_N), OBJECTS_AT_A_TIME):
        part = slice(first, first + OBJECTS_AT_A_TIME)
        iou_MN, share_MN = overlaps(boxes_M4, objects.boxes_N4[part])
        iou_MN = iou_MN.masked_fill(crowd_N[part], 0)
        largest_M, index_M = iou_MN.max(1)
        better_M = largest_M > best_M
        object_M = torch.where(better_M, index_M + first, object_M)
        best_M = torch.where(better_M, largest_M, best_M)
        if best_too:
            is_best_M |= ((iou_MN == iou_MN.amax(0)) & (iou_MN > 0)).any(1)
        in_crowd_M |= ((share_MN >= CROWD_SHARE) & crowd_N[part]).any(1)
    positive_M = (best_M >= above) | is_best_M
    return Matches(object_M, positive_M, (best_M < below) & ~positive_M & ~in_crowd_M)


def overlaps(boxes_M4: Tensor, others_N4: Tensor) -> tuple[Tensor, Tensor]:
    """Returns intersection over union, and which share of each box lies in each other box; fp32 (M, N)."""
    low = torch.maximum(boxes_M4[:, None, :2], others_N4[None, :, :2])
    sides = (torch.minimum(boxes_M4[:, None, 2:], others_N4[None, :, 2:]) - low).clamp(min=0)
    inside_MN = sides[..., 0] * sides[..., 1]
    area_M1, area_N = box_area(boxes_M4)[:, None], box_area(others_N4)
    return inside_MN / (area_M1 + area_N - inside_MN), inside_MN / area_M1.clamp(min=1e-6)


def counter_hash(key: Tensor, stream: int, count: int) -> Tensor:
    """Returns well-mixed numbers that depend on nothing but key, stream and their place; int64 (count,), 0 or more.

    They are computed on the key's device: an image has up to 590,000 anchors, and a generator on the host would take
    as long as the layers do.

    Args:
        key: int64 scalar, the image's own.
        stream: what the numbers are for.
        count: how many.

    Source: the finaliser of SplitMix64, as `fd_scale.randomness.hash64`.
    """
    place = torch.arange(count, device=key.device) + _signed((stream * 0xD1B54A32D192ED03) % 2**64)
    words = (place * _signed(0x9E3779B97F4A7C15)) ^ key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        words = (words ^ ((words >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return words & (2**63 - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


class Chosen(NamedTuple):
    """Some of an image's boxes, those that are objects first."""

    index_R: Tensor
    """int64: which box; R is known before the boxes are."""
    valid_R: Tensor
    """bool: whether the place is taken."""
    positive_R: Tensor
    """bool: whether it is taken by an object's."""


def chosen(matches: Matches, noise_M: Tensor, count: int, most_positive: int) -> Chosen:
    """Chooses objects' boxes at random, and fills up with background.

    Args:
        matches: of the boxes.
        noise_M: int64, 0 or more, different ones: those with the largest are chosen.
        count: how many, R, where there are so many boxes.
        most_positive: how many of them may be objects'.
    """
    positive_noise, positive = _largest(noise_M, matches.positive_M, most_positive)
    negative_noise, negative = _largest(noise_M, matches.negative_M, count)
    is_positive = positive_noise >= 0
    is_negative = negative_noise >= 0
    valid = torch.cat([is_positive, is_negative])
    places_R = (~valid).to(torch.uint8).argsort(stable=True)[: min(count, len(noise_M))]
    positives = torch.cat([is_positive, torch.zeros_like(is_negative)])
    return Chosen(torch.cat([positive, negative])[places_R], valid[places_R], positives[places_R])


def truth_of(objects: Instances, matches: Matches, picked: Chosen) -> Tensor:
    """Returns the box of each chosen box's object, fp32 (R, 4); of background, some box."""
    if not len(objects.boxes_N4):
        return objects.boxes_N4.new_zeros(len(picked.index_R), 4)
    return objects.boxes_N4[matches.object_M[picked.index_R]]


def regression_errors(
    deltas_R4: Tensor, references_R4: Tensor, truth_R4: Tensor, weights: Sequence[float], positive_R: Tensor,
    beta: float,
) -> Tensor:  # fmt: skip
    """Returns the smooth L1 error of each box, summed over its deltas; fp32 (...,), 0 of background.

    Args:
        deltas_R4: predicted ones, fp32 (..., 4).
        references_R4: what they start from.
        truth_R4: where they should lead.
        weights: as of `encoded`.
        positive_R: which boxes are an object's.
        beta: up to which the error is squared.
    """
    # What is no object's may have no area, and no deltas: an error of its own prediction is 0, and so is the gradient.
    wanted_R4 = torch.where(
        positive_R[..., None], encoded(truth_R4, references_R4, weights), deltas_R4.detach()
    )
    return F.smooth_l1_loss(deltas_R4, wanted_R4, reduction="none", beta=beta).sum(-1)


def filled(x: Tensor, length: int) -> Tensor:
    """Returns `x` with zeros at its end, so that it has so many rows."""
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])


def _largest(noise_M: Tensor, among_M: Tensor, count: int) -> tuple[Tensor, Tensor]:
    found = noise_M.masked_fill(~among_M, -1).topk(min(count, len(noise_M)))
    return found.values, found.indices


def suppressed(boxes_M4: Tensor, scores_M: Tensor, groups_M: Tensor, iou: float) -> Tensor:
    """Returns which boxes stay when worse ones of the same group that overlap them are dropped, the surest first.

    On the meta device, where nothing is known of overlaps, all stay.
    """
    if boxes_M4.is_meta:
        return torch.arange(len(boxes_M4), device=boxes_M4.device)
    # torchvision moves each group by the whole width of all: of the thousandth one fp32 would keep eighths of a pixel.
    return batched_nms(boxes_M4.double(), scores_M.double(), groups_M, iou)


def softly_suppressed(
    boxes_M4: Tensor, scores_M: Tensor, groups_M: Tensor, method: SoftNMS, count: int
) -> tuple[Tensor, Tensor]:
    """Returns the surest boxes when the scores of others of their group fall with their overlap.

    All groups take part at once: the surest box of all has a score that falls no more, so that after `count` of them
    the surest `count` are known, and each costs one row of overlaps.

    Args:
        boxes_M4: fp32, with sides above 0.
        scores_M: fp32, 0..1.
        groups_M: int64; boxes of different groups do not touch each other.
        method: `linear`: times 1 - IoU where that is above 0.5; `gaussian`: times exp(-IoU^2 / 0.5).
        count: how many at most.

    Returns:
        Indices of the boxes and their new scores, the surest first.

    Source: Bodla et al. 2017 (arXiv:1704.04503).
    """
    left_M, picked, scores = scores_M.clone(), [], []
    for _ in range(min(count, len(boxes_M4))):
        best = left_M.argmax()
        picked.append(best)
        scores.append(left_M[best])
        iou_M = box_iou(boxes_M4[best][None], boxes_M4)[0] * (groups_M == groups_M[best])
        if method == "linear":
            factor_M = torch.where(iou_M > NMS_IOU, 1 - iou_M, 1.0)
        else:
            factor_M = (-iou_M.square() / SOFT_NMS_SIGMA).exp()
        left_M = (left_M * factor_M).index_fill(0, best, -1)
    if not picked:
        return torch.zeros_like(groups_M), scores_M
    return torch.stack(picked), torch.stack(scores)
