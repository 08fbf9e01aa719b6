"""Crops of images and masks: together, of the right share, a function of the generator alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from fd_scale.data.mask_transforms import MaskCrop, distorted, largest_share, whole_with_mask
from fd_scale.data.picture import Picture

PLAIN = {"resize": (1.0, 1.0), "max_class_share": 1.0, "flip": 0.0, "distort": False, "fill": (10, 20, 30)}


def coded(height: int, width: int) -> tuple[Picture, Image.Image]:
    """An image that tells its mask: red is the class times 10, in columns of 8 pixels."""
    mask = np.broadcast_to(np.arange(width) // 8, (height, width)).astype(np.uint8)
    pixels = np.stack([mask * 10, mask * 0, mask * 0], axis=2).astype(np.uint8)
    return Picture.of(Image.fromarray(pixels)), Image.fromarray(np.ascontiguousarray(mask))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_image_and_mask_are_cut_alike(flip: float) -> None:
    crop = MaskCrop(side=16, **(PLAIN | {"flip": flip}))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, mask = crop(*coded(32, 128))  # resized to half: columns of 4
        assert (pixels.shape, mask.shape, pixels.dtype, mask.dtype) == (
            (3, 16, 16), (16, 16), torch.uint8, torch.uint8
        )  # fmt: skip
        inner = mask[:, 2::4].int()
        assert (inner.diff(dim=1).sign() == (1 if flip == 0 else -1)).all()
        # Half-way between two columns the image is blurred by its resize, the mask is not.
        assert ((pixels[0].int() - 10 * mask.int()).abs() <= 5).all()
        seen.add(int(mask[0, 0]))
    assert len(seen) > 5, "places differ"


def test_resize_lies_between_its_limits() -> None:
    crop = MaskCrop(side=64, **(PLAIN | {"resize": (0.5, 2.0)}))
    image, mask = Picture.of(Image.new("RGB", (40, 20))), Image.new("L", (40, 20))
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        pixels, cut = crop(image, mask)
        shares.append(float((cut == 0).double().mean()))
        padded = cut == 255
        assert (pixels[:, padded] == torch.tensor([[10], [20], [30]])).all(), "the model's mean"
    # Shorter side 32 to 128: the least is 32 rows of all 64 columns, from 64 on nothing is padded.
    assert min(shares) == pytest.approx(0.5, abs=0.02)
    assert 0.6 < np.mean([share == 1 for share in shares]) < 0.75, "two thirds of a uniform draw"


def test_crops_with_one_class_are_tried_again() -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 48:] = 1
    image = Picture.of(Image.new("RGB", (64, 64)))
    found = {}
    for share in (0.75, 1.0):
        crop = MaskCrop(side=24, **(PLAIN | {"max_class_share": share, "resize": (64 / 24, 64 / 24)}))
        torch.manual_seed(0)
        found[share] = [largest_share(crop(image, Image.fromarray(mask))[1].numpy()) for _ in range(200)]
    assert np.mean([share > 0.75 for share in found[1.0]]) > 0.5
    # A place has 75% or less with probability 13/41: ten of them all fail in 2% of the crops.
    assert np.mean([share > 0.75 for share in found[0.75]]) < 0.06


def test_an_ignored_crop_is_taken_only_where_there_is_no_other() -> None:
    mask = np.full((64, 64), 255, dtype=np.uint8)
    mask[:32, :32] = 5
    crop = MaskCrop(side=24, **(PLAIN | {"max_class_share": 0.75, "resize": (64 / 24, 64 / 24)}))
    torch.manual_seed(0)
    image = Picture.of(Image.new("RGB", (64, 64)))
    crops = [crop(image, Image.fromarray(mask))[1] for _ in range(50)]
    assert all((crop == 5).any() for crop in crops)
    assert (crop(image, Image.new("L", (64, 64), 255))[1] == 255).all()


def test_photometric_distortion() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    results = []
    for seed in range(40):
        torch.manual_seed(seed)
        results.append(np.asarray(distorted(image)))
        torch.manual_seed(seed)
        np.testing.assert_array_equal(np.asarray(distorted(image)), results[-1])
    same = [np.array_equal(result, np.asarray(image)) for result in results]
    assert 0 < np.mean(same) < 0.25, "one in 16 is left as it is"
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    levels = set()
    for seed in range(100):
        torch.manual_seed(seed)
        pixels = np.asarray(distorted(grey))
        assert (pixels == pixels[0, 0, 0]).all(), "grey has no hue and no saturation"
        levels.add(int(pixels[0, 0, 0]))
    assert min(levels) >= (100 - 32) // 2
    assert max(levels) <= (100 + 32) * 1.5


def test_the_whole_image_and_its_mask() -> None:
    image, mask = coded(9, 24)
    pixels, labels = whole_with_mask(image, mask)
    assert torch.equal(pixels[0], 10 * labels)
    assert labels.shape == (9, 24)
