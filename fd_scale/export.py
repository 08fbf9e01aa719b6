"""From a run to a folder that stands alone: the backbone's weights, its configuration, a model card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file

from fd_scale import run_folder
from fd_scale.checkpoint import newest_checkpoint, read_manifest, write_atomically
from fd_scale.config import Recipe, to_yaml
from fd_scale.engine import saved_weights
from fd_scale.errors import UserError
from fd_scale.metrics import read_metrics
from fd_scale.models import BACKBONE, weights_sha256


def export(run_dir: str | Path, out: str | Path) -> Path:
    """Writes the trained backbone alone; a recipe takes the folder as `model.weights`.

    Args:
        run_dir: folder of a run of any task, trained with any ZeRO stage.
        out: folder to write: `model.safetensors` (fp32), `config.json`, `README.md` (model card).

    Returns:
        `out`.

    Raises:
        UserError: `run_dir` is no run, has no whole checkpoint, or `out` cannot be written.
    """
    run, target = Path(run_dir), Path(out)
    recipe = run_folder.read_recipe(run)
    checkpoint = newest_checkpoint(run)
    prefix = BACKBONE + "."
    weights = {
        name.removeprefix(prefix): tensor.contiguous()
        for name, tensor in saved_weights(checkpoint).items()
        if name.startswith(prefix)
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        temporary = target / "model.safetensors.tmp"
        save_file(weights, temporary, metadata={"format": "pt"})
        temporary.replace(target / "model.safetensors")
        model = asdict(recipe.model) | {"weights": None}
        write_atomically(target / "config.json", json.dumps({"model": model}, indent=1))
        step = read_manifest(checkpoint)["state"]["step"]
        write_atomically(
            target / "README.md", model_card(recipe, run, step, sum(w.numel() for w in weights.values()))
        )
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{target}: cannot be written ({reason}); free space there or choose another folder"
        ) from None
    return target


def model_card(recipe: Recipe, run_dir: Path, step: int, num_parameters: int) -> str:
    """Returns a model card in Markdown: what it is, its teacher and licence, its recipe and metrics."""
    teachers = recipe.distill.teachers if recipe.distill is not None else []
    license_name = teachers[0].model.license if teachers else recipe.model.license
    card = [
        "---", f"license: {license_name}", "library_name: fd-scale", "---", "",
        f"# {recipe.model.name}, {recipe.task}", "",
        f"{num_parameters / 1e6:.1f} M parameters, {recipe.model.img_size} px input, step {step} of `{run_dir}`.",
        f"Input: RGB in 0..1, mean {list(recipe.model.mean)}, standard deviation {list(recipe.model.std)}.", "",
    ]  # fmt: skip
    for teacher in teachers:
        weights = teacher.model.weights
        card += ["## Teacher", "", f"- model: {teacher.model.name}, {teacher.model.img_size} px",
                 f"- weights: {weights or 'random initialisation'}",
                 f"- SHA-256 of the weights: {_sha256(weights) if weights else 'none'}",
                 f"- licence: {teacher.model.license}", ""]  # fmt: skip
    card += ["## Metrics", "", "| measured at step | metric | value |", "|---|---|---|"]
    for kind in ("train", "evaluation"):
        for line in read_metrics(run_dir, kind)[-1:]:
            names = ("loss", "top1") if kind == "evaluation" else ("loss",)
            card += [
                f"| {line['step']} | {kind} {name} | {line[name]:.4f} |" for name in names if name in line
            ]
    overrides = OmegaConf.to_container(OmegaConf.create(recipe.model.overrides))
    card += [
        "", "## Use", "", "```python", "from fd_scale.models import create_model, load_weights", "",
        f"model = create_model({recipe.model.name!r}, img_size={recipe.model.img_size}, **{overrides!r})",
        'load_weights(model, "THIS_FOLDER")', "```", "", "## Recipe", "", "```yaml", to_yaml(recipe).rstrip(),
        "```", "",
    ]  # fmt: skip
    return "\n".join(card)


def _sha256(weights: str) -> str:
    try:
        return weights_sha256(weights)
    except UserError:
        return "unknown, the file is no longer there"
