"""Fixtures and options shared by all tests."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks of a test share two cores

import torch

from fd_scale.config import Recipe, build_recipe

TINY = {"patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
MODEL = {"name": "swin_v2_tiny", "img_size": 24, "overrides": TINY | {"drop_path_rate": 0.2}}
SECTIONS: dict[str, dict[str, Any]] = {
    "distill": {
        "teachers": [{"model": MODEL | {"overrides": TINY | {"embed_dim": 24, "num_heads": [2, 4]}}}]
    },
    "contrastive": {"projection_dim": 8},
    "masked": {},
    "classification": {"head_init_scale": 1.0},
    "linear_probe": {"lr_factors": [0.1, 1.0, 10.0]},
    "segmentation": {"channels": 16},
    "detection": {"channels": 16, "rois_per_image": 32},
}

FINE_TUNING: dict[str, Any] = {
    "classification": {"head_init_scale": 1.0, "mixup": 0.8, "cutmix": 1.0},
    "optim__layer_decay": 0.65, "data__rand_augment": "m9-mstd0.5-inc1", "data__erasing": 0.25,
    "data__interpolation": "bicubic",
}  # fmt: skip
"""What makes a classification one as the paper's."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail, not skip, tests marked gpu without a GPU"
    )
    parser.addoption(
        "--require-slurm",
        action="store_true",
        help="fail, not skip, the tests of SLURM where it is not installed",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("--require-gpu"):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="session")
def values_in() -> Callable[..., dict[str, Any]]:
    """Returns a function that makes a tiny recipe on digits in a run folder, with `section.key=value` as keywords.

    Task "fine-tuning" is classification with all that the paper's fine-tuning has.
    """

    def make(run_dir: Path, task: str = "distill", **changes: Any) -> dict[str, Any]:
        if task == "fine-tuning":
            task, changes = "classification", FINE_TUNING | changes
        values: dict[str, Any] = {
            "task": task,
            "run_dir": str(run_dir),
            "model": MODEL,
            "data": {"train": "digits:train", "num_workers": 0, "flip": 0.0},
            "optim": {"lr": 1e-3, "grad_clip": 0.28},
            "train": {
                "global_batch": 16, "micro_batch": 8, "steps": 6, "precision": "fp32",
                "device": "cpu", "ds_config": "zero0", "timeout_s": 60,
            },
            "checkpoint": {"save_every_steps": 2},
            "log": {"every_steps": 1, "images_every_steps": 0},
            task: SECTIONS[task],
        }  # fmt: skip
        values = copy.deepcopy(values)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                values[section][name] = value
            else:
                values[section] = value
        return values

    return make


@pytest.fixture(scope="session")
def write_shapes() -> Callable[..., str]:
    """Returns a function that writes images of coloured discs and squares with masks, and names them as a source.

    Sizes differ; the share of ignored pixels grows from none in the first image to a third in the last.
    """

    def write(folder: Path, count: int = 8, seed: int = 0) -> str:
        rng = np.random.default_rng(seed)
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        (folder / "classes.txt").write_text("ground\ndisc\nsquare\n")
        for index in range(count):
            height, width = (int(side) for side in rng.integers(24, 41, size=2))
            mask = np.zeros((height, width), dtype=np.uint8)
            rows, columns = np.ogrid[:height, :width]
            top, left, radius = rng.integers(4, height - 12), rng.integers(4, width - 12), rng.integers(5, 9)
            mask[(rows - top) ** 2 + (columns - left) ** 2 < radius**2] = 1
            mask[top + 4 : top + 12, left + 4 : left + 12] = 2
            colours = np.array([[60, 120, 60], [220, 60, 40], [50, 70, 210]])
            pixels = colours[mask] + rng.integers(-20, 21, size=(height, width, 3))
            mask[: height * index // (3 * count)] = 255
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{index}.png")
            Image.fromarray(mask).save(folder / f"masks/{index}.png")
        return f"masks:{folder}"

    return write


@pytest.fixture
def write_objects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Returns a function that writes images of coloured squares and discs as COCO has them, and names them as a source.

    Squares are polygons, discs are runs; of all images but the last, which has none, each has two or three objects;
    every third one has a crowd. Category ids are 3 and 7. Indexes lie in the test's own folder.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(folder: Path, count: int = 8, seed: int = 0) -> str:
        rng = np.random.default_rng(seed)
        (folder / "images").mkdir(parents=True)
        images, annotations = [], []
        for index in range(count):
            height, width = (int(side) for side in rng.integers(40, 73, size=2))
            pixels = np.full((height, width, 3), (60, 120, 60), dtype=np.int64)
            images.append(
                {"id": 10 * index + 5, "file_name": f"{index}.png", "height": height, "width": width}
            )
            for position in range(0 if index == count - 1 else 2 + index % 2):
                side = int(rng.integers(10, 20))
                left, top = int(rng.integers(width - side)), int(rng.integers(height - side))
                rows, columns = np.ogrid[:height, :width]
                inside = (abs(rows - top - side / 2 + 0.5) < side / 2) & (
                    abs(columns - left - side / 2 + 0.5) < side / 2
                )
                segmentation: Any = [[left, top, left + side, top, left + side, top + side, left, top + side]]
                if disc := position % 2 == 1:
                    middle = side / 2 - 0.5  # of pixels, so that the disc fills its box
                    inside = (rows - top - middle) ** 2 + (columns - left - middle) ** 2 < (side / 2) ** 2
                    edges = np.flatnonzero(np.diff(inside.T.ravel(), prepend=False, append=False))
                    counts = np.diff(edges, prepend=0, append=inside.size).tolist()
                    segmentation = {"size": [height, width], "counts": counts}
                pixels[inside] = (220, 60, 40) if disc else (50, 70, 210)
                annotations.append({
                    "id": 100 * index + position + 1, "image_id": 10 * index + 5, "category_id": 7 if disc else 3,
                    "bbox": [left, top, side, side], "area": int(inside.sum()),
                    "iscrowd": int(index % 3 == 0 and disc), "segmentation": segmentation,
                })  # fmt: skip
            pixels += rng.integers(-20, 21, size=pixels.shape)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{index}.png")
        categories = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}]
        values = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "instances.json").write_text(json.dumps(values))
        return f"instances:{folder}"

    return write


@pytest.fixture
def recipe_values(values_in: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """As `values_in`, in a run folder of the test's own."""
    return lambda *args, **changes: values_in(changes.pop("run_dir", tmp_path / "run"), *args, **changes)


@pytest.fixture
def make_recipe(recipe_values: Callable[..., dict[str, Any]]) -> Callable[..., Recipe]:
    """As `recipe_values`, checked and built."""
    return lambda *args, **changes: build_recipe(recipe_values(*args, **changes))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Returns a function that saves the values of a recipe as YAML, and names the file."""

    def write(values: dict[str, Any]) -> str:
        OmegaConf.save(OmegaConf.create(values), tmp_path / "recipe.yaml")
        return str(tmp_path / "recipe.yaml")

    return write
