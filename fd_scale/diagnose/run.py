"""`fd-scale diagnose`: models side by side over the same images.

Shape legend: B = images, L = tokens, D = channels, R = rows (tokens of all images), P = patches.
"""

from __future__ import annotations

import html
import itertools
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from fd_scale import run_folder
from fd_scale.checkpoint import newest_checkpoint, write_atomically
from fd_scale.config import ModelConfig
from fd_scale.data import (
    UNLABELLED,
    Picture,
    Source,
    View,
    evaluation_batches,
    evaluation_transform,
    open_source,
    spread,
)
from fd_scale.diagnose import plots
from fd_scale.diagnose.blocks import as_map, followed, layouts
from fd_scale.diagnose.capture import AttentionMap, look_at_attention
from fd_scale.diagnose.measures import LayerStatistics, feature_statistics, linear_cka, patches_only
from fd_scale.distill.pictures import principal_colours
from fd_scale.engine import saved_weights
from fd_scale.errors import UserError
from fd_scale.log import results
from fd_scale.metrics import memory_gib
from fd_scale.models import (
    BACKBONE,
    Backbone,
    at_trained_scale,
    build_model,
    dtype_of,
    normalize,
    resolved_model,
)
from fd_scale.report.page import document, grid, picture, table

logger = logging.getLogger(__name__)

SCHEMA = 2
NUM_PICTURES = 6
CKA_SIDE = 4
"""Tokens of a layer are averaged to so many by so many an image: models of different grids have the same rows."""
LARGEST_MAP = 24 * 24
"""Patches of an average map that is drawn."""
LONGEST_LABEL = 48


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
class _Cost:
    """What the passes over all images took: `plain`, the model alone, and `look`."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_gib: dict[str, float] = field(default_factory=dict)
    """Of the GPU; on the host, resident in the whole process so far."""

    @contextmanager
    def of(self, name: str, device: torch.device) -> Iterator[None]:
        """Adds what is done in it."""
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize(device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.peak_gib[name] = max(self.peak_gib.get(name, 0.0), memory_gib(device))


@dataclass
class _Found:
    """What a pass over the images gives of one model."""

    name: str
    label: str
    """A short name, unlike those of the other models."""
    image_px: int
    layers: dict[int, LayerStatistics] = field(default_factory=dict)
    """By its number among the model's."""
    left_out: list[str | None] = field(default_factory=list)
    """Of each attention of the model why it is none of `layers`; None where it is."""
    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    """For each block, by number, its tokens at `CKA_SIDE` squared places, a tensor a batch."""
    num_blocks: int = 0
    """With those whose layout is not known, which are none of `rows`."""
    tokens: list[Tensor] = field(default_factory=list)
    """The last ones, patches alone, (B, L, D) fp32 on the host."""
    grid: tuple[int, int] = (0, 0)
    cost: _Cost = field(default_factory=_Cost)
    queries: dict[int, np.ndarray] = field(default_factory=dict)
    """Of the first image: where its middle patch looks, by layer, where all patches see each other."""

    def look(self, index: int, attention: AttentionMap) -> None:
        """See `capture.Look`."""
        self.layers.setdefault(index, LayerStatistics(attention.shape)).add(attention)
        if attention.is_image and not self.tokens:
            probs_hPP = patches_only(attention.probs, attention.num_prefix_tokens)[0, 0]
            rows, columns = attention.shape
            middle = rows // 2 * columns + columns // 2
            self.queries[index] = probs_hPP.mean(0)[middle].view(rows, columns).cpu().numpy()


