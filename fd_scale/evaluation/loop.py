"""One pass over an evaluation source, shared by ranks: each image exactly once, none padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from fd_scale.data import Batch, FeatureFiles, Source, Transform, evaluation_batches, subset
from fd_scale.distributed import World
from fd_scale.errors import UserError

Forward = Callable[..., dict[str, Tensor]]
"""The module's forward, by way of the engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """A source and how its images are cut."""

    source: Source
    transform: Transform
    batch_size: int
    num_workers: int
    features: FeatureFiles | None = None
    """Teachers' features that batches bring along."""


def evaluated_batches(evaluation: EvaluationSet, world: World) -> Iterator[Batch]:
    """Yields this rank's batches of a source on its device; every rank has equally many.

    Raises:
        CommonError: a sample of any rank cannot be decoded.
    """
    batches = evaluation_batches(
        evaluation.source,
        evaluation.transform,
        batch_size=evaluation.batch_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=evaluation.num_workers,
        features=evaluation.features,
    )
    with closing(batches):
        while True:
            batch, problem = None, ""
            try:
                batch = next(batches, None)
            except UserError as error:
                problem = str(error)
            # The others would wait for this rank, at the next collective, until they hear that it is gone.
            if any(world.sum([float(problem != "")])):
                raise world.common_error(problem)
            if batch is None:
                return
            yield batch.to(world.device)


def single_images(
    evaluation: EvaluationSet, sample_ids: Sequence[int], world: World
) -> Iterator[tuple[int, Batch]]:
    """Yields some images of a source, whole and one at a time since they differ in size, on this rank's device."""
    if not sample_ids:
        return
    batches = evaluation_batches(
        subset(evaluation.source, sample_ids),
        evaluation.transform,
        batch_size=1,
        rank=0,
        world_size=1,
        num_workers=evaluation.num_workers,
    )
    for sample_id, batch in zip(sample_ids, batches, strict=True):
        yield sample_id, batch.to(world.device)


def mean_over_source(
    evaluation: EvaluationSet, world: World, sums: Callable[[Batch], tuple[dict[str, float], int]]
) -> dict[str, float]:
    """Averages values over all items (images, tokens) of the whole source.

    Args:
        evaluation: source, transform and batch size.
        world: ranks; each takes its share of the images, in equally many batches.
        sums: called with a batch on the device; returns sums of the values over the batch's items, and
            how many items there are.

    Returns:
        The means, the same on all ranks.
    """
    totals: dict[str, float] = {}
    num_items = 0
    for batch in evaluated_batches(evaluation, world):
        values, count = sums(batch)
        num_items += count
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value
    *all_totals, count_of_all = world.sum([*totals.values(), float(num_items)])
    return {name: total / count_of_all for name, total in zip(totals, all_totals, strict=True)}
