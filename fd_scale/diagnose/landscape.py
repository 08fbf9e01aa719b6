"""How flat a minimum is: the loss on a line or plane through the trained weights, and the Hessian's top eigenvalue.

Shape legend: F = filters of a weight (its first dimension), K = points along a direction.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from fd_kernels.dispatch import implementation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fd_scale import log
from fd_scale.checkpoint import read_manifest, shown, write_atomically
from fd_scale.config import Recipe
from fd_scale.data import Batch, evaluation_batches, evaluation_cut, spread
from fd_scale.diagnose.plots import save
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet, Forward
from fd_scale.run_folder import not_writable

logger = logging.getLogger(__name__)

Metrics = dict[str, float]

SETTLED = 0.01
"""An eigenvalue of a larger error, as a share of it, is warned of."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the loss is seen: places on a line or a plane through the trained weights."""

    directions: int = 2
    """1: a line; 2: a plane, whose first direction is the line's."""
    points: int = 11
    """K, along each direction; odd, so that the middle is the trained weights."""
    span: float = 1.0
    """From the middle to an edge, in lengths of the weights' filters."""
    seed: int = 0
    """Of the directions."""

    def __post_init__(self) -> None:
        if self.directions not in (1, 2):
            raise UserError(f"--directions: got {self.directions}, expected 1, a line, or 2, a plane")
        if self.points < 3 or self.points % 2 == 0:
            raise UserError(f"--points: got {self.points}, expected an odd number of 3 or more")
        if not (math.isfinite(self.span) and self.span > 0):
            raise UserError(f"--span: got {self.span}, expected a positive number")

    @property
    def along(self) -> np.ndarray:
        """Coordinates along a direction."""
        return np.linspace(-self.span, self.span, self.points)

    @property
    def places(self) -> list[tuple[float, float]]:
        """Coordinates along both directions, row by row; a row is one place along the second direction."""
        second = self.along.tolist() if self.directions == 2 else [0.0]
        return [(x, y) for y in second for x in self.along.tolist()]

    @property
    def name(self) -> str:
        """Of the files."""
        return "landscape" if self.directions == 2 else "landscape_line"


def filter_normalised(parameters: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Draws a direction whose filters are as long as the weights' own; parameters whose filters are numbers stay fixed.

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
        if weight.dim() < 2 or weight.numel() == len(weight):  # the second: a scale for each head
            direction.append(torch.zeros_like(weight))
            continue
        filters = (drawn.flatten(1), weight.detach().flatten(1))
        lengths_F1 = [part.norm(dim=1, keepdim=True) for part in filters]
        scaled = filters[0] * (lengths_F1[1] / lengths_F1[0].clamp_min(1e-12))
        direction.append(scaled.view_as(weight))
    return direction


@torch.no_grad()
def measured(
    parameters: Sequence[nn.Parameter],
    metrics: Callable[[], Metrics],
    grid: Grid,
    done: list[Metrics],
    after_place: Callable[[list[Metrics]], None],
) -> list[Metrics]:
    """Measures at each place of a grid; the weights are what they were afterwards.

    Args:
        parameters: what is moved.
        metrics: measures at the present weights; all ranks call it.
        grid: the places.
        done: measurements of an earlier call, the first ones, which are not taken again.
        after_place: called with all of them after each new one.

    Returns:
        A measurement for each of `grid.places`.
    """
    generator = torch.Generator().manual_seed(grid.seed)
    first = filter_normalised(parameters, generator)
    second = filter_normalised(parameters, generator) if grid.directions == 2 else first
    trained = [parameter.detach().clone() for parameter in parameters]
    found = list(done)
    try:
        for x, y in grid.places[len(found) :]:
            for parameter, start, a, b in zip(parameters, trained, first, second, strict=True):
                parameter.copy_(start + x * a + y * b)
            found.append(metrics())
            after_place(found)
    finally:
        for parameter, start in zip(parameters, trained, strict=True):
            parameter.copy_(start)
    return found


def top_eigenvalue(
    loss: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    num_steps: int = 40,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> tuple[float, float]:
    """Computes the Hessian's eigenvalue of the largest size by Lanczos' method, from its products with vectors.

    Two vectors are kept, not all: without orthogonalisation against the others, eigenvalues that are found
    come again as copies of themselves, and the outermost ones stay right (Paige 1980).

    Args:
        loss: computes it anew, twice differentiable; scalar.
        parameters: what it is differentiated by.
        num_steps: products at most.
        tolerance: share of the value at which an error is small enough for no further one.
        seed: of the vector that is started from.

    Returns:
        The value, and its error: so near, at the most, is an eigenvalue (another one may be larger).

    Source: Lanczos 1950; for networks Ghorbani et al. 2019 (arXiv:1901.10159), section 2.
    """
    generator = torch.Generator().manual_seed(seed)
    # In fp32, whatever the parameters are: of a norm over millions of them bf16 keeps 8 bits.
    vector = [torch.randn(each.shape, generator=generator).to(each.device) for each in parameters]
    length = _dot(vector, vector) ** 0.5
    before = [torch.zeros_like(part) for part in vector]
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
    diagonal: list[float] = []
    beside: list[float] = [0.0]
    value = error = math.nan
    for _ in range(num_steps):
        for part in vector:
            part /= length
        product = _hessian_product(gradient, parameters, vector)
        for index, previous in enumerate(before):  # one by one: of a large model there is no room for both
            product[index] = product[index] - beside[-1] * previous
        diagonal.append(_dot(product, vector))
        for part, present in zip(product, vector, strict=True):
            part -= diagonal[-1] * present
        length = _dot(product, product) ** 0.5
        if not math.isfinite(length):
            return math.nan, math.nan
        values, states = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[1:], 1) + np.diag(beside[1:], -1))
        largest = int(np.abs(values).argmax())
        value, error = float(values[largest]), length * abs(float(states[-1, largest]))
        if error <= tolerance * abs(value):
            break
        beside.append(length)
        before, vector = vector, product
    return value, error


