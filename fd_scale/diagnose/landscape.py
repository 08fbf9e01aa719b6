"""How flat a minimum is: the loss on a plane around the trained weights, and the Hessian's largest eigenvalue.

Shape legend: F = filters of a weight (its first dimension), K = points along a direction.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from fd_kernels.dispatch import implementation
from torch import Tensor, nn

from fd_scale.checkpoint import read_manifest, write_atomically
from fd_scale.config import Recipe
from fd_scale.data import Batch, evaluation_batches, spread
from fd_scale.diagnose.plots import save
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet, Forward
from fd_scale.run_folder import not_writable

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Which plane, and how finely it is seen."""

    points: int = 11
    """K, along each of two directions; odd, so that the middle is the trained weights."""
    span: float = 1.0
    """From the middle to an edge, in lengths of the weights' filters."""
    seed: int = 0
    """Of the directions."""

    def __post_init__(self) -> None:
        if self.points < 3 or self.points % 2 == 0:
            raise UserError(f"--points: got {self.points}, expected an odd number of 3 or more")
        if not (math.isfinite(self.span) and self.span > 0):
            raise UserError(f"--span: got {self.span}, expected a positive number")

    @property
    def places(self) -> np.ndarray:
        """Coordinates along a direction."""
        return np.linspace(-self.span, self.span, self.points)


def filter_normalised(parameters: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Draws a direction whose filters are as long as the weights' own; parameters of one dimension stay fixed.

    Args:
        parameters: floating point, any shapes.
        generator: on the host, so that a device changes nothing.

    Returns:
        The direction, a tensor for each parameter, in its shape and dtype.

    Source: Li et al. 2018 (arXiv:1712.09913), section 4, "filter-wise normalization".
    """
    direction = []
    for weight in parameters:
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        if weight.dim() < 2:
            direction.append(torch.zeros_like(weight))
            continue
        filters = (drawn.flatten(1), weight.detach().flatten(1))
        lengths_F1 = [part.norm(dim=1, keepdim=True) for part in filters]
        scaled = filters[0] * (lengths_F1[1] / lengths_F1[0].clamp_min(1e-12))
        direction.append(scaled.view_as(weight))
    return direction


@torch.no_grad()
def surface(
    parameters: Sequence[nn.Parameter],
    metrics: Callable[[], Metrics],
    plane: Plane,
    done: list[list[Metrics]],
    after_row: Callable[[list[list[Metrics]]], None],
) -> list[list[Metrics]]:
    """Measures at each point of a plane; the weights are what they were afterwards.

    Args:
        parameters: what is moved.
        metrics: measures at the present weights; all ranks call it.
        plane: the points.
        done: rows of an earlier call, which are not measured again.
        after_row: called with all rows after each new one.

    Returns:
        K rows of K measurements; the row is the place along the second direction.
    """
    generator = torch.Generator().manual_seed(plane.seed)
    first, second = (filter_normalised(parameters, generator) for _ in range(2))
    trained = [parameter.detach().clone() for parameter in parameters]
    rows = list(done)
    try:
        for y in plane.places[len(rows) :]:
            row = []
            for x in plane.places:
                for parameter, start, a, b in zip(parameters, trained, first, second, strict=True):
                    parameter.copy_(start + float(x) * a + float(y) * b)
                row.append(metrics())
            rows.append(row)
            after_row(rows)
            logger.info("landscape: row %d of %d", len(rows), plane.points)
    finally:
        for parameter, start in zip(parameters, trained, strict=True):
            parameter.copy_(start)
    return rows


def top_eigenvalue(
    loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], num_steps: int = 20, seed: int = 0
) -> float:
    """Returns the Hessian's eigenvalue of the largest size, by power iteration on its products with vectors.

    Args:
        loss: computes it anew, twice differentiable; scalar.
        parameters: what it is differentiated by.
        num_steps: products.
        seed: of the vector that is started from.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(each.shape, generator=generator).to(each) for each in parameters]
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
    pairs = [(each, parameter) for each, parameter in zip(gradient, parameters, strict=True)]
    value = 0.0
    for _ in range(num_steps):
        length = torch.stack([part.square().sum() for part in vector]).sum().sqrt()
        vector = [part / length for part in vector]
        inner = torch.stack(
            [(each * part).sum() for (each, _), part in zip(pairs, vector, strict=True) if each is not None]
        ).sum()
        products = torch.autograd.grad(inner, parameters, retain_graph=True, allow_unused=True)
        product = [
            torch.zeros_like(part) if each is None else each.detach()
            for each, part in zip(products, vector, strict=True)
        ]
        value = float(torch.stack([(a * b).sum() for a, b in zip(vector, product, strict=True)]).sum())
        vector = product
    return value


