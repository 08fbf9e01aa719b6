"""Strict YAML and `key=value` arguments -> a checked recipe, and back; a table of all settings."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fd_scale.config.checks import first_line
from fd_scale.config.recipe import Recipe
from fd_scale.config.sections import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    WatchConfig,
)
from fd_scale.config.shape import require_shape
from fd_scale.config.tasks import (
    ClassificationConfig,
    ContrastiveConfig,
    DetectionConfig,
    DistillConfig,
    FeaturesConfig,
    LinearProbeConfig,
    MaskedConfig,
    SegmentationConfig,
    TeacherConfig,
)
from fd_scale.errors import UserError

_SECTIONS: dict[str, Any] = {
    "": Recipe, "model": ModelConfig, "data": DataConfig, "data.train.0": SourceConfig,
    "optim": OptimConfig, "train": TrainConfig, "checkpoint": CheckpointConfig, "watch": WatchConfig,
    "log": LogConfig,
    "distill": DistillConfig, "distill.features": FeaturesConfig,
    "distill.teachers.0": TeacherConfig, "contrastive": ContrastiveConfig, "masked": MaskedConfig,
    "classification": ClassificationConfig, "linear_probe": LinearProbeConfig,
    "segmentation": SegmentationConfig,
    "detection": DetectionConfig,
}  # fmt: skip


def packaged_recipes() -> dict[str, Path]:
    """Returns the name and file of every recipe that ships with the package."""
    root = Path(str(resources.files("fd_scale") / "recipes"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def load_recipe(recipe: str | Path, overrides: Sequence[str] | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        recipe: a YAML file, or the name of a packaged recipe.
        overrides: `key=value` strings, e.g. `optim.lr=1e-3` or `distill.teachers.0.model.weights=PATH`.

    Returns:
        The checked recipe.

    Raises:
        UserError: no such recipe, an unknown key, a wrong type or a value out of range.
    """
    path = _find_recipe(recipe)
    try:
        given = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    except OSError as error:  # OmegaConf's, also for a file that holds one number
        raise UserError(f"{path}: a recipe is a mapping of sections, cannot be read: {error}") from None
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of sections, got {type(given).__name__}")
    if isinstance(overrides, str):  # which would be read letter by letter
        raise UserError(f"'{overrides}': overrides are a list of key=value strings; write ['{overrides}']")
    for item in overrides or []:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise UserError(f"'{item}': an override is written key=value, e.g. optim.lr=1e-3")
        try:
            _put(given, key, OmegaConf.from_dotlist([f"value={value}"]).value)
        except IndexError:
            raise UserError(
                f"'{item}': cannot be set: list index out of range: items count from 0, and the recipe has fewer"
            ) from None
        except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
            raise UserError(f"'{item}': cannot be set: {first_line(error)}") from None
    try:
        values = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {first_line(error)}") from None
    return build_recipe(values, where=str(path))


def build_recipe(values: Any, where: str = "recipe") -> Recipe:
    """Builds a checked recipe from plain nested dicts; errors name `where`."""
    require_shape(Recipe, values, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), values)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise UserError(f"{where}: required and not given: {', '.join(sorted(missing))}")
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key}: {first_line(error)}") from None
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML: reading it back gives an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns the resolved recipe as plain nested dicts and lists."""
    values = OmegaConf.to_container(OmegaConf.structured(recipe))
    assert isinstance(values, dict)
    return values  # type: ignore[return-value]


def describe_keys() -> list[tuple[str, str, str]]:
    """Returns (key, default, meaning) of every setting, from the field docstrings above."""
    return [
        (f"{section}.{name}".lstrip("."), default, meaning)
        for section, cls in _SECTIONS.items()
        for name, default, meaning in describe_fields(cls)
    ]


def default_settings() -> dict[str, Any]:
    """Returns key -> default of every setting that has one."""
    found = {}
    for section, cls in _SECTIONS.items():
        for item in fields(cls):
            key = f"{section}.{item.name}".lstrip(".")
            if item.default is not MISSING:
                found[key] = item.default
            elif item.default_factory is not MISSING:
                found[key] = item.default_factory()
    return found


def describe_fields(cls: type) -> list[tuple[str, str, str]]:
    """Returns (name, default, meaning) of each field of a dataclass that has a docstring under it."""
    source = Path(str(sys.modules[cls.__module__].__file__)).read_text(encoding="utf-8")
    body = source.split(f"class {cls.__name__}:")[1].split("\n\n\n")[0]
    rows = []
    for item in fields(cls):
        match = re.search(rf'^    {item.name}: .*\n    """((?:.|\n)*?)"""', body, re.MULTILINE)
        if match is None:
            continue  # a section of its own
        made = MISSING if item.default_factory is MISSING else item.default_factory()
        default = made if item.default is MISSING else item.default
        rows.append(
            (item.name, "required" if default is MISSING else str(default), " ".join(match[1].split()))
        )
    return rows


def _find_recipe(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = packaged_recipes()
    if str(recipe) in packaged:
        return packaged[str(recipe)]
    nearest = difflib.get_close_matches(str(recipe), packaged, n=1)
    meant = f"did you mean {nearest[0]}? Else " if nearest else ""
    raise UserError(
        f"{recipe}: neither a file nor a packaged recipe; {meant}give a path to a YAML file or one of: "
        f"{', '.join(packaged)}"
    )


def _put(config: DictConfig, key: str, value: Any) -> None:
    """Sets `a.b.0.c` in a config; numbers index lists."""
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node: Any = config
    for part in parents:
        if isinstance(node, DictConfig) and node.get(part) is None:
            node[part] = {}
        node = node[part]
    node[last] = value
