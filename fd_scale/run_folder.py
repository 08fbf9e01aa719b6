"""The run folder: what a run was, written before its first step."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fd_scale.checkpoint import write_atomically
from fd_scale.cluster import pinned
from fd_scale.config import Recipe, load_recipe, to_dict, to_yaml
from fd_scale.data import Source, pixel_source
from fd_scale.errors import UserError
from fd_scale.models import model_identity, weights_path, weights_sha256

_PACKAGES = (
    "fd-scale", "torch", "torchvision", "triton", "deepspeed", "timm", "numpy", "pillow", "simplejpeg",
    "nvidia-nvimgcodec-cu13",
)  # fmt: skip


_CLASSES = "classes.json"
_WITH_CLASSES = ("classification", "segmentation", "detection")

# How a trained model is measured: not what it is.
PREDICTION_SETTINGS = (
    "segmentation.inference", "segmentation.stride", "segmentation.short_side", "segmentation.scales",
    "segmentation.flip_too", "detection.score_threshold", "detection.max_detections", "detection.soft_nms",
    "detection.scales", "detection.flip_too",
)  # fmt: skip
# Settings that may change between a run and its resumption: they do not touch the losses.
_FREE_SETTINGS = (
    "run_dir", "checkpoint", "watch", "log", "data.train", "data.evaluation", "data.num_workers",
    "data.max_bad_fraction", "train.micro_batch", "train.device", "train.ds_config", "train.mics_shard_size",
    "train.timeout_s", "train.activation_checkpointing", "train.checkpointing_period", "train.kernels",
    "train.compile", "train.cuda_graphs", "distill.knn_images", "linear_probe.knn_images",
    "distill.features.folder", "model.weights", *PREDICTION_SETTINGS,
)  # fmt: skip


def create(recipe: Recipe, source: Source) -> Path:
    """Makes the run folder and writes `recipe.yaml` and `environment.json` into it, and `classes.json`.

    Each start appends to the environment's list: a resumed run may have moved to other hardware.

    Args:
        recipe: of the run.
        source: what it learns from; `classes.json` has its classes, where the task is to tell them apart and they
            have names.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(recipe.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "recipe.yaml", to_yaml(recipe))
        if recipe.task in _WITH_CLASSES and source.class_names is not None:
            values = pixel_source(source).mask_values if source.targets == "masks" else None
            classes = {"names": source.class_names, "mask_values": values}
            write_atomically(folder / _CLASSES, json.dumps(classes, indent=1, ensure_ascii=False))
        file = folder / "environment.json"
        starts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        write_atomically(
            file, json.dumps([*starts, environment() | {"weights": weights_of(recipe)}], indent=1)
        )
    except OSError as error:
        raise not_writable(folder, error) from None
    return folder


def classes(run_dir: Path) -> tuple[list[str] | None, list[int] | None]:
    """Returns the names of a run's classes, and their values in masks; none where it says nothing of them."""
    try:
        found = json.loads((run_dir / _CLASSES).read_text(encoding="utf-8"))
        return found["names"], found["mask_values"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def not_writable(folder: Path, error: OSError, setting: str = "run_dir") -> UserError:
    """Returns the error that says so of a folder, and which setting names another, `run_dir` or an option."""
    value = " DIR" if setting.startswith("--") else "=PATH"
    return UserError(
        f"{setting}: {folder} cannot be written ({error.strerror}); choose another with {setting}{value}"
    )


def make_for_results(folder: Path) -> None:
    """Makes a folder of results, and a file in it, before minutes are spent on them.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise not_writable(folder, error, "--out") from None


def read_recipe(run_dir: Path, overrides: Sequence[str] | None = None) -> Recipe:
    """Returns the resolved recipe of a run, with `key=value` settings replaced.

    Raises:
        UserError: the folder is not one of a run.
    """
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: no recipe.yaml there; expected the folder of a run (its run_dir)")
    return load_recipe(file, overrides)


def weights_of(recipe: Recipe) -> dict[str, str | None]:
    """Returns the SHA-256 of the weights that a recipe begins with, by setting; none where it names none."""
    teachers = recipe.distill.teachers if recipe.distill is not None else []
    models = {"model": recipe.model} | {
        f"distill.teachers.{index}.model": teacher.model for index, teacher in enumerate(teachers)
    }
    paths = {f"{key}.weights": weights_path(model) for key, model in models.items()}
    return {key: path and weights_sha256(path) for key, path in paths.items()}


def last_start(run_dir: Path) -> dict[str, Any]:
    """Returns what a run said of its last start; empty where there was none."""
    file = run_dir / "environment.json"
    starts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return starts[-1] if starts else {}


def environment() -> dict[str, Any]:
    """Returns command, folder, commit, versions and devices of this process."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "folder": str(Path.cwd()),
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "commit": pinned.commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def identity(recipe: Recipe, data_fingerprint: str, stage: int, world_size: int) -> dict[str, Any]:
    """Returns what a checkpoint and the run that resumes it must have in common.

    Data and the teacher's weights count by their content, wherever they lie; initial weights have
    done their part when there is a checkpoint.
    """
    settings = flat(to_dict(recipe))
    for index, teacher in enumerate(recipe.distill.teachers if recipe.distill is not None else []):
        settings[f"distill.teachers.{index}.model.name"] = model_identity(teacher.model)
    settings["model.name"] = model_identity(recipe.model)
    settings |= weights_of(recipe)
    free_settings = set(_FREE_SETTINGS)
    if recipe.linear_probe is not None:  # the model stays what it was at the start, and is in no checkpoint
        free_settings -= {"model.weights"}
    facts = {"data_fingerprint": data_fingerprint, "zero_stage": stage}
    if recipe.distill is not None and recipe.distill.loss == "phi_s":
        # The rounding of a teacher's features would move its close eigenvalues, and with them the target.
        free_settings -= {"train.micro_batch", "train.device"}
        facts["world_size"] = world_size
    kept = {
        key: value
        for key, value in settings.items()
        if not any(key == free or key.startswith(free + ".") for free in free_settings)
        and not key.endswith(".license")
    }
    return kept | facts


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Returns setting -> value of nested dicts and of lists of dicts, as `distill.teachers.0.share`."""
    if isinstance(values, dict) and values:
        return {k: v for key, value in values.items() for k, v in flat(value, f"{prefix}{key}.").items()}
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return {k: v for i, value in enumerate(values) for k, v in flat(value, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): values}
