"""Labels that cannot be right are seen before an image is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fd_scale.config import Recipe, to_yaml
from fd_scale.data import open_source, spread
from fd_scale.errors import UserError
from fd_scale.finetune import ClassificationTask
from fd_scale.finetune.labels import doubts_of_labels
from fd_scale.verbs.check import check


def digits(labels: Callable[[np.ndarray], np.ndarray]) -> Any:
    source: Any = open_source("digits:train")
    source.labels_N = labels(source.labels_N)
    return source


def test_good_labels_raise_no_doubt() -> None:
    assert doubts_of_labels("data.train", open_source("digits:train")) == []
    some = digits(lambda labels: np.where(np.arange(len(labels)) % 2, labels, -1))
    assert doubts_of_labels("data.train", some) == []
    assert doubts_of_labels("data.train", spread(open_source("digits:train"), 300)) == []


def test_labels_counted_from_one_are_seen() -> None:
    """Where the file names no classes, 1 to 10 mean eleven classes of which the first is empty."""
    source = digits(lambda labels: labels + 1)
    source.num_classes, source.class_names = 11, None
    [doubt] = doubts_of_labels("data.train", source)
    assert doubt == "data.train: no image of 1 of 11 classes: 0; are labels counted from 1?"


def test_labels_that_are_no_class_are_refused_by_name() -> None:
    source = digits(lambda labels: labels + 1)  # the file names ten classes
    with pytest.raises(UserError, match=r"digits:train:\d+ has label 10, and \d+ more .*expected 0 to 9"):
        doubts_of_labels("data.train", source)
    with pytest.raises(UserError, match="has label -2, and 0 more"):
        doubts_of_labels(
            "data.train", digits(lambda labels: np.where(np.arange(len(labels)) == 3, -2, labels))
        )


def test_labels_are_seen_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    few = digits(lambda labels: np.where(labels == 4, 5, labels))
    wrong = digits(lambda labels: np.where(np.arange(len(labels)) % 500 == 499, 77, labels))
    for at_once in (2**20, 7):
        monkeypatch.setattr("fd_scale.finetune.labels._NUM_AT_ONCE", at_once)
        assert doubts_of_labels("data.train", few) == ["data.train: no image of 1 of 10 classes: 4 (4)"]
        with pytest.raises(UserError, match="digits:train:499 has label 77, and 1 more"):
            doubts_of_labels("data.train", wrong)


def test_empty_classes_are_named(
    make_recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for index in range(12):
        (tmp_path / f"data/class{index:02}").mkdir(parents=True)
        if index not in (3, 7):
            Image.new("RGB", (8, 8)).save(tmp_path / f"data/class{index:02}/x.png")
    path = f"imagefolder:{tmp_path / 'data'}"
    recipe = make_recipe("classification", data__train=path, train__global_batch=8)
    ClassificationTask(recipe, None, open_source(path))
    expected = "data.train: no image of 2 of 12 classes: 3 (class03), 7 (class07)"
    assert expected in caplog.text
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    check(str(tmp_path / "recipe.yaml"), [], 1)
    assert "no image of 2 of 12" in " ".join(capsys.readouterr().out.split())
