"""Overlap of predicted and true classes of pixels over a whole source, from one matrix of counts.

Shape legend: H, W = pixels, K = classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fd_scale.data import IGNORED
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation.dense import Predictor
from fd_scale.evaluation.loop import EvaluationSet, Forward, single_images
from fd_scale.evaluation.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Segmentation:
    """Shares, in 0..1, of the pixels of a source that have a class."""

    matrix: np.ndarray
    """int64 (K, K): pixels of each true class, a row, and predicted class, a column."""

    @property
    def class_iou(self) -> np.ndarray:
        """Intersection over union of each class, fp64 (K,); NaN where it is neither true nor predicted."""
        hits_K = np.diag(self.matrix)
        union_K = self.matrix.sum(0) + self.matrix.sum(1) - hits_K
        with np.errstate(invalid="ignore"):
            return hits_K / union_K

    @property
    def class_recall(self) -> np.ndarray:
        """Share of each class's pixels that are predicted as such, fp64 (K,); NaN where there are none."""
        with np.errstate(invalid="ignore"):
            return np.diag(self.matrix) / self.matrix.sum(1)

    @property
    def metrics(self) -> dict[str, float]:
        """What a run logs.

        `miou`: mean of `class_iou` over classes with a union; `macc`: mean of `class_recall` over classes with pixels;
        `aacc`: share of all pixels.
        """
        return {
            "miou": float(np.nanmean(self.class_iou)),
            "macc": float(np.nanmean(self.class_recall)),
            "aacc": float(np.diag(self.matrix).sum() / self.matrix.sum()),
        }

    def worst_classes(self, count: int) -> list[int]:
        """Returns the classes with the smallest IoU among those that have pixels."""
        present = np.flatnonzero(self.matrix.sum(1))
        return [int(label) for label in present[np.argsort(self.class_iou[present], kind="stable")[:count]]]

    def to_json(self, class_names: list[str] | None) -> dict[str, Any]:
        """Returns plain values, those of each class among them."""
        names = class_names or [str(label) for label in range(len(self.matrix))]
        rows = zip(names, self.matrix.sum(1), self.class_iou, self.class_recall, strict=True)
        classes = [
            {
                "label": label,
                "name": name,
                "pixels": int(pixels),
                "iou": _or_none(iou),
                "acc": _or_none(recall),
            }
            for label, (name, pixels, iou, recall) in enumerate(rows)
        ]
        return {"pixels": int(self.matrix.sum()), **self.metrics, "classes": classes}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


class ConfusionCounter:
    """Counts over the images of a rank, then over ranks: integers, so that the order of the sum is nothing."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predicted_HW: Tensor, truth_HW: Tensor) -> None:
        """Counts the pixels of images whose true class is not `IGNORED`; both uint8, of one shape."""
        counted = truth_HW != IGNORED
        pairs = truth_HW[counted].long() * self.num_classes + predicted_HW[counted]
        self.matrix += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.matrix)

    def total(self, world: World) -> npt.NDArray[np.int64]:
        """Returns the matrix over all ranks, which all call it; exact up to 2^53 pixels."""
        totals = world.sum(self.matrix.flatten().tolist())
        return np.array(totals).round().astype(np.int64).reshape(self.num_classes, self.num_classes)

    def result(self, world: World) -> Segmentation:
        """Returns the shares over all ranks, which all call it.

        Raises:
            UserError: no pixel has a class.
        """
        matrix_KK = self.total(world)
        if not matrix_KK.any():
            raise UserError("data.evaluation: no pixel of its masks has a class; check them, or classes.txt")
        return Segmentation(matrix=matrix_KK)


def segmentation_of(
    evaluation: EvaluationSet,
    predictor: Predictor,
    forward: Forward,
    world: World,
    progress: Progress | None = None,
) -> Segmentation:
    """Predicts every image of a source at its own size and counts, on any number of ranks.

    Each image is one rank's. A partitioned model needs all ranks in each forward pass: whoever has fewer windows in a
    round of images, or no image, runs an empty one.

    Args:
        evaluation: images and masks, whole.
        predictor: how an image is predicted.
        forward: the module's, which returns `logits`.
        world: ranks; all call it.
        progress: where counts are kept on the way; none: nowhere.
    """

    def segment(images_BCHW: Tensor) -> Tensor:
        return forward(images_BCHW=images_BCHW)["logits"]

    counter = ConfusionCounter(predictor.num_classes, world.device)
    counted = [] if progress is None else world.on_main(progress.read)[-1:]
    first = counted[0]["num_images"] if counted else 0
    if counted and world.is_main:
        counter.matrix += torch.tensor(counted[0]["matrix"], device=world.device)
    images = single_images(evaluation, range(first + world.rank, len(evaluation.source), world.size), world)
    for round_end in range(first + world.size, len(evaluation.source) + world.size, world.size):
        _, batch = next(images, (None, None))
        calls = 0 if batch is None else predictor.num_calls(*batch.images.shape[2:])
        most = max(world.gather(calls))
        if batch is not None:
            counter.add(predictor(batch.images[0], segment), batch.classes[0])
        for _ in range(most - calls):
            segment(torch.zeros(1, 3, predictor.side, predictor.side, device=world.device))
        if progress is not None and (round_end - first) // world.size % progress.every == 0:
            num_images, matrix_KK = min(round_end, len(evaluation.source)), counter.total(world)
            world.on_main(partial(progress.add, [{"num_images": num_images, "matrix": matrix_KK.tolist()}]))
    return counter.result(world)
