"""Pictures of a diagnosis, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Writes a figure in both formats and lets it go; returns the PNG."""
    for suffix in ("svg", "png"):
        figure.savefig(path := folder / f"{name}.{suffix}", dpi=120)
    plt.close(figure)
    return path


def distances(found: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Attention distance of each head by layer, a panel a model."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(4 * len(found), 3.4), sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, model in zip(axes[0], found, strict=True):
        for index, layer in enumerate(model["layers"]):
            heads = layer["distance_px"]
            axis.scatter([index] * len(heads), heads, s=12, color="C0", alpha=0.6)
            axis.hlines(np.mean(heads), index - 0.3, index + 0.3, color="C1")
        axis.set(title=model["name"], xlabel="layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("attention distance (px)")
    return save(figure, folder, "attention_distance")


def curves(found: Sequence[dict[str, Any]], folder: Path) -> Path:
    """What is one number a layer, models in one panel."""
    titles = {
        "head_similarity": "cosine similarity of heads",
        "effective_rank": "effective rank of a map",
        "within_one_patch": "attention within one patch",
        "bias_share": "share of the position bias",
    }
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), constrained_layout=True)
    for axis, (key, title) in zip(axes.flat, titles.items(), strict=True):
        for model in found:
            values = [np.nan if layer[key] is None else layer[key] for layer in model["layers"]]
            if not np.isnan(values).all():
                axis.plot(values, marker="o", markersize=3, label=model["name"])
        axis.set(title=title, xlabel="layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    return save(figure, folder, "layers")


def average_maps(names: Sequence[str], maps: Sequence[Sequence[np.ndarray]], folder: Path) -> Path:
    """Average attention of each layer, a row a model."""
    columns = max(len(row) for row in maps)
    figure, axes = plt.subplots(
        len(maps), columns, figsize=(1.5 * columns, 1.7 * len(maps)), squeeze=False, constrained_layout=True
    )
    for axis in axes.flat:
        axis.axis("off")
    for name, row, panels in zip(names, maps, axes, strict=True):
        for index, (average_PP, axis) in enumerate(zip(row, panels, strict=False)):
            # The scale of each is its own: a uniform map of many patches would be black beside one of few.
            axis.imshow(average_PP, cmap="viridis")
            axis.set_title(f"{name}\nlayer 0" if index == 0 else f"{index}", fontsize=7)
    return save(figure, folder, "average_maps")


def spectra(found: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Spectrum of the last tokens, before and after whitening."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, constrained_layout=True)
    for axis, key in zip(axes, ("raw", "whitened"), strict=True):
        for model in found:
            values = np.array(model["features"][key]["spectrum"])
            axis.semilogy(np.arange(1, len(values) + 1), values / values.sum() + 1e-12, label=model["name"])
        axis.set(title=f"spectrum, {key}", xlabel="component")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of variance")
    axes[0].legend(fontsize=7)
    return save(figure, folder, "spectrum")


def similarity(pairs: Sequence[dict[str, Any]], folder: Path) -> Path:
    """CKA of the layers of two models, a panel a pair."""
    figure, axes = plt.subplots(
        1, len(pairs), figsize=(4 * len(pairs), 3.6), squeeze=False, constrained_layout=True
    )
    for axis, pair in zip(axes[0], pairs, strict=True):
        image = axis.imshow(pair["layers"], vmin=0, vmax=1, origin="lower", cmap="magma")
        axis.set(title="CKA", xlabel=f"layer of {pair['second']}", ylabel=f"layer of {pair['first']}")
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axis)
    return save(figure, folder, "cka")


def colours(names: Sequence[str], images: np.ndarray, maps: Sequence[np.ndarray], folder: Path) -> Path:
    """Images, and each model's tokens as colours: the first three principal components."""
    rows = [images, *maps]
    figure, axes = plt.subplots(
        len(rows), len(images), figsize=(1.4 * len(images), 1.5 * len(rows)), squeeze=False, constrained_layout=True
    )  # fmt: skip
    for label, row, panels in zip(["images", *names], rows, axes, strict=True):
        for picture, axis in zip(row, panels, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        panels[0].set_ylabel(label, fontsize=7)
    return save(figure, folder, "feature_colours")


def query_maps(
    names: Sequence[str], image: np.ndarray, maps: Sequence[Sequence[np.ndarray]], folder: Path
) -> Path:
    """Where the middle patch of a picture looks, by layer, over the picture; models that attend globally."""
    columns = max(len(row) for row in maps)
    figure, axes = plt.subplots(
        len(maps), columns, figsize=(1.5 * columns, 1.7 * len(maps)), squeeze=False, constrained_layout=True
    )
    side = image.shape[0]
    for axis in axes.flat:
        axis.axis("off")
    for name, row, panels in zip(names, maps, axes, strict=True):
        for index, (attention, axis) in enumerate(zip(row, panels, strict=False)):
            axis.imshow(image)
            axis.imshow(attention, cmap="inferno", alpha=0.6, extent=(0, side, side, 0))
            axis.set_title(f"{name}\nlayer 0" if index == 0 else f"{index}", fontsize=7)
    return save(figure, folder, "query_maps")
