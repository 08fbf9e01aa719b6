"""Objects as pictures: boxes, names and masks over an image.

Shape legend: C = channels, H, W = pixels, N = objects, m = side of a mask in its box.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch import Tensor

from fd_scale.data.instances import Detections, Instances, unpacked
from fd_scale.evaluation import compact
from fd_scale.finetune.segmentation.pictures import colours, font

_CROWD = "crowd"


def with_truth(image_CHW: Tensor, objects: Instances, class_names: Sequence[str] | None) -> np.ndarray:
    """Returns an image, uint8, with what is known of its objects, uint8 (H, W, 3); names: none are numbers."""
    masks_NHW: Sequence[np.ndarray] | None = None
    if objects.has_masks:
        masks_NHW = list(unpacked(objects.masks_NHw, image_CHW.shape[2]).bool().cpu().numpy())
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
    masks_NHW: Sequence[np.ndarray] | None = None
    if shown.masks_Nmm.shape[1]:
        height, width = image_CHW.shape[1:]
        runs = compact(shown, height, width)["masks"]  # the pixels that AP is measured of
        masks_NHW = [coco_mask.decode({"size": [height, width], "counts": counts}) > 0 for counts in runs]
    captions = [
        f"{_name(label, class_names)} {score:.2f}"
        for label, score in zip(shown.labels_N.tolist(), shown.scores_N.tolist(), strict=True)
    ]
    image = image_CHW.permute(1, 2, 0).cpu().numpy()
    return np.asarray(_drawn(image, shown.boxes_N4, shown.labels_N, masks_NHW, captions))


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return class_names[label] if class_names is not None else str(label)


def _drawn(
    image_HWC: np.ndarray,
    boxes_N4: Tensor,
    labels_N: Tensor,
    masks_NHW: Sequence[np.ndarray] | None,
    captions: Sequence[str],
) -> Image.Image:
    picture = image_HWC.astype(np.float32)
    inks = [colours()[label % 254 + 1] for label in labels_N.tolist()]
    if masks_NHW is not None:
        for mask_HW, ink in zip(masks_NHW, inks, strict=True):
            picture[mask_HW] = 0.5 * picture[mask_HW] + 0.5 * ink
    page = Image.fromarray(picture.round().astype(np.uint8))
    draw = ImageDraw.Draw(page)
    for box, ink, caption in zip(boxes_N4.tolist(), inks, captions, strict=True):
        draw.rectangle(box, outline=tuple(ink.tolist()), width=2)
        corner = (max(box[0], 0), max(box[1] - 11, 0))
        draw.rectangle(draw.textbbox(corner, caption, font=font()), fill=tuple(ink.tolist()))
        draw.text(corner, caption, fill="white" if ink.sum() < 384 else "black", font=font())
    return page
