"""`bench giant`: what is recorded, what a second call does, and the goals. `tests/distributed` takes real steps."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fd_scale import cli
from fd_scale.benchmarks import giant
from fd_scale.benchmarks.cells import CELLS, MODELS, RECIPE, WAYS, Cell
from fd_scale.benchmarks.records import Environment, Record, Records
from fd_scale.benchmarks.report import goals
from fd_scale.config import load_recipe

SHAPE = {"patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
TOY = tuple(
    f"{place}.{setting}"
    for place in ("model", "distill.teachers.0.model")
    for setting in (
        "name=swin_v2_tiny",
        "img_size=24",
        *(f"overrides.{name}={value}" for name, value in SHAPE.items()),
    )
)
FOUND = {
    "num_steps": 10, "median_ms": 100.0, "p10_ms": 99.0, "p90_ms": 103.0, "images_per_s": 40.0, "build_s": 1.0,
    "first_step_s": 1.0, "phases_s": {"forward": 0.05, "backward": 0.04, "optimizer": 0.01},
}  # fmt: skip
# In the place of a cell's process: says that it ran, then does what the cell's micro-batch stands for.
PROGRAM = """
import sys, time
file, recipe, way, steps, *settings = sys.argv[1:]
open(LOG, "a").write(way + "\\n")
if "train.micro_batch=2" in settings:
    sys.exit(9)
if "train.micro_batch=3" in settings:
    time.sleep(60)
open(file, "w").write(ERROR if "train.micro_batch=1" in settings else FOUND)
"""


def toy(micro_batch: int, way: str = "zero3") -> Cell:
    return Cell(model="B", policy="none", micro_batch=micro_batch, way=way, settings=TOY)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that says which ways were started so far."""
    log = tmp_path / "started"
    log.touch()
    error = json.dumps({"error": "out of memory: tried to allocate much"})
    values = f"LOG, ERROR, FOUND = {str(log)!r}, {error!r}, {json.dumps(FOUND)!r}"
    monkeypatch.setattr(giant, "PROGRAM", (sys.executable, "-c", values + PROGRAM))
    return lambda: log.read_text().split()


def measure(out: Path, *cells: Cell, **options: Any) -> dict[str, Record]:
    giant.bench_giant(out, device="cpu", cells=cells, **options)
    records = Records.newest(out)
    return {} if records is None else records.by_cell


@pytest.mark.slow
def test_what_goes_wrong_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giant, "CELL_TIMEOUT_S", 2.0)
    records = measure(tmp_path / "out", toy(1), toy(2), toy(3), toy(4), toy(4, "timm"))
    assert [record.error for record in records.values()] == [
        "out of memory: tried to allocate much",
        "its process ended with code 9",
        "time-out: not done after 2 s",
        None,
        None,
    ]
    assert records["B none 4 timm"].plan_gib is None, "the plan is of ours"
    whole = records["B none 4 zero3"]
    assert whole.images_per_s == 40
    assert whole.mfu is None
    assert whole.plan_gib is not None
    assert 0.9 < whole.plan_gib < 1, "DeepSpeed's bucket of 5e8 bf16 gradients is all that a toy takes"
    assert not list((tmp_path / "out").glob("*.draft*"))


def test_a_second_call_goes_on_where_the_first_stopped(
    tmp_path: Path, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giant._Planner, "numbers", lambda *given: (None, None))
    out, cells = tmp_path / "out", [toy(4, way) for way in ("zero3", "zero1", "timm")]
    assert measure(out, *cells, minutes=0) == {}
    measure(out, *cells, match="zero1")
    assert started() == ["zero1"]
    records = measure(out, *cells)
    assert started() == ["zero1", "zero3", "timm"]
    assert set(records) == {cell.name for cell in cells}
    here = Environment.here()
    monkeypatch.setattr(Environment, "here", lambda: replace(here, source="other code"))
    measure(out, cells[0])
    assert started()[3:] == ["zero3"], "what another code was measured on is measured again"


def record(cell: str, images_per_s: float, **values: Any) -> Record:
    versions = dict.fromkeys(("torch", "triton", "deepspeed", "timm"), "1")
    environment = Environment(gpu="NVIDIA H200", versions=versions, commit="c", source="s", time="t")
    return Record(
        cell=cell, recipe=RECIPE, settings=[], environment=environment, micro_batch=int(cell.split()[2]),
        **FOUND | {"images_per_s": images_per_s} | values,
    )  # fmt: skip


def test_goals() -> None:
    records = [
        record("G none 64 zero3", 100, mfu=0.46, peak_gib=100.0, plan_gib=105.0),
        record("G block 64 zero3", 80, mfu=0.40, peak_gib=70.0, plan_gib=60.0),
        record("G block 64 zero3-reference", 20, mfu=0.9, peak_gib=70.0, plan_gib=10.0),
        record("B none 128 zero1", 300),
        record("B none 128 timm-compiled", 250),
        record("B none 256 timm-compiled", 100),
        record("B none 128 timm", 50),
        replace(record("B none 256 zero1", 0), images_per_s=None, median_ms=None, error="out of memory"),
    ]
    assert [str(goal) for goal in goals(records)] == [
        "MFU of SwinV2-G >= 45%: 46.0%, met",
        "SwinV2-B, images/s over timm compiled >= 1.5: 1.20, missed",
        "plan within 10% of the peak of memory: -14.3% at the worst, missed",
    ]
    assert all("not measured" in str(goal) for goal in goals([]))


def test_without_a_gpu_it_is_one_sentence_or_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "giant", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
    cli.main(["bench", "giant", "--out", str(tmp_path), "--report"])
    assert "Whole steps on one GPU: not measured" in capsys.readouterr().out
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(SystemExit):
        cli.main(["bench", "giant", "--out", str(tmp_path), "--report"])
    assert "no file of `bench giant` or `bench scale`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "giant", "--match", "("])
    assert "no regular expression" in capsys.readouterr().err


def test_cells_are_recipes() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert {cell.model for cell in CELLS} == set(MODELS)
    assert {cell.way for cell in CELLS} == set(WAYS)
    for cell in CELLS:
        recipe = load_recipe(RECIPE, cell.overrides)
        assert recipe.distill is not None
        [teacher] = recipe.distill.teachers
        assert teacher.model.name == recipe.model.name
        assert recipe.train.global_batch == cell.micro_batch


def test_the_report_of_the_documented_folder() -> None:
    """As docs/measurements.md has it: every file there is one of records, whichever is the newest."""
    for file in sorted((Path(__file__).parents[2] / "docs/measurements").glob("*.json")):
        assert Records.read(file).by_cell, file
