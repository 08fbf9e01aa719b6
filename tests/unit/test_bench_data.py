"""`bench data`, and what the plan makes of its number: all ways run on the same files, cores add up.

And that the command line gives each benchmark what it asks for.
"""

import contextlib
import importlib
import inspect
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fd_scale import cli
from fd_scale.benchmarks.data import BATCH, LIMIT, OURS, _jpeg_files, _ours, bench_data
from fd_scale.config import Recipe
from fd_scale.data import open_source
from fd_scale.errors import UserError
from fd_scale.hardware import GPUS
from fd_scale.plan import input_needed, plan, to_json


@pytest.fixture
def photos(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    for number in range(10):
        image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        folder = tmp_path / "photos" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.{'png' if number == 9 else 'jpg'}")
    return f"imagefolder:{tmp_path}/photos"


@pytest.mark.slow
def test_all_ways_run(photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("webdataset", reason="webdataset is of the extra [dev]")
    rate = bench_data(photos, 2 * BATCH, 1, 16, 4, str(tmp_path / "data.json"))
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["images"] == 9, "the PNG file is left out"
    assert list(found["images_per_s"]) == [
        LIMIT, "decode and crop", OURS, f"{OURS}, 100,000,000 images", f"{OURS}, 4 crops an image",
        "torchvision's ImageFolder", "timm's create_loader", "webdataset",
    ]  # fmt: skip
    for [speed] in found["images_per_s"].values():
        assert speed["wall"] > 0
        assert speed["core"] > 0
    assert rate == found["images_per_s"][f"{OURS}, 4 crops an image"][0]["core"]
    assert LIMIT.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["step"], ["finetune", "R"], ["features", "R"], ["segmentation", "R"], ["prediction", "R"],
        ["detection", "R"], ["annotations"], ["index"], ["order"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_benchmarks_are_given_what_they_ask_for(words: list[str]) -> None:
    options = cli.parsed(["bench", *words])
    module, function = options.function.split(".")
    asked = inspect.signature(getattr(importlib.import_module(f"fd_scale.benchmarks.{module}"), function))
    assert all(name in asking for name, asking in zip(options.given, asked.parameters, strict=True))
    assert all(hasattr(options, name) for name in options.given)


def test_a_source_without_jpeg_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    (tmp_path / "0.png").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="none of its images is a whole JPEG file"):
        bench_data(f"imagefolder:{tmp_path}", 10, 1, 8, 1, None)


def test_damaged_files_are_left_out_and_any_number_of_crops_will_do(photos: str, tmp_path: Path) -> None:
    first, second, *_ = sorted(tmp_path.glob("photos/*/*.jpg"))
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(b"no image")
    files = _jpeg_files(photos, open_source(photos), 10, tmp_path, 16)
    assert len(files.data) == len(files.source) == 7
    for crops in (3, 100):
        with contextlib.closing(_ours(files, BATCH, crops)) as done:
            assert next(done) % crops == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench", "data", "digits:test", "--images", "0"], "--images, --rounds, --size, --crops: expected"),
        (["bench", "data", "digits:test", "--gpus", "8"], "--recipe, --gpus and --gpu say together"),
        (
            ["plan", "digits/distill", "--gpus", "1", "--gpu", "h100", "--images-per-core", "0"],
            "--images-per-core: got 0.0, expected a number above 0",
        ),
        (["plan", "digits/distill", "--measure", "--images-per-core", "9"], "remove --images-per-core"),
    ],
)
def test_wrong_options(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_cores_of_a_node(make_recipe: Callable[..., Recipe]) -> None:
    found = plan("small", make_recipe(train__steps=10), GPUS["h100"], 16, images_per_core=50.0)
    for choice in (found.own, found.choices[0]):
        per_node = 16 / choice.step_seconds / 2  # 16 images a step, of which a node of two takes half
        assert found.images_per_s_of_a_node(choice) == pytest.approx(per_node)
        assert found.cores_of_a_node(choice) == math.ceil(per_node / 50)
    assert found.best is not None
    [line] = input_needed(found)
    cores = found.cores_of_a_node(found.best)
    assert f"take {cores} of its cores at 50 images/s a core" in line
    assert f"data.num_workers={math.ceil(cores / 8)} on each of 8 ranks" in line
    assert to_json(found)["best"]["cores_of_a_node"] == cores
    assert input_needed(plan("views", make_recipe("contrastive", train__steps=10), GPUS["h100"], 1)) == []


@pytest.mark.slow
def test_epochs_have_all_crops(make_recipe: Callable[..., Recipe]) -> None:
    steps = [
        plan(
            "small",
            make_recipe(data__crops=crops, train__steps=None, train__epochs=2),
            GPUS["h100"],
            1,
            images=160,
        ).num_steps
        for crops in (1, 4)
    ]
    assert steps == [20, 80]
