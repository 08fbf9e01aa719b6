"""`fd-scale fetch`: all that a recipe names on the Hugging Face hub, into the cache, so that a run needs no network."""

from __future__ import annotations

import os
from collections.abc import Iterator

from fd_scale import hub
from fd_scale.config import Recipe, as_list
from fd_scale.models.pretrained import hub_files


def named_files(recipe: Recipe) -> list[hub.HubFiles]:
    """Returns what a recipe names on the hub: its data, its student's weights and its teachers'.

    Raises:
        UserError: a name is written wrong.
    """
    found = [hub.dataset_files(path) for path in data_paths(recipe) if path.startswith(hub.PREFIX)]
    teachers = recipe.distill.teachers if recipe.distill is not None else []
    for model in (recipe.model, *(teacher.model for teacher in teachers)):
        files = hub_files(model)
        if files is not None:
            found.append(files)
    return list(dict.fromkeys(found))


def data_paths(recipe: Recipe) -> list[str]:
    """Returns where a recipe's sources of images lie."""
    configs = as_list(recipe.data.train)
    if recipe.data.evaluation is not None:
        configs = configs + as_list(recipe.data.evaluation)
    return [config.source.partition(":")[2] for config in configs]


def fetch(recipe: Recipe) -> Iterator[str]:
    """Downloads what a recipe names on the hub; yields a line for each thing when it is there.

    Raises:
        UserError: it cannot be downloaded.
    """
    named = named_files(recipe)
    for files in named:
        paths = hub.fetch(files)
        mib = sum(path.stat().st_size for path in paths) / 2**20
        yield f"{files}: {len(paths)} files, {mib:.1f} MiB, in {os.path.commonpath([path.parent for path in paths])}"
    if not named:
        yield "the recipe names nothing on the hub: there is nothing to fetch"
