"""The miniature's chain, table and files, and what it refuses; its runs are ordinary ones, with tests of their own."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fd_scale import api
from fd_scale.config import load_recipe
from fd_scale.errors import UserError
from fd_scale.launch import Launcher, OutOfTimeError
from fd_scale.miniature import STUDIES, miniature
from fd_scale.miniature.results import SCRATCH, TEACHER, Row, table, write
from fd_scale.miniature.run import _Miniature

ROWS = [
    Row("vit", "contrastive", TEACHER, [0.5, 0.6], 0.4),
    Row("vit", "contrastive", "whitened", [0.55, 0.58], 0.3),
    Row("vit", "supervised", TEACHER, [0.7, 0.7], 0.6),
    Row("vit", "supervised", "raw", [0.71, 0.69], 0.5),
    Row("swin_v2", "contrastive", TEACHER, [0.4, 0.4], 0.6),
    Row("swin_v2", "contrastive", "raw", [0.41, 0.42], 0.5),
    Row("swin_v2", "", SCRATCH, [0.2, 0.3], None),
]


def test_a_student_is_compared_with_its_own_teacher_seed_by_seed() -> None:
    columns = {str(column.header): list(column.cells) for column in table(ROWS).columns}
    assert columns["over its teacher"] == ["", "+5.0, -2.0", "", "+1.0, -1.0", "", "+1.0, +2.0", ""]
    assert columns["fine-tuned"] == ["55.0%", "56.5%", "70.0%", "70.0%", "40.0%", "41.5%", "25.0%"]
    assert columns["probe"] == ["40.0%", "30.0%", "60.0%", "50.0%", "60.0%", "50.0%", ""]


def test_what_is_written(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    assert [Row(**row) for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == ROWS
    assert (tmp_path / "results.png").stat().st_size > 1000


@dataclass(frozen=True)
class Recorded(Launcher):
    """Writes what a run leaves that the next ones need, and trains nothing."""

    jobs: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, verb: str, recipe: str, run_dir: Path, settings: Sequence[str]) -> Path:
        read = load_recipe(recipe, [*settings, f"run_dir={run_dir}"])  # every setting fits every other
        assert read.data.train.startswith("parquet:data/")
        with self.lock:
            self.jobs.append((verb, recipe, tuple(settings)))
        run_dir.mkdir(parents=True)
        top1 = 0.5 + read.seed / 10 if read.task == "classification" else 0.4
        line = {"kind": "evaluation", "step": read.train.steps, "top1": top1}
        (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return run_dir


@pytest.mark.parametrize(
    ("study", "num_students", "num_runs"),
    [("cpu", 4, 26), pytest.param("gpu", 19, 131, marks=pytest.mark.slow)],
)
def test_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: str, num_students: int, num_runs: int
) -> None:
    monkeypatch.setattr(api, "export", lambda run, out: out.mkdir())
    launcher = Recorded()
    rows = _Miniature(STUDIES[study], Path("data"), tmp_path, ["optim.lr=1e-3"], launcher).run()
    assert len(launcher.jobs) == num_runs
    assert [verb for verb, *_ in launcher.jobs].count("distill") == num_students
    assert all("optim.lr=1e-3" in settings for *_, settings in launcher.jobs)
    num_teachers = len(STUDIES[study].teachers) * len(STUDIES[study].architectures)
    assert len(rows) == num_teachers + num_students + len(STUDIES[study].architectures)
    assert rows[0] == Row(rows[0].architecture, "contrastive", TEACHER, rows[0].finetune, 0.4)
    assert rows[0].finetune == [0.5, 0.6, 0.7][: STUDIES[study].num_seeds]
    assert rows[-1] == Row("swin_v2", "", SCRATCH, rows[-1].finetune, None)
    if study == "gpu":
        absolute = next(row for row in rows if row.start == "absolute positions")
        assert (absolute.architecture, absolute.teacher) == ("vit", "contrastive")
        [tuned, *_] = [
            settings for _, recipe, settings in launcher.jobs
            if recipe.endswith("finetune") and any("absolute-positions" in setting for setting in settings)
        ]  # fmt: skip
        assert "model.name=vit_tiny_patch16_224" in tuned, "a student is fine-tuned as what it is"


def test_time_that_is_up(tmp_path: Path) -> None:
    with pytest.raises(
        OutOfTimeError, match="contrastive: not complete when the time was up; the same command"
    ):
        _Miniature(STUDIES["cpu"], Path("data"), tmp_path, [], Launcher(end=0.0)).run()
    assert not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no train-00000-\*\.parquet there; expected the files of `uoft-cs/cifar10`"
    ):
        miniature("cpu", str(tmp_path), str(tmp_path / "out"))
    for name in ("train-00000-of-2.parquet", "test-0.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"--minutes: got 0, expected more than 0"):
        miniature("cpu", str(tmp_path), str(tmp_path / "out"), minutes=0)
