"""A classifier of named classes: its names are its run's, whatever is measured or predicted with it."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fd_scale import api, cli
from fd_scale.config import build_recipe, load_recipe
from fd_scale.errors import UserError
from fd_scale.models import build_model
from fd_scale.verbs.evaluate import saying_where_it_started
from fd_scale.verbs.shard import shard

NAMES = ["Hund & Katze", "größe", "z.b. bird"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any, values_in: Callable[..., dict[str, Any]]) -> Path:
    """Learns by heart three colours; the last class of the images has none but in training."""
    folder = tmp_path_factory.mktemp("classification")
    rng = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 60, size=(30, 40, 3))
            pixels[..., label] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"{number} é.png")
    values = values_in(
        folder / "run", "classification", data__train=f"imagefolder:{folder / 'images'}", train__global_batch=12,
        train__micro_batch=12, train__steps=40, optim__lr=5e-3, data__evaluation=f"imagefolder:{folder / 'images'}",
    )  # fmt: skip
    api.train(build_recipe(values))
    return folder / "run"


def test_other_names_are_refused_and_numbers_are_places(run: Path, tmp_path: Path) -> None:
    assert json.loads((run / "classes.json").read_text()) == {"names": NAMES, "mask_values": None}
    right = api.evaluate(run)
    assert right["top1"] > 0.9
    numbers, renamed = tmp_path / "numbers", tmp_path / "renamed"
    for place, name in enumerate(NAMES):
        shutil.copytree(run.parent / "images" / name, numbers / str(place))
        shutil.copytree(run.parent / "images" / name, renamed / name.replace("Hund & Katze", "zHund"))
    found = api.evaluate(run, [f"data.evaluation=imagefolder:{numbers}"])
    assert found["top1"] == right["top1"]
    assert [each["name"] for each in found["classes"]] == NAMES
    with pytest.raises(
        UserError, match=r"other classes than the run was trained on \(only in one: \['Hund & Katze', "
    ):
        api.evaluate(run, [f"data.evaluation=imagefolder:{renamed}"])


def test_results_may_lie_elsewhere_and_the_run_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"--out: .*file/x cannot be written \(Not a directory\); choose another with --out"
    ):
        api.evaluate(run, out=tmp_path / "file/x")
    found = api.evaluate(run, out=tmp_path / "a/b")
    assert json.loads((tmp_path / "a/b/step_00000040.json").read_text()) == found
    with pytest.raises(
        UserError, match=r"no such checkpoint, kept are step_00000038, step_00000040; name one"
    ):
        api.evaluate(run / "checkpoints/step_00000007")
    starts = json.loads((run / "environment.json").read_text())
    starts[-1]["folder"] = str(run.parent)
    (run / "environment.json").write_text(json.dumps(starts))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"images is not a folder.*images is relative, and the run was started in {run.parent}$",
    ):
        api.evaluate(run, ["data.evaluation=imagefolder:images"])


def test_a_teacher_that_is_relative_to_another_folder(tmp_path: Path) -> None:
    (tmp_path / "here/vit").mkdir(parents=True)
    (tmp_path / "environment.json").write_text(json.dumps([{"folder": str(tmp_path / "here")}]))
    recipe = load_recipe("digits/distill", ["distill.teachers.0.model.weights=vit"])
    assert recipe.distill is not None
    with (
        pytest.raises(UserError, match=r"; vit is relative, and the run was started in .*here$"),
        saying_where_it_started(tmp_path, recipe),
    ):
        build_model(recipe.distill.teachers[0].model)


def test_shards_have_the_names_beside_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    list(shard(f"imagefolder:{run.parent / 'images'}", str(tmp_path / "shards"), "1GB"))
    found = api.evaluate(run, [f"data.evaluation=tar:{tmp_path / 'shards'}"])
    assert [each["name"] for each in found["classes"]] == NAMES
    (tmp_path / "shards/classes.txt").unlink()
    again = api.evaluate(run, [f"data.evaluation=tar:{tmp_path / 'shards'}"])
    assert [each["name"] for each in again["classes"]] == NAMES, "those of the run"


def test_predict_writes_a_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["predict", str(run), str(run.parent / "images"), "--out", str(tmp_path / "out é")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out é/predictions.csv")
    with (tmp_path / "out é/predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert rows[0]["image"] == "Hund & Katze/0 é.png"
    for row in rows:
        shares = [float(row[f"probability_{place}"]) for place in (1, 2, 3)]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=2e-4)
        assert {row[f"class_{place}"] for place in (1, 2, 3)} == set(NAMES)
    right = sum(row["class_1"] == row["image"].split("/")[0] for row in rows)
    assert right / 12 == pytest.approx(api.evaluate(run)["top1"])
    photos = tmp_path / "photos"
    shutil.copytree(run.parent / "images" / NAMES[0], photos)
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "._broken.png").write_bytes(b"macOS lays such beside files")
    (photos / "a folder.png").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(next(photos.glob("0*")), tmp_path / "elsewhere/linked.png")
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"1 of 6 images cannot be decoded: broken\.png; .* the others gave is in"
    ):
        api.predict(run, photos, tmp_path / "rest")
    table = (tmp_path / "rest/predictions.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 6, "a head, and a row for each of the others"
    assert table[-1].startswith("link/linked.png,")
    with pytest.raises(
        UserError, match=r"--masks: a class for each pixel .*; leave it out; those of a detection's"
    ):
        api.predict(run, run.parent / "images", tmp_path, masks=True)
