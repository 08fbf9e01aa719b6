"""What ranks do in the tests of a detection's evaluation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_scale import distributed
from fd_scale.data import Detections, open_source
from fd_scale.data.instance_transforms import whole_with_objects
from fd_scale.evaluation import EvaluationSet, Progress, detection_of

SIDE = 7  # of a mask in its box


def by_colour(image_CHW: Tensor) -> Detections:
    """Takes all that is blue for one square, and all that is red for one disc."""
    boxes, scores, labels = [], [], []
    for label, channel in ((0, 2), (1, 0)):
        inside_HW = image_CHW[channel] > 150
        if inside_HW.any():
            rows, columns = inside_HW.any(1).nonzero()[:, 0], inside_HW.any(0).nonzero()[:, 0]
            boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
            scores.append(float(image_CHW[channel].double().mean()) / 255)
            labels.append(label)
    return Detections(
        boxes_N4=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores_N=torch.tensor(scores),
        labels_N=torch.tensor(labels, dtype=torch.int64),
        masks_Nmm=torch.ones(len(labels), SIDE, SIDE),
    )


def detect_all(source: str, progress: str | None, last: float) -> dict[str, Any] | None:
    """Measures; returns metrics and how many calls this rank made, none where it stopped after `last` calls."""
    world = distributed.start("cpu", 60)
    calls: list[int] = []

    def detect(image_CHW: Tensor) -> Detections:
        if len(calls) >= last:
            raise KeyboardInterrupt
        calls.append(1)
        world.barrier()  # as a partitioned model: all ranks or none
        return by_colour(image_CHW)

    images = EvaluationSet(
        source=open_source(source), transform=whole_with_objects, batch_size=1, num_workers=0
    )
    kept = None if progress is None else Progress(file=Path(progress), of="this", every=1)
    try:
        measured = detection_of(images, detect, world, kept)
    except KeyboardInterrupt:
        return None
    return {
        "metrics": measured.metrics,
        "classes": measured.classes,
        "calls": len(calls),
        "found": measured.found,
    }
