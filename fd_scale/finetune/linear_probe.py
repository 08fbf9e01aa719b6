"""Linear probe: classifiers on features of a frozen backbone, computed once, one classifier for each learning rate.

Shape legend: N = images of a source, B = images of a batch, D = channels, K = classes, R = learning rates.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.checkpoint import write_atomically
from fd_scale.config import Recipe
from fd_scale.data import UNLABELLED, Batch, Labels, Source, Targets, TrainLoader, evaluation_cut, spread
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import AccuracyCounter, EvaluationSet, Forward, evaluated_batches, nearest_neighbours
from fd_scale.finetune.classes import require_same_classes
from fd_scale.finetune.labels import doubts_of_labels
from fd_scale.models import (
    Backbone,
    Fp32Linear,
    build_model,
    dtype_of,
    model_identity,
    normalize,
    weights_path,
    weights_sha256,
)
from fd_scale.placement import WHOLE, Placement
from fd_scale.randomness import initial_seed

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 4096


class FeatureSource:
    """What stands in for a source of images in the loader: their features, in its order.

    Args:
        images: the source.
        folder: where `compute` puts the features; nothing is read from it before.
    """

    targets: Targets = "labels"

    def __init__(self, images: Source, folder: Path) -> None:
        self.images = images
        self.folder = folder
        self.labels_N = images.all_labels()
        self.class_names = images.class_names
        self.num_classes = images.num_classes

    @functools.cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """fp32 (N, D), on disk."""
        return np.load(self.folder / "features.npy", mmap_mode="r")

    @property
    def fingerprint(self) -> str:
        """See `Source`."""
        return self.images.fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def all_labels(self) -> Labels:
        """See `Source`."""
        return self.labels_N

    def name(self, sample_id: int) -> str:
        """See `Source`."""
        return self.images.name(sample_id)

    def key(self, sample_id: int) -> str:
        """See `Source`."""
        return self.images.key(sample_id)

    def read(self, sample_id: int) -> tuple[Any, int]:
        """Returns the features, (D,), and the label."""
        return self.features[sample_id], int(self.labels_N[sample_id])


def as_tensor(features_D: Any, label: int) -> tuple[Tensor, int]:
    """The transform of a `FeatureSource`: a copy, since the file is only read."""
    return torch.tensor(features_D), label


def features_of(images: EvaluationSet, folder: Path) -> EvaluationSet:
    """Returns the set whose source is a `FeatureSource`; without loader workers, which would copy all features."""
    source = cast(Source, FeatureSource(images.source, folder))
    return replace(images, source=source, transform=as_tensor, num_workers=0)


def compute(recipe: Recipe, images: EvaluationSet, folder: Path, world: World) -> None:
    """Computes the mean of the patch tokens of every image, where `folder` does not have it; all ranks call it.

    Args:
        recipe: names the backbone and its weights.
        images: a source of images, and how they are cut.
        folder: gets `features.npy` and then `manifest.json`; every rank must see it.
        world: ranks, which share the images.

    Raises:
        UserError: the folder cannot be written.
    """
    manifest = folder / "manifest.json"
    wanted = {"data": images.source.fingerprint, "precision": recipe.train.precision} | _model_facts(recipe)
    wanted |= evaluation_cut(recipe.model.size)
    text = json.dumps(wanted, indent=1)
    file = folder / "features.npy"
    if world.on_main(
        lambda: file.is_file() and manifest.is_file() and manifest.read_text(encoding="utf-8") == text
    ):
        return
    dtype = dtype_of(recipe.train.precision)
    backbone = probed_backbone(recipe).to(world.device, dtype).eval()
    shape = (len(images.source), backbone.num_features)

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            manifest.unlink(missing_ok=True)
            np.lib.format.open_memmap(file, "w+", np.float32, shape).flush()
            with file.open("r+b") as whole:
                os.posix_fallocate(whole.fileno(), 0, file.stat().st_size)  # a full disk is told now
        except OSError as error:
            raise UserError(f"run_dir: {folder} cannot be written ({error.strerror})") from None

    logger.info("computing the features of %d images once, into %s", len(images.source), folder)
    world.on_main(make)
    start, row_bytes = np.load(file, mmap_mode="r").offset, 4 * shape[1]
    # Written and not mapped: ranks share pages of the file, which a network file system would write back whole.
    with torch.no_grad(), file.open("r+b") as rows:
        for batch in evaluated_batches(images, world):
            pixels_BCHW = normalize(batch.images, backbone.mean, backbone.std).to(dtype)
            tokens_BLD = backbone(pixels_BCHW)[:, backbone.num_prefix_tokens :]
            rows.seek(start + int(batch.positions[0]) * row_bytes)  # a batch is a range of the source
            rows.write(tokens_BLD.mean(1).float().cpu().numpy().tobytes())
        rows.flush()
        os.fsync(rows.fileno())
    world.barrier()
    world.on_main(lambda: write_atomically(manifest, text))


def probed_backbone(recipe: Recipe) -> Backbone:
    """Builds the frozen model; without weights it is the same on every rank."""
    torch.manual_seed(initial_seed(recipe.seed))
    return build_model(recipe.model)


def _model_facts(recipe: Recipe) -> dict[str, Any]:
    """What decides the features besides the images."""
    path, model = weights_path(recipe.model), recipe.model
    return {
        "weights": path and weights_sha256(path), "name": model_identity(model), "img_size": model.size,
        "mean": list(model.mean or ()), "std": list(model.std or ()), "overrides": model.overrides, "seed": recipe.seed,
    }  # fmt: skip


class LinearProbeModule(nn.Module):
    """A linear classifier for each learning rate, on standardised features.

    Args:
        num_features: D.
        num_classes: K.
        num_heads: R.

    Attributes:
        mean: of the training images' features, (D,).
        std: of the training images' features, (D,).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_features: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.heads = nn.ModuleList(Fp32Linear(num_features, num_classes) for _ in range(num_heads))
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, features_BD: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Classifies.

        Args:
            features_BD: fp32.
            labels_B: int64, -1: not labelled.

        Returns:
            `loss`: cross entropy summed over images, the mean of the heads', whose gradients are those of each
            one's own; `logits`: (R, B, K), fp32, without gradient.
        """
        x_BD = (features_BD - self.mean.float()) / self.std.float()
        logits_RBK = torch.stack([head(x_BD) for head in self.heads])
        loss = sum(
            F.cross_entropy(logits_BK, labels_B, ignore_index=UNLABELLED, reduction="sum")
            for logits_BK in logits_RBK
        )
        assert isinstance(loss, Tensor)
        # The value of the mean, to be read beside an evaluation's, and the gradient of the sum.
        mean = loss + (loss / len(self.heads) - loss).detach()
        return {"loss": mean, "logits": logits_RBK.detach()}


class LinearProbeTask:
    """What the trainer needs to know of a linear probe.

    Args:
        recipe: with its section `linear_probe`.
        train: images to train on.
        evaluation: images on which accuracy is measured.
        placement: where the classifiers' parameters are.
    """

    best_metric = ("top1", +1)

    def __init__(
        self,
        recipe: Recipe,
        train: EvaluationSet,
        evaluation: EvaluationSet | None,
        placement: Placement = WHOLE,
    ) -> None:
        assert recipe.linear_probe is not None, "a recipe of task linear_probe has its section"
        self.num_classes = train.source.num_classes
        if self.num_classes < 2:
            raise UserError(f"data.train: {recipe.data.train} has no classes; a linear probe needs labels")
        self.recipe = recipe
        self.sets = {"train": train} | ({} if evaluation is None else {"evaluation": evaluation})
        for part, images in self.sets.items():
            for doubt in doubts_of_labels(f"data.{part}", images.source):
                logger.warning("%s", doubt)
        if evaluation is not None:
            require_same_classes(recipe, train.source, evaluation.source)
        with torch.device("meta"):
            num_features = build_model(replace(recipe.model, weights=None)).num_features
        factors = recipe.linear_probe.lr_factors
        self.learning_rates = [factor * recipe.optim.lr for factor in factors]
        with placement.building(dtype_of(recipe.train.precision)):
            self.module = LinearProbeModule(num_features, self.num_classes, len(factors))
        self.undecayed: set[str] = set()
        self.lr_scales = {
            f"heads.{index}.{name}": factor
            for index, factor in enumerate(factors)
            for name in ("weight", "bias")
        }

    def features(self, part: str) -> EvaluationSet:
        """Returns the features of `train` or `evaluation`, which are there after `prepare`."""
        return features_of(self.sets[part], self._folder(part))

    def _folder(self, part: str) -> Path:
        return Path(self.recipe.run_dir) / "features" / part

    def prepare(self, world: World, loader: TrainLoader) -> None:
        """Computes what features are not there yet, and how they are distributed."""
        for part, images in self.sets.items():
            compute(self.recipe, images, self._folder(part), world)
        train = self.features("train").source
        assert isinstance(train, FeatureSource), "features_of makes it"
        self.module.mean, self.module.std = _moments(train.features)

    def counts(self, batch: Batch) -> dict[str, float]:
        """The loss goes over labelled images."""
        return {"loss": float((batch.classes != UNLABELLED).sum())}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Features and labels."""
        return {"features_BD": batch.images, "labels_B": batch.classes}

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """Measures every classifier; the metrics are those of the one with the best top-1, `learning_rate` is its.

        Where that one is at an end of the sweep, a better one may lie beyond: a warning.
        """
        if "evaluation" not in self.sets:
            return {}
        counters = [AccuracyCounter(self.num_classes) for _ in self.learning_rates]
        for batch in evaluated_batches(self.features("evaluation"), world):
            logits_RBK = forward(features_BD=batch.images, labels_B=batch.classes)["logits"]
            for counter, logits_BK in zip(counters, logits_RBK, strict=True):
                counter.add(logits_BK, batch.classes, batch.positions.tolist())
        found = [counter.result(world).metrics for counter in counters]
        best = max(range(len(found)), key=lambda index: found[index]["top1"])
        if doubt := doubt_of_sweep(self.learning_rates, [metrics["top1"] for metrics in found]):
            logger.warning("%s", doubt)
        return found[best] | {"learning_rate": self.learning_rates[best]} | self._neighbours(world)

    def _neighbours(self, world: World) -> dict[str, float]:
        assert self.recipe.linear_probe is not None, "checked at the start"
        count, train = self.recipe.linear_probe.knn_images, self.features("train")
        if not count:
            return {}
        bank = replace(train, source=spread(train.source, count))
        return nearest_neighbours(bank, self.features("evaluation"), lambda batch: batch.images, world)

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """There are none."""
        return {}


