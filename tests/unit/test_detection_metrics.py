"""Average precision equals pycocotools, of the same detections; on any number of ranks, and after a kill."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from fd_scale.benchmarks.annotations import write_annotations
from fd_scale.data import Detections, ObjectSource, object_source, open_source
from fd_scale.data.coco import CocoSource
from fd_scale.data.instance_transforms import whole_with_objects
from fd_scale.data.objects import Window, mask_in
from fd_scale.distributed import ALONE
from fd_scale.errors import UserError
from fd_scale.evaluation import (
    Detection,
    EvaluationSet,
    Progress,
    compact,
    detection_of,
    found_in,
    write_results,
)
from fd_scale.evaluation.detection import MAX_DETECTIONS, average_precision

SIDE = 28  # of a mask in its box


@pytest.fixture
def generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectSource:
    """Annotations of 24 images that are not there, with crowds, of which 80 classes have some, of 640 x 480 px."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_annotations(tmp_path / "instances.json", num_images=24, num_objects=400)
    return CocoSource("generated", tmp_path, tmp_path / "instances.json")


def guesses(source: ObjectSource, sample_id: int, masks: bool = True, error: float = 0.15) -> Detections:
    """Objects that are somewhat off, some missed, some doubled, some of another class; scores have ties."""
    rng = np.random.default_rng(sample_id)
    objects = source.objects(sample_id)
    rows = rng.choice(len(objects.ids_N), size=len(objects.ids_N) + 4)
    corners = np.concatenate(
        [objects.boxes_N4[:, :2], objects.boxes_N4[:, :2] + objects.boxes_N4[:, 2:]], axis=1
    )
    sizes = np.tile(objects.boxes_N4[rows, 2:], 2)
    boxes = corners[rows] + rng.normal(0, error, (len(rows), 4)) * sizes * rng.integers(0, 2, (len(rows), 1))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels = np.where(
        rng.random(len(rows)) < 0.2, rng.integers(0, source.num_classes, len(rows)), objects.labels_N[rows]
    )
    scores = np.sort(rng.integers(1, 11, len(rows)) / 10)[::-1].copy()
    drawn = [seen_in(source, sample_id, int(row)) for row in rows]
    return Detections(
        boxes_N4=torch.tensor(boxes, dtype=torch.float32),
        scores_N=torch.tensor(scores, dtype=torch.float32),
        labels_N=torch.tensor(labels),
        masks_Nmm=torch.stack(drawn) if masks else torch.zeros(len(rows), 0, 0),
    )


def seen_in(source: ObjectSource, sample_id: int, row: int) -> Tensor:
    """An object's mask in its box, SIDE x SIDE."""
    objects = source.objects(sample_id)
    whole = mask_in(
        objects.outlines[row],
        objects,
        Window(0, 0, objects.width, objects.height, objects.width, objects.height),
    )
    left, top, width, height = objects.boxes_N4[row].astype(int)
    part = torch.from_numpy(
        whole[top : top + max(height, 1) + 1, left : left + max(width, 1) + 1].copy()
    ).float()
    return F.interpolate(part[None, None], size=(SIDE, SIDE), mode="bilinear")[0, 0]


def by_pycocotools(folder: Path, source: ObjectSource, found: list[Any], kind: str) -> COCOeval:
    """From the results file that the benchmark's server would get, and the annotations as they are."""
    write_results(folder / "results.json", source, found)
    results = json.loads((folder / "results.json").read_text())
    for result in results:
        if kind == "segm":  # else the area of a mask would be its box's
            del result["bbox"]
    truth = COCO(folder / "instances.json")
    evaluator = COCOeval(truth, truth.loadRes(results), kind)
    evaluator.params.imgIds = [source.objects(each["sample"]).image_id for each in found]
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


