"""Transforms of an image together with its objects: large-scale jitter, and objects of one image pasted into another.

As in `transforms`, they draw from torch's default generator only.

Shape legend: N = objects, H, W = pixels, w = bytes of a row of 8 pixels each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fd_scale.data.base import IGNORED, ObjectSource
from fd_scale.data.decode import DecodeError
from fd_scale.data.instances import Instances, unpacked
from fd_scale.data.mask_transforms import distorted, padded
from fd_scale.data.objects import Objects, Window, box_around, mask_in, nearest_in
from fd_scale.data.picture import Picture

MIN_SIDE = 1.0
"""Of a box, in pixels: what a crop leaves less of is no object; as torchvision's `SanitizeBoundingBoxes`."""
_CUT = 0.5  # pixels: a box that loses more is drawn anew around what is left of its mask


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceCrop:
    """Large-scale jitter: random resize, a square crop, filled up where the image is smaller, and flip.

    A box that the crop cuts is drawn anew around what is left of the object's mask, or cut itself where there are no
    masks. What has no pixel of its mask, or less than `MIN_SIDE` of its box, is gone; crowds are cut like objects.

    Source: Ghiasi et al. 2021 (arXiv 2012.07177); `ResizeScale`, `FixedSizeCrop` and `recompute_boxes` of detectron2
        (Apache 2.0), written anew.
    """

    side: int
    """Of the square crop, in pixels."""
    scale_range: tuple[float, float]
    """Smallest and largest size of the resized image, as a factor of the largest one that fits into the square."""
    flip: float
    """Probability of a horizontal flip."""
    distort: bool
    """Whether brightness, contrast, saturation and hue change at random."""
    fill: tuple[int, int, int]
    """Colour that a smaller image is filled up with, to the right and below."""

    def __call__(self, picture: Picture, objects: Objects) -> tuple[Tensor, Instances]:
        """Returns uint8 (3, side, side), and the objects in it with masks where the image has outlines."""
        image = picture.pil()
        low, high = self.scale_range
        factor = self.side * (low + (high - low) * float(torch.rand(()))) / max(image.size)
        width, height = (max(1, round(length * factor)) for length in image.size)
        left, top = (int(torch.randint(max(length - self.side, 0) + 1, ())) for length in (width, height))
        window = Window(left, top, min(self.side, width - left), min(self.side, height - top), width, height)
        mirrored = float(torch.rand(())) < self.flip
        image = _seen(image, window, mirrored)
        if self.distort:
            image = distorted(image)
        instances = cut(objects, window, mirrored, self.side)
        return pil_to_tensor(padded(image, self.side, self.fill)), instances


