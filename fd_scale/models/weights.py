"""Files of weights: read, loaded strictly, hashed, interpolated. Which tensor is which is for the model to say."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fd_scale.errors import UserError
from fd_scale.models.backbone import Backbone
from fd_scale.models.huggingface import HuggingFaceBackbone, is_published
from fd_scale.models.layouts import recognise

WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json", "model.pth", "pytorch_model.bin")
"""Names by which weights are found in a folder, the first that is there."""
_PICKLES = (".pth", ".pt", ".bin")
_WRAPPERS = ("model", "state_dict", "student", "teacher")

# Beside their tensors Swin, SimMIM and the FD authors pickle settings, DINO, DeiT and MAE arguments. They are read as
# plain data and not used; an OrderedDict is the mapping that torch's safe reader fills.
_SETTINGS = ((OrderedDict, "yacs.config.CfgNode"), (argparse.Namespace, "argparse.Namespace"))


def weights_files(path: str) -> list[Path]:
    """Returns the files of weights that `path` names: a file, one in a folder, or an index and its shards.

    Raises:
        UserError: one of them does not exist, or the index is damaged.
    """
    found = Path(path)
    if found.is_dir():
        there = [found / name for name in WEIGHTS_FILES if (found / name).is_file()]
        found = there[0] if there else found / WEIGHTS_FILES[0]
    if not found.is_file() and (Path(path) / "recipe.yaml").is_file():
        raise UserError(f"weights: {path} is a run; export it first: fd-scale export {path} {path}-export")
    if not found.is_file():
        raise UserError(
            f"weights: {found} does not exist; give a .safetensors or .pth file, or a folder of `fd-scale export` or "
            "Hugging Face"
        )
    if found.suffix != ".json":
        return [found]
    try:
        shards = sorted({str(shard) for shard in json.loads(found.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"weights: {found} is not an index of shards; fetch it again") from None
    files = [found.with_name(Path(shard).name) for shard in shards]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"weights: {found} names {missing[0]}, which does not exist; fetch all {len(files)} shards"
        )
    return [found, *files]


def weights_folder(path: str) -> Path:
    """Returns the folder whose `config.json` speaks of weights: they themselves, or what holds them by a usual name."""
    place = Path(path)
    return place.parent if place.name in WEIGHTS_FILES else place


def weights_sha256(path: str) -> str:
    """Returns the SHA-256 of the weights' file, or of index and shards in a row, in hexadecimal."""
    facts = ((file, file.stat()) for file in weights_files(path))
    return _sha256(tuple((file, fact.st_size, fact.st_mtime_ns) for file, fact in facts))


