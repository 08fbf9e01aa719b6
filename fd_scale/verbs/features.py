"""`fd-scale features`: the teachers' features of all views of a recipe's images, computed once for many runs.

Shape legend: N = images of a file, R = bytes of a record.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fd_scale import log, run_folder
from fd_scale.config import FeaturesConfig, Recipe
from fd_scale.data import (
    Batch,
    FeatureFiles,
    Source,
    Transform,
    evaluation_cut,
    training_transform,
    view_batches,
)
from fd_scale.distill import built_teachers, codec_of
from fd_scale.distributed import World
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet
from fd_scale.randomness import initial_seed

FORMAT = 1
# Of a run's identity, what decides the features: the images, the teachers and their arithmetic; and how views are cut.
_DECIDING = (
    r"seed|data_fingerprint|train\.precision|model\.(img_size|mean|std)|distill\.features\.precision|"
    r"distill\.teachers\.\d+\.(model\..*|target|layers|precision)"
)
_DECIDING_VIEWS = (
    r"|data\.(crops|crop_scale|crop_ratio|flip|interpolation|rand_augment|erasing)|distill\.features\.views"
)


@dataclass(frozen=True)
class Part:
    """Images whose features are kept: those of the training, or of the evaluation."""

    source: Source
    transform: Transform
    files: FeatureFiles
    identity: dict[str, Any]
    crops: int
    """Of each image, in one view; a record holds the features of all of them."""
    max_bad_fraction: float
    """Of the images, which need not be decodable: another takes the place of such a one."""

    @property
    def name(self) -> str:
        """`train` or `evaluation`."""
        return self.files.folder.name


def train_part(recipe: Recipe, source: Source) -> Part:
    """Returns the views of a training's images, for a resolved recipe with `distill.features`."""
    section = _section(recipe)
    transform = training_transform(recipe, source)
    return _part(
        recipe, "train", source, transform, section.views, recipe.data.crops, recipe.data.max_bad_fraction
    )


def evaluation_part(recipe: Recipe, images: EvaluationSet) -> Part:
    """Returns the images of an evaluation, one view of each."""
    return _part(recipe, "evaluation", images.source, images.transform, 1, 1, 0)


def compute(recipe: Recipe, part: Part, world: World) -> None:
    """Computes the files that are not there, shared by all ranks; they need not be as many as at another call.

    Args:
        recipe: resolved.
        part: which images.
        world: ranks.

    Raises:
        UserError: the folder has other features, or cannot be written; or an image of the evaluation, or more than
            `data.max_bad_fraction` of the training's, cannot be decoded.
    """
    files = part.files
    world.on_main(lambda: files.open(part.identity, make=True))
    missing: list[tuple[int, int]] = world.from_main(files.missing() if world.is_main else [])
    world.on_main(lambda: _require_room(files, len(missing)))
    own = missing[world.rank :: world.size]
    torch.manual_seed(initial_seed(recipe.seed))  # a teacher without weights is the one of a run with it
    teachers, codec = built_teachers(recipe) if own else [], codec_of(recipe)
    for teacher in teachers:
        teacher.to(world.device)
    total, done = sum(len(files.samples(number)) for _, number in own), 0
    with log.counting(f"images, {part.name}", shown=world.is_main) as told:
        for view, places in itertools.groupby(own, key=lambda place: place[0]):
            records_NR, read_ids_N = np.empty((0, files.record_bytes), np.uint8), np.empty(0, np.int64)
            for batch in _batches(recipe, part, view, [files.samples(number) for _, number in places]):
                images = batch.images.to(world.device)
                features = [tokens_BLD for teacher in teachers for tokens_BLD in teacher.features(images)]
                number, first = divmod(int(batch.positions[0]), files.samples_per_file)
                if first == 0:
                    count = len(files.samples(number))
                    records_NR = np.empty((count, files.record_bytes), np.uint8)
                    read_ids_N = np.empty(count, np.int64)
                last = first + len(batch.positions)
                records_NR[first:last] = codec.encode(features).cpu().numpy().reshape(last - first, -1)
                read_ids_N[first:last] = batch.read_ids
                if last == len(records_NR):
                    files.write(view, number, records_NR, read_ids_N)
                done += last - first
                told(done, total)
    world.barrier()


def _batches(recipe: Recipe, part: Part, view: int, files: list[range]) -> Iterator[Batch]:
    """The images of files, none of which shares a batch with another."""
    size = max(1, recipe.train.micro_batch // part.crops)
    return view_batches(
        part.source,
        part.transform,
        seed=recipe.seed,
        view=view,
        requests=[ids[first : first + size] for ids in files for first in range(0, len(ids), size)],
        num_workers=recipe.data.num_workers,
        max_bad_fraction=part.max_bad_fraction,
        crops=part.crops,
    )


def _require_room(files: FeatureFiles, num_missing: int) -> None:
    needed = num_missing * files.file_bytes
    free = shutil.disk_usage(files.folder).free
    if needed > free:
        raise UserError(
            f"distill.features.folder: {files.folder} has {free / 2**30:.1f} GiB left, {needed / 2**30:.1f} GiB are "
            "needed; make room, take another folder, fewer distill.features.views or precision=int8"
        )


def _part(
    recipe: Recipe,
    name: str,
    source: Source,
    transform: Transform,
    num_views: int,
    crops: int,
    max_bad_fraction: float,
) -> Part:
    folder = Path(_section(recipe).folder) / name
    files = FeatureFiles(folder, crops * codec_of(recipe).record_bytes, len(source), num_views)
    identity = run_folder.identity(recipe, source.fingerprint, stage=0, world_size=1)
    pattern = re.compile(_DECIDING + _DECIDING_VIEWS if name == "train" else _DECIDING)
    deciding = {key: value for key, value in identity.items() if pattern.fullmatch(key)}
    if name == "evaluation":
        deciding |= evaluation_cut(recipe.model.size)
    return Part(source, transform, files, deciding | {"format": FORMAT}, crops, max_bad_fraction)


def _section(recipe: Recipe) -> FeaturesConfig:
    assert recipe.distill is not None, "a recipe of task distill has its section"
    assert recipe.distill.features is not None, "the recipe keeps features"
    return recipe.distill.features
