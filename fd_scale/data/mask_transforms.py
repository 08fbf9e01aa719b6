"""Transforms of an image together with its mask: uint8 tensors out.

As in `transforms`, they draw from torch's default generator only.

Shape legend: H, W = pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fd_scale.data.base import IGNORED
from fd_scale.data.picture import Picture

NUM_TRIES = 10
"""Places that are tried for a crop."""
_BRIGHTNESS = 32
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE = 0.1  # of the circle: the 18 of OpenCV's 180


def fill_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """Returns what an image is padded with: the mean of a model's input, 8-bit, which is 0 once it is normalised."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskCrop:
    """Random resize, a crop that no class fills, flip and photometric distortion.

    Source: the training pipeline of UPerNet on ADE20K in mmsegmentation (Apache 2.0), written anew.
    """

    side: int
    """Of the square crop, in pixels."""
    resize: tuple[float, float]
    """Smallest and largest shorter side of the resized image, as a factor of `side`."""
    max_class_share: float
    """Largest share of one class among a crop's pixels with a class; of ten places the first that keeps it is taken,
    else the one where the largest class has the smallest share."""
    flip: float
    """Probability of a horizontal flip."""
    distort: bool
    """Whether brightness, contrast, saturation and hue change at random."""
    fill: tuple[int, int, int]
    """Colour that a smaller image is padded with; its mask there is ignored."""

    def __call__(self, picture: Picture, mask: Image.Image) -> tuple[Tensor, Tensor]:
        """Returns uint8 (3, side, side) and uint8 (side, side)."""
        image = picture.pil()
        low, high = self.resize
        factor = self.side * (low + (high - low) * float(torch.rand(()))) / min(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image, mask = (
            image.resize(size, Image.Resampling.BILINEAR),
            mask.resize(size, Image.Resampling.NEAREST),
        )
        left, top = self._place(np.asarray(mask))
        box = (left, top, min(left + self.side, size[0]), min(top + self.side, size[1]))
        image, mask = image.crop(box), mask.crop(box)
        if float(torch.rand(())) < self.flip:
            image, mask = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (image, mask))
        if self.distort:
            image = distorted(image)
        return pil_to_tensor(padded(image, self.side, self.fill)), pil_to_tensor(
            padded(mask, self.side, IGNORED)
        )[0]

    def _place(self, mask_HW: npt.NDArray[np.uint8]) -> tuple[int, int]:
        """Left and top of the crop."""
        best, smallest = (0, 0), 2.0
        for _ in range(NUM_TRIES):
            top, left = (int(torch.randint(max(length - self.side, 0) + 1, ())) for length in mask_HW.shape)
            share = largest_share(mask_HW[top : top + self.side, left : left + self.side])
            if share < smallest:
                best, smallest = (left, top), share
            if share <= self.max_class_share:
                break
        return best


def largest_share(mask_HW: npt.NDArray[np.uint8]) -> float:
    """Share of the largest class among pixels with a class, in 0..1; above 1 where no pixel has one."""
    counts = np.bincount(mask_HW.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / counts.sum()) if counts.any() else 1.5


def padded(image: Image.Image, side: int, fill: int | tuple[int, int, int]) -> Image.Image:
    """Fills an image up to a square, to the right and below."""
    if image.size == (side, side):
        return image
    square = Image.new(image.mode, (side, side), fill)
    square.paste(image, (0, 0))
    return square


def distorted(image: Image.Image) -> Image.Image:
    """Changes brightness, contrast, saturation and hue of an RGB image, each in half of all calls."""
    brighter, contrasted, contrast_first, saturated, shifted = (torch.rand(5) < 0.5).tolist()
    beta, contrast, saturation, hue = torch.rand(4).tolist()
    value_256 = np.arange(256.0)
    factors = [
        low + (high - low) * drawn
        for (low, high), drawn in ((_CONTRAST, contrast), (_SATURATION, saturation))
    ]
    if brighter:
        image = _by_table(image, value_256 + _BRIGHTNESS * (2 * beta - 1))
    if contrasted and contrast_first:
        image = _by_table(image, value_256 * factors[0])
    if saturated or shifted:
        hues, saturations, values = image.convert("HSV").split()
        if saturated:
            saturations = _by_table(saturations, value_256 * factors[1])
        if shifted:
            hues = _by_table(hues, (value_256 + 256 * _HUE * (2 * hue - 1)) % 256)
        image = Image.merge("HSV", (hues, saturations, values)).convert("RGB")
    if contrasted and not contrast_first:
        image = _by_table(image, value_256 * factors[0])
    return image


def _by_table(image: Image.Image, table_256: npt.NDArray[np.float64]) -> Image.Image:
    table = np.clip(table_256, 0, 255).astype(np.uint8).tolist()
    return image.point(table * len(image.getbands()))


def whole_with_mask(picture: Picture, mask: Image.Image) -> tuple[Tensor, Tensor]:
    """The transform of an evaluation: all of an image, uint8 (3, H, W), and its mask, uint8 (H, W)."""
    return pil_to_tensor(picture.pil()), pil_to_tensor(mask)[0]