def same_as_pycocotools(
    folder: Path, source: ObjectSource, found: list[Any], measured: Detection, kind: str
) -> None:
    theirs = by_pycocotools(folder, source, found, kind)
    what = "box" if kind == "bbox" else "mask"
    for index, name in enumerate(["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]):
        # The same sums of fp64 in another order.
        assert measured.metrics.get(f"{what}_{name}", -1) == pytest.approx(theirs.stats[index], abs=1e-6), (
            name
        )
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for label, each in enumerate(measured.classes):
        known = precision[:, :, label][precision[:, :, label] > -1]
        assert each[f"{what}_ap"] == (pytest.approx(known.mean(), abs=1e-6) if known.size else None)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ap_equals_pycocotools(generated: ObjectSource, tmp_path: Path, kind: str) -> None:
    found = [{"sample": i} | compact(guesses(generated, i), 480, 640) for i in range(len(generated))]
    measured = average_precision(generated, found)
    same_as_pycocotools(tmp_path, generated, found, measured, kind)
    metrics = measured.metrics
    assert 0.1 < metrics["box_ap75"] < metrics["box_ap"] < metrics["box_ap50"] < 0.95, (
        "neither empty nor perfect"
    )
    assert 0.1 < metrics["mask_ap"] < 0.95
    assert sum(each["objects"] for each in measured.classes) == 396, "without four crowds"
    assert measured.to_json(generated.class_names)["classes"][3]["name"] == "class 4"
    aps = [measured.classes[label]["mask_ap"] for label in measured.worst_classes(5)]
    assert aps == sorted(aps)


def test_boxes_alone_and_some_images(generated: ObjectSource, tmp_path: Path) -> None:
    found = [{"sample": i} | compact(guesses(generated, i, masks=False), 480, 640) for i in (3, 5, 20)]
    measured = average_precision(generated, found)
    assert {name.partition("_")[0] for name in measured.metrics} == {"box"}
    assert "mask_ap" not in measured.classes[0]
    same_as_pycocotools(tmp_path, generated, found, measured, "bbox")
    assert measured.num_images == 3


def test_all_that_is_there_and_nothing_at_all(tmp_path: Path, write_objects: Callable[..., str]) -> None:
    source = object_source(open_source(write_objects(tmp_path / "own")))
    found, nothing = [], []
    for sample_id in range(len(source)):
        objects = source.objects(sample_id)
        runs = [
            coco_mask.encode(
                np.asfortranarray(
                    mask_in(outline, objects, Window(0, 0, *[objects.width, objects.height] * 2))
                )
            )
            for outline in objects.outlines
        ]
        size = [objects.height, objects.width]
        boxes, labels = objects.boxes_N4.tolist(), objects.labels_N.tolist()
        found.append({
            "sample": sample_id, "size": size, "boxes": boxes, "labels": labels, "scores": [0.9] * len(boxes),
            "masks": [each["counts"].decode() for each in runs],
        })  # fmt: skip
        nothing.append(
            {"sample": sample_id}
            | compact(Detections(*(torch.zeros(0, 4), *[torch.zeros(0)] * 2, torch.zeros(0, 28, 28))), *size)
        )
    perfect = average_precision(source, found)
    assert perfect.metrics == {
        f"{what}_ap{part}": pytest.approx(1)
        for what in ("box", "mask")
        for part in ("", "50", "75", "_small")
    }, "all are small"
    for kind in ("bbox", "segm"):
        assert by_pycocotools(tmp_path / "own", source, found, kind).stats[0] == pytest.approx(1)
    assert set(average_precision(source, nothing).metrics.values()) == {0}


def test_enlarged_masks_are_grid_samples() -> None:
    """As detectron2 and torchvision enlarge them: `grid_sample` with zeros around, at the pixels' centres."""
    rng = np.random.default_rng(0)
    height, width = 50, 70
    corner = rng.uniform(-15, 60, (60, 2))
    boxes = torch.tensor(
        np.concatenate([corner, corner + rng.uniform(0.1, 50, (60, 2))], axis=1), dtype=torch.float32
    )
    masks = torch.rand(60, 7, 7)
    found = compact(
        Detections(boxes, torch.ones(60), torch.zeros(60, dtype=torch.int64), masks), height, width
    )
    for box, mask, counts in zip(boxes.double(), masks.double(), found["masks"], strict=True):
        left, top, right, bottom = box.tolist()
        rows = (torch.arange(height).double() + 0.5 - top) / (bottom - top) * 2 - 1
        columns = (torch.arange(width).double() + 0.5 - left) / (right - left) * 2 - 1
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None]
        theirs = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
        mine = coco_mask.decode({"size": [height, width], "counts": counts})
        certain = (theirs - 0.5).abs().numpy() > 1e-5  # fp32 of sums of 4 products
        # COCO's box ends where the mask's last pixel does; what grid_sample fades beyond it is below a half.
        np.testing.assert_array_equal(mine[certain], (theirs >= 0.5).numpy()[certain])
    empty = compact(
        Detections(
            torch.tensor([[5.0, 5, 5, 9], [90, 90, 99, 99]]), torch.ones(2), torch.zeros(2), masks[:2]
        ),
        50,
        70,
    )
    assert [int(coco_mask.area({"size": [50, 70], "counts": counts})) for counts in empty["masks"]] == [0, 0]


def test_large_masks_are_enlarged_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, masks = torch.tensor([[3.3, 2.2, 60.5, 47.7]]), torch.rand(1, 14, 14)
    detections = Detections(boxes, torch.ones(1), torch.zeros(1, dtype=torch.int64), masks)
    whole = compact(detections, 50, 70)
    monkeypatch.setattr("fd_scale.evaluation.detection._BAND_PIXELS", 100)
    assert compact(detections, 50, 70) == whole


def test_the_hundred_surest_count() -> None:
    many = Detections(
        torch.rand(130, 4), torch.linspace(1, 0, 130), torch.arange(130), torch.zeros(130, 0, 0)
    )
    found = compact(many, 10, 10)
    assert found["labels"] == list(range(MAX_DETECTIONS))
    assert "masks" not in found


class Guesser:
    """Detects what `guesses` says, of images that tell their number."""

    def __init__(self, source: ObjectSource, last: float = math.inf) -> None:
        self.source, self.last = source, last
        self.calls: list[int] = []
        self.sizes = {source.read(i)[0].pil().tobytes(): i for i in range(len(source))}

    def __call__(self, image_CHW: Tensor) -> Detections:
        if len(self.calls) >= self.last:
            raise KeyboardInterrupt
        sample_id = self.sizes.get(image_CHW.permute(1, 2, 0).contiguous().numpy().tobytes(), -1)
        self.calls.append(sample_id)
        if sample_id < 0 or not len(self.source.objects(sample_id).ids_N):
            return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), torch.zeros(0, SIDE, SIDE))
        return guesses(self.source, sample_id)


