"""The objects of an image as a data set gives them: boxes, and outlines that become masks at any size.

Outlines stay polygons or runs until an image has been resized and cut, and only what is left of them is drawn: that
is cheap, and the same pixels as of the whole image.

Shape legend: N = objects, H, W = pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

Outline = list[npt.NDArray[np.float64]] | bytes | None
"""Polygons x, y, x, y, ... in pixels, whose union it is; or the runs of a mask of the image's size, as COCO compresses
them; or none."""
_SUBPIXELS = 5  # COCO's rasteriser rounds corners to fifths of a pixel


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """What is annotated in one image, to the last bit as its file has it."""

    image_id: int
    """Number of the image in its data set."""
    height: int
    """Of the image, in pixels."""
    width: int
    """Likewise."""
    ids_N: npt.NDArray[np.int64]
    """Numbers of the annotations in their data set."""
    boxes_N4: npt.NDArray[np.float64]
    """Left, top, width, height, which may lie outside the image or have no area."""
    labels_N: npt.NDArray[np.int64]
    """0 to classes - 1."""
    areas_N: npt.NDArray[np.float64]
    """By which objects count as small, medium or large."""
    crowd_N: npt.NDArray[np.bool_]
    """A region of many objects."""
    outlines: list[Outline]
    """Of each object."""
    semantic: Image.Image | None = None
    """8-bit grey, a class of stuff or thing for each pixel, 255 where there is none."""


class Window(NamedTuple):
    """A rectangle of a resized image."""

    left: int
    top: int
    width: int
    height: int
    image_width: int
    """Of the whole resized image."""
    image_height: int
    """Likewise."""


def mask_in(outline: Outline, objects: Objects, window: Window) -> npt.NDArray[np.uint8]:
    """Draws what a window shows of an outline.

    Args:
        outline: polygons or runs; none is drawn as nothing.
        objects: where it is from, of which the image's size is used.
        window: in pixels of the image after a resize.

    Returns:
        mask_HW, 0 and 1, of the window's size: of polygons that part of COCO's own mask of the resized image, the
        same to the pixel from the image's corner, and elsewhere but for ties of COCO's rounding, a pixel in a thousand
        masks; of runs, the nearest pixel of their mask.
    """
    if outline is None:
        return np.zeros((window.height, window.width), dtype=np.uint8)
    if isinstance(outline, bytes):
        whole_HW = coco_mask.decode({"size": [objects.height, objects.width], "counts": outline})
        return nearest_in(whole_HW, window)
    factors = np.array([window.image_width / objects.width, window.image_height / objects.height])
    points = [polygon.reshape(-1, 2) * factors for polygon in outline]
    together_P2 = np.concatenate(points) - [window.left, window.top]
    # Only where it is: most objects are a small part of what is seen.
    seen_2 = np.array([window.width, window.height])
    left, top = np.clip(np.floor(together_P2.min(axis=0)) - 1, 0, seen_2).astype(int).tolist()
    right, bottom = np.clip(np.ceil(together_P2.max(axis=0)) + 1, 0, seen_2).astype(int).tolist()
    if window.left == window.top == 0:
        left, top = 0, 0  # COCO's own sums, to their last bit
    mask_HW = np.zeros((window.height, window.width), dtype=np.uint8)
    if left < right and top < bottom:
        corner = np.array([window.left + left, window.top + top])
        runs = coco_mask.frPyObjects([_snapped(each, corner) for each in points], bottom - top, right - left)
        mask_HW[top:bottom, left:right] = coco_mask.decode(coco_mask.merge(runs))
    return mask_HW


def nearest_in(map_HW: npt.NDArray[np.uint8], window: Window) -> npt.NDArray[np.uint8]:
    """Returns what a window shows of a map of the image's size: for each place, the value nearest to its centre."""
    rows = _nearest(window.top, window.height, window.image_height, map_HW.shape[0])
    columns = _nearest(window.left, window.width, window.image_width, map_HW.shape[1])
    return map_HW[rows[:, None], columns]


def runs_of(outline: Outline, objects: Objects) -> bytes:
    """Returns an outline as the runs of a mask of its image's size, as COCO compresses them."""
    if isinstance(outline, bytes):
        return outline
    if outline is None:
        nothing = {"size": [objects.height, objects.width], "counts": [objects.height * objects.width]}
        return coco_mask.frPyObjects(nothing, objects.height, objects.width)["counts"]
    return coco_mask.merge(coco_mask.frPyObjects(outline, objects.height, objects.width))["counts"]


def box_around(mask_HW: npt.NDArray[np.uint8]) -> tuple[int, int, int, int] | None:
    """Returns left, top, right and bottom edge of what is drawn; none where nothing is."""
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _snapped(points_P2: npt.NDArray[np.float64], corner_2: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Corners relative to a window's, flat, that COCO rounds as it would round those of the whole image.

    It computes int(5 x + 0.5), which rounds up below zero and down above it. So corners are rounded here, and those
    left of and above the window lie where its rounding leads to the same fifth of a pixel.
    """
    fifths_P2 = np.trunc(_SUBPIXELS * points_P2 + 0.5) - _SUBPIXELS * corner_2
    return (np.where(fifths_P2 < 0, fifths_P2 - 0.75, fifths_P2) / _SUBPIXELS).ravel()


def _nearest(first: int, count: int, resized: int, original: int) -> npt.NDArray[np.int64]:
    """Which pixels of a row of `original` are `count` ones, from `first` on, of its resize to `resized`."""
    centres = (np.arange(first, first + count) + 0.5) * original / resized
    return np.minimum(centres.astype(np.int64), original - 1)
