"""Mixup and CutMix: timm's arithmetic, on pairs that the position in the stream decides."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from fd_scale.config import ClassificationConfig, ModelConfig
from fd_scale.finetune.classification import ClassificationModule
from fd_scale.finetune.mixing import Mixing

MIXUP = Mixing(seed=0, mixup=0.8, cutmix=0.0)
CUTMIX = Mixing(seed=0, mixup=0.0, cutmix=1.0)
BOTH = Mixing(seed=0, mixup=0.8, cutmix=1.0, cutmix_share=0.3)


def batch(size: int = 8, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and positions; an image is a function of its position."""
    images = [
        np.random.default_rng(first + index).integers(0, 256, (3, 12, 16), dtype=np.uint8)
        for index in range(size)
    ]
    positions = torch.arange(first, first + size)
    return torch.from_numpy(np.stack(images)), positions % 10, positions


def test_mixup_is_the_weighted_mean_of_a_pair() -> None:
    images, labels, positions = batch()
    mixed = MIXUP(images, labels, positions)
    for index in range(8):
        partner, weight = index ^ 1, mixed.weights[index]
        expected = weight * images[index].double() + (1 - weight) * images[partner].double()
        torch.testing.assert_close(mixed.images[index].double(), expected, rtol=0, atol=1e-4)  # fp32
        assert weight == mixed.weights[partner]
        assert mixed.partner_labels[index] == labels[partner]
    assert len(mixed.weights.unique()) == 4


def test_cutmix_swaps_a_box_and_weighs_by_its_area() -> None:
    images, labels, positions = batch(64)
    mixed = CUTMIX(images, labels, positions)
    for index in range(64):
        own, partner = images[index].float(), images[index ^ 1].float()
        from_partner = (mixed.images[index] == partner).all(0)
        assert torch.equal(mixed.images[index], torch.where(from_partner, partner, own))
        rows, columns = from_partner.any(1).nonzero(), from_partner.any(0).nonzero()
        if not len(rows):
            assert mixed.weights[index] == 1
            continue
        height, width = (int(axis.max() - axis.min()) + 1 for axis in (rows, columns))
        assert from_partner.sum() == height * width, "a box without holes"
        assert mixed.weights[index] == pytest.approx(1 - height * width / (12 * 16))
        # The image's own shape, but for rounding and what is cut off at a border.
        inside = rows.min() > 0 and rows.max() < 11 and columns.min() > 0 and columns.max() < 15
        assert not inside or abs(width - height * 16 / 12) < 2


def test_a_pair_is_mixed_alike_in_any_batch() -> None:
    images, labels, positions = batch(16)
    whole = BOTH(images, labels, positions)
    for start in range(0, 16, 4):
        part = BOTH(*(tensor[start : start + 4] for tensor in (images, labels, positions)))
        for mine, theirs in zip(part, whole, strict=True):
            assert torch.equal(mine, theirs[start : start + 4])
    other_seed = Mixing(seed=1, mixup=0.8, cutmix=1.0)(images, labels, positions)
    later = BOTH(images, labels, positions + 16)
    for changed in (other_seed, later):
        assert (changed.weights != whole.weights).float().mean() > 0.5


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX, BOTH])
def test_crops_of_an_image_are_mixed_with_those_of_the_next(mixing: Mixing) -> None:
    """Crop c of an image with crop c of the other: as two streams of one crop each, but for what is drawn."""
    images, labels, positions = batch(24)
    labels = positions // 3
    mixed = replace(mixing, crops=3)(images, labels, positions)
    partners = torch.tensor([3, 4, 5, 0, 1, 2]).repeat(4) + positions // 6 * 6
    assert torch.equal(mixed.partner_labels, labels[partners])
    assert torch.equal(mixed.weights, mixed.weights[partners])
    assert len(mixed.weights.unique()) > 9, "each of 12 pairs for itself"
    own = mixed.weights[:, None, None, None]
    if mixing is MIXUP:
        expected = own * images.float() + (1 - own) * images[partners].float()
        torch.testing.assert_close(mixed.images, expected, rtol=0, atol=1e-4)
    part = replace(mixing, crops=3)(images[6:12], labels[6:12], positions[6:12])
    assert torch.equal(part.images, mixed.images[6:12])


def test_weights_are_of_the_beta_distribution() -> None:
    positions = np.arange(0, 40_000, 2)
    weights, boxes = MIXUP._draw(positions, 224, 224)
    assert not boxes.any()
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); 20 000 draws, five standard errors.
    assert weights.mean() == pytest.approx(0.5, abs=5 * float(weights.std()) / 20_000**0.5)
    assert weights.var() == pytest.approx(1 / (4 * 2.6), rel=0.03)
    weights, boxes = BOTH._draw(positions, 224, 224)
    cut = boxes[:, 1] > boxes[:, 0]
    assert cut.mean() == pytest.approx(0.3, abs=0.02)
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / 224**2
    np.testing.assert_allclose(weights[cut], 1 - areas[cut], atol=1e-6)
    # The box's centre is uniform: a box of side s of the image (area of s^2 uniform) keeps (s - s^2 / 4)^2 of it.
    sides = np.sqrt(np.linspace(0, 1, 1001))
    assert areas[cut].mean() == pytest.approx(np.mean((sides - sides**2 / 4) ** 2), rel=0.03)


def test_a_pair_without_a_label_stays_as_it_is() -> None:
    images, labels, positions = batch()
    labels = labels.clone()
    labels[2], labels[5] = -1, -1
    mixed = BOTH(images, labels, positions)
    assert torch.equal(mixed.images[2:6], images[2:6].float())
    assert (mixed.weights[2:6] == 1).all()
    assert (mixed.partner_labels[2:6] == -1).all()
    assert (mixed.weights[[0, 6]] != 1).all()


def test_the_loss_is_timms_of_the_mixed_target() -> None:
    torch.manual_seed(0)
    overrides = {"patch_size": 4, "embed_dim": 16, "depths": [1], "num_heads": [1], "window_size": 4}
    model = ModelConfig(name="swin_v2_tiny", img_size=16, overrides=overrides)
    config = ClassificationConfig(label_smoothing=0.1, head_init_scale=50.0)
    module = ClassificationModule(model, config, num_classes=10, dtype=torch.float32)
    images, labels, positions = batch(2)
    images = torch.nn.functional.pad(images, (0, 0, 2, 2))
    mixed = MIXUP(images, labels, positions)
    found = module(mixed.images, labels, mixed.partner_labels, mixed.weights)
    target = mixup_target(
        labels, 10, float(mixed.weights[0]), smoothing=0.1
    )  # timm mixes a batch with its reverse
    expected = 2 * SoftTargetCrossEntropy()(found["logits"], target)
    torch.testing.assert_close(found["loss"].detach(), expected)
