"""`fd-scale diagnose`: models side by side over the same images.

Shape legend: B = images, L = tokens, D = channels, R = rows (tokens of all images), P = patches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from fd_scale import run_folder
from fd_scale.checkpoint import newest_checkpoint, write_atomically
from fd_scale.config import ModelConfig
from fd_scale.data import ImageAlone, Source, evaluation_batches, evaluation_transform, open_source, spread
from fd_scale.diagnose import plots
from fd_scale.diagnose.capture import AttentionMap, look_at_attention
from fd_scale.diagnose.measures import LayerStatistics, feature_statistics, linear_cka, patches_only
from fd_scale.distill.pictures import principal_colours
from fd_scale.engine import saved_weights
from fd_scale.errors import UserError
from fd_scale.log import console
from fd_scale.models import BACKBONE, Backbone, build_model, dtype_of, normalize, resolved_model

logger = logging.getLogger(__name__)

SCHEMA = 1
NUM_PICTURES = 6
CKA_SIDE = 4
"""Tokens of a layer are averaged to so many by so many an image: models of different grids have the same rows."""
LARGEST_MAP = 24 * 24
"""Patches of an average map that is drawn."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How models are looked at."""

    images: Any = None
    """Source, as `data.train` takes it; none: what the first model's run is evaluated on, or trained."""
    num_images: int = 64
    batch_size: int = 16
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""
    precision: str = "fp32"
    img_size: int | None = None
    """None: each model's own."""


@dataclass
class _Found:
    """What a pass over the images gives of one model."""

    name: str
    layers: list[LayerStatistics] = field(default_factory=list)
    rows: list[list[Tensor]] = field(default_factory=list)
    """For each block its tokens at `CKA_SIDE` squared places, a tensor a batch."""
    tokens: list[Tensor] = field(default_factory=list)
    """The last ones, patches alone, (B, L, D) fp32 on the host."""
    grid: tuple[int, int] = (0, 0)
    queries: list[np.ndarray] = field(default_factory=list)
    """Of the first image: where its middle patch looks, by layer, where all patches see each other."""


def diagnose(names: Sequence[str], out: str | Path | None, options: Options) -> dict[str, Any]:
    """Writes diagnosis.json and plots, and returns what the file holds.

    Args:
        names: each a run's folder, a folder that `export` wrote, `teacher:RUN` for the teacher of a distillation, or
            the name of a model with `@` and its weights (`@pretrained`, `@PATH`, `@none` for random ones).
        out: folder of the results; none: `diagnosis` in the first model's run.
        options: images, precision, device.

    Raises:
        UserError: no such model or images, or a model without attention.
    """
    if options.num_images < 2 or options.batch_size < 1:
        raise UserError(
            f"--num-images {options.num_images}, --batch-size {options.batch_size}: expected at least 2 and 1"
        )
    images, folder = _places(names[0], options.images, out)
    source = spread(open_source(images), options.num_images)
    found, pictures = [], []
    for name in names:
        model = load_backbone(name, options.img_size)
        size = options.img_size or resolved_model(_config_of(name)).size
        logger.info("%s: %d images of %d px", name, len(source), size)
        one, images_BHWC = _look(name, model, source, size, options)
        found.append(one)
        pictures.append(images_BHWC)
    result = {
        "schema": SCHEMA, "images": str(images), "num_images": len(source), "precision": options.precision,
        "environment": run_folder.environment(), "models": [_numbers(one) for one in found],
        "cka": [_cka(found[0], other) for other in found[1:] if found[0].rows and other.rows],
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "diagnosis.json", json.dumps(result, indent=1))
        _draw(result, found, pictures[0], folder)
    except OSError as error:
        raise run_folder.not_writable(folder, error) from None
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a table of means over layers and heads."""
    table = Table(
        "model",
        "distance, px",
        "similarity of heads",
        "rank of a map",
        "within one patch",
        "bias",
        "rank of features",
    )
    for model in result["models"]:
        layers = model["layers"]

        def mean(key: str, layers: list[dict[str, Any]] = layers) -> str:
            values = [np.mean(layer[key]) for layer in layers if layer[key] is not None]
            return f"{np.mean(values):.3g}" if values else ""

        keys = ("distance_px", "head_similarity", "effective_rank", "within_one_patch", "bias_share")
        table.add_row(model["name"], *map(mean, keys), f"{model['features']['raw']['effective_rank']:.3g}")
    console.print(table)


def _places(first: str, images: Any, out: str | Path | None) -> tuple[Any, Path]:
    """Returns the source and the folder of the results, from the first model's run where they are not given."""
    run = Path(first.removeprefix("teacher:"))
    if (images is None or out is None) and not (run / "recipe.yaml").is_file():
        raise UserError(f"{first} is no run, so there is no default: give --images SOURCE and --out DIR")
    if images is None:
        data = run_folder.read_recipe(run).data
        images = data.evaluation or data.train
    return images, run / "diagnosis" if out is None else Path(out)


def _config_of(name: str) -> ModelConfig:
    kind, _, rest = name.partition(":")
    if kind == "teacher" and rest:
        recipe = run_folder.read_recipe(Path(rest))
        if recipe.distill is None:
            raise UserError(f"{name}: {rest} is a run of task {recipe.task}, which has no teacher")
        return recipe.distill.teachers[0].model
    path = Path(name)
    if (path / "recipe.yaml").is_file():
        return replace(run_folder.read_recipe(path).model, weights=None)
    if (path / "config.json").is_file():
        described = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "model" not in described:
            raise UserError(
                f"{name}: its config.json names no model; expected a folder that `fd-scale export` wrote"
            )
        return ModelConfig(**described["model"] | {"weights": str(path)})
    model, at, weights = name.partition("@")
    if not at:
        raise UserError(
            f"{name}: no run's folder and no exported one; of a model's name expected NAME@pretrained, NAME@PATH, or "
            "NAME@none for random weights"
        )
    return ModelConfig(name=model, weights=None if weights == "none" else weights)


