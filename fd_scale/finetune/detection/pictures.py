"""Objects as pictures: boxes, names and masks over an image.

Shape legend: C = channels, H, W = pixels, N = objects, m = side of a mask in its box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fd_scale.data.instances import Detections, Instances, unpacked
from fd_scale.finetune.segmentation.pictures import colours

_CROWD = "crowd"


def with_truth(image_CHW: Tensor, objects: Instances, class_names: Sequence[str] | None) -> np.ndarray:
    """Returns an image, uint8, with what is known of its objects, uint8 (H, W, 3); names: none are numbers."""
    masks_NHW = None
    if objects.has_masks:
        masks_NHW = unpacked(objects.masks_NHw, image_CHW.shape[2]).bool().cpu().numpy()
    captions = [
        _CROWD if crowd else _name(label, class_names)
        for label, crowd in zip(objects.labels_N.tolist(), objects.crowd_N.tolist(), strict=True)
    ]
    image = image_CHW.permute(1, 2, 0).cpu().numpy()
    return np.asarray(_drawn(image, objects.boxes_N4, objects.labels_N, masks_NHW, captions))


def with_detections(
    image_CHW: Tensor, found: Detections, class_names: Sequence[str] | None, least_score: float
) -> np.ndarray:
    """Returns an image, uint8, with what was detected in it, uint8 (H, W, 3).

    Args:
        image_CHW: uint8.
        found: in its pixels.
        class_names: none: numbers.
        least_score: others are not shown.
    """
    shown = Detections(*(part[found.scores_N >= least_score].cpu() for part in found))
    masks_NHW = None
    if shown.masks_Nmm.shape[1]:
        masks_NHW = pasted(shown, *image_CHW.shape[1:])
    captions = [
        f"{_name(label, class_names)} {score:.2f}"
        for label, score in zip(shown.labels_N.tolist(), shown.scores_N.tolist(), strict=True)
    ]
    image = image_CHW.permute(1, 2, 0).cpu().numpy()
    return np.asarray(_drawn(image, shown.boxes_N4, shown.labels_N, masks_NHW, captions))


def pasted(found: Detections, height: int, width: int) -> np.ndarray:
    """Returns masks, bool (N, H, W): where a pixel's centre lies in the box, and its probability is 0.5 or more."""
    masks = np.zeros((len(found.scores_N), height, width), dtype=bool)
    for mask_HW, mask_mm, box in zip(masks, found.masks_Nmm, found.boxes_N4.tolist(), strict=True):
        left, top = (max(0, math.floor(edge)) for edge in box[:2])
        right, bottom = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
        x, y = (
            (torch.arange(first, last) + 0.5 - low) / max(high - low, 1e-6) * 2 - 1
            for first, last, low, high in ((left, right, box[0], box[2]), (top, bottom, box[1], box[3]))
        )
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        values = F.grid_sample(mask_mm[None, None], grid[None], align_corners=False)[0, 0]
        mask_HW[top:bottom, left:right] = (values >= 0.5).numpy()
    return masks


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return class_names[label] if class_names is not None else str(label)


def _drawn(
    image_HWC: np.ndarray,
    boxes_N4: Tensor,
    labels_N: Tensor,
    masks_NHW: np.ndarray | None,
    captions: Sequence[str],
) -> Image.Image:
    picture = image_HWC.astype(np.float32)
    inks = [colours()[label % 254 + 1] for label in labels_N.tolist()]
    if masks_NHW is not None:
        for mask_HW, ink in zip(masks_NHW, inks, strict=True):
            picture[mask_HW] = 0.5 * picture[mask_HW] + 0.5 * ink
    page = Image.fromarray(picture.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for box, ink, caption in zip(boxes_N4.tolist(), inks, captions, strict=True):
        draw.rectangle(box, outline=tuple(ink.tolist()), width=2)
        corner = (max(box[0], 0), max(box[1] - 11, 0))
        draw.rectangle(draw.textbbox(corner, caption, font=font), fill=tuple(ink.tolist()))
        draw.text(corner, caption, fill="white" if ink.sum() < 384 else "black", font=font)
    return page
