"""`fd-scale predict`: what a run's model makes of images: pictures, or a table of classes."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fd_scale.checkpoint import write_atomically
from fd_scale.config import Recipe, as_list
from fd_scale.data import evaluation_batches, measuring_transform, open_source
from fd_scale.data.base import UNLABELLED
from fd_scale.data.decode import DecodeError, decode
from fd_scale.data.folders import FileSource, walk_images
from fd_scale.data.instances import Detections
from fd_scale.data.masks import ade20k_names
from fd_scale.data.picture import Picture
from fd_scale.data.transforms import Transform, Unfinished
from fd_scale.errors import UserError
from fd_scale.evaluation import compact, results_of
from fd_scale.finetune import ClassificationTask, DetectionTask, SegmentationTask
from fd_scale.finetune.detection.pictures import with_detections
from fd_scale.finetune.segmentation.pictures import overlay

logger = logging.getLogger(__name__)

NUM_CLASSES = 5
"""Of an image, the most probable ones, that a table has."""
_BROKEN = UNLABELLED - 1
SHOWN_SCORE = 0.3
"""Of a detection, where `detection.score_threshold` is lower: that is for AP, and a picture with all would be full."""


class _Files(FileSource):
    """Files, of which some may be no images."""

    def read(self, sample_id: int) -> tuple[Picture, int]:
        try:
            return super().read(sample_id)
        except DecodeError:
            return Picture.of(Image.new("RGB", (1, 1))), _BROKEN


@dataclass(frozen=True)
class _OrNothing:
    """The transform of a classifier's evaluation; what cannot be decoded is black, and its target `_BROKEN`."""

    transform: Transform
    side: int

    def __call__(self, picture: Picture, target: int) -> tuple[Tensor | Unfinished, Any]:
        try:
            return self.transform(picture, target)
        except DecodeError:
            return torch.zeros(3, self.side, self.side, dtype=torch.uint8), _BROKEN


def _require_whole(broken: list[str], num_images: int, out: Path) -> None:
    """Refuses, behind all else, what could not be decoded."""
    if broken:
        named = "; ".join(broken[:5]) + (f"; and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise UserError(
            f"{len(broken)} of {num_images} images cannot be decoded: {named}; repair or remove them; what the others "
            f"gave is in {out}"
        )


def images_below(path: Path) -> list[Path]:
    """Returns an image file, or those of a folder and all below it.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"{path} does not exist; expected an image, or a folder with images")
    found = sorted(path / name for name in walk_images(path))
    if not found:
        raise UserError(f"{path}: no image there; expected a file, or a folder with images")
    return found


def predict_classes(
    task: ClassificationTask,
    recipe: Recipe,
    class_names: list[str] | None,
    path: Path,
    out: Path,
    device: torch.device,
) -> Path:
    """Writes a table of images and their most probable classes, `predictions.csv`.

    Args:
        task: with its trained weights, in eval mode on the device.
        recipe: the run's: images are cut as in its evaluations.
        class_names: of its classes; none: their numbers.
        path: an image or a folder.
        out: folder of the table.
        device: of the module.

    Returns:
        The table: a row an image, its path relative to the folder, then name and probability (0..1) of each class.

    Raises:
        UserError: there are no images, nothing can be written, or, once the table is, some cannot be decoded.
    """
    num_classes = task.module.head.out_features
    names = _named(class_names, num_classes)
    root = path if path.is_dir() else path.parent
    files = [str(file.relative_to(root)) for file in images_below(path)]
    source = _Files(root, files, [UNLABELLED] * len(files), [])
    count = min(NUM_CLASSES, num_classes)
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(
        ["image", *(f"{what}_{place}" for place in range(1, count + 1) for what in ("class", "probability"))]
    )
    broken = []
    for file, found in zip(files, _most_probable(task, recipe, source, count, device), strict=True):
        name = file.encode(errors="backslashreplace").decode()  # names that are no UTF-8
        if found is None:
            broken.append(name)
        else:
            rows.writerow(
                [name, *(cell for label, share in found for cell in (names[label], f"{share:.4f}"))]
            )
    target = out / "predictions.csv"
    _write(target, table.getvalue(), out)
    _require_whole(broken, len(files), out)
    return target


def _most_probable(
    task: ClassificationTask, recipe: Recipe, source: _Files, count: int, device: torch.device
) -> Iterator[list[tuple[int, float]] | None]:
    """Yields for each image the `count` most probable classes with their probabilities; none: it cannot be decoded."""
    transform = _OrNothing(measuring_transform(recipe), recipe.model.size)
    for batch in evaluation_batches(
        source, transform, batch_size=recipe.train.micro_batch, rank=0, world_size=1,
        num_workers=recipe.data.num_workers,
    ):  # fmt: skip
        inputs = task.evaluation_inputs(batch.to(device))
        inputs["labels_B"] = torch.full_like(inputs["labels_B"], UNLABELLED)
        with torch.no_grad():
            shares, labels = task.module(**inputs)["logits"].softmax(-1).topk(count)
        for target, *found in zip(batch.classes.tolist(), labels.tolist(), shares.tolist(), strict=True):
            yield None if target == _BROKEN else list(zip(*found, strict=True))


def _named(class_names: list[str] | None, num_classes: int) -> list[str]:
    if class_names is None or len(class_names) != num_classes:
        return [str(label) for label in range(num_classes)]
    return class_names


def _write(file: Path, content: str | bytes, out: Path) -> None:
    """Writes a file, all or nothing, somewhere below the folder `out`."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None