def load_backbone(name: str, img_size: int | None) -> Backbone:
    """Builds what a name of `diagnose` stands for, with its weights, in eval mode.

    Raises:
        UserError: there is no such thing.
    """
    config = _config_of(name)
    if img_size is not None:
        config = replace(config, img_size=img_size)
    model = build_model(config)
    if (Path(name) / "recipe.yaml").is_file():
        saved_weights(newest_checkpoint(Path(name))).copy_into(model, f"{BACKBONE}.")
    return model.eval().requires_grad_(False)


def _look(
    name: str, model: Backbone, source: Source, size: int, options: Options
) -> tuple[_Found, np.ndarray]:
    device, dtype = _device(options.device), dtype_of(options.precision)
    model.to(device, dtype)
    one = _Found(Path(name).name if Path(name).exists() else name)
    pictures: list[Tensor] = []
    blocks = [module for module in model.modules() if type(module) in model.block_classes()]
    handles = [block.register_forward_hook(_keeper(one, index, model)) for index, block in enumerate(blocks)]
    one.rows = [[] for _ in blocks]
    batches = evaluation_batches(
        source, ImageAlone(evaluation_transform(size, crop_fraction=1.0)), batch_size=options.batch_size,
        rank=0, world_size=1, num_workers=0,
    )  # fmt: skip
    for batch in batches:
        pixels = normalize(batch.images.to(device), model.mean, model.std).to(dtype)

        def look(index: int, attention: AttentionMap) -> None:
            if index == len(one.layers):
                one.layers.append(LayerStatistics(attention.shape))
            one.layers[index].add(attention)
            if len(one.queries) == index and attention.probs.shape[1] == 1 and not one.tokens:
                probs_hPP = patches_only(attention.probs, attention.num_prefix_tokens)[0, 0]
                rows, columns = attention.shape
                middle = rows // 2 * columns + columns // 2
                one.queries.append(probs_hPP.mean(0)[middle].view(rows, columns).cpu().numpy())

        tokens_BLD = look_at_attention(model, pixels, look)
        one.grid = model.grid_size(*pixels.shape[-2:])
        one.tokens.append(tokens_BLD[:, model.num_prefix_tokens :].float().cpu())
        pictures.append(batch.images)
    for handle in handles:
        handle.remove()
    images = torch.cat(pictures)[:NUM_PICTURES].permute(0, 2, 3, 1).numpy()
    return one, images


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no CUDA device; take cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _keeper(one: _Found, index: int, model: Backbone) -> Any:
    """A hook that keeps a block's tokens; of the two passes over a batch, the first."""

    def keep(_: Any, inputs: Any, output: Any) -> None:
        if len(one.rows[index]) > len(one.tokens):
            return
        tokens = output[0] if isinstance(output, tuple) else output
        if tokens.dim() == 3:
            tokens = tokens[:, model.num_prefix_tokens :]
            side = round(tokens.shape[1] ** 0.5)
            tokens = tokens.unflatten(1, (side, -1))
        small = F.adaptive_avg_pool2d(tokens.float().permute(0, 3, 1, 2), CKA_SIDE)
        one.rows[index].append(small.flatten(2).mT.flatten(0, 1).cpu())

    return keep


def _numbers(one: _Found) -> dict[str, Any]:
    tokens_RD = torch.cat(one.tokens).flatten(0, 1)
    features = {}
    for key, rows in (("raw", tokens_RD), ("whitened", F.layer_norm(tokens_RD, tokens_RD.shape[-1:]))):
        found = feature_statistics(rows)
        features[key] = {
            "effective_rank": found.effective_rank, "token_norm": found.token_norm,
            "channel_std": found.channel_std.tolist(), "spectrum": found.spectrum.tolist(),
        }  # fmt: skip
    layers = [layer.numbers() for layer in one.layers]
    return {"name": one.name, "grid": list(one.grid), "layers": layers, "features": features}


def _cka(first: _Found, second: _Found) -> dict[str, Any]:
    rows = [[torch.cat(parts) for parts in one.rows] for one in (first, second)]
    return {
        "first": first.name,
        "second": second.name,
        "layers": [[linear_cka(x, y) for y in rows[1]] for x in rows[0]],
    }


def _draw(result: dict[str, Any], found: Sequence[_Found], images: np.ndarray, folder: Path) -> None:
    names = [one.name for one in found]
    plots.distances(result["models"], folder)
    plots.curves(result["models"], folder)
    plots.spectra(result["models"], folder)
    drawn = [
        [layer.average_map.numpy() for layer in one.layers if layer.shape[0] * layer.shape[1] <= LARGEST_MAP]
        for one in found
    ]
    if all(drawn):
        plots.average_maps(names, drawn, folder)
    if result["cka"]:
        plots.similarity(result["cka"], folder)
    plots.colours(names, images, [_colours(one) for one in found], folder)
    globally = [one for one in found if one.queries]
    if globally:
        plots.query_maps([one.name for one in globally], images[0], [one.queries for one in globally], folder)


def _colours(one: _Found) -> np.ndarray:
    """The first images' tokens by their three leading principal components, (B, rows, columns, 3) in 0..1."""
    [colours_BL3] = principal_colours(torch.cat(one.tokens)[:NUM_PICTURES])
    return colours_BL3.unflatten(1, one.grid).numpy()
