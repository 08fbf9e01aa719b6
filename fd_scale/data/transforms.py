"""Image transforms: `Picture` in, uint8 tensor out; beside it goes what is learned of the image.

Images stay uint8 until they are on the device, where each model normalises with its own mean and
std. A transform draws from torch's default generator only: that is the one which the loader seeds.
"""

import functools
import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

from fd_scale.config import Recipe
from fd_scale.data.base import Source, object_source
from fd_scale.data.instance_transforms import CopyPaste, InstanceCrop, whole_with_objects
from fd_scale.data.mask_transforms import MaskCrop, fill_colour, whole_with_mask
from fd_scale.data.picture import Box, Interpolation, Picture, tensor_of
from fd_scale.errors import UserError

View = Callable[[Picture], torch.Tensor]
"""Image -> uint8 tensor."""
Unfinished = Callable[[], torch.Tensor]
"""Makes a uint8 tensor, for which everything has been drawn."""
TrainingView = Callable[[Picture], torch.Tensor | Unfinished]
Transform = Callable[[Picture, Any], tuple[torch.Tensor | Unfinished, Any]]
"""Image and target (`data.base.Target`) -> uint8 tensor, and the target as a tensor or a number."""


def finished(image: torch.Tensor | Unfinished) -> torch.Tensor:
    """Returns the tensor that an image is, or makes."""
    return image if isinstance(image, torch.Tensor) else image()


@dataclass(frozen=True)
class ImageAlone:
    """The transform of a view that concerns no target: this one goes through as it is."""

    view: TrainingView

    def __call__(self, picture: Picture, target: Any) -> tuple[torch.Tensor | Unfinished, Any]:
        return self.view(picture), target


# timm passes over sections that it does not know.
_RAND_AUGMENT = re.compile(r"((^|-)((m|mmax|inc|n)\d+|(mstd|p)\d+(\.\d+)?))+")
CROP_FRACTION = 0.875
"""Part of the resized side of an image that an evaluation sees; timm's default too."""


def training_view(
    img_size: int,
    *,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: Interpolation = "bilinear",
    flip: float = 0.5,
    rand_augment: str | None = None,
    erasing: float = 0.0,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
) -> TrainingView:
    """Returns random resized crop and horizontal flip; for classification also RandAugment and random erasing.

    Args:
        img_size: side of the square result, in pixels.
        crop_scale: smallest and largest area of the crop, as a fraction of the image's.
        crop_ratio: smallest and largest width / height of the crop.
        interpolation: of the crop, "bilinear" or "bicubic".
        flip: probability of a horizontal flip, 0 to 1.
        rand_augment: timm's description of it, "m9-mstd0.5-inc1"; None: none.
        erasing: probability that a rectangle of 2% to a third of the image becomes noise.
        mean: of the model's input, in 0..1: what RandAugment moves into the image, and the mean of the noise.
        std: of the model's input, in 0..1: the noise's, which is cut at black and white.

    Returns:
        Callable, `Picture` -> uint8 (3, img_size, img_size), with RandAugment or erasing `Unfinished`.

    Raises:
        UserError: that is no RandAugment.

    Source: distillation: Wei et al. 2022 (arXiv:2205.14141), as in the released code, crop and flip alone;
        classification: the same code, which takes timm's.
    """
    crop = _CropAndFlip(img_size, crop_scale, crop_ratio, interpolation, flip)
    draws: list[_Draw] = []
    if rand_augment is not None:
        draws.append(_RandAugment(rand_augment, img_size, mean))
    if erasing:
        draws.append(_Erasing(erasing, mean, std))
    return _Augmented(crop, draws) if draws else crop


_Step = Callable[[torch.Tensor], torch.Tensor]
_Draw = Callable[[torch.Size], _Step]
"""Shape of an image -> what is done to it, for which everything has been drawn."""


@dataclass(frozen=True)
class _Augmented:
    """Crops, and draws what is done to the crop; doing it is left for later."""

    crop: "_CropAndFlip"
    draws: Sequence[_Draw]

    def __call__(self, picture: Picture) -> Unfinished:
        pixels = self.crop(picture)
        return functools.partial(_in_turn, [draw(pixels.shape) for draw in self.draws], pixels)


def _in_turn(steps: Sequence[Callable[[Any], Any]], image: Any) -> torch.Tensor:
    """Takes steps; torchvision's `Compose` takes apart whatever goes from one to the next."""
    for step in steps:
        image = step(image)
    return image