def diagnose(names: Sequence[str], out: str | Path | None, options: Options) -> dict[str, Any]:
    """Writes diagnosis.json, plots and a page of both, and returns what the first one holds.

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
    found = [
        _Found(name, label, options.img_size or resolved_model(_config_of(name)).size)
        for name, label in zip(names, labels(names), strict=True)
    ]
    for one in found[1:]:  # One that is refused is so before the others have seen all images.
        _look(_Found(one.name, one.label, one.image_px), spread(source, 1), options)
    run_folder.make_for_results(folder)
    pictures = [_look(one, source, options) for one in found]
    result = {
        "schema": SCHEMA, "images": str(images), "num_images": len(source), "precision": options.precision,
        "environment": run_folder.environment(), "models": [_numbers(one) for one in found],
        "cka": [_cka(found[0], other) for other in found[1:] if found[0].rows and other.rows],
    }  # fmt: skip
    for note in notes(result):
        logger.info("%s", note)
    try:
        write_atomically(folder / "diagnosis.json", json.dumps(result, indent=1))
        drawn = _draw(result, found, pictures[0], folder)
        write_atomically(folder / "diagnosis.html", _page(result, drawn))
        logger.info("written: %s", folder / "diagnosis.html")
    except OSError as error:
        raise run_folder.not_writable(folder, error, "--out") from None
    return result


def labels(names: Sequence[str]) -> list[str]:
    """Short names for pictures and tables: without folders, long ones without their middle, equal ones numbered."""
    short = [re.sub(r"[^@:/]*/", "", name.rstrip("/")) for name in names]
    half = LONGEST_LABEL // 2
    short = [name if len(name) <= LONGEST_LABEL else f"{name[:half]}…{name[-half:]}" for name in short]
    found: list[str] = []
    for name in short:
        numbered = (f"{name} ({number})" for number in itertools.count(1))
        candidates = itertools.chain([name] if short.count(name) == 1 else [], numbered)
        found.append(next(each for each in candidates if each not in found))
    return found


def notes(result: dict[str, Any]) -> list[str]:
    """Returns sentences on what is left out of a diagnosis, and why."""
    found = []
    for model in result["models"]:
        label = model["label"]
        reasons: dict[str, list[str]] = {}
        for each in model["left_out"]:
            reasons.setdefault(each["reason"], []).append(str(each["layer"]))
        if reasons:
            said = "; ".join(f"{', '.join(layers)}: {reason}" for reason, layers in reasons.items())
            found.append(
                f"{label}: {len(model['layers'])} of {model['num_layers']} layers of attention are seen, without {said}"
            )
        if not any(_is_drawn(layer["patches"]) for layer in model["layers"]):
            found.append(f"{label}: no average maps, which would be of more than {LARGEST_MAP} patches")
        if len(result["models"]) == 1:
            continue
        if not model["num_blocks"]:
            found.append(f"{label}: no CKA, as its blocks are not known")
        elif model["blocks_left_out"]:
            numbers = ", ".join(map(str, model["blocks_left_out"]))
            found.append(
                f"{label}: CKA without blocks {numbers} of {model['num_blocks']}, whose layout is not known"
            )
    return found


def show(result: dict[str, Any]) -> None:
    """Prints a table of means over layers and heads."""
    head, *rows = means(result)
    shown = Table(*head)
    shown.columns[0].overflow = "fold"  # labels differ at either end
    for row in rows:
        shown.add_row(*row)
    results(uncut=True).print(shown)


def means(result: dict[str, Any]) -> list[list[str]]:
    """Returns a table of means over layers and heads, its head first."""
    rows = [["model", "image, grid", "layers", "distance, px", "similarity of heads", "rank of a map",
             "within one patch", "bias", "rank of features", "s, x inference"]]  # fmt: skip
    for model in result["models"]:
        layers = model["layers"]

        def mean(key: str, layers: list[dict[str, Any]] = layers) -> str:
            values = [np.mean(layer[key]) for layer in layers if layer[key] is not None]
            return f"{np.mean(values):.3g}" if values else ""

        keys = ("distance_px", "head_similarity", "effective_rank", "within_one_patch", "bias_share")
        plain, look = (model["cost"]["seconds"][name] for name in ("plain", "look"))
        rank = model["features"]["raw"]["effective_rank"]
        took = f"{plain + look:.1f}, {(plain + look) / plain:.2f}"
        grid = f"{model['image_px']} px, {model['grid'][0]} x {model['grid'][1]}"
        seen = f"{len(layers)} of {model['num_layers']}"
        rows.append([model["label"], grid, seen, *map(mean, keys), f"{rank:.3g}", took])
    return rows


def _page(result: dict[str, Any], drawn: Sequence[Path]) -> str:
    names = [model["name"] for model in result["models"]]
    of = f"{result['num_images']} images of {result['images']}, {result['precision']}"
    shown = [(path.stem.replace("_", " "), picture(path.read_bytes())) for path in drawn]
    return document(names[0], [
        f"<h1>{html.escape(', '.join(names))}</h1><p>{html.escape(of)}</p>", "<h2>Means over layers and heads</h2>",
        table(means(result)), *(f"<p>{html.escape(note)}</p>" for note in notes(result)),
        "<h2>Layer by layer</h2>", grid(shown),
    ])  # fmt: skip


def _places(first: str, images: Any, out: str | Path | None) -> tuple[Any, Path]:
    """Returns the source and the folder of the results, from the first model's run where they are not given."""
    run = Path(first.removeprefix("teacher:"))
    missing = [name for name, value in (("--images SOURCE", images), ("--out DIR", out)) if value is None]
    if missing and "@" not in first and not run.exists():
        raise UserError(f"{run} does not exist; expected the folder of a run, or a name, NAME@pretrained")
    if missing and not (run / "recipe.yaml").is_file():
        raise UserError(f"{first} is no run, so there is no default: give {' and '.join(missing)}")
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
        recipe = run_folder.read_recipe(path)
        # A probe's model stays what it was at the start, and is in no checkpoint.
        return recipe.model if recipe.task == "linear_probe" else replace(recipe.model, weights=None)
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
        config = at_trained_scale(config, replace(config, img_size=img_size))
    model = build_model(config)
    if (Path(name) / "recipe.yaml").is_file() and config.weights is None:
        saved_weights(newest_checkpoint(Path(name))).copy_into(model, f"{BACKBONE}.")
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class _WithoutTarget:
    """A transform that drops what is learned of an image, which may be a mask."""

    view: View

    def __call__(self, picture: Picture, target: Any) -> tuple[Tensor, int]:
        return self.view(picture), UNLABELLED