@functools.lru_cache(maxsize=8)
def _sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    """A start asks for it more than once, and giants take seconds; a file that changes has another time."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def load_weights(model: Backbone, path: str) -> None:
    """Loads weights strictly, cast to the model's dtypes; on the meta device names and shapes are compared.

    Args:
        model: a backbone.
        path: what `weights_files` takes.

    Raises:
        UserError: no such file, damaged, more than tensors, or weights of another architecture.
    """
    if isinstance(model, HuggingFaceBackbone) and is_published(Path(path)):
        model.load_published(Path(path))
        return
    on_meta = next(model.parameters()).is_meta
    # Not by way of `load_tensors`, which would hold the whole file to its end.
    _move_into(model, fitted(model, read_state(path, "meta" if on_meta else "cpu"), path))


def read_weights(model: Backbone, path: str) -> dict[str, Tensor]:
    """Returns the tensors of a file by the model's names, exactly those that the model has.

    Args:
        model: a backbone, on any device.
        path: what `weights_files` takes.

    Raises:
        UserError: as `load_weights`.
    """
    if isinstance(model, HuggingFaceBackbone) and is_published(Path(path)):
        return model.published(Path(path))
    return fitted(model, read_state(path), path)


def load_tensors(model: Backbone, state: Mapping[str, Tensor], origin: str) -> None:
    """Loads tensors of any layout that the model knows, strictly; errors name their `origin`."""
    _move_into(model, fitted(model, state, origin))


@torch.no_grad()
def _move_into(model: Backbone, found: dict[str, Tensor]) -> None:
    """Moves tensors out of `found`, one by one, into the model; on the meta device nothing is moved.

    A file of tensors is mapped, not read: its pages are let go with its last tensor, and of a model in parts
    one parameter at a time is whole.
    """
    own = model.state_dict(keep_vars=True)  # a copy would keep parameters whole that are held in parts
    for name in list(found):
        own[name].copy_(found.pop(name))


def fitted(model: Backbone, state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Returns tensors by the model's names, exactly those that the model has.

    Raises:
        UserError: they are not; it names `origin`, up to three tensors, and the layout that was recognised.
    """
    try:
        found = model.translate(state)
    except UserError as error:
        raise UserError(f"weights: {origin}: {error}") from None
    own = model.state_dict(keep_vars=True)
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems += [
        f"{name} holds integers, expected floating-point numbers: quantised weights are not read"
        for name, tensor in own.items()
        if name in found and tensor.is_floating_point() and not found[name].is_floating_point()
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        layout = recognise(state)
        read_as = f" (read as Swin V2, layout {layout[0]})" if layout else ""
        raise UserError(
            f"weights: {origin} is of another architecture{read_as}: {'; '.join(problems[:3])}{more}"
        )
    return found


def read_state(path: str, device: str = "cpu") -> dict[str, Tensor]:
    """Returns the tensors of a file or folder by its own names, freed of wrappers such as {"model": ...}.

    Args:
        path: what `weights_files` takes.
        device: `cpu`, or `meta` for names and shapes alone.

    Raises:
        UserError: no such file, damaged, or more than tensors.
    """
    state: dict[str, Tensor] = {}
    for file in weights_files(path):
        if file.suffix == ".safetensors":
            state |= _unwrap(_read_safetensors(file, device), file)
        elif file.suffix in _PICKLES:
            state |= _unwrap(_read_pickle(file, device), file)
        elif file.suffix != ".json":
            raise UserError(
                f"weights: {file} ends in {file.suffix!r}, expected .safetensors, .pth, .pt or .bin"
            )
    return state


def interpolate(first: str, second: str, alpha: float) -> dict[str, Tensor]:
    """Returns (1 - alpha) * first + alpha * second in fp32, tensor by tensor; integers are the first's.

    Args:
        first: weights, as `weights_files` takes them.
        second: weights with the same names and shapes.
        alpha: 0 gives the first, 1 the second.

    Raises:
        UserError: names or shapes differ, or alpha is outside 0..1.

    Source: Wortsman et al. 2022 (arXiv:2109.01903), section 3 (WiSE-FT).
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}; expected a number in 0..1")
    start, end = read_state(first), read_state(second)
    for one, other, other_path in ((start, end, second), (end, start, first)):
        only = [name for name in one if name not in other]
        if only:
            more = f" and {len(only) - 3} more" if len(only) > 3 else ""
            raise UserError(
                f"{other_path} has no {', '.join(only[:3])}{more}; interpolate weights of one architecture and layout "
                "(fd-scale convert)"
            )
    for name, tensor in start.items():
        if tensor.shape != end[name].shape:
            raise UserError(
                f"{name} is {tuple(tensor.shape)} in {first}, {tuple(end[name].shape)} in {second}; "
                "interpolate weights of one architecture and layout (fd-scale convert)"
            )
    return {
        name: (1 - alpha) * tensor.float() + alpha * end[name].float()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in start.items()
    }


def _read_safetensors(file: Path, device: str) -> dict[str, Tensor]:
    try:
        if device != "meta":
            return load_file(file)
        with safe_open(file, framework="pt") as header:
            parts = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118
            facts = {name: (part.get_shape(), "F" in part.get_dtype()) for name, part in parts.items()}
        return {
            name: torch.empty(shape, dtype=torch.float32 if floating else torch.int64, device=device)
            for name, (shape, floating) in facts.items()
        }
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights: {file} is not a whole safetensors file: {error}") from None


def _read_pickle(file: Path, device: str) -> Any:
    try:
        with torch.serialization.safe_globals(list(_SETTINGS)):
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            return torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        other = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds {other[1]}, and only tensors are read" if other else "is no file of tensors"
        raise UserError(
            f"weights: {file} {reason}; save the state dict alone, where you trust the file"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        if "TorchScript" in str(error):  # as OpenAI gives out CLIP
            raise UserError(
                f"weights: {file} is a TorchScript archive, which holds code; where you trust it, save the tensors "
                f"alone: torch.save(torch.jit.load({file.name!r}, 'cpu').state_dict(), 'weights.pth')"
            ) from None
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"weights: {file} is not a whole file of torch.save: {reason}") from None


def _unwrap(value: Any, file: Path) -> dict[str, Tensor]:
    while isinstance(value, dict):
        inside = [key for key in _WRAPPERS if isinstance(value.get(key), dict)]
        if not inside:
            break
        if {"student", "teacher"} <= set(inside):
            raise UserError(
                f"weights: {file} holds a student and a teacher; save the one that you want alone"
            )
        value = value[inside[0]]
    if not isinstance(value, dict) or not any(isinstance(item, Tensor) for item in value.values()):
        raise UserError(f"weights: {file} holds no tensors by name; save a model's state dict")
    others = [
        str(name) for name, item in value.items() if not (isinstance(name, str) and isinstance(item, Tensor))
    ]
    if others:
        raise UserError(f"weights: {file}: {others[0]} is no tensor with a name; save the state dict alone")
    is_wrapped = all(name.startswith("module.") for name in value)
    start = len("module.") if is_wrapped else 0
    return {name[start:]: tensor.detach() for name, tensor in value.items()}
