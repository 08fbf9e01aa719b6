"""Image transforms: PIL RGB in, uint8 tensor out.

Images stay uint8 until they are on the device, where each model normalises with its own mean and
std. A transform draws from torch's default generator only: that is the one which the loader seeds.
"""

import difflib
from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from fd_scale.errors import UserError

Transform = Callable[[Image.Image], torch.Tensor]

_INTERPOLATIONS = {mode.value: mode for mode in InterpolationMode}


def distillation_transform(
    img_size: int,
    *,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Transform:
    """Returns random resized crop (bilinear) and horizontal flip, nothing else.

    Args:
        img_size: side of the square result, in pixels.
        crop_scale: smallest and largest area of the crop, as a fraction of the image's.
        crop_ratio: smallest and largest width / height of the crop.
        flip: probability of a horizontal flip, 0 to 1.

    Returns:
        Callable, PIL RGB image -> uint8 (3, img_size, img_size).

    Source: Wei et al. 2022 (arXiv:2205.14141), as in the released code.
    """
    view: Transform = v2.Compose([*_crop_and_flip(img_size, crop_scale, crop_ratio, flip), v2.PILToTensor()])
    return view


def evaluation_transform(
    img_size: int, *, crop_fraction: float = 0.875, interpolation: str = "bicubic"
) -> Transform:
    """Returns a resize of the shorter side to img_size / crop_fraction, then a centre crop.

    Args:
        img_size: side of the square result, in pixels.
        crop_fraction: part of the resized side that is kept, in (0, 1].
        interpolation: "bilinear", "bicubic", "nearest", ... (names of torchvision's InterpolationMode).

    Returns:
        Callable, PIL RGB image -> uint8 (3, img_size, img_size).

    Raises:
        UserError: unknown interpolation, or crop_fraction outside (0, 1].
    """
    if interpolation not in _INTERPOLATIONS:
        nearest = difflib.get_close_matches(interpolation, _INTERPOLATIONS, n=1, cutoff=0)[0]
        raise UserError(
            f"interpolation {interpolation!r} is unknown; nearest: {nearest!r}, "
            f"all: {', '.join(_INTERPOLATIONS)}"
        )
    if not 0 < crop_fraction <= 1:
        raise UserError(f"crop_fraction must be in (0, 1], got {crop_fraction}; 0.875 is usual at 224 pixels")
    resize = v2.Resize(round(img_size / crop_fraction), _INTERPOLATIONS[interpolation])
    view: Transform = v2.Compose([resize, v2.CenterCrop(img_size), v2.PILToTensor()])
    return view


def contrastive_transform(
    img_size: int,
    *,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    colour_jitter: float = 0.4,
    grey: float = 0.2,
) -> Transform:
    """Returns two views of an image, each with its own crop, flip, colour jitter and loss of colour.

    Args:
        img_size: side of the square views, in pixels.
        crop_scale: smallest and largest area of the crop, as a fraction of the image's.
        crop_ratio: smallest and largest width / height of the crop.
        flip: probability of a horizontal flip; 0 for digits and letters.
        colour_jitter: largest relative change of brightness, contrast and saturation, 0 to 1; the
            hue changes by a quarter of it. 8 views in 10 are jittered.
        grey: probability that a view loses its colour.

    Returns:
        Callable, PIL RGB image -> uint8 (2, 3, img_size, img_size).

    Source: Chen et al. 2020 (arXiv:2002.05709), appendix A, with weaker jitter and without blur.
    """
    jitter = v2.ColorJitter(colour_jitter, colour_jitter, colour_jitter, colour_jitter / 4)
    view = v2.Compose(
        [
            *_crop_and_flip(img_size, crop_scale, crop_ratio, flip),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(grey),
            v2.PILToTensor(),
        ]
    )
    return _TwoViews(view)


def _crop_and_flip(
    img_size: int, scale: tuple[float, float], ratio: tuple[float, float], flip: float
) -> list[Callable[[Image.Image], Image.Image]]:
    crop = v2.RandomResizedCrop(img_size, scale, ratio, InterpolationMode.BILINEAR)
    return [crop, v2.RandomHorizontalFlip(flip)]


class _TwoViews:
    """A class and not a closure, so that workers can unpickle it."""

    def __init__(self, view: Transform) -> None:
        self.view = view

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.stack([self.view(image), self.view(image)])
