"""How long annotations of COCO's size take to become an index, and how much memory: on a generated file."""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fd_scale.data.coco_index import CocoIndex, convert
from fd_scale.errors import UserError
from fd_scale.log import console

NUM_CLASSES = 80
_CROWD_EVERY = 86  # of the 860,001 annotations of train2017, 10,498 are crowds
_POINTS = 26  # of an outline there, on average


def write_annotations(file: Path, num_images: int, num_objects: int) -> None:
    """Writes annotations with as many points and crowds as COCO's, in its order and with its keys.

    Args:
        file: the JSON.
        num_images: of 640 x 480 px.
        num_objects: spread over them at random.
    """
    rng = np.random.default_rng(0)
    images = (
        {
            "license": 1, "file_name": f"{number:012d}.jpg", "coco_url": f"http://example.org/{number:012d}.jpg",
            "height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "id": number,
        }
        for number in rng.permutation(num_images).tolist()
    )  # fmt: skip
    annotations = (_annotation(rng, number, num_images) for number in range(1, num_objects + 1))
    categories = [
        {"supercategory": "thing", "id": number, "name": f"class {number}"}
        for number in range(1, NUM_CLASSES + 1)
    ]
    with file.open("w", encoding="utf-8") as out:
        out.write('{"info": {"year": 2017}, "licenses": [{"id": 1}]')
        for name, items in (
            ("images", images),
            ("annotations", annotations),
            ("categories", iter(categories)),
        ):
            out.write(f', "{name}": [{json.dumps(next(items))}')
            out.writelines(f", {json.dumps(item)}" for item in items)
            out.write("]")
        out.write("}")


def _annotation(rng: np.random.Generator, number: int, num_images: int) -> dict[str, Any]:
    (left, top), (width, height) = rng.uniform(0, 300, 2).round(2), rng.uniform(8, 180, 2).round(2)
    crowd = number % _CROWD_EVERY == 0
    segmentation: Any
    if crowd:
        counts = rng.integers(1, 400, 400).tolist()
        segmentation = {"counts": [*counts, 640 * 480 - sum(counts)], "size": [480, 640]}
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, max(3, rng.poisson(_POINTS))))
        points = np.stack(
            [left + width * (1 + np.cos(angles)) / 2, top + height * (1 + np.sin(angles)) / 2], axis=1
        )
        segmentation = [points.round(2).ravel().tolist()]
    return {
        "segmentation": segmentation, "area": float(width * height * np.pi / 4), "iscrowd": int(crowd),
        "image_id": int(rng.integers(num_images)), "bbox": [left, top, width, height],
        "category_id": int(rng.integers(1, NUM_CLASSES + 1)), "id": number,
    }  # fmt: skip


def _converted(source: Path, target: Path) -> tuple[float, float]:
    """Seconds, and the GiB that this process held at most, of which its libraries are a part."""
    began = time.monotonic()
    convert(source, target)
    return time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bench_annotations(num_images: int, num_objects: int) -> dict[str, Any]:
    """Measures the conversion in a process of its own, then how long the index takes to open.

    Raises:
        UserError: there is nothing to convert.
    """
    if min(num_images, num_objects) < 1:
        raise UserError(f"--images, --objects: got {num_images} and {num_objects}, expected at least 1")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "instances.json", Path(folder) / "instances.index"
        write_annotations(source, num_images, num_objects)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, gib = pool.apply(_converted, (source, target))
        began = time.monotonic()
        CocoIndex(target).objects(num_images // 2)
        opened = time.monotonic() - began
        found = {
            "images": num_images, "objects": num_objects, "json_mib": source.stat().st_size / 2**20,
            "index_mib": target.stat().st_size / 2**20, "convert_s": seconds, "peak_gib": gib, "open_s": opened,
        }  # fmt: skip
    table = Table("what", "value")
    for name, value in found.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    return found
