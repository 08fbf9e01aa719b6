"""Average precision of boxes and masks over a whole source, as COCO defines it.

What is found in an image becomes a few numbers and runs at once, so that ranks exchange, and a file keeps, no pixels.

Shape legend: N = detections or objects of an image, H, W = pixels, m = side of a mask in its box, n = rows of a band,
T = thresholds of overlap, R = recalls, K = classes, A = ranges of area.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask
from torch import Tensor

from fd_scale.checkpoint import write_atomically
from fd_scale.data import Detections, ObjectSource, object_source
from fd_scale.data.objects import runs_of
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation.loop import EvaluationSet, single_images
from fd_scale.evaluation.progress import Progress

MAX_DETECTIONS = 100
"""Of an image, the surest ones, as is usual; COCO itself counts as many of each class."""
_BAND_PIXELS = 2**24  # of a mask that is enlarged, at a time: 64 MiB as fp32
_ROUNDS = 100  # an image a rank each, from one exchange to the next
_EMPTY_SIDE = 32  # of the image that a rank without one runs through the model
_AREAS = ("", "_small", "_medium", "_large")

Detect = Callable[[Tensor], Detections]
"""uint8 image_CHW on the device -> what is in it. For an image of any size, it calls the model equally often."""
Found = dict[str, Any]
"""Of one image: `sample`, its number in the source; `size`, height and width; `boxes`, left, top, width, height;
`scores`; `labels`; and `masks`, COCO's compressed runs, where the detector makes masks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """Average precision over a source."""

    metrics: dict[str, float]
    """In 0..1: `box_ap`, mean over overlaps of 0.5, 0.55, ..., 0.95; `box_ap50` and `box_ap75` of one overlap;
    `box_ap_small`, `_medium` and `_large` of objects below 32^2, below 96^2 and above; `mask_...`, likewise, where both
    the detector and the source have masks. A range without objects has none."""
    classes: list[dict[str, Any]]
    """Of each class: `label`, `objects`, `box_ap` and `mask_ap`, which are none where there are no objects."""
    num_images: int
    found: list[Found]
    """What was found in each image, on the main rank alone."""

    def worst_classes(self, count: int) -> list[int]:
        """Returns the classes with the smallest AP, of masks if there are any, among those that have objects."""
        key = "mask_ap" if "mask_ap" in self.metrics else "box_ap"
        present = [each for each in self.classes if each[key] is not None]
        return [each["label"] for each in sorted(present, key=lambda each: each[key])[:count]]

    def to_json(self, class_names: list[str] | None) -> dict[str, Any]:
        """Returns plain values, those of each class among them."""
        names = class_names or [str(label) for label in range(len(self.classes))]
        classes = [each | {"name": name} for each, name in zip(self.classes, names, strict=True)]
        return {"images": self.num_images, **self.metrics, "classes": classes}


def detection_of(
    evaluation: EvaluationSet, detect: Detect, world: World, progress: Progress | None = None
) -> Detection:
    """Finds what is in every image of a source and measures it, on any number of ranks.

    Args:
        evaluation: images, whole, and their objects.
        detect: finds what is in an image.
        world: ranks; all call it.
        progress: where what is found is kept on the way; none: nowhere.

    Returns:
        The same on all ranks, but for `found`.

    Raises:
        UserError: the source has no objects.
    """
    source = object_source(evaluation.source)
    if not source.is_annotated:
        raise UserError(
            f"data.evaluation: none of its {len(source)} images has an object to measure by; name images with "
            "annotations"
        )
    found = found_in(evaluation, detect, world, progress)
    measured = world.on_main(lambda: average_precision(source, found))
    return replace(measured, found=found)


