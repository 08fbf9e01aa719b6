"""Linear probe: classifiers on features of a frozen backbone, computed once, one classifier for each learning rate.

Shape legend: N = images of a source, B = images of a batch, D = channels, K = classes, R = learning rates.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.checkpoint import write_atomically
from fd_scale.config import Recipe
from fd_scale.data import UNLABELLED, Batch, Source, TrainLoader
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import AccuracyCounter, EvaluationSet, Forward, evaluated_batches
from fd_scale.finetune.labels import doubts_of_labels
from fd_scale.models import Backbone, build_model, dtype_of, normalize, weights_path, weights_sha256
from fd_scale.placement import WHOLE, Placement
from fd_scale.randomness import hash64

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class FeatureSource:
    """What stands in for a source of images in the loader: their features, in its order.

    Attributes:
        images: the source.
        features: fp32 (N, D), on disk.
        labels: int64 (N,), -1 where an image has none.
    """

    images: Source
    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    @property
    def class_names(self) -> list[str] | None:
        """See `Source`."""
        return self.images.class_names

    @property
    def num_classes(self) -> int:
        """See `Source`."""
        return self.images.num_classes

    def all_labels(self) -> npt.NDArray[np.int64]:
        """See `Source`."""
        return self.labels

    @property
    def fingerprint(self) -> str:
        """See `Source`."""
        return self.images.fingerprint

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, sample_id: int) -> str:
        """See `Source`."""
        return self.images.name(sample_id)

    def key(self, sample_id: int) -> str:
        """See `Source`."""
        return self.images.key(sample_id)

    def read(self, sample_id: int) -> tuple[Any, int]:
        """Returns the features, (D,), and the label."""
        return self.features[sample_id], int(self.labels[sample_id])


def as_tensor(features_D: Any) -> Tensor:
    """The transform of a `FeatureSource`: a copy, since the file is only read."""
    return torch.tensor(features_D)


def cached_features(recipe: Recipe, images: EvaluationSet, folder: Path, world: World) -> EvaluationSet:
    """Computes the mean of the patch tokens of every image once; all ranks call it and share the images.

    Args:
        recipe: names the backbone and its weights.
        images: a source, and how its images are cut.
        folder: where `features.npy` and `labels.npy` are written, or were by an earlier call for the same backbone and
            images; every rank must see it.
        world: ranks.

    Returns:
        A set whose source is a `FeatureSource`.
    """
    wanted = {"data": images.source.fingerprint, "precision": recipe.train.precision} | model_facts(recipe)
    manifest = folder / "manifest.json"
    found = manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")) == wanted
    if not world.from_main(found):
        _compute(recipe, images, folder, world)
        world.on_main(lambda: write_atomically(manifest, json.dumps(wanted, indent=1)))
    features_ND, labels_N = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "labels")
    )
    source = cast(Source, FeatureSource(images.source, features_ND, labels_N))
    # Workers would each get a copy of all features.
    return replace(images, source=source, transform=as_tensor, num_workers=0)


def model_facts(recipe: Recipe) -> dict[str, Any]:
    """What decides the features besides the images."""
    path = weights_path(recipe.model)
    model = recipe.model
    return {
        "weights": path and weights_sha256(path), "name": model.name, "img_size": model.size,
        "mean": list(model.mean or ()), "std": list(model.std or ()), "overrides": model.overrides,
    }  # fmt: skip


def probed_backbone(recipe: Recipe) -> Backbone:
    """Builds the frozen model; without weights it is the same on every rank."""
    torch.manual_seed(int(hash64(recipe.seed, "initialisation")) % 2**63)
    return build_model(recipe.model)


def _compute(recipe: Recipe, images: EvaluationSet, folder: Path, world: World) -> None:
    dtype = dtype_of(recipe.train.precision)
    backbone = probed_backbone(recipe).to(world.device, dtype).eval()
    num_images = len(images.source)
    shapes = {
        "features": ((num_images, backbone.num_features), np.float32),
        "labels": ((num_images,), np.int64),
    }

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").unlink(missing_ok=True)
            for name, (shape, kind) in shapes.items():
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape).flush()
        except OSError as error:
            raise UserError(f"run_dir: {folder} cannot be written ({error.strerror})") from None

    logger.info("computing the features of %d images once, into %s", num_images, folder)
    world.on_main(make)
    features_ND, labels_N = (np.lib.format.open_memmap(folder / f"{name}.npy", "r+") for name in shapes)
    with torch.no_grad():
        for batch in evaluated_batches(images, world):
            pixels_BCHW = normalize(batch.images, backbone.mean, backbone.std).to(dtype)
            tokens_BLD = backbone(pixels_BCHW)[:, backbone.num_prefix_tokens :]
            rows = batch.positions.numpy()
            features_ND[rows] = tokens_BLD.mean(1).float().cpu().numpy()
            labels_N[rows] = batch.labels.cpu().numpy()
    features_ND.flush()
    labels_N.flush()
    world.barrier()


class LinearProbeModule(nn.Module):
    """A linear classifier for each learning rate, on standardised features.

    Args:
        mean_D: of the training images' features.
        std_D: of the training images' features.
        num_classes: K.
        num_heads: R.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean_D: Tensor, std_D: Tensor, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean_D)
        self.register_buffer("std", std_D)
        self.heads = nn.ModuleList(nn.Linear(len(mean_D), num_classes) for _ in range(num_heads))
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
            `loss`: cross entropy summed over images and heads; `logits`: (R, B, K), fp32, without gradient.
        """
        dtype = self.heads[0].weight.dtype
        assert isinstance(dtype, torch.dtype)
        x_BD = ((features_BD - self.mean.float()) / self.std.float()).to(dtype)
        logits_RBK = torch.stack([head(x_BD) for head in self.heads]).float()
        loss = sum(
            F.cross_entropy(logits_BK, labels_B, ignore_index=UNLABELLED, reduction="sum")
            for logits_BK in logits_RBK
        )
        assert isinstance(loss, Tensor)
        return {"loss": loss, "logits": logits_RBK.detach()}


class LinearProbeTask:
    """What the trainer needs to know of a linear probe.

    Args:
        recipe: with its section `linear_probe`.
        train: features of the training images.
        evaluation: features of the images on which accuracy is measured.
        placement: where the classifiers' parameters are.
    """

    best_metric = ("top1", +1)

    def __init__(
        self, recipe: Recipe, train: Source, evaluation: EvaluationSet | None, placement: Placement = WHOLE
    ) -> None:
        assert recipe.linear_probe is not None, "a recipe of task linear_probe has its section"
        assert isinstance(train, FeatureSource), "cached_features made it"
        if train.num_classes < 2:
            raise UserError(f"data.train: {recipe.data.train} has no classes; a linear probe needs labels")
        for doubt in doubts_of_labels("data.train", train):
            logger.warning("%s", doubt)
        self.evaluation = evaluation
        self.factors = tuple(recipe.linear_probe.lr_factors)
        self.learning_rates = [factor * recipe.optim.lr for factor in self.factors]
        self.num_classes = train.num_classes
        mean_D, std_D = _moments(train.features)
        with placement.building(dtype_of(recipe.train.precision)):
            self.module = LinearProbeModule(mean_D, std_D, self.num_classes, len(self.factors))
        self.undecayed: set[str] = set()
        self.lr_scales = {
            f"heads.{index}.{name}": factor
            for index, factor in enumerate(self.factors)
            for name in ("weight", "bias")
        }

    def prepare(self, world: World, loader: TrainLoader) -> None:
        """There is nothing beside the module."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """The loss goes over labelled images."""
        return {"loss": float((batch.labels != UNLABELLED).sum())}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Features and labels."""
        return {"features_BD": batch.images, "labels_B": batch.labels}

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]:
        """Measures every classifier; the metrics are those of the one with the best top-1, `learning_rate` is its."""
        if self.evaluation is None:
            return {}
        counters = [AccuracyCounter(self.num_classes) for _ in self.factors]
        for batch in evaluated_batches(self.evaluation, world):
            logits_RBK = forward(features_BD=batch.images, labels_B=batch.labels)["logits"]
            for counter, logits_BK in zip(counters, logits_RBK, strict=True):
                counter.add(logits_BK, batch.labels, batch.positions.tolist())
        found = [counter.result(world).metrics for counter in counters]
        best = max(range(len(found)), key=lambda index: found[index]["top1"])
        return found[best] | {"learning_rate": self.learning_rates[best]}

    def pictures(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """There are none."""
        return {}


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
