"""Images with objects: COCO, Objects365, or any folder of images with annotations in COCO's format."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fd_scale.data.base import IGNORED, UNLABELLED, Targets, content_hash
from fd_scale.data.coco_index import index_of
from fd_scale.data.decode import DecodeError, decode_mask
from fd_scale.data.objects import Objects
from fd_scale.data.picture import Picture
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

NUM_STUFF_CLASSES = 183
"""Of COCO-stuff: 91 of things, 91 of stuff, and `other`, which maps of stuff alone have in the place of all things."""


@dataclass(frozen=True)
class PixelMaps:
    """COCO-stuff's class of each pixel, a PNG file an image."""

    folder: Path
    first: int
    """Value of class 0; the value before it, as an unsigned number 255 for 0, is no class."""


class CocoSource:
    """Image files below a folder, and what a JSON file says of the objects in them.

    Args:
        kind: of the source, as the user writes it.
        images: folder of the images.
        annotations: the JSON file; see `coco_index.convert`.
        pixel_maps: COCO-stuff's; none: there are none.
        num_parts: of a file name in the JSON, how many of its last parts lead to the image below the folder; none: all.

    Raises:
        UserError: there is no such folder, or the JSON is broken.
    """

    targets: Targets = "instances"

    def __init__(
        self,
        kind: str,
        images: Path,
        annotations: Path,
        pixel_maps: PixelMaps | None = None,
        num_parts: int | None = None,
    ) -> None:
        if not images.is_dir():
            raise UserError(f"{kind}: {images} is not a folder; check the path, or what is below it")
        self.images, self.annotations, self.pixel_maps, self.num_parts = (
            images,
            annotations,
            pixel_maps,
            num_parts,
        )
        self.index = index_of(annotations)
        header = self.index.header
        left_out = ", ".join(f"{count} {what}" for what, count in header["left_out"].items() if count)
        if left_out:
            logger.info("%s: not learned: %s", annotations, left_out)
        if header["doubt"]:
            logger.warning("%s: %s", annotations, header["doubt"])
        self.class_names: list[str] | None = header["class_names"]
        self.num_classes = len(header["class_names"])
        self.category_ids: list[int] = header["category_ids"]
        self.has_outlines: bool = header["has_outlines"]
        self.num_semantic_classes = 0 if pixel_maps is None else NUM_STUFF_CLASSES
        self.is_annotated = len(self.index.columns["ids"]) > 0

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Source`: that of the JSON, which has the images' names and sizes; and which pixel maps there are."""
        facts = [self.index.header["digest"], str(self.pixel_maps is not None)]
        if self.pixel_maps is not None and self.pixel_maps.first == 0:
            facts.append("with things")  # which earlier versions, whose runs go on, did not know
        return content_hash(facts)

    def __len__(self) -> int:
        return len(self.index)

    def all_labels(self) -> npt.NDArray[np.int64]:
        """See `Source`: an image as a whole has no label."""
        return np.full(len(self), UNLABELLED, dtype=np.int64)

    def name(self, sample_id: int) -> str:
        return str(self.images / self.key(sample_id))

    def key(self, sample_id: int) -> str:
        parts = Path(self.index.file_name(sample_id)).parts
        return os.path.join(*(parts if self.num_parts is None else parts[-self.num_parts :]))

    def objects(self, sample_id: int) -> Objects:
        """See `ObjectSource`; without a map of pixels."""
        return self.index.objects(sample_id)

    def read(self, sample_id: int) -> tuple[Picture, Objects]:
        """See `Source`. What does not fit the image names the annotations' file."""
        objects = self.index.objects(sample_id)
        try:
            image = Picture(Path(self.name(sample_id)).read_bytes())
        except OSError as error:
            raise DecodeError(f"it cannot be read: {error.strerror}") from error
        if image.size != (objects.width, objects.height):
            raise DecodeError(
                f"it is {image.width} x {image.height} px, and image {objects.image_id} of {self.annotations} is "
                f"{objects.width} x {objects.height}"
            )
        return image, objects if self.pixel_maps is None else self._with_map(
            objects, self.pixel_maps, sample_id
        )

    def _with_map(self, objects: Objects, maps: PixelMaps, sample_id: int) -> Objects:
        file = (maps.folder / self.key(sample_id)).with_suffix(".png")
        try:
            values_HW = decode_mask(file.read_bytes())
        except OSError as error:
            raise DecodeError(f"its pixel map {file} cannot be read: {error.strerror}") from error
        except DecodeError as error:
            raise DecodeError(f"its pixel map {file}: {error}") from error
        if values_HW.shape != (objects.height, objects.width):
            raise DecodeError(
                f"its pixel map {file} is {values_HW.shape[1]} x {values_HW.shape[0]} px, and the image "
                f"{objects.width} x {objects.height}"
            )
        assert IGNORED == 255, "what `PixelMaps` says of no class"
        classes_HW = values_HW - np.uint8(maps.first)
        unknown_HW = (classes_HW >= NUM_STUFF_CLASSES) & (classes_HW != IGNORED)
        if unknown_HW.any():
            none = (maps.first - 1) % 256
            raise DecodeError(
                f"its pixel map {file} has the value {values_HW[unknown_HW].min()}, expected {maps.first} to "
                f"{maps.first + NUM_STUFF_CLASSES - 1}, or {none} for no class"
            )
        return replace(objects, semantic=Image.fromarray(classes_HW))


def coco(kind: str, part: str, path: str) -> CocoSource:
    """Opens a part of COCO 2017, 80 classes: `train2017`, 118,287 images, or `val2017`, 5,000."""
    root = Path(path)
    maps = (
        PixelMaps(root / "stuffthingmaps" / part, first=0),  # things too, as HTC learns from
        PixelMaps(root / "annotations" / f"stuff_{part}_pixelmaps", first=1),
    )
    return CocoSource(
        f"{kind}:{root}",
        root / part,
        root / "annotations" / f"instances_{part}.json",
        next((each for each in maps if each.folder.is_dir()), None),
    )


def coco_test_dev(path: str) -> CocoSource:
    """Opens COCO's test-dev part, 20,288 images without annotations: the benchmark's server measures detections."""
    root = Path(path)
    return CocoSource(
        f"coco_test_dev:{root}", root / "test2017", root / "annotations" / "image_info_test-dev2017.json"
    )


def objects365(kind: str, part: str, path: str) -> CocoSource:
    """Opens a part of Objects365 v2, 365 classes, boxes alone: `train`, 1.7 million images, or `val`, 80,000.

    They lie as in the JSON, `images/v1/patch0/NAME`, or as they are distributed, `train/patch0/NAME`.
    """
    root = Path(path)
    annotations = root / "annotations" / f"zhiyuan_objv2_{part}.json"
    if (root / part).is_dir():
        return CocoSource(f"{kind}:{root}", root / part, annotations, num_parts=2)
    return CocoSource(f"{kind}:{root}", root, annotations)


def instances_folder(path: str) -> CocoSource:
    """Opens a folder of one's own: `images`, and `instances.json` in COCO's format."""
    root = Path(path)
    return CocoSource(f"instances:{root}", root / "images", root / "instances.json")
