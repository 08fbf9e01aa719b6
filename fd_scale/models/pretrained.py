"""What a model's name says before it is built: its input, its licence, and where its published weights are."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from fd_scale import hub
from fd_scale.config import IMAGENET_MEAN, IMAGENET_STD, PRETRAINED, TEACHER, ModelConfig, Recipe
from fd_scale.errors import UserError
from fd_scale.models.huggingface import read_config
from fd_scale.models.registry import HUGGING_FACE, default_img_size
from fd_scale.models.timm_backbone import is_timm_model
from fd_scale.models.weights import weights_folder

logger = logging.getLogger(__name__)


def resolved(recipe: Recipe) -> Recipe:
    """Returns the recipe with the models' own input sizes, means, standard deviations and licences filled in."""
    recipe = replace(recipe, model=resolved_model(recipe.model))
    if recipe.distill is None:
        return recipe
    teachers = [replace(teacher, model=resolved_model(teacher.model)) for teacher in recipe.distill.teachers]
    return replace(recipe, distill=replace(recipe.distill, teachers=teachers))


def resolved_model(config: ModelConfig) -> ModelConfig:
    """Returns the section with what it leaves open, as the model's name says it.

    Raises:
        UserError: an `hf:` folder that is not there.
    """
    exported = exported_model(config.weights)
    own = _own_input(config.name) | {
        key: tuple(exported[key]) for key in ("mean", "std") if exported.get(key)
    }
    given = {key: getattr(config, key) for key in ("img_size", "mean", "std")}
    filled = {key: own[key] if value is None else value for key, value in given.items()}
    license_name = config.license
    if license_name == "unknown":
        license_name = exported.get("license", license_name)
    if license_name == "unknown":
        license_name = own["license"]
    return replace(config, **filled, license=license_name)


def exported_model(weights: str | None) -> dict[str, Any]:
    """What an export says of its model, where weights are one; else nothing."""
    if weights in (None, PRETRAINED, TEACHER):
        return {}
    config = weights_folder(str(weights)) / "config.json"
    try:
        described = json.loads(config.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return described if isinstance(described, dict) else {}


def _own_input(name: str) -> dict[str, Any]:
    own = {
        "img_size": default_img_size(name),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "license": "unknown",
    }
    if name.startswith(HUGGING_FACE):
        folder = hugging_face_folder(name)
        size = getattr(read_config(folder), "image_size", None) or 224
        own["img_size"] = size if isinstance(size, int) else size[0]
        own["mean"], own["std"] = _processing(folder)
    elif is_timm_model(name):
        published = _published(name)
        own["img_size"] = published.input_size[-1]
        own["mean"], own["std"] = tuple(published.mean), tuple(published.std)
        own["license"] = published.license or "unknown"
    return own


@functools.cache
def _processing(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which a Transformers model wants its pixels normalised.

    Raises:
        UserError: it wants blue in the place of red.
    """
    values: dict[str, Any] = {}
    # The first is Transformers 5's, of processors of several kinds.
    for file in ("processor_config.json", "preprocessor_config.json"):
        if (path := folder / file).is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            values |= found.get("image_processor", found)
    if values.get("do_flip_channel_order"):
        raise UserError(
            f"hf:{folder}: wants blue in the place of red (do_flip_channel_order), and images here begin with red; "
            "choose another model"
        )
    if "image_mean" not in values and "do_normalize" not in values:
        logger.warning(
            "hf:%s: no preprocessor_config.json says how its pixels are normalised: by ImageNet's mean and standard "
            "deviation, where the recipe names no others", folder,
        )  # fmt: skip
    elif not values.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    return tuple(values.get("image_mean", IMAGENET_MEAN)), tuple(values.get("image_std", IMAGENET_STD))


def _published(name: str) -> Any:
    """What timm says of a name's published weights."""
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        raise UserError(f"model.name: {name}: {error}; known: {', '.join(_tags(name))}") from None
    assert published is not None, name
    return published


def _tags(name: str) -> list[str]:
    architecture = name.split(".")[0]
    return [known for known in timm.list_pretrained() if known.split(".")[0] == architecture]


def hub_files(config: ModelConfig) -> hub.HubFiles | None:
    """Returns what a model section needs from the Hugging Face hub; none where all is local.

    Raises:
        UserError: `weights: pretrained` for a name of which no weights are published, or with another activation than
            they have.
    """
    if config.name.startswith(HUGGING_FACE):
        place = config.name.removeprefix(HUGGING_FACE)
        if Path(place).is_dir():
            return None
        return _repository(place)
    if config.weights != PRETRAINED:
        return None
    if not is_timm_model(config.name):
        raise UserError(
            f"model.weights: no weights of {config.name} are published; give a file or folder, or leave it out"
        )
    published = _published(config.name)
    if not published.hf_hub_id:
        known = ", ".join(_tags(config.name)) or "none"
        raise UserError(
            f"model.weights: timm has no weights of {config.name} on the hub; names that have: {known}"
        )
    if any("QuickGELU" in note for note in published.notes or ()) and "quickgelu" not in config.name:
        raise UserError(
            f"model.weights: those of {config.name} were trained with QuickGELU, and under this name timm computes "
            f"GELU; use {config.name.replace('_clip_', '_clip_quickgelu_')}"
        )
    file = published.hf_hub_filename or "model.safetensors"
    return hub.HubFiles(repo=published.hf_hub_id, kind="model", patterns=(file,))


def hugging_face_folder(name: str) -> Path:
    """Returns the local folder of an `hf:` name: itself, or the fetched copy of the repository.

    Raises:
        UserError: it is neither a folder nor fetched.
    """
    place = Path(name.removeprefix(HUGGING_FACE))
    if place.is_dir():
        return place
    if len(place.parts) != 2 or place.is_absolute():
        raise UserError(
            f"{name}: there is no such folder, seen from {Path.cwd()}; expected one, or a model of the hub, hf:ORG/NAME"
        )
    files = hub.cached(_repository(str(place)))
    return min(
        (file.parent for file in files if file.name == "config.json"), key=lambda folder: len(folder.parts)
    )


def _repository(place: str) -> hub.HubFiles:
    return hub.HubFiles(repo=place, kind="model", patterns=("config.json", "*.json", "*.safetensors"))


def model_identity(config: ModelConfig) -> str:
    """Returns a model's name; of a local `hf:` folder, which may be moved, the hash of what it says."""
    place = Path(config.name.removeprefix(HUGGING_FACE))
    if not config.name.startswith(HUGGING_FACE) or not place.is_dir():
        return config.name
    return HUGGING_FACE + hashlib.sha256((place / "config.json").read_bytes()).hexdigest()


def weights_path(config: ModelConfig) -> str | None:
    """Returns the local file or folder of a model section's weights; none for random or the teacher's ones.

    Raises:
        UserError: published weights that were not fetched.
    """
    if config.weights != PRETRAINED:
        return None if config.weights == TEACHER else config.weights
    if config.name.startswith(HUGGING_FACE):
        return str(hugging_face_folder(config.name))
    files = hub_files(config)
    assert files is not None, "published weights of a timm name are on the hub"
    return str(hub.cached(files)[0])