def doubt_of_sweep(learning_rates: list[float], top1: list[float]) -> str:
    """Says that the smallest or the largest learning rate does better than all others; empty: neither does."""
    advice = (min, "smallest", "lower optim.lr"), (max, "largest", "raise optim.lr, or train for more epochs")
    for end, which, change in advice:
        index = learning_rates.index(end(learning_rates))
        others = top1[:index] + top1[index + 1 :]
        if others and top1[index] > max(others):
            return (
                f"linear_probe.lr_factors: the {which} learning rate of the sweep, {learning_rates[index]:g}, is the "
                f"best one, and one beyond it may be better; {change}"
            )
    return ""


def _moments(features_ND: npt.NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, fp32; a channel that never changes has deviation 1."""
    total: Any = 0.0
    squares: Any = 0.0
    for start in range(0, len(features_ND), _ROWS_AT_A_TIME):
        rows = features_ND[start : start + _ROWS_AT_A_TIME].astype(np.float64)
        total, squares = total + rows.sum(0), squares + np.square(rows).sum(0)
    mean_D = total / len(features_ND)
    std_D = np.sqrt(np.maximum(squares / len(features_ND) - mean_D**2, 0))
    std_D[std_D < 1e-6] = 1.0
    return torch.from_numpy(mean_D).float(), torch.from_numpy(std_D).float()