def _seen(image: Image.Image, window: Window, mirrored: bool) -> Image.Image:
    """A window of a resized image, without the rest of it, which may be many times as large."""
    across, down = image.width / window.image_width, image.height / window.image_height
    right, bottom = window.left + window.width, window.top + window.height
    box = (window.left * across, window.top * down, right * across, bottom * down)
    image = image.resize((window.width, window.height), Image.Resampling.BILINEAR, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def cut(objects: Objects, window: Window, mirrored: bool, side: int) -> Instances:
    """Returns what a window of a resized image shows of its objects.

    Args:
        objects: of the whole image.
        window: what is seen.
        mirrored: whether left and right change places in the window.
        side: of the square that is filled up to the right and below the window, in pixels.
    """
    whole_N4, boxes_N4 = _boxes(objects, window)
    kept = np.flatnonzero((boxes_N4[:, 2:] - boxes_N4[:, :2] >= MIN_SIDE).all(axis=1)).tolist()
    masks_NHw = np.zeros((len(kept), 0, 0), dtype=np.uint8)
    if any(outline is not None for outline in objects.outlines):
        masks = {}
        for index in kept:
            outline = objects.outlines[index]
            mask_HW = mask_in(outline, objects, window)
            around = box_around(mask_HW)
            if around is None and (outline is not None or not objects.crowd_N[index]):
                continue
            if around is not None and np.abs(whole_N4[index] - boxes_N4[index]).max() > _CUT:
                boxes_N4[index] = around
            masks[index] = np.packbits(_filled_up(mask_HW, mirrored, side, 0), axis=1)
        kept = list(masks)
        masks_NHw = np.stack([*masks.values(), np.zeros((side, -(-side // 8)), dtype=np.uint8)])[:-1]
    if mirrored:
        boxes_N4[:, [0, 2]] = window.width - boxes_N4[:, [2, 0]]
    semantic_HW = torch.zeros(0, 0, dtype=torch.uint8)
    if objects.semantic is not None:
        seen_HW = nearest_in(np.asarray(objects.semantic), window)
        semantic_HW = torch.from_numpy(_filled_up(seen_HW, mirrored, side, IGNORED))
    return Instances(
        boxes_N4=torch.tensor(boxes_N4[kept], dtype=torch.float32),
        labels_N=torch.tensor(objects.labels_N[kept]),
        crowd_N=torch.tensor(objects.crowd_N[kept]),
        masks_NHw=torch.from_numpy(masks_NHw),
        semantic_HW=semantic_HW,
    )


def _filled_up(map_HW: npt.NDArray[np.uint8], mirrored: bool, side: int, fill: int) -> npt.NDArray[np.uint8]:
    square_HW = np.full((side, side), fill, dtype=np.uint8)
    square_HW[: map_HW.shape[0], : map_HW.shape[1]] = map_HW[:, ::-1] if mirrored else map_HW
    return square_HW


def _boxes(objects: Objects, window: Window) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Left, top, right, bottom in a window, as they are and as far as they are seen."""
    across, down = window.image_width / objects.width, window.image_height / objects.height
    corners_N4 = np.concatenate(
        [objects.boxes_N4[:, :2], objects.boxes_N4[:, :2] + objects.boxes_N4[:, 2:]], axis=1
    )
    whole_N4 = corners_N4 * [across, down, across, down] - [window.left, window.top, window.left, window.top]
    seen_N4 = np.clip(whole_N4, 0, [window.width, window.height, window.width, window.height])
    return whole_N4, seen_N4


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyPaste:
    """Pastes objects of another image into one, both cut by large-scale jitter.

    Of the other image's objects a random number, at least one, is pasted in place of the pixels below. Objects that
    they cover in part have the rest of their mask and a box around it; wholly covered ones are gone. Nothing is pasted
    where the other image shows no object with a mask, or objects here have none, or it cannot be decoded, which is
    reported when its own turn comes.

    Source: Ghiasi et al. 2021 (arXiv 2012.07177), section 3, without blending, which changed nothing there.
    """

    crop: InstanceCrop
    source: ObjectSource
    """Where the other images are from."""
    probability: float

    def __call__(self, picture: Picture, objects: Objects) -> tuple[Tensor, Instances]:
        """As `InstanceCrop`."""
        cropped = self.crop(picture, objects)
        if float(torch.rand(())) >= self.probability:
            return cropped
        other_id = int(torch.randint(len(self.source), ()))
        try:
            other_picture, other_objects = self.source.read(other_id)
            assert isinstance(other_objects, Objects), "a source of objects"
            other_cropped = self.crop(other_picture, other_objects)
        except DecodeError:
            return cropped
        return pasted(*cropped, *other_cropped)


def pasted(
    pixels_CHW: Tensor, instances: Instances, other_CHW: Tensor, others: Instances
) -> tuple[Tensor, Instances]:
    """Pastes a random number of objects, at least one, of another image of the same size; see `CopyPaste`."""
    learned = torch.nonzero(~others.crowd_N)[:, 0]
    if not (len(learned) and others.has_masks) or (len(instances.labels_N) and not instances.has_masks):
        return pixels_CHW, instances
    count = 1 + int(torch.randint(len(learned), ()))
    chosen = learned[torch.randperm(len(learned))[:count]]
    top = _chosen(others, chosen)
    over_Hw = torch.from_numpy(np.bitwise_or.reduce(top.masks_NHw.numpy(), axis=0))
    over_HW = unpacked(over_Hw[None], pixels_CHW.shape[2])[0].bool()
    below = _covered(instances, over_Hw) if len(instances.labels_N) else None
    semantic_HW = instances.semantic_HW
    if semantic_HW.numel() and top.semantic_HW.numel():
        semantic_HW = torch.where(over_HW, top.semantic_HW, semantic_HW)
    if below is not None:  # its masks have the sides of those above
        boxes_N4, labels_N, crowd_N, masks_NHw = map(torch.cat, zip(below[:4], top[:4], strict=True))
        top = Instances(boxes_N4, labels_N, crowd_N, masks_NHw, semantic_HW)
    return torch.where(over_HW, other_CHW, pixels_CHW), top._replace(semantic_HW=semantic_HW)


def _chosen(instances: Instances, indices: Tensor) -> Instances:
    boxes_n4, labels_n, crowd_n, masks_nHw = (values[indices] for values in instances[:4])
    return Instances(boxes_n4, labels_n, crowd_n, masks_nHw, instances.semantic_HW)


def _covered(instances: Instances, over_Hw: Tensor) -> Instances:
    """What is left of objects below a mask."""
    masks_NHw = instances.masks_NHw & ~over_Hw
    boxes_N4 = instances.boxes_N4.clone()
    kept = []
    for index in range(len(masks_NHw)):
        if not torch.equal(masks_NHw[index], instances.masks_NHw[index]):
            around = box_around(unpacked(masks_NHw[index : index + 1], 8 * masks_NHw.shape[2])[0].numpy())
            if around is None:
                continue
            boxes_N4[index] = torch.tensor(around, dtype=torch.float32)
        kept.append(index)
    left = instances._replace(boxes_N4=boxes_N4, masks_NHw=masks_NHw)
    return _chosen(left, torch.tensor(kept, dtype=torch.int64))


def whole_with_objects(picture: Picture, objects: Objects) -> tuple[Tensor, Instances]:
    """The transform of an evaluation: all of an image, uint8 (3, H, W), and its boxes, without masks."""
    window = Window(0, 0, *picture.size, *picture.size)
    boxes_alone = replace(objects, outlines=[None] * len(objects.outlines), semantic=None)
    return pil_to_tensor(picture.pil()), cut(boxes_alone, window, mirrored=False, side=max(picture.size))