class _CropAndFlip:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip; the crop is drawn before the image is decoded."""

    def __init__(
        self,
        side: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        interpolation: Interpolation,
        flip: float,
    ) -> None:
        self.side, self.interpolation, self.scale, self.ratio = side, interpolation, scale, ratio
        # To the bit what torchvision draws between and compares with: fp32.
        self.log_ratio = torch.tensor(ratio).log().tolist()
        self.flip = torch.tensor(flip, dtype=torch.float32).item()

    def __call__(self, picture: Picture) -> torch.Tensor:
        pixels = picture.crop(self._box(*picture.size), self.side, self.interpolation)
        return pixels.flip(-1) if _FLOAT.uniform_().item() < self.flip else pixels

    def _box(self, width: int, height: int) -> Box:
        """Draws as torchvision's `make_params` does, call by call, in a third of its time."""
        for _ in range(10):
            area = width * height * _FLOAT.uniform_(*self.scale).item()
            ratio = _FLOAT.uniform_(*self.log_ratio).exp_().item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = _drawn_below(height - h + 1)
                return Box(_drawn_below(width - w + 1), top, w, h)
        w = min(width, round(height * max(self.ratio)))
        h = min(height, round(width / min(self.ratio)))
        return Box((width - w) // 2, (height - h) // 2, w, h)


# Drawn into: torch.rand and torch.randint draw the same, and make a tensor each time.
_FLOAT, _INTEGER = torch.empty(1), torch.empty(1, dtype=torch.int64)


def _drawn_below(bound: int) -> int:
    return int(_INTEGER.random_(bound).item())


class _RandAugment:
    """timm's, mended; its seed is drawn from torch's generator."""

    def __init__(self, description: str, img_size: int, mean: Sequence[float]) -> None:
        # Takes seconds, which most loader workers can do without.
        from timm.data.auto_augment import rand_augment_transform

        colour = tuple(min(255, round(255 * value)) for value in mean)
        settings = {
            "translate_const": int(img_size * 0.45), "img_mean": colour, "interpolation": Image.Resampling.BICUBIC,
        }  # fmt: skip
        if not _RAND_AUGMENT.fullmatch(description):
            raise UserError(
                f"data.rand_augment: got {description!r}, expected sections in timm's words, m9-mstd0.5-inc1: "
                "magnitude, its standard deviation, whether all get stronger with it; n2, operations an image; p0.5, "
                "probability"
            )
        augment = rand_augment_transform(f"rand-{description}", settings)
        mend_posterize(augment)
        augment.ops = np.array(augment.ops)  # which numpy's choice makes of a list, at each call
        self.augment = _Seeded(augment)

    def __call__(self, shape: torch.Size) -> _Step:
        return functools.partial(self._augmented, _drawn_below(2**32))

    def _augmented(self, seed: int, image: torch.Tensor) -> torch.Tensor:
        return tensor_of(self.augment(_as_pil(image), seed))


def _as_pil(pixels_CHW: torch.Tensor) -> Image.Image:
    """Of uint8 RGB; torchvision's own, which takes anything, takes ten times as long."""
    pixels_HWC = np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())
    return Image.frombytes("RGB", (pixels_HWC.shape[1], pixels_HWC.shape[0]), pixels_HWC)


