"""Accuracy of a classifier over a whole source: top-1, top-5, by class, and how far its confidence can be trusted.

Shape legend: B = images, K = classes, C = bins of confidence.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fd_scale.data import UNLABELLED, Source
from fd_scale.distributed import World
from fd_scale.errors import UserError

NUM_BINS = 15
_PLACE_IN_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Shares, in 0..1, of the labelled images of a source."""

    num_images: int
    top1: float
    top5: float
    """Of fewer than five classes: 1."""
    loss: float
    """Cross entropy, nats."""
    calibration_error: float
    """Expected calibration error: the mean distance of confidence and accuracy, over 15 bins of confidence."""
    class_top1: np.ndarray
    """Of each class, fp64 (K,); NaN where it has no image."""
    class_images: np.ndarray
    """int64 (K,)."""
    real_top1: float | None = None
    """Share of predictions that are among an image's reassessed labels; none: these were not given."""

    @property
    def metrics(self) -> dict[str, float]:
        """What a run logs."""
        return {
            "top1": self.top1, "top5": self.top5, "loss": self.loss, "class_mean": float(np.nanmean(self.class_top1)),
            "calibration_error": self.calibration_error,
        } | ({} if self.real_top1 is None else {"real_top1": self.real_top1})  # fmt: skip

    def worst_classes(self, count: int) -> list[int]:
        """Returns the classes with the smallest accuracy; of equals those with more images, then the first."""
        present = np.flatnonzero(self.class_images)
        order = np.lexsort((present, -self.class_images[present], self.class_top1[present]))
        return [int(label) for label in present[order[:count]]]

    def to_json(self, class_names: list[str] | None) -> dict[str, Any]:
        """Returns plain values, those of each class among them."""
        names = class_names or [str(label) for label in range(len(self.class_images))]
        classes = [
            {
                "label": label,
                "name": name,
                "images": int(images),
                "top1": None if np.isnan(top1) else float(top1),
            }
            for label, (name, images, top1) in enumerate(
                zip(names, self.class_images, self.class_top1, strict=True)
            )
        ]
        return {"images": self.num_images, **self.metrics, "classes": classes}


class AccuracyCounter:
    """Counts over the batches of a rank, then over ranks.

    Args:
        num_classes: K.
        reassessed: labels that count as right, of each sample (`reassessed_labels`); none: there are none.
    """

    def __init__(self, num_classes: int, reassessed: list[list[int]] | None = None) -> None:
        self.num_classes = num_classes
        self.reassessed = reassessed
        self.classes_K2 = np.zeros((num_classes, 2))
        self.bins_C3 = np.zeros((NUM_BINS, 3))
        self.sums = np.zeros(4)

    def add(self, logits_BK: Tensor, labels_B: Tensor, sample_ids: list[int]) -> None:
        """Counts a batch; images without label (-1) count only for reassessed labels."""
        predicted_B = logits_BK.argmax(-1)
        if self.reassessed is not None:
            for predicted, sample_id in zip(predicted_B.tolist(), sample_ids, strict=True):
                if right := self.reassessed[sample_id]:
                    self.sums[2:] += predicted in right, 1
        labelled_B = labels_B != UNLABELLED
        logits_BK, labels_B, predicted_B = (
            logits_BK[labelled_B],
            labels_B[labelled_B],
            predicted_B[labelled_B],
        )
        top5_B = logits_BK.topk(min(5, self.num_classes)).indices.eq(labels_B[:, None]).any(-1)
        loss = F.cross_entropy(logits_BK.double(), labels_B, reduction="sum")
        confidence_B = logits_BK.double().softmax(-1).max(-1).values.cpu().numpy()
        hits_B = (predicted_B == labels_B).double().cpu().numpy()
        self.sums[:2] += float(top5_B.sum()), float(loss)
        np.add.at(self.classes_K2, labels_B.cpu().numpy(), np.stack([hits_B, np.ones_like(hits_B)], axis=1))
        # Bins are open on the left: (0, 1/15], ..., as in Guo et al.
        bins_B = np.clip(np.ceil(confidence_B * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
        np.add.at(self.bins_C3, bins_B, np.stack([hits_B, confidence_B, np.ones_like(hits_B)], axis=1))

    def result(self, world: World) -> Accuracy:
        """Returns the shares over all ranks, which all call it.

        Raises:
            UserError: no image is labelled.

        Source: calibration error: Guo et al. 2017 (arXiv:1706.04599), equation 3.
        """
        parts = (self.classes_K2, self.bins_C3, self.sums)
        totals = np.array(world.sum(np.concatenate([part.ravel() for part in parts]).tolist()))
        classes_K2, bins_C3, sums = (
            part.reshape(shaped.shape)
            for part, shaped in zip(
                np.split(totals, np.cumsum([part.size for part in parts])[:-1]), parts, strict=True
            )
        )
        (hits_K, images_K), (bin_hits_C, confidence_C, _) = classes_K2.T, bins_C3.T
        num_images = images_K.sum()
        if not num_images:
            raise UserError("data.evaluation: no image has a label; accuracy needs labels")
        with np.errstate(invalid="ignore"):
            class_top1 = hits_K / images_K
        top5, loss, real_hits, real_images = sums
        return Accuracy(
            num_images=int(num_images),
            top1=float(hits_K.sum() / num_images),
            top5=float(top5 / num_images),
            loss=float(loss / num_images),
            calibration_error=float(np.abs(bin_hits_C - confidence_C).sum() / num_images),
            class_top1=class_top1,
            class_images=images_K.astype(np.int64),
            real_top1=float(real_hits / real_images) if real_images else None,
        )


def reassessed_labels(file: str, source: Source, num_classes: int) -> list[list[int]]:
    """Reads ImageNet's reassessed labels: of each sample of a source the classes that are right, perhaps none.

    Args:
        file: JSON, a list of lists of labels: those of ILSVRC2012_val_00000001, then of ...02, and so on.
        source: ImageNet's validation images, under their own names.
        num_classes: classes of the model.

    Raises:
        UserError: it is another file, or other images.

    Source: Beyer et al. 2020 (arXiv:2006.07159), its real.json.
    """
    try:
        labels = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--real: {file} cannot be read as JSON: {error}") from None
    good = isinstance(labels, list) and all(
        isinstance(item, list) and all(isinstance(label, int) and 0 <= label < num_classes for label in item)
        for item in labels
    )
    if not good:
        raise UserError(
            f"--real: {file} is no list of lists of labels 0 to {num_classes - 1}; expected the real.json of "
            "reassessed ImageNet"
        )
    found = []
    for sample_id in range(len(source)):
        place = _PLACE_IN_VALIDATION.search(source.key(sample_id))
        if place is None or not 1 <= int(place[1]) <= len(labels):
            raise UserError(
                f"--real: {source.key(sample_id)} is not among the {len(labels)} images of ImageNet's validation set, "
                "expected names ILSVRC2012_val_00000001 and so on; evaluate on that set, or without --real"
            )
        found.append(labels[int(place[1]) - 1])
    return found
