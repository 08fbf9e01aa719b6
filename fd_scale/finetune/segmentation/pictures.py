"""Masks as pictures: a colour for each class, over an image, with a legend.

Shape legend: H, W = pixels, K = classes; the last axis of a picture is RGB.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fd_scale.data import IGNORED

_ROW_PX = 18


def colours() -> np.ndarray:
    """Returns a colour for each class, uint8 (256, 3), far apart for classes that follow each other; ignored: black.

    Source: the colour map of PASCAL VOC's development kit: the bits of the class number, dealt to red, green and blue.
    """
    number_K = np.arange(1, 257)
    found = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            found[:, channel] |= ((number_K >> (3 * bit + channel)) & 1) << (7 - bit)
    found[IGNORED] = 0
    return found.astype(np.uint8)


def painted(mask_HW: np.ndarray) -> np.ndarray:
    """Returns a mask's colours, uint8 (H, W, 3)."""
    return colours()[mask_HW]


def error_map(predicted_HW: np.ndarray, truth_HW: np.ndarray) -> np.ndarray:
    """Returns uint8 (H, W, 3): red where the classes differ, white where they agree, black where there is no truth."""
    picture = np.full((*truth_HW.shape, 3), 255, dtype=np.uint8)
    picture[predicted_HW != truth_HW] = (220, 30, 30)
    picture[truth_HW == IGNORED] = 0
    return picture


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    """Of what is written on pictures: matplotlib's, with Latin, Greek and Cyrillic letters; Pillow's own has few."""
    import matplotlib  # half a second that other uses need not wait

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 10)


def overlay(image: Image.Image, mask_HW: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Returns an image half covered by the colours of its classes, and beside it their names and shares.

    Args:
        image: RGB.
        mask_HW: uint8, of the image's size.
        class_names: of all classes.
    """
    covered = Image.blend(image, Image.fromarray(painted(mask_HW)), 0.5)
    counts = np.bincount(mask_HW.ravel(), minlength=IGNORED + 1)[:IGNORED]
    present = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
    lines = [f"{class_names[label]}  {counts[label] / mask_HW.size:.1%}" for label in present]
    width = 30 + max(int(font().getlength(line)) for line in lines)
    page = Image.new("RGB", (image.width + width, max(image.height, _ROW_PX * len(lines))), "white")
    page.paste(covered, (0, 0))
    draw = ImageDraw.Draw(page)
    for row, (label, line) in enumerate(zip(present, lines, strict=True)):
        left, top = image.width + 6, _ROW_PX * row
        draw.rectangle(
            (left, top + 3, left + 12, top + 15), fill=tuple(colours()[label].tolist()), outline="black"
        )
        draw.text((left + 18, top + 3), line, fill="black", font=font())
    return page