@dataclass
class _Annotations:
    """Detections of images as COCO writes a data set of its own, with a score for each object."""

    names: list[str]
    images: list[dict[str, Any]] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file: str, found: Detections, height: int, width: int) -> None:
        """Adds an image, in pixels, and what was found in it."""
        self.images.append({"id": len(self.images) + 1, "file_name": file, "height": height, "width": width})
        for result in results_of(
            compact(found, height, width), len(self.images), range(1, len(self.names) + 1)
        ):
            runs = result.get("segmentation")
            area = float(coco_mask.area(runs)) if runs else result["bbox"][2] * result["bbox"][3]
            self.objects.append({"id": len(self.objects) + 1, "area": area, "iscrowd": 0} | result)

    def to_json(self) -> str:
        """The data set."""
        categories = [{"id": number, "name": name} for number, name in enumerate(self.names, start=1)]
        return json.dumps({"images": self.images, "annotations": self.objects, "categories": categories})


def _targets(path: Path, root: Path, out: Path) -> dict[Path, Path]:
    """Where the picture of each image goes."""
    targets = {file: (out / file.relative_to(root)).with_suffix(".png") for file in images_below(path)}
    taken = {file.resolve(): file for file in targets}  # resolved: one folder has many names
    for file, target in targets.items():
        place = target.resolve()
        if place in taken:
            raise UserError(
                f"--out {out}: the picture of {file} would take the place of {taken[place]}, or of its picture; name "
                "another folder, and files that differ in more than their suffix"
            )
        taken[place] = file
    return targets


def predict_images(
    task: SegmentationTask | DetectionTask,
    class_names: list[str] | None,
    path: Path,
    out: Path,
    device: torch.device,
    mask_values: list[int] | None = None,
) -> list[Path]:
    """Writes a PNG file for each image: it under the colours of its classes, with a legend; or its objects, or mask.

    Objects are in `detections.json`, too, which is a data set in COCO's format, with a score for each.

    Args:
        task: with its trained weights, in eval mode on the device.
        class_names: of its classes; none: their numbers.
        path: an image or a folder.
        out: folder of the pictures; those of sub-folders lie in sub-folders.
        device: of the module.
        mask_values: of the classes in masks, 8-bit grey, which are wanted of a segmentation in place of pictures; none:
            pictures are.

    Returns:
        The pictures, and `detections.json` behind them.

    Raises:
        UserError: there are no images, two would be written to one file, or nothing can be; or, once all others are,
            some cannot be decoded.
    """
    names = _named(class_names, task.num_classes)
    root = path if path.is_dir() else path.parent
    targets = _targets(path, root, out)
    broken, written = [], list(targets.values())
    annotations = _Annotations(names)
    for file, target in targets.items():
        try:
            image = decode(file.read_bytes())
        except (DecodeError, OSError) as error:
            broken.append(f"{file}: {error}".encode(errors="backslashreplace").decode())
            continue
        pixels_CHW = pil_to_tensor(image).to(device)
        with torch.no_grad():
            if isinstance(task, DetectionTask):
                found = task.detect(pixels_CHW, task.module)
                annotations.add(str(file.relative_to(root)), found, image.height, image.width)
                picture = Image.fromarray(with_detections(pixels_CHW, found, names, SHOWN_SCORE))
            else:
                picture = _segmented(task, image, pixels_CHW, names, mask_values)
        encoded = io.BytesIO()
        picture.save(encoded, "png")
        _write(target, encoded.getvalue(), out)
        logger.info("%s", target)
    if isinstance(task, DetectionTask):
        written.append(out / "detections.json")
        _write(written[-1], annotations.to_json(), out)
    _require_whole(broken, len(targets), out)
    return written


def _segmented(
    task: SegmentationTask,
    image: Image.Image,
    pixels_CHW: Tensor,
    names: list[str],
    mask_values: list[int] | None,
) -> Image.Image:
    def segment(images_BCHW: Tensor) -> Tensor:
        return task.module(images_BCHW=images_BCHW)["logits"]

    mask_HW = task.predictor(pixels_CHW, segment).cpu().numpy()
    if mask_values is None:
        return overlay(image, mask_HW, names)
    return Image.fromarray(np.array(mask_values, dtype=np.uint8)[mask_HW])


def mask_values_of(recipe: Recipe, num_classes: int) -> list[int]:
    """Returns the classes' values in masks, where a run of an earlier version did not write them down."""
    first = int(as_list(recipe.data.train)[0].source.startswith("ade20k_"))
    return list(range(first, first + num_classes))


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