def mend_posterize(augment: Any) -> None:
    """Lets timm's RandAugment keep 0 bits, which newer Pillows refuse."""
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, whose strongest level keeps 0 bits: black, as older Pillows made it; newer ones refuse."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class _Seeded:
    """A transform of timm's that draws from Python's and numpy's generators: from its own two, seeded at each call."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform
        self.random, self.bits = random.Random(), np.random.MT19937()

    def __call__(self, image: Any, seed: int) -> Any:
        # They take the places of the global ones: to copy those' states out and back takes as long as many draws.
        module: Any = sys.modules[type(self.transform).__module__]
        before = mtrand.get_bit_generator()
        module.random = self.random
        mtrand.set_bit_generator(self.bits)
        self.random.seed(seed)
        np.random.seed(seed)
        try:
            return self.transform(image)
        finally:
            module.random = random
            mtrand.set_bit_generator(before)


class _Erasing:
    """timm's random erasing, which wants normalised pixels, of uint8 images: in their place."""

    def __init__(self, probability: float, mean: Sequence[float], std: Sequence[float]) -> None:
        from timm.data.random_erasing import RandomErasing

        self.erase = _Seeded(RandomErasing(probability, mode="pixel", device="cpu"))
        self.mean, self.std = (255 * torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def __call__(self, shape: torch.Size) -> _Step:
        written = _Written(shape)
        self.erase(written, _drawn_below(2**32))
        return functools.partial(self._erased, written.parts)

    def _erased(self, parts: Sequence[tuple[Any, torch.Tensor]], image: torch.Tensor) -> torch.Tensor:
        for where, noise in parts:
            image[where] = (noise * self.std + self.mean).round_().clamp_(0, 255)
        return image


class _Written:
    """Stands in for an image and keeps what timm writes into it."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.parts: list[tuple[Any, torch.Tensor]] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, where: Any, noise: torch.Tensor) -> None:
        self.parts.append((where, noise))


def evaluation_transform(img_size: int, *, crop_fraction: float = CROP_FRACTION) -> View:
    """Returns a bicubic resize of the shorter side to img_size / crop_fraction, rounded down, then a centre crop.

    Args:
        img_size: side of the square result, in pixels.
        crop_fraction: part of the resized side that is kept, in (0, 1].

    Returns:
        Callable, `Picture` -> uint8 (3, img_size, img_size).

    Raises:
        UserError: crop_fraction outside (0, 1].
    """
    if not 0 < crop_fraction <= 1:
        raise UserError(f"crop_fraction must be in (0, 1], got {crop_fraction}; 0.875 is usual at 224 pixels")
    resize = v2.Resize(int(img_size / crop_fraction), InterpolationMode.BICUBIC)  # as timm rounds
    return functools.partial(_in_turn, [Picture.pil, resize, v2.CenterCrop(img_size), tensor_of])


def evaluation_cut(img_size: int) -> dict[str, int]:
    """Tells images of an evaluation from those of before it rounded down; empty where both are the same.

    For the identity of what is kept of such images on disk.
    """
    side = img_size / CROP_FRACTION
    return {} if int(side) == round(side) else {"resized_px": int(side)}


def contrastive_transform(
    img_size: int,
    *,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    colour_jitter: float = 0.4,
    grey: float = 0.2,
) -> View:
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
        Callable, `Picture` -> uint8 (2, 3, img_size, img_size).

    Source: Chen et al. 2020 (arXiv:2002.05709), appendix A, with weaker jitter and without blur.
    """
    jitter = v2.ColorJitter(colour_jitter, colour_jitter, colour_jitter, colour_jitter / 4)
    steps = [
        _CropAndFlip(img_size, crop_scale, crop_ratio, "bilinear", flip),
        _as_pil,
        v2.RandomApply([jitter], p=0.8),
        v2.RandomGrayscale(grey),
        tensor_of,
    ]
    return functools.partial(_two_views, steps)


def _two_views(steps: Sequence[Callable[[Any], Any]], picture: Picture) -> torch.Tensor:
    picture.num_crops = 2
    return torch.stack([_in_turn(steps, picture), _in_turn(steps, picture)])


def training_transform(recipe: Recipe, source: Source) -> Transform:
    """Returns how an image and its target are cut in training, for the task of a recipe whose model is resolved.

    Args:
        recipe: of any task.
        source: its training images, of which `detection.copy_paste` takes a second one.

    Raises:
        UserError: an augmentation that is none, or that the source does not allow.
    """
    data = recipe.data
    if recipe.contrastive is not None:
        return ImageAlone(
            contrastive_transform(
                recipe.model.size,
                crop_scale=data.crop_scale,
                crop_ratio=data.crop_ratio,
                flip=data.flip,
                colour_jitter=recipe.contrastive.jitter,
            )
        )
    assert recipe.model.mean is not None, "the recipe is resolved"
    assert recipe.model.std is not None, "the recipe is resolved"
    if (section := recipe.segmentation) is not None:
        return MaskCrop(
            side=recipe.model.size,
            resize=section.resize,
            max_class_share=section.max_class_share,
            flip=data.flip,
            distort=section.photometric,
            fill=fill_colour(recipe.model.mean),
        )
    if recipe.detection is not None:
        return _detection_crop(recipe, source)
    view = training_view(
        recipe.model.size,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        interpolation=data.interpolation,
        flip=data.flip,
        rand_augment=data.rand_augment,
        erasing=data.erasing,
        mean=recipe.model.mean,
        std=recipe.model.std,
    )
    return ImageAlone(view)


def _detection_crop(recipe: Recipe, source: Source) -> Transform:
    section, mean = recipe.detection, recipe.model.mean
    assert section is not None, "a recipe of task detection has its section"
    assert mean is not None, "the recipe is resolved"
    crop = InstanceCrop(
        side=recipe.model.size,
        scale_range=section.scale_range,
        flip=recipe.data.flip,
        distort=section.photometric,
        fill=fill_colour(mean),
    )
    if not section.copy_paste:
        return crop
    objects = object_source(source)
    if not objects.has_outlines:
        raise UserError(
            f"detection.copy_paste: got {section.copy_paste}, and the objects of {recipe.data.train} have boxes alone; "
            "set it to 0"
        )
    return CopyPaste(crop=crop, source=objects, probability=section.copy_paste)


def measuring_transform(recipe: Recipe) -> Transform:
    """Returns how an image and its target are cut for a metric of a recipe's task."""
    if recipe.detection is not None:
        return whole_with_objects
    if recipe.segmentation is not None:
        return whole_with_mask
    return ImageAlone(evaluation_transform(recipe.model.size))
