"""Pictures of a diagnosis, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SMALL = 8
Maps = Mapping[str, Mapping[int, np.ndarray]]
"""By model and by the number of the layer."""


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Writes a figure in both formats; returns the PNG."""
    for suffix in ("svg", "png"):
        # Tight: a label may be longer than its axis, and lead out of the figure.
        figure.savefig(path := folder / f"{name}.{suffix}", dpi=120, bbox_inches="tight")
    return path


def distances(found: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Attention distance of each head by layer, a panel a model."""
    figure = Figure(figsize=(4 * len(found), 3.4), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], found, strict=True):
        for layer in model["layers"]:
            index, heads = layer["layer"], layer["distance_px"]
            axis.scatter([index] * len(heads), heads, s=12, color="C0", alpha=0.6)
            axis.hlines(np.mean(heads), index - 0.3, index + 0.3, color="C1")
        rows, columns = model["grid"]
        axis.set_title(f"{model['label']}\n{model['image_px']} px, grid {rows} x {columns}", fontsize=_SMALL)
        axis.set(xlabel="layer", xlim=(-0.5, model["num_layers"] - 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("attention distance (px)")
    return save(figure, folder, "attention_distance")


def curves(found: Sequence[dict[str, Any]], folder: Path) -> Path:
    """What is one number a layer, models in one panel; without panels that would be empty."""
    titles = {
        "head_similarity": "cosine similarity of heads",
        "effective_rank": "effective rank of a map",
        "within_one_patch": "attention within one patch",
        "bias_share": "share of the position bias",
    }
    titles = {
        key: title
        for key, title in titles.items()
        if any(layer[key] is not None for model in found for layer in model["layers"])
    }
    rows, columns = (2, 2) if len(titles) == 4 else (1, len(titles))
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (key, title) in zip(axes.flat, titles.items(), strict=True):
        for index, model in enumerate(found):
            layers = [layer for layer in model["layers"] if layer[key] is not None]
            axis.plot(
                [layer["layer"] for layer in layers], [layer[key] for layer in layers],
                marker="o", markersize=3, label=model["label"], color=f"C{index}",
            )  # fmt: skip
        axis.set(title=title, xlabel="layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    _legend_below(figure, axes[0, 0])
    return save(figure, folder, "layers")


def _legend_below(figure: Figure, axis: Axes) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=_SMALL)


def _a_row_each(maps: Maps) -> tuple[Figure, Iterator[tuple[np.ndarray, Axes]]]:
    """A figure with a row a model and a panel a layer, and each map with its panel."""
    columns = max(len(row) for row in maps.values())
    figure = Figure(figsize=(max(1.5 * columns, 4.5), 1.8 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")

    def panels() -> Iterator[tuple[np.ndarray, Axes]]:
        for (name, row), line in zip(maps.items(), axes, strict=True):
            for place, ((number, shown), axis) in enumerate(zip(row.items(), line, strict=False)):
                # On a line of its own a name has the width of all panels.
                title = f"{name}\nlayer {number}" if place == 0 else f"{number}"
                axis.set_title(title, fontsize=7, loc="left")
                yield shown, axis

    return figure, panels()


def average_maps(maps: Maps, folder: Path) -> Path:
    """Average attention of each layer, a row a model."""
    figure, panels = _a_row_each(maps)
    for average_PP, axis in panels:
        # The scale of each is its own: a uniform map of many patches would be black beside one of few.
        axis.imshow(average_PP, cmap="viridis")
    return save(figure, folder, "average_maps")


def spectra(found: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Spectrum of the last tokens, before and after whitening."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key in zip(axes, ("raw", "whitened"), strict=True):
        for model in found:
            values = np.array(model["features"][key]["spectrum"])
            axis.semilogy(np.arange(1, len(values) + 1), values / values.sum() + 1e-12, label=model["label"])
        axis.set(title=f"spectrum, {key}", xlabel="component")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of variance")
    _legend_below(figure, axes[0])
    return save(figure, folder, "spectrum")


def similarity(pairs: Sequence[dict[str, Any]], folder: Path) -> Path:
    """CKA of the blocks of two models, a panel a pair; blocks that are left out are blank."""
    figure = Figure(figsize=(4 * len(pairs), 3.6), layout="constrained")
    axes = figure.subplots(1, len(pairs), squeeze=False)
    for axis, pair in zip(axes[0], pairs, strict=True):
        values = np.array(pair["layers"], dtype=float)  # None is NaN
        image = axis.imshow(values, vmin=0, vmax=1, origin="lower", cmap="magma")
        axis.set_title("CKA", fontsize=_SMALL)
        axis.set_xlabel(f"block of {pair['second']}", fontsize=_SMALL)
        axis.set_ylabel(f"block of {pair['first']}", fontsize=_SMALL)
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axis)
    return save(figure, folder, "cka")


def colours(names: Sequence[str], images: np.ndarray, maps: Sequence[np.ndarray], folder: Path) -> Path:
    """Images, and each model's tokens as colours: the first three principal components."""
    rows = [images, *maps]
    figure = Figure(figsize=(max(1.4 * len(images), 4.5), 1.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for label, row, panels in zip(["images", *names], rows, axes, strict=True):
        for picture, axis in zip(row, panels, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        panels[0].set_title(label, fontsize=7, loc="left")
    return save(figure, folder, "feature_colours")


def query_maps(maps: Maps, image: np.ndarray, folder: Path) -> Path:
    """Where the middle patch of a picture looks, by layer, over the picture; models that attend globally."""
    figure, panels = _a_row_each(maps)
    side = image.shape[0]
    for attention, axis in panels:
        axis.imshow(image)
        axis.imshow(attention, cmap="inferno", alpha=0.6, extent=(0, side, side, 0))
    return save(figure, folder, "query_maps")
