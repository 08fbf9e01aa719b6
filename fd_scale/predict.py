"""`fd-scale predict`: what a run's model makes of images, as pictures."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fd_scale.config import Recipe, as_list
from fd_scale.data import open_source
from fd_scale.data.base import IMAGE_SUFFIXES
from fd_scale.data.decode import DecodeError, decode
from fd_scale.data.masks import ade20k_names
from fd_scale.errors import UserError
from fd_scale.finetune import SegmentationTask
from fd_scale.finetune.segmentation.pictures import overlay

logger = logging.getLogger(__name__)


def images_below(path: Path) -> list[Path]:
    """Returns an image file, or those of a folder and all below it.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"{path}: no image there; expected a file, or a folder with images")
    return found


def predict_images(
    task: SegmentationTask, class_names: list[str] | None, path: Path, out: Path, device: torch.device
) -> list[Path]:
    """Writes a picture for each image, named OUT/NAME.png: it, under the colours of its classes, and a legend.

    Args:
        task: with its trained weights, in eval mode on the device.
        class_names: of its classes; none: their numbers.
        path: an image or a folder.
        out: folder of the pictures; those of sub-folders lie in sub-folders.
        device: of the module.

    Returns:
        The pictures.

    Raises:
        UserError: there are no images, one cannot be decoded, or nothing can be written.
    """
    names = class_names or [str(label) for label in range(task.num_classes)]
    files, written = images_below(path), []
    root = path if path.is_dir() else path.parent

    def segment(images_BCHW: Tensor) -> Tensor:
        return task.module(images_BCHW=images_BCHW)["logits"]

    for file in files:
        try:
            image = decode(file.read_bytes())
        except (DecodeError, OSError) as error:
            raise UserError(f"{file}: cannot be decoded ({error}); repair or remove it") from None
        with torch.no_grad():
            classes_HW = task.predictor(pil_to_tensor(image).to(device), segment)
        target = out / f"{file.relative_to(root)}.png"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            overlay(image, classes_HW.cpu().numpy(), names).save(target)
        except OSError as error:
            raise UserError(
                f"--out {out}: cannot be written ({error.strerror}); name another folder"
            ) from None
        logger.info("%s", target)
        written.append(target)
    return written


def class_names_of(recipe: Recipe) -> list[str] | None:
    """Returns the names of a run's classes, or none where its data are not here and are not ADE20K's."""
    sources = as_list(recipe.data.train)
    if sources[0].source.startswith("ade20k_"):
        return ade20k_names()
    try:
        return open_source(recipe.data.train).class_names
    except UserError as error:
        logger.warning("the legend has numbers in place of names: %s", error)
        return None