def found_in(
    evaluation: EvaluationSet, detect: Detect, world: World, progress: Progress | None = None
) -> list[Found]:
    """Finds what is in every image of a source, which need not have annotations; arguments as of `detection_of`.

    A partitioned model needs all ranks in each forward pass: whoever has no image left runs an empty one.

    Returns:
        What was found, in the order of the source, on the main rank; on others nothing.
    """
    known = progress.read() if progress is not None and world.is_main else []
    found = list({each["sample"]: each for each in known}.values())  # two may have written to one file
    done = set(world.from_main([each["sample"] for each in found]))
    left = [sample_id for sample_id in range(len(evaluation.source)) if sample_id not in done]
    images = single_images(evaluation, left[world.rank :: world.size], world)
    own: list[Found] = []
    num_rounds = -(-len(left) // world.size)
    for number in range(1, num_rounds + 1):
        sample_id, batch = next(images, (None, None))
        if batch is None:
            detect(torch.zeros(3, _EMPTY_SIDE, _EMPTY_SIDE, dtype=torch.uint8, device=world.device))
        else:
            own.append({"sample": sample_id} | compact(detect(batch.images[0]), *batch.images.shape[2:]))
        # Also without a file: what all ranks have found of a large source would be one large message.
        if number == num_rounds or number % (_ROUNDS if progress is None else progress.every) == 0:
            fresh = [each for part in world.gather(own) for each in part]
            own = []
            if progress is not None:
                world.on_main(partial(progress.add, fresh))
            if world.is_main:
                found += fresh
    return sorted(found, key=lambda each: each["sample"])


def compact(detections: Detections, height: int, width: int) -> Found:
    """Returns the surest detections as plain values, masks at the size of the image.

    Args:
        detections: in an image.
        height: of the image, in pixels.
        width: likewise.
    """
    boxes_N4, scores_N, labels_N, masks_Nmm = (values[:MAX_DETECTIONS].cpu() for values in detections)
    corners_N4 = boxes_N4.double()
    sizes_N4 = torch.cat([corners_N4[:, :2], corners_N4[:, 2:] - corners_N4[:, :2]], dim=1)
    found: Found = {
        "size": [height, width], "boxes": sizes_N4.tolist(), "scores": scores_N.tolist(), "labels": labels_N.tolist(),
    }  # fmt: skip
    if masks_Nmm.shape[1]:
        found["masks"] = list(_runs(corners_N4.numpy(), masks_Nmm.float().numpy(), height, width))
    return found


def _runs(
    boxes_N4: npt.NDArray[np.float64], masks_Nmm: npt.NDArray[np.float32], height: int, width: int
) -> Iterator[str]:
    """Masks in their boxes as runs of masks of the image's size, one at a time."""
    whole_HW = np.zeros((height, width), dtype=np.uint8, order="F")
    for box_4, mask_mm in zip(boxes_N4, masks_Nmm, strict=True):
        left, top, right, bottom = box_4
        rows = slice(int(max(np.floor(top), 0)), int(min(np.ceil(bottom), height)))
        columns = slice(int(max(np.floor(left), 0)), int(min(np.ceil(right), width)))
        if left < right and top < bottom and rows.start < rows.stop and columns.start < columns.stop:
            across_mW = _weights(columns, left, right, mask_mm.shape[1]).T
            step = max(1, _BAND_PIXELS // (columns.stop - columns.start))
            for first in range(rows.start, rows.stop, step):
                band = slice(first, min(first + step, rows.stop))
                down_nm = _weights(band, top, bottom, mask_mm.shape[0])
                whole_HW[band, columns] = down_nm @ (mask_mm @ across_mW) >= 0.5
        yield coco_mask.encode(whole_HW)["counts"].decode()
        whole_HW[rows, columns] = 0


def _weights(pixels: slice, first: float, last: float, side: int) -> npt.NDArray[np.float32]:
    """Of pixels (rows) of a bilinear enlargement to `first` to `last`: how much of each of `side` places they have.

    Beyond the outermost places' centres the mask fades to 0, as in `grid_sample` with zeros around it.
    """
    centres = (np.arange(pixels.start, pixels.stop) + 0.5 - first) / (last - first) * side - 0.5
    return np.maximum(1 - np.abs(centres[:, None] - np.arange(side)), 0).astype(np.float32)


def average_precision(source: ObjectSource, found: list[Found]) -> Detection:
    """Measures what was found in the images of a source.

    Crowds are as COCO has them: whoever finds something there neither gains nor loses.

    Args:
        source: images and their objects.
        found: of some images, which alone count.

    Source: COCOeval of pycocotools, in the implementation of faster-coco-eval.
    """
    has_masks = source.has_outlines and any("masks" in each for each in found)
    truth = _truth(source, found, has_masks)
    results = [
        result
        for each in found
        for result in results_of(each, each["sample"], range(1, source.num_classes + 1))
    ]
    metrics, of_classes = _measured(truth, results, "box")
    if has_masks:
        more, of_masks = _measured(truth, results, "mask")
        metrics |= more
        of_classes = [boxes | masks for boxes, masks in zip(of_classes, of_masks, strict=True)]
    numbers = [each["category_id"] for each in truth["annotations"] if not each["iscrowd"]]
    counts = np.bincount(np.array(numbers, dtype=np.int64), minlength=source.num_classes + 1)[1:]
    classes = [
        {"label": label, "objects": int(counts[label])} | values for label, values in enumerate(of_classes)
    ]
    return Detection(metrics=metrics, classes=classes, num_images=len(found), found=[])


def _truth(source: ObjectSource, found: list[Found], with_masks: bool) -> dict[str, Any]:
    """Objects of images in COCO's format; ids from 1, since pycocotools takes the object 0 for none."""
    names = source.class_names or [str(label) for label in range(source.num_classes)]
    truth: dict[str, Any] = {
        "images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }  # fmt: skip
    for each in found:
        objects = source.objects(each["sample"])
        size = {"height": objects.height, "width": objects.width}
        truth["images"].append({"id": each["sample"]} | size)
        rows = zip(
            objects.labels_N.tolist(), objects.boxes_N4.tolist(), objects.areas_N.tolist(), objects.crowd_N.tolist(),
            objects.outlines, strict=True,
        )  # fmt: skip
        for label, box, area, crowd, outline in rows:
            annotation = {
                "id": len(truth["annotations"]) + 1, "image_id": each["sample"], "category_id": label + 1,
                "bbox": box, "area": area, "iscrowd": int(crowd),
            }  # fmt: skip
            if with_masks:
                runs = {"size": [objects.height, objects.width], "counts": runs_of(outline, objects)}
                annotation["segmentation"] = runs
            truth["annotations"].append(annotation)
    return truth


def _measured(
    truth: dict[str, Any], results: list[dict[str, Any]], what: str
) -> tuple[dict[str, float], list[dict[str, float | None]]]:
    """Metrics of boxes or of masks, and the AP of each class."""
    # Where results have a box, its area would count as the mask's.
    other = "segmentation" if what == "box" else "bbox"
    results = [{key: value for key, value in result.items() if key != other} for result in results]
    known = COCO(truth)
    evaluator = COCOeval_faster(known, known.loadRes(results), "bbox" if what == "box" else "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    precision_TRKA = evaluator.eval["precision"][..., -1]  # of `MAX_DETECTIONS`, the last limit
    values = {f"ap{area}": _mean(precision_TRKA[..., index]) for index, area in enumerate(_AREAS)}
    values |= {"ap50": _mean(precision_TRKA[0, ..., 0]), "ap75": _mean(precision_TRKA[5, ..., 0])}
    metrics = {f"{what}_{name}": value for name, value in sorted(values.items()) if value is not None}
    return metrics, [
        {f"{what}_ap": _mean(precision_TRKA[:, :, k, 0])} for k in range(precision_TRKA.shape[2])
    ]


def _mean(precision: npt.NDArray[np.float64]) -> float | None:
    """Over all but -1, which stands for classes without objects; none where there is nothing else."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def results_of(found: Found, image_id: int, category_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields what was found in an image in COCO's format of results.

    Args:
        found: in the image.
        image_id: of the image.
        category_ids: of each label.
    """
    for index, (label, box, score) in enumerate(
        zip(found["labels"], found["boxes"], found["scores"], strict=True)
    ):
        result = {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        if "masks" in found:
            result["segmentation"] = {"size": found["size"], "counts": found["masks"][index]}
        yield result


def write_results(file: Path, source: ObjectSource, found: list[Found]) -> None:
    """Writes what was found in COCO's format of results, with the ids of the data set, as its server takes it.

    Args:
        file: the JSON.
        source: where the images are from.
        found: in them.

    Raises:
        OSError: it cannot be written.
    """
    results = (
        json.dumps(result)
        for each in found
        for result in results_of(each, source.objects(each["sample"]).image_id, source.category_ids)
    )
    write_atomically(file, "[" + ",\n".join(results) + "]\n")