def _look(one: _Found, source: Source, options: Options) -> np.ndarray:
    """Fills in what a pass over the images gives, and returns the first of them, (B, H, W, 3)."""
    device, dtype = _device(options.device), dtype_of(options.precision)
    model = load_backbone(one.name, options.img_size).to(device, dtype)
    logger.info("%s: %d images of %d px", one.name, len(source), one.image_px)
    pictures: list[Tensor] = []
    blocks, size_px = model.list_blocks(), (one.image_px, one.image_px)
    one.num_blocks, one.grid = len(blocks), model.grid_size(*size_px)
    blank_1CHW = torch.zeros(1, 3, *size_px, device=device, dtype=dtype)
    channels_last = layouts(model, blocks, blank_1CHW, one.grid)

    def keep(index: int, block: nn.Module, tokens: Tensor) -> None:
        map_BDHW = as_map(tokens, model.num_prefix_tokens, one.grid, channels_last.get(type(block)))
        if map_BDHW is not None:
            small = F.adaptive_avg_pool2d(map_BDHW.float(), CKA_SIDE)
            one.rows.setdefault(index, []).append(small.flatten(2).mT.flatten(0, 1).cpu())

    batches = evaluation_batches(
        source, _WithoutTarget(evaluation_transform(one.image_px, crop_fraction=1.0)), batch_size=options.batch_size,
        rank=0, world_size=1, num_workers=0,
    )  # fmt: skip
    for batch in batches:
        pixels = normalize(batch.images.to(device), model.mean, model.std).to(dtype)
        with torch.no_grad(), one.cost.of("plain", device):
            tokens_BLD = model(pixels)
        with one.cost.of("look", device), followed(blocks, keep):
            one.left_out = look_at_attention(model, pixels, tokens_BLD, one.look)
        one.tokens.append(tokens_BLD[:, model.num_prefix_tokens :].float().cpu())
        pictures.append(batch.images)
    return torch.cat(pictures)[:NUM_PICTURES].permute(0, 2, 3, 1).numpy()


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no CUDA device; take cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _numbers(one: _Found) -> dict[str, Any]:
    tokens_RD = torch.cat(one.tokens).flatten(0, 1)
    features = {}
    for key, rows in (("raw", tokens_RD), ("whitened", F.layer_norm(tokens_RD, tokens_RD.shape[-1:]))):
        found = feature_statistics(rows)
        features[key] = {
            "effective_rank": found.effective_rank, "token_norm": found.token_norm,
            "channel_std": found.channel_std.tolist(), "spectrum": found.spectrum.tolist(),
        }  # fmt: skip
    layers = [{"layer": number, **layer.numbers()} for number, layer in one.layers.items()]
    left_out = [
        {"layer": number, "reason": reason}
        for number, reason in enumerate(one.left_out)
        if reason is not None
    ]
    return {
        "name": one.name, "label": one.label, "image_px": one.image_px, "grid": list(one.grid),
        "num_layers": len(one.left_out), "left_out": left_out, "num_blocks": one.num_blocks,
        "blocks_left_out": [index for index in range(one.num_blocks) if index not in one.rows], "layers": layers,
        "features": features, "cost": asdict(one.cost),
    }  # fmt: skip


def _cka(first: _Found, second: _Found) -> dict[str, Any]:
    rows = [[torch.cat(parts) for parts in one.rows.values()] for one in (first, second)]
    blocks: list[list[float | None]] = [[None] * second.num_blocks for _ in range(first.num_blocks)]
    for row, values in zip(first.rows, linear_cka(*rows), strict=True):
        for column, value in zip(second.rows, values, strict=True):
            blocks[row][column] = value
    return {"first": first.label, "second": second.label, "layers": blocks}


def _is_drawn(shape: Sequence[int]) -> bool:
    return shape[0] * shape[1] <= LARGEST_MAP


def _draw(result: dict[str, Any], found: Sequence[_Found], images: np.ndarray, folder: Path) -> list[Path]:
    names = [one.label for one in found]
    paths = [plots.curves(result["models"], folder), plots.distances(result["models"], folder)]
    drawn = [
        {number: layer.average_map.numpy() for number, layer in one.layers.items() if _is_drawn(layer.shape)}
        for one in found
    ]
    if any(drawn):
        shown = {name: maps for name, maps in zip(names, drawn, strict=True) if maps}
        paths.append(plots.average_maps(shown, folder))
    if any(one.queries for one in found):
        shown = {one.label: one.queries for one in found if one.queries}
        paths.append(plots.query_maps(shown, images[0], folder))
    paths.append(plots.colours(names, images, [_colours(one) for one in found], folder))
    paths.append(plots.spectra(result["models"], folder))
    if result["cka"]:
        paths.append(plots.similarity(result["cka"], folder))
    return paths


def _colours(one: _Found) -> np.ndarray:
    """The first images' tokens by their three leading principal components, (B, rows, columns, 3) in 0..1."""
    [colours_BL3] = principal_colours(torch.cat(one.tokens)[:NUM_PICTURES])
    return colours_BL3.unflatten(1, one.grid).numpy()
