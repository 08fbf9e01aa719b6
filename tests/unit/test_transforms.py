"""Image transforms: sizes, ranges, randomness."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from fd_scale.data.transforms import contrastive_transform, distillation_transform, evaluation_transform
from fd_scale.errors import UserError


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.fixture
def left_half_white() -> Image.Image:
    """A picture that shows a horizontal flip."""
    return Image.fromarray(np.repeat([[[255] * 3] * 8 + [[0] * 3] * 8], 16, axis=0).astype(np.uint8))


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (distillation_transform(16), (3, 16, 16)),
        (evaluation_transform(16), (3, 16, 16)),
        (contrastive_transform(16), (2, 3, 16, 16)),
    ],
    ids=["distillation", "evaluation", "contrastive"],
)
@pytest.mark.parametrize("size", [(48, 32), (1, 1), (1, 40)], ids=str)
def test_result_is_uint8_of_the_asked_size(transform, shape, size) -> None:
    image = Image.new("RGB", size, (255, 128, 0))
    result = pickle.loads(pickle.dumps(transform))(image)  # workers get a pickled copy
    assert result.shape == shape
    assert result.dtype == torch.uint8


@pytest.mark.parametrize("make", [distillation_transform, contrastive_transform])
def test_torchs_default_generator_decides_everything(make, noise: Image.Image) -> None:
    transform = make(16)
    results = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results.append(transform(noise))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_distillation_of_the_whole_image_is_the_image(noise: Image.Image) -> None:
    square = noise.crop((0, 0, 32, 32))
    transform = distillation_transform(32, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)
    assert np.array_equal(transform(square).permute(1, 2, 0), np.asarray(square))


@pytest.mark.parametrize(("flip", "expected_share"), [(0, 0), (1, 1), (0.5, 0.5)])
def test_flip_probability(flip: float, expected_share: float, left_half_white: Image.Image) -> None:
    transform = distillation_transform(16, crop_scale=(1, 1), crop_ratio=(1, 1), flip=flip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flipped = [transform(left_half_white)[0, 0, 0].item() == 0 for _ in range(200)]
    # Standard deviation of the share at 0.5 is 0.035; 4 of those.
    assert abs(np.mean(flipped) - expected_share) <= (0.14 if flip == 0.5 else 0)


def test_evaluation_keeps_the_centre() -> None:
    grid_HW = np.add.outer(10 * np.arange(8), np.arange(8)).astype(np.uint8)
    image = Image.fromarray(grid_HW).convert("RGB")
    transform = evaluation_transform(4, crop_fraction=0.5, interpolation="nearest")
    assert np.array_equal(transform(image)[0], grid_HW[2:6, 2:6])


def test_evaluation_interpolation_is_used(noise: Image.Image) -> None:
    results = [evaluation_transform(16, interpolation=name)(noise) for name in ("bilinear", "bicubic")]
    assert not torch.equal(*results)


def test_contrastive_views_differ_from_each_other(noise: Image.Image) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = contrastive_transform(16)(noise)
    assert not torch.equal(first, second)


def test_contrastive_options_can_all_be_switched_off(left_half_white: Image.Image) -> None:
    transform = contrastive_transform(
        16, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, colour_jitter=0, grey=0
    )
    for view in transform(left_half_white):
        assert np.array_equal(view.permute(1, 2, 0), np.asarray(left_half_white))


def test_contrastive_grey_removes_colour(noise: Image.Image) -> None:
    views = contrastive_transform(16, grey=1)(noise)
    assert torch.equal(views[:, 0], views[:, 1])
    assert torch.equal(views[:, 0], views[:, 2])


def test_unknown_interpolation_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'bicubik' is unknown; nearest: 'bicubic'"):
        evaluation_transform(16, interpolation="bicubik")


@pytest.mark.parametrize("crop_fraction", [0, -1, 1.5])
def test_impossible_crop_fraction(crop_fraction: float) -> None:
    with pytest.raises(UserError, match="crop_fraction"):
        evaluation_transform(16, crop_fraction=crop_fraction)