def evaluation_set(source: ObjectSource) -> EvaluationSet:
    return EvaluationSet(source=source, transform=whole_with_objects, batch_size=4, num_workers=0)


def test_an_evaluation_goes_on_where_one_was_killed(
    tmp_path: Path, write_objects: Callable[..., str]
) -> None:
    source = object_source(open_source(write_objects(tmp_path / "own")))
    images = evaluation_set(source)
    whole = detection_of(images, detect := Guesser(source), ALONE)
    assert detect.calls == list(range(8))
    assert 0 < whole.metrics["mask_ap"] < 1
    progress = Progress(file=tmp_path / "run.progress", of="this", every=2)
    with pytest.raises(KeyboardInterrupt):
        detection_of(images, Guesser(source, last=5), ALONE, progress)
    assert [each["sample"] for each in progress.read()] == [0, 1, 2, 3], "written after every second image"
    text = progress.file.read_text()
    progress.file.write_text(text[:-10])
    assert [each["sample"] for each in progress.read()] == [0, 1, 2], "one was cut"
    resumed = detection_of(images, detect := Guesser(source), ALONE, progress)
    assert detect.calls == [3, 4, 5, 6, 7]
    assert resumed == whole
    progress.add(progress.read()[2:5])  # as another evaluation of the same would, at the same time
    assert detection_of(images, detect := Guesser(source), ALONE, progress) == whole
    assert not detect.calls
    other = replace(progress, of="another")
    assert other.read() == []
    other.add([{"sample": 1}])
    assert (other.read(), progress.read()) == ([{"sample": 1}], [])
    with pytest.raises(UserError, match=r"nowhere/file cannot be written \(No such file"):
        replace(progress, file=tmp_path / "nowhere/file").add([])


def test_images_without_annotations(tmp_path: Path, write_objects: Callable[..., str]) -> None:
    spec = write_objects(tmp_path / "own")
    values = json.loads((tmp_path / "own/instances.json").read_text())
    guesser = Guesser(object_source(open_source(spec)))
    (tmp_path / "own/instances.json").write_text(json.dumps(values | {"annotations": []}))
    source = object_source(open_source(spec))
    with pytest.raises(UserError, match=r"data.evaluation: none of its 8 images has an object to measure by"):
        detection_of(evaluation_set(source), guesser, ALONE)
    found = found_in(evaluation_set(source), guesser, ALONE)
    write_results(tmp_path / "results.json", source, found)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["image_id"] for result in results} == {5, 15, 25, 35, 45, 55, 65}
    assert {result["category_id"] for result in results} == {3, 7}
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
