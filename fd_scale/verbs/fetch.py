"""`fd-scale fetch`: all that a recipe names on the Hugging Face hub, into the cache, so that a run needs no network."""

from __future__ import annotations

import os
from collections.abc import Iterator

from fd_scale import hub
from fd_scale.config import PRETRAINED, ModelConfig, Recipe, as_list
from fd_scale.errors import UserError
from fd_scale.models.pretrained import hub_files

_OF_A_MODEL = f"@{PRETRAINED}"


def is_alone(name: str) -> bool:
    """Tells whether a name is a model's, with `@pretrained`, or a source's on the hub: no recipe's."""
    return name.endswith(_OF_A_MODEL) or hub.PREFIX in name


def named_files(recipe: Recipe | str) -> list[hub.HubFiles]:
    """Returns what a recipe names on the hub: its data, its student's weights and its teachers'.

    Args:
        recipe: or the name of a model or source, as `is_alone` tells.

    Raises:
        UserError: a name is written wrong.
    """
    if isinstance(recipe, str):
        return [_named_alone(recipe)]
    found = [hub.dataset_files(path) for path in data_paths(recipe) if path.startswith(hub.PREFIX)]
    teachers = recipe.distill.teachers if recipe.distill is not None else []
    for model in (recipe.model, *(teacher.model for teacher in teachers)):
        files = hub_files(model)
        if files is not None:
            found.append(files)
    return list(dict.fromkeys(found))


def _named_alone(name: str) -> hub.HubFiles:
    if not name.endswith(_OF_A_MODEL):
        return hub.dataset_files(name[name.index(hub.PREFIX) :])
    model = name.removesuffix(_OF_A_MODEL)
    files = hub_files(ModelConfig(name=model, weights=PRETRAINED))
    if files is None:
        raise UserError(f"{model}: is a folder here; there is nothing to fetch")
    return files


def data_paths(recipe: Recipe) -> list[str]:
    """Returns where a recipe's sources of images lie."""
    configs = as_list(recipe.data.train)
    if recipe.data.evaluation is not None:
        configs = configs + as_list(recipe.data.evaluation)
    return [config.source.partition(":")[2] for config in configs]


def fetch(recipe: Recipe | str) -> Iterator[str]:
    """Downloads what a recipe names on the hub, or a name alone; yields a line for each thing when it is there.

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