def _hessian_product(
    gradient: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], vector: Sequence[Tensor]
) -> list[Tensor]:
    """The Hessian times a vector: the gradient of the gradient's inner product with it."""
    pairs = [(each, part) for each, part in zip(gradient, vector, strict=True) if each is not None]
    inner = torch.stack([(each * part).sum() for each, part in pairs]).sum()
    products = torch.autograd.grad(inner, parameters, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(part) if each is None else each.detach()
        for each, part in zip(products, vector, strict=True)
    ]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum())


class Evaluated(Protocol):
    """What is asked of a task; each as of `fd_scale.trainer.Task`."""

    evaluation: EvaluationSet | None

    @property
    def module(self) -> nn.Module: ...

    def evaluation_counts(self, batch: Batch) -> dict[str, float]: ...

    def evaluation_inputs(self, batch: Batch) -> dict[str, Any]: ...

    def evaluate(self, forward: Forward, world: World) -> dict[str, float]: ...


def landscape_of(
    task: Evaluated, recipe: Recipe, checkpoint: Path, grid: Grid, num_images: int, world: World, folder: Path
) -> dict[str, Any]:
    """Measures a grid and the largest eigenvalue of a task at a checkpoint, and writes both as it goes.

    Args:
        task: with the checkpoint's weights, in eval mode on the device.
        recipe: the task's.
        checkpoint: a whole one.
        grid: the places.
        num_images: evenly spread ones of the evaluation source; the eigenvalue is of the first batch of them.
        world: ranks, which share the images.
        folder: of the files.

    Returns:
        What landscape.json holds, or of a line landscape_line.json.

    Raises:
        UserError: too few images, or `folder` has another landscape or cannot be written.
    """
    assert task.evaluation is not None, "the recipe names images"
    if num_images < 1:
        raise UserError(f"--num-images: got {num_images}, expected at least 1")
    task.evaluation = replace(task.evaluation, source=spread(task.evaluation.source, num_images))
    file = folder / f"{grid.name}.json"
    key = asdict(grid) | {
        "step": read_manifest(checkpoint)["state"]["step"], "images": str(recipe.data.evaluation),
        "num_images": num_images, "fingerprint": task.evaluation.source.fingerprint,
        "precision": recipe.train.precision,
        "checkpoint": hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest(),
        **evaluation_cut(recipe.model.size),
    }  # fmt: skip
    parameters = [each for each in task.module.parameters() if each.requires_grad]
    done = world.on_main(lambda: read_places(file, key))
    more = _curvature(task, task.evaluation, parameters, world)

    def keep(found: list[Metrics]) -> None:
        if world.is_main:
            write_places(file, key, found, more)
        told(len(found), len(grid.places))

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with log.counting("places of the landscape", shown=world.is_main) as told:
            found = measured(parameters, lambda: task.evaluate(task.module, world), grid, done, keep)
        if world.is_main:
            draw(found, grid, folder)
            logger.info("written: %s and its plots", file)
    except OSError as error:
        raise not_writable(folder, error, "--out") from None
    return {"of": key, "rows": _rows(found, grid.points)} | more


