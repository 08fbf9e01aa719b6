"""Annotations in COCO's JSON, converted once into a `MappedFile`: outlines, in the JSON's order, then columns.

Columns are sorted by image. An outline begins at a multiple of 8 bytes: of polygons, fp64: how many, the numbers of
each, then all of them; of runs, COCO's compressed bytes.

Shape legend: M = images, N = annotations.
"""

from __future__ import annotations

import logging
import os
import time
from array import array
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from fd_scale.data.json_lists import JsonLists
from fd_scale.data.mapped_file import Columns, MappedFile, cache_file, make_once, unwritable
from fd_scale.data.objects import Objects, Outline
from fd_scale.errors import UserError

logger = logging.getLogger(__name__)

VERSION = 2
_MOST_OUTSIDE = 0.1
"""Share of boxes that may reach out of their images, by careless annotators, before it is taken for a mistake."""
_POLYGONS, _RUNS = 1, 2
_FARTHEST_PX = 10**6
_WHOLE = ("id", "image_id", "category_id", "height", "width")  # keys of numbers that are whole
_POINTS = 3  # of a polygon at least: pycocotools takes two points for a box


class CocoIndex(MappedFile):
    """What `convert` wrote."""

    MAGIC = b"FDCOCO1\n"
    CONTENT, ORIGIN = "annotations", "the JSON"

    def __len__(self) -> int:
        return len(self.columns["image_ids"])

    def file_name(self, sample_id: int) -> str:
        """Returns the image's name in the JSON."""
        return os.fsdecode(self.columns["file_names"][sample_id])

    def objects(self, sample_id: int) -> Objects:
        """Returns what is annotated in an image; images are sorted by their ids."""
        columns = self.columns
        own = slice(*columns["first"][sample_id : sample_id + 2].tolist())
        shapes = zip(*(columns[name][own].tolist() for name in ("kind", "start", "size")), strict=True)
        return Objects(
            image_id=int(columns["image_ids"][sample_id]),
            height=int(columns["height"][sample_id]),
            width=int(columns["width"][sample_id]),
            ids_N=columns["ids"][own],
            boxes_N4=columns["boxes"][own],
            labels_N=columns["labels"][own].astype(np.int64),
            areas_N=columns["areas"][own],
            crowd_N=columns["crowd"][own],
            outlines=[self._outline(*shape) for shape in shapes],
        )

    def _outline(self, kind: int, start: int, size: int) -> Outline:
        if kind == _RUNS:
            return self.bytes[start : start + size].tobytes()
        if kind != _POLYGONS:
            return None
        numbers = np.frombuffer(self.bytes, dtype=np.float64, count=size // 8, offset=start)
        ends = (
            1 + int(numbers[0]) + np.concatenate([[0], numbers[1 : 1 + int(numbers[0])].cumsum()])
        ).tolist()
        return [numbers[int(first) : int(last)] for first, last in pairwise(ends)]


def index_of(file: Path) -> CocoIndex:
    """Opens the index of a JSON file; the first call makes it, and others wait for that one.

    It lies in `$XDG_CACHE_HOME/fd-scale` (`~/.cache/fd-scale`), named by the JSON's place, size and time.

    Raises:
        UserError: as of `convert`, or the cache cannot be written.
    """
    index = cache_file(file.stem, [str(file.resolve()), *map(str, _state(file)), str(VERSION)])
    try:
        make_once(index, lambda: convert(file, index))
    except OSError as error:
        raise unwritable(index, error) from None
    return CocoIndex(index)


def _state(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check the path") from None
    return found.st_size, found.st_mtime_ns


def convert(source: Path, target: Path) -> None:
    """Converts annotations; the target is there whole, or not at all.

    Args:
        source: JSON with `images`, `categories` and `annotations`, in any order; without annotations, as the test
            parts have it, images alone.
        target: the index.

    Raises:
        UserError: the JSON cannot be read, an annotation is broken, or the file changed meanwhile.
        OSError: the target cannot be written.
    """
    began = time.monotonic()
    logger.info("%s: an index of it is made, once", source)

    def fill(out: IO[bytes]) -> tuple[Columns, dict[str, Any]]:
        before, table, lists = _state(source), _Table(source, out), JsonLists(source)
        for name, value in lists:
            table.add(name, value)
        if _state(source) != before:
            raise UserError(f"{source}: has changed while it was read; start again when it is written")
        return table.columns(), {"digest": lists.digest.hexdigest(), **table.facts}

    CocoIndex.create(target, fill)
    index = CocoIndex(target)
    logger.info(
        "%s: %d images, %d annotations, indexed in %.0f s", source, len(index), len(index.columns["ids"]),
        time.monotonic() - began,
    )  # fmt: skip


class _Table:
    """What has been read of a JSON file; outlines go to the target at once."""

    def __init__(self, source: Path, out: IO[bytes]) -> None:
        self.source, self.out = source, out
        self.facts: dict[str, Any] = {}
        """What holds of all of it: classes, and what is not learned."""
        self.image_ids, self.heights, self.widths = array("q"), array("i"), array("i")
        self.file_names: list[bytes] = []
        self.categories: dict[int, str] = {}
        self.ids, self.image_of, self.category_of = array("q"), array("q"), array("q")
        self.boxes, self.areas, self.crowd = array("d"), array("d"), array("b")
        self.kinds, self.starts, self.sizes = array("b"), array("q"), array("q")
        self.runs_of: list[tuple[int, int, int]] = []
        """Position of an annotation with runs, their height and width."""
        self.short_polygons = 0
        self.at = out.tell()

    def add(self, name: str, value: Any) -> None:
        """Takes an element of the list `name`; lists of other things are passed over."""
        add = {"images": self._image, "categories": self._category, "annotations": self._annotation}.get(name)
        if add is None:
            return
        try:
            add(value)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            number = value.get("id", "without id") if isinstance(value, dict) else value
            problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            odd = [key for key in _WHOLE if isinstance(value, dict) and type(value.get(key, 0)) is not int]
            if odd:
                problem = f"its {odd[0]} is {value[odd[0]]!r}, not a whole number"
            raise self._broken(f"{name}, {number}", f"{problem}; expected COCO's format") from None

    def _broken(self, what: str, problem: str) -> UserError:
        return UserError(f"{self.source}: {what}: {problem}")

    def _image(self, value: dict[str, Any]) -> None:
        self.image_ids.append(value["id"])
        self.heights.append(value["height"])
        self.widths.append(value["width"])
        name = value["file_name"]
        if not Path(name).parts or "\0" in name:
            raise ValueError(f"its file_name is {name!r}")
        self.file_names.append(os.fsencode(name))
        if min(self.heights[-1], self.widths[-1]) < 1:
            raise ValueError(f"its size is {self.widths[-1]} x {self.heights[-1]}")

    def _category(self, value: dict[str, Any]) -> None:
        number, name = value["id"], value["name"]
        if type(number) is not int or not isinstance(name, str):
            raise ValueError(
                f"its id is {number!r} and its name {name!r}; expected a whole number and a word"
            )
        if number in self.categories or name in self.categories.values():
            raise ValueError(f"two categories have its number or its name, {name!r}; give each its own")
        self.categories[number] = name

    def _annotation(self, value: dict[str, Any]) -> None:
        self.ids.append(value["id"])
        self.image_of.append(value["image_id"])
        self.category_of.append(value["category_id"])
        left, top, width, height = value["bbox"]
        if not isfinite(left + top + width + height):
            raise ValueError(f"its bbox is {value['bbox']}")
        self.boxes.extend((left, top, width, height))
        area = value.get("area", width * height)
        if not isfinite(area):
            raise ValueError(f"its area is {area}")
        self.areas.append(area)
        self.crowd.append(bool(value.get("iscrowd", 0)))
        outline = value.get("segmentation")
        kind, body = 0, b""
        if isinstance(outline, dict) and outline:
            kind, body = _RUNS, self._runs(outline)
        elif outline:
            body = self._polygons(outline)
            kind = _POLYGONS if body else 0
        self.kinds.append(kind)
        self.starts.append(self.at)
        self.sizes.append(len(body))
        self.at += self.out.write(body + bytes(-len(body) % 8))

    def _polygons(self, polygons: list[list[float]]) -> bytes:
        kept = [array("d", polygon) for polygon in polygons]
        for polygon in kept:
            # pycocotools' rasteriser writes outside of its memory where corners are far away, or no numbers.
            if len(polygon) % 2 or not all(abs(value) <= _FARTHEST_PX for value in polygon):
                raise ValueError(
                    f"a polygon of {len(polygon)} numbers; expected pairs of x and y, at most {_FARTHEST_PX} px away"
                )
        long = [polygon for polygon in kept if len(polygon) >= 2 * _POINTS]
        self.short_polygons += len(kept) - len(long)
        if not long:
            return b""
        lengths = array("d", [len(long), *map(len, long)])
        return lengths.tobytes() + b"".join(polygon.tobytes() for polygon in long)

    def _runs(self, runs: dict[str, Any]) -> bytes:
        (height, width), counts = runs["size"], runs["counts"]
        if isinstance(counts, list):
            total = sum(counts) if all(type(count) is int and count >= 0 for count in counts) else -1
        else:
            counts = counts.encode()
            total = pixels_of_runs(counts)
        if total != height * width:
            raise ValueError(
                f"its runs fill {total} pixels, and its size is {width} x {height}; write it again"
            )
        self.runs_of.append((len(self.ids) - 1, height, width))
        if isinstance(counts, list):
            counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)[
                "counts"
            ]
        return counts

    def columns(self) -> Columns:
        """Returns all but the outlines, images sorted by their ids, annotations by their image.

        Raises:
            UserError: what belongs together does not fit.
        """
        if not self.image_ids or not self.categories:
            missing = "images" if self.categories else "categories"
            raise self._broken(missing, "there are none; expected COCO's format")
        images = np.argsort(self.image_ids, kind="stable")
        image_ids, ids = np.array(self.image_ids)[images], np.array(self.ids, dtype=np.int64)
        self._unique("images", image_ids)
        self._unique("annotations", ids)
        image_N = self._found("image_id", image_ids, self.image_of)
        categories = np.array(sorted(self.categories))
        label_N = self._found("category_id", categories, self.category_of)
        height, width = (np.array(sides, dtype=np.int32)[images] for sides in (self.heights, self.widths))
        for annotation, *size in self.runs_of:
            image = image_N[annotation]
            if size != [height[image], width[image]]:
                raise self._broken(
                    f"annotations, {ids[annotation]}",
                    f"its runs are {size[1]} x {size[0]} px, and image {image_ids[image]} is {width[image]} x "
                    f"{height[image]}",
                )
        boxes = np.array(self.boxes, dtype=np.float64).reshape(-1, 4)
        kinds = np.array(self.kinds, dtype=np.int8)
        with_outlines = np.isin(image_N, image_N[kinds > 0])
        lacking = (kinds == 0) & (np.array(self.crowd, dtype=np.int8) == 0) & with_outlines
        self.facts = {
            "class_names": [self.categories[number] for number in categories.tolist()],
            "category_ids": categories.tolist(),
            "has_outlines": bool(kinds.any()),
            "doubt": _doubt(boxes, height[image_N], width[image_N]),
            "left_out": {
                "boxes without area in the image": int(_empty(boxes, height[image_N], width[image_N]).sum()),
                "polygons of less than three points": self.short_polygons,
                "objects without outline beside others that have one": int(lacking.sum()),
            },
        }
        order = np.argsort(image_N, kind="stable")
        return {
            "image_ids": image_ids, "height": height, "width": width,
            "file_names": np.array(self.file_names)[images],
            "first": np.searchsorted(image_N[order], np.arange(len(images) + 1)),
            "ids": ids[order], "labels": label_N[order].astype(np.int32), "boxes": boxes[order],
            "areas": np.array(self.areas, dtype=np.float64)[order],
            "crowd": np.array(self.crowd, dtype=bool)[order], "kind": kinds[order],
            "start": np.array(self.starts, dtype=np.int64)[order],
            "size": np.array(self.sizes, dtype=np.int64)[order],
        }  # fmt: skip

    def _unique(self, name: str, numbers: npt.NDArray[np.int64]) -> None:
        ordered = np.sort(numbers)
        if len(twice := ordered[1:][ordered[1:] == ordered[:-1]]):
            raise self._broken(f"{name}, {twice[0]}", "this id is there twice; give each its own")

    def _found(self, name: str, known: npt.NDArray[np.int64], wanted: array[int]) -> npt.NDArray[np.int64]:
        """Positions of numbers in a sorted list."""
        wanted_N = np.array(wanted, dtype=np.int64)
        place_N = np.minimum(np.searchsorted(known, wanted_N), len(known) - 1)
        if len(lost := np.flatnonzero(known[place_N] != wanted_N)):
            what = "image" if name == "image_id" else "category"
            raise self._broken(
                f"annotations, {self.ids[lost[0]]}",
                f"its {name} is {wanted_N[lost[0]]}, and there is no such {what}",
            )
        return place_N


def _empty(
    boxes_N4: npt.NDArray[np.float64], height_N: npt.NDArray[np.int32], width_N: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """Whether nothing of a box lies in its image."""
    first_N2 = np.maximum(boxes_N4[:, :2], 0)
    last_N2 = np.minimum(boxes_N4[:, :2] + boxes_N4[:, 2:], np.stack([width_N, height_N], axis=1))
    return np.asarray((last_N2 <= first_N2).any(axis=1))


def _doubt(
    boxes_N4: npt.NDArray[np.float64], height_N: npt.NDArray[np.int32], width_N: npt.NDArray[np.int32]
) -> str:
    """What speaks against boxes being COCO's, left, top, width and height in pixels; empty: nothing."""
    if not len(boxes_N4):
        return ""
    if (boxes_N4 <= 1).all():
        return f"all of its {len(boxes_N4)} boxes are within a pixel; COCO's are in pixels, not in shares of an image"
    last_N2 = boxes_N4[:, :2] + boxes_N4[:, 2:]
    outside_N = (last_N2 > np.stack([width_N, height_N], axis=1) + 1).any(axis=1) | (
        boxes_N4[:, :2] < -1
    ).any(axis=1)
    if outside_N.mean() <= _MOST_OUTSIDE:
        return ""
    return (
        f"{outside_N.sum()} of its {len(boxes_N4)} boxes reach out of their images; COCO's are left, top, width, "
        "height, not left, top, right, bottom"
    )


def pixels_of_runs(counts: bytes) -> int:
    """Returns how many pixels compressed runs fill; -1 where they are none.

    Source: `rleFrString` of pycocotools, which decodes what it is given, whatever it fills.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return -1
    first = np.flatnonzero(np.concatenate([[True], (digits[:-1] & 32) == 0]))  # of the digits of each number
    place = np.arange(len(digits)) - np.repeat(first, np.diff([*first, len(digits)]))
    if place.max() > 6:
        return -1
    runs = np.add.reduceat((digits & 31) << (5 * place), first)
    last = np.concatenate([first[1:], [len(digits)]]) - 1
    runs -= np.where(digits[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    # From the fourth run on, a number is the difference from the run before the last one.
    for parity in (1, 2):
        runs[parity::2] = runs[parity::2].cumsum()
    return int(runs.sum()) if runs.min() >= 0 else -1