class Evaluated(Protocol):
    """What is asked of a task; each as of `fd_scale.trainer.Task`."""

    evaluation: EvaluationSet | None

    @property
    def module(self) -> nn.Module: ...

    def counts(self, batch: Batch) -> dict[str, float]: ...

    def evaluation_inputs(self, batch: Batch) -> dict[str, Any]: ...

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]: ...


def landscape_of(
    task: Evaluated, recipe: Recipe, checkpoint: Path, plane: Plane, num_images: int, world: World
) -> dict[str, Any]:
    """Measures the plane and the largest eigenvalue of a task at a checkpoint, and writes both as it goes.

    Args:
        task: with the checkpoint's weights, in eval mode on the device.
        recipe: the task's.
        checkpoint: whose run gets the files.
        plane: the points.
        num_images: evenly spread ones of the evaluation source; the eigenvalue is of the first batch of them.
        world: ranks, which share the images.

    Returns:
        What landscape.json holds.

    Raises:
        UserError: too few images, or nothing can be written.
    """
    assert task.evaluation is not None, "the recipe names images"
    if num_images < 1:
        raise UserError(f"--num-images: got {num_images}, expected at least 1")
    task.evaluation = replace(task.evaluation, source=spread(task.evaluation.source, num_images))
    folder = checkpoint.parent.parent / "diagnosis"
    file = folder / "landscape.json"
    step = read_manifest(checkpoint)["state"]["step"]
    key = asdict(plane) | {"step": step, "images": str(recipe.data.evaluation), "num_images": num_images}
    parameters = [each for each in task.module.parameters() if each.requires_grad]
    batch = next(iter(_batches(task.evaluation, world)))
    more = {"top_eigenvalue": top_eigenvalue(lambda: _loss(task, batch), parameters)}
    logger.info("landscape: the Hessian's largest eigenvalue is %.4g", more["top_eigenvalue"])
    done = read_rows(file, key)

    def keep(rows: list[list[Metrics]]) -> None:
        if world.is_main:
            write_rows(file, key, rows, more)

    try:
        folder.mkdir(exist_ok=True)
        rows = surface(parameters, lambda: task.evaluate(task.module, world), plane, done, keep)
        keep(rows)
        if world.is_main:
            draw(rows, plane, folder)
    except OSError as error:
        raise not_writable(folder, error) from None
    return {"of": key, "rows": rows} | more


def _batches(evaluation: EvaluationSet, world: World) -> Any:
    """The batches of one rank alone, on this rank's device: the same on all."""
    for batch in evaluation_batches(
        evaluation.source,
        evaluation.transform,
        batch_size=evaluation.batch_size,
        rank=0,
        world_size=1,
        num_workers=0,
    ):
        yield batch.to(world.device)


def _loss(task: Evaluated, batch: Batch) -> Tensor:
    """The mean loss of a batch through operations that have second derivatives."""
    with implementation("reference"):
        outputs = task.module(**task.evaluation_inputs(batch))
    terms = [outputs[name].float() / max(count, 1.0) for name, count in task.counts(batch).items()]
    return torch.stack(terms).sum()


def read_rows(file: Path, key: dict[str, Any]) -> list[list[Metrics]]:
    """Returns the rows of an earlier call for the same plane of the same weights; none: there are none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    rows: list[list[Metrics]] = found["rows"]
    return rows if found["of"] == key else []


def write_rows(file: Path, key: dict[str, Any], rows: list[list[Metrics]], more: dict[str, Any]) -> None:
    """Writes what is measured so far."""
    write_atomically(file, json.dumps({"of": key, "rows": rows} | more, indent=1))


def draw(rows: list[list[Metrics]], plane: Plane, folder: Path) -> None:
    """Contours of the loss, and cuts through the middle along both directions."""
    loss_KK = np.array([[point["loss"] for point in row] for row in rows])
    figure, (contours, cuts) = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    finite = np.where(np.isfinite(loss_KK), loss_KK, np.nan)
    drawn = contours.contourf(plane.places, plane.places, finite, levels=20, cmap="viridis")
    figure.colorbar(drawn, ax=contours)
    contours.plot(0, 0, marker="+", color="white")
    contours.set(title="loss around the trained weights", xlabel="first direction", ylabel="second")
    middle = plane.points // 2
    cuts.plot(plane.places, loss_KK[middle], marker="o", markersize=3, label="first direction")
    cuts.plot(plane.places, loss_KK[:, middle], marker="o", markersize=3, label="second direction")
    cuts.set(title="cuts through the middle", xlabel="in lengths of the weights", ylabel="loss")
    cuts.grid(alpha=0.3)
    cuts.legend()
    save(figure, folder, "landscape")