def _curvature(
    task: Evaluated, evaluation: EvaluationSet, parameters: Sequence[nn.Parameter], world: World
) -> dict[str, Any]:
    """The largest eigenvalue over the first images, a batch of them or as many as memory allows; the same on all ranks.

    Through operations that have second derivatives: these keep what the kernels of a training do not.
    """
    num_images = evaluation.batch_size
    while num_images:
        batch = _first_batch(evaluation, num_images, world)
        num_images = len(batch.positions)
        try:
            # Around the backward passes too, in which blocks may be computed again.
            with implementation("reference"), sdpa_kernel(SDPBackend.MATH):
                value, error = top_eigenvalue(partial(_loss, task, batch), parameters)
        except torch.OutOfMemoryError:
            logger.warning("landscape: the Hessian does not fit in memory with %d images", num_images)
        else:
            words = "landscape: the Hessian's largest eigenvalue is %.4g, to within %.2g, %d images"
            logger.info(words, value, error, num_images)
            if not error <= SETTLED * abs(value):
                words = "landscape: the largest eigenvalue did not settle; %.4g may be off by %.2g or more"
                logger.warning(words, value, error)
            return {"top_eigenvalue": value, "eigenvalue_error": error, "eigenvalue_images": num_images}
        num_images //= 2
    return {"top_eigenvalue": None, "eigenvalue_error": None, "eigenvalue_images": 0}


def _first_batch(evaluation: EvaluationSet, num_images: int, world: World) -> Batch:
    """What one rank alone would read first, on this rank's device."""
    batches = evaluation_batches(
        evaluation.source, evaluation.transform, batch_size=num_images, rank=0, world_size=1, num_workers=0
    )
    return next(batches).to(world.device)


def _loss(task: Evaluated, batch: Batch) -> Tensor:
    """The mean loss of a batch."""
    outputs = task.module(**task.evaluation_inputs(batch))
    counts = task.evaluation_counts(batch)
    return torch.stack([outputs[name].float() / max(count, 1.0) for name, count in counts.items()]).sum()


def read_places(file: Path, key: dict[str, Any]) -> list[Metrics]:
    """Returns what an earlier call measured on the same grid around the same weights; nothing: there was none.

    Raises:
        UserError: it measured something else, which would be lost.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        before, places = found["of"], [place for row in found["rows"] for place in row]
    except (OSError, ValueError, KeyError):  # none, or one that somebody cut
        return []
    if before == key:
        return places
    other = [
        f"{name} {shown(before.get(name))}, here {shown(key.get(name))}"
        for name in key | before
        if before.get(name) != key.get(name)
    ]
    raise UserError(
        f"{file}: is of another landscape ({'; '.join(other)}); name another folder by --out, or delete the file"
    )


def write_places(file: Path, key: dict[str, Any], found: list[Metrics], more: dict[str, Any]) -> None:
    """Writes what is measured so far."""
    body = {"of": key, "rows": _rows(found, key["points"])} | more
    write_atomically(file, json.dumps(body, indent=1))


def _rows(found: list[Metrics], points: int) -> list[list[Metrics]]:
    return [found[start : start + points] for start in range(0, len(found), points)]


def draw(found: list[Metrics], grid: Grid, folder: Path) -> None:
    """Cuts through the middle, of a plane contours, too; of the loss and, where there is one, the top-1 accuracy."""
    measures = [key for key in ("loss", "top1") if key in found[0]]
    figure = Figure(figsize=(4.5 * grid.directions, 3.8 * len(measures)), layout="constrained")
    axes = figure.subplots(len(measures), grid.directions, squeeze=False)
    for measure, panels in zip(measures, axes, strict=True):
        values_KK = np.array([place[measure] for place in found]).reshape(-1, grid.points)
        middle = len(values_KK) // 2
        cuts = panels[-1]
        cuts.plot(grid.along, values_KK[middle], marker="o", markersize=3, label="first direction")
        if grid.directions == 2:
            cuts.plot(
                grid.along, values_KK[:, grid.points // 2], marker="o", markersize=3, label="second direction"
            )
            cuts.legend()
            _contours(panels[0], values_KK, grid, measure)
        cuts.set(title="through the trained weights", xlabel="in lengths of the weights", ylabel=measure)
        cuts.grid(alpha=0.3)
    save(figure, folder, grid.name)


def _contours(axis: Axes, values_KK: np.ndarray, grid: Grid, measure: str) -> None:
    finite_KK = np.where(np.isfinite(values_KK), values_KK, np.nan)
    drawn = axis.contourf(grid.along, grid.along, finite_KK, levels=20, cmap="viridis")
    axis.figure.colorbar(drawn, ax=axis)
    axis.plot(0, 0, marker="+", color="white")
    axis.set(title=f"{measure} around the trained weights", xlabel="first direction", ylabel="second")
