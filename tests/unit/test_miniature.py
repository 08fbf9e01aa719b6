"""The miniature's table and files, and what it refuses; its runs are those of `compare`, which has tests of its own."""

import json
from pathlib import Path

import pytest

from fd_scale.compare import _jobs
from fd_scale.errors import UserError
from fd_scale.miniature import SCRATCH, TEACHERS, VARIANTS, Row, _write, miniature, table

ROWS = [
    Row("contrastive", "teacher", [0.5, 0.6], 0.4),
    Row("contrastive", "whitened", [0.55, 0.58], 0.3),
    Row("supervised", "teacher", [0.7, 0.7], 0.6),
    Row("supervised", "raw", [0.71, 0.69], 0.5),
    Row("", SCRATCH, [0.2, 0.3], None),
]


def test_a_student_is_compared_with_its_own_teacher_seed_by_seed() -> None:
    columns = {str(column.header): list(column.cells) for column in table(ROWS).columns}
    assert columns["over its teacher"] == ["", "+5.0, -2.0", "", "+1.0, -1.0", ""]
    assert columns["fine-tuned"] == ["55.0%", "56.5%", "70.0%", "70.0%", "25.0%"]
    assert columns["probe"] == ["40.0%", "30.0%", "60.0%", "50.0%", ""]


def test_what_is_written(tmp_path: Path) -> None:
    _write(tmp_path, ROWS)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["teacher"], row["start"], row["finetune"], row["probe"]) for row in rows] == [
        (row.teacher, row.start, row.finetune, row.probe) for row in ROWS
    ]
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no train-00000-\*\.parquet there; expected the files of `uoft-cs/cifar10`"
    ):
        miniature(str(tmp_path), str(tmp_path / "out"))


@pytest.mark.parametrize("recipe", ["miniature/finetune", "miniature/probe"])
def test_its_recipes_can_be_compared(recipe: str, tmp_path: Path) -> None:
    names = [f"{teacher} {start}" for teacher in TEACHERS for start in ("teacher", *VARIANTS)]
    starts = {name: ["model.weights=null"] for name in names}
    assert len(_jobs(recipe, starts, tmp_path, 2, ["data.train=parquet:x"])) == 2 * len(names)
