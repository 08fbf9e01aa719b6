"""From a run to a folder that stands alone: the backbone's weights, its configuration, a model card."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fd_scale import models, run_folder
from fd_scale.checkpoint import newest_checkpoint, read_manifest, write_atomically
from fd_scale.config import ModelConfig, Recipe, to_yaml
from fd_scale.data.transforms import CROP_FRACTION
from fd_scale.engine import saved_weights
from fd_scale.errors import UserError
from fd_scale.metrics import read_metrics
from fd_scale.models import (
    BACKBONE,
    WEIGHTS_FILES,
    Backbone,
    build_model,
    read_weights,
    resolved,
    resolved_model,
    timm_classifier,
    weights_folder,
    weights_path,
    weights_sha256,
)
from fd_scale.shards import write_safetensors

_WEIGHTS_FILE = {"official": "model.pth", "fd": "model.pth"}
"""Layouts whose projects read {"model": ...} of torch.save; the others read safetensors."""


def export(run_dir: str | Path, out: str | Path, layout: str = "ours") -> Path:
    """Writes the trained backbone, for timm a classifier's head too; a recipe takes the folder as `model.weights`.

    Args:
        run_dir: folder of a run of any task, trained with any ZeRO stage.
        out: folder to write: `model.safetensors` (fp32; `model.pth` in layouts `official` and `fd`),
            `config.json`, `README.md` (model card).
        layout: whose names the tensors get, one of `layouts.LAYOUTS` that the model has.

    Returns:
        `out`.

    Raises:
        UserError: `run_dir` is no run, has no whole checkpoint, the layout has no place for a part of the
            model, or `out` cannot be written or holds weights in a file of another name.
    """
    run = Path(run_dir)
    recipe = resolved(run_folder.read_recipe(run))
    checkpoint = newest_checkpoint(run)
    shards = saved_weights(checkpoint)
    prefix = f"{BACKBONE}."
    names = {name.removeprefix(prefix): name for name in shards.shapes if name.startswith(prefix)}
    if not names:
        raise UserError(
            f"{run}: its checkpoints hold no backbone, as those of a linear probe; export the run it was of"
        )
    step = read_manifest(checkpoint)["state"]["step"]
    backbone = _on_meta(recipe.model)
    described = replace(recipe.model, license=license_of(recipe))
    if layout == "ours":  # chunk by chunk: the host need not hold the model
        texts = _texts(_described(backbone, described, layout), described, layout)
        texts["README.md"] = model_card(recipe, run, step, backbone, layout)
        return _write(
            Path(out), "model.safetensors", lambda file: write_safetensors(file, shards, names), texts
        )
    weights = {name: shards.read(there) for name, there in names.items()}
    named, config = backbone.to_layout(weights, layout), _described(backbone, described, layout)
    classifier = None
    if layout == "timm" and recipe.classification is not None:
        head = {part: shards.read(f"head.{part}") for part in ("weight", "bias")}
        classifier = timm_classifier(backbone, config, named, head, recipe.classification.norm)
    if classifier is not None:
        config, named = classifier
        config |= {"label_names": run_folder.classes(run)[0]}
    texts = _texts(config, described, layout)
    texts["README.md"] = model_card(recipe, run, step, backbone, layout, with_head=classifier is not None)
    return _write_named(Path(out), named, layout, texts)


def convert(source: str, out: str | Path, model: ModelConfig, layout: str) -> Path:
    """Writes the weights of a file in another layout, in the dtype that they have.

    Args:
        source: a file or folder in any layout that the model knows.
        out: folder to write, as `export` does, without a model card.
        model: what the weights are of.
        layout: as in `export`.

    Raises:
        UserError: weights of another model, or as in `export`.
    """
    model = resolved_model(replace(model, weights=source))  # of an export also its images' mean
    backbone = _on_meta(model)
    named = backbone.to_layout(read_weights(backbone, source), layout)
    return _write_named(Path(out), named, layout, _texts(_described(backbone, model, layout), model, layout))


def interpolate(first: str, second: str, out: str | Path, alpha: float) -> Path:
    """Writes `models.interpolate` of two files or folders, and what lies beside the first and says how to read it.

    Raises:
        UserError: their tensors differ in name or shape, or as in `export`.
    """
    beside = (weights_folder(first) / name for name in ("config.json", "preprocessor_config.json"))
    texts = {file.name: file.read_text(encoding="utf-8") for file in beside if file.is_file()}
    weights = models.interpolate(first, second, alpha)
    return _write(Path(out), "model.safetensors", lambda file: _write_whole(file, weights), texts)


def _on_meta(config: ModelConfig) -> Backbone:
    with torch.device("meta"):
        return build_model(replace(config, weights=None))


def _write_named(target: Path, named: dict[str, Tensor], layout: str, texts: dict[str, str]) -> Path:
    file = _WEIGHTS_FILE.get(layout, "model.safetensors")
    return _write(target, file, lambda path: _write_whole(path, named), texts)


def _texts(described: dict[str, Any], config: ModelConfig, layout: str) -> dict[str, str]:
    texts = {"config.json": json.dumps(described, indent=1)}
    if layout == "hf":
        texts["preprocessor_config.json"] = json.dumps(_image_processor(config), indent=1)
    return texts


def _described(backbone: Backbone, config: ModelConfig, layout: str) -> dict[str, Any]:
    return {"model": asdict(config) | {"weights": None}} | backbone.layout_config(layout, config)


def _image_processor(config: ModelConfig) -> dict[str, Any]:
    """What `transformers.AutoImageProcessor` reads: images as evaluations cut them."""
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": int(config.size / CROP_FRACTION)}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": config.size, "width": config.size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": config.mean, "image_std": config.std,
    }  # fmt: skip


def _write_whole(file: Path, weights: dict[str, Tensor]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    if file.stem.endswith(".pth"):
        torch.save({"model": contiguous}, file)
    else:
        save_file(contiguous, file, metadata={"format": "pt"})


def _write(target: Path, file: str, write: Callable[[Path], None], texts: dict[str, str]) -> Path:
    """Writes a folder, its weights by `write`; each of its files is seen whole or not at all."""
    if others := [name for name in WEIGHTS_FILES if name != file and (target / name).is_file()]:
        raise UserError(
            f"{target} holds {others[0]}, which whoever loads the folder could take for these weights; remove it, or "
            "name another folder"
        )
    present = target.iterdir() if target.is_dir() else ()
    # Hidden files are a repository's, and a temporary one is of an export that was killed.
    files = {path.name for path in present if not path.name.startswith(".") and path.suffix != ".tmp"}
    if files and not files & {file, "config.json"}:
        raise UserError(f"{target} holds {min(files)}, which is no model's; name another folder")
    temporary = target / f"{file}.tmp"
    try:
        target.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors' own is for the owner alone
        for name, text in texts.items():
            write_atomically(target / name, text)
        # Last: weights without the rest would be read with another mean.
        temporary.replace(target / file)
    except (OSError, SafetensorError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{target}: cannot be written ({reason}); free space there or choose another folder"
        ) from None
    return target


def license_of(recipe: Recipe) -> str:
    """Returns the licence that trained weights are under: that of what they were distilled or fine-tuned from."""
    teachers = recipe.distill.teachers if recipe.distill is not None else []
    return teachers[0].model.license if teachers else recipe.model.license


_LIBRARIES = {"timm": "timm", "hf": "transformers"}


def model_card(
    recipe: Recipe, run_dir: Path, step: int, backbone: Backbone, layout: str, *, with_head: bool = False
) -> str:
    """Returns a model card in Markdown: what it is, its teacher and licence, its (resolved) recipe and metrics."""
    teachers = recipe.distill.teachers if recipe.distill is not None else []
    num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    mean, std = recipe.model.mean, recipe.model.std
    assert mean is not None, "resolved"
    assert std is not None, "resolved"
    card = [
        "---", f"license: {license_of(recipe)}", f"library_name: {_LIBRARIES.get(layout, 'fd-scale')}", "---", "",
        f"# {recipe.model.name}, {recipe.task}", "",
        f"{num_parameters / 1e6:.1f} M parameters, {recipe.model.img_size} px input, step {step} of `{run_dir}`.",
        f"Input: RGB in 0..1, mean {list(mean)}, standard deviation {list(std)}.", "",
    ]  # fmt: skip
    if recipe.task not in ("distill", "contrastive", "masked") and not with_head:
        card += [f"The backbone alone: what was trained on top of it for {recipe.task} stays in the run.", ""]
    if decay := recipe.optim.ema_decay:
        card += [
            f"The weights are an exponential moving average of those that were trained, decay {decay} a step.",
            "",
        ]
    for teacher in teachers:
        weights = teacher.model.weights
        card += ["## Teacher", "", f"- model: {teacher.model.name}, {teacher.model.img_size} px",
                 f"- weights: {weights or 'random initialisation'}",
                 f"- SHA-256 of the weights: {_sha256(teacher.model)}",
                 f"- licence: {teacher.model.license}", ""]  # fmt: skip
    card += ["## Metrics", "", "| measured at step | metric | value |", "|---|---|---|"]
    for kind in ("train", "evaluation"):
        for line in read_metrics(run_dir, kind)[-1:]:
            names = ("loss", "top1", "miou", "box_ap", "mask_ap") if kind == "evaluation" else ("loss",)
            card += [
                f"| {line['step']} | {kind} {name} | {line[name]:.4f} |" for name in names if name in line
            ]
    card += [
        "", "## Use", "", "```python", *_usage(recipe.model, layout), "```", "", "## Recipe", "", "```yaml",
        to_yaml(recipe).rstrip(), "```", "",
    ]  # fmt: skip
    return "\n".join(card)


def _usage(config: ModelConfig, layout: str) -> list[str]:
    """Lines of Python that load an exported folder."""
    if layout == "timm":
        return ["import timm", "", 'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)']
    if layout == "hf":
        return [
            "from transformers import AutoImageProcessor, AutoModel", "",
            'model = AutoModel.from_pretrained("THIS_FOLDER")',
            'processor = AutoImageProcessor.from_pretrained("THIS_FOLDER")',
        ]  # fmt: skip
    if layout in _WEIGHTS_FILE:
        return [
            "import torch",
            "",
            'weights = torch.load("THIS_FOLDER/model.pth", weights_only=True)["model"]',
        ]
    overrides = OmegaConf.to_container(OmegaConf.create(config.overrides))
    return [
        "from fd_scale.models import create_model, load_weights", "",
        f"model = create_model({config.name!r}, img_size={config.img_size}, **{overrides!r})",
        'load_weights(model, "THIS_FOLDER")',
    ]  # fmt: skip


def _sha256(config: ModelConfig) -> str:
    try:
        path = weights_path(config)
        return "none" if path is None else weights_sha256(path)
    except UserError:
        return f"unknown: the file is not there, seen from {Path.cwd()}"
