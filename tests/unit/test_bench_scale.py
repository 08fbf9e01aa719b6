"""`bench scale`: sizes, settings, and predicted beside measured. `tests/distributed` starts the ranks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fd_scale import cli
from fd_scale.benchmarks import scale_report
from fd_scale.benchmarks.records import Environment, Record, Records
from fd_scale.benchmarks.scale import Job, default_sizes
from fd_scale.config import load_recipe
from fd_scale.plan.scaling import Assumptions

VERSIONS: dict[str, str | None] = dict.fromkeys(("torch", "triton", "deepspeed", "timm"), "1")
HERE = Environment(gpu="NVIDIA H100 80GB HBM3", versions=VERSIONS, commit="c", source="s", time="t")


@pytest.fixture
def recipe_file(recipe_values: Callable[..., dict[str, Any]], saved: Callable[[dict[str, Any]], str]) -> str:
    return saved(recipe_values(train__ds_config="zero3", train__global_batch=16, train__micro_batch=8))


def record(job: Job, size: int, median_ms: float | None = None, **values: Any) -> Record:
    images_per_s = None if median_ms is None else 16e3 / median_ms
    return Record(
        cell=job.cell(size), recipe=job.recipe, settings=job.settings(size), environment=HERE, num_ranks=size,
        micro_batch=job.micro_batch(size), median_ms=median_ms, images_per_s=images_per_s, **values,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "local", "expected"),
    [(1, 1, [1]), (4, 4, [1, 2, 4]), (6, 6, [1, 2, 4, 6]), (32, 8, [8, 16, 32]), (40, 8, [8, 16, 32, 40])],
)
def test_default_sizes(monkeypatch: pytest.MonkeyPatch, ranks: int, local: int, expected: list[int]) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert default_sizes(ranks) == expected


def test_settings_of_a_size(recipe_file: str) -> None:
    job = Job(recipe=recipe_file, overrides=("optim.grad_clip=1",))
    recipe = load_recipe(recipe_file, job.settings(2))
    assert (recipe.optim.grad_clip, recipe.train.global_batch, job.micro_batch(2)) == (1, 16, 8)
    weak = Job(recipe=recipe_file, weak=True)
    assert (load_recipe(recipe_file, weak.settings(4)).train.global_batch, weak.micro_batch(4)) == (32, 8)


def test_what_needs_no_measurement(recipe_file: str, tmp_path: Path) -> None:
    job = Job(recipe=recipe_file)
    records = Records(tmp_path / "records.json")
    records.add(record(job, 1, 100.0))
    records.add(record(job, 2, error="time-out"))
    assert job.has(records, 1, HERE)
    assert not job.has(records, 2, HERE), "what failed is tried again"
    assert not job.has(records, 4, HERE)
    other = Job(recipe=recipe_file, overrides=("optim.grad_clip=1",))
    assert not other.has(records, 1, HERE), "other settings"
    assert [each.num_ranks for each in job.rows(Records.read(records.path))] == [1, 2]
    assert other.rows(records) == Job(recipe=recipe_file, weak=True).rows(records) == job.rows(None) == []


@pytest.mark.slow
def test_predicted_beside_measured(
    recipe_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fewest ranks say how quickly they compute; the rest follows, and nothing waits for input or checkpoints."""
    monkeypatch.setenv("COLUMNS", "150")
    job = Job(recipe=recipe_file)
    counts = scale_report.count(load_recipe(recipe_file, job.settings(1)))
    monkeypatch.setattr(scale_report, "count", lambda recipe: counts)
    measured = [record(job, 1, 10_000.0, sent_bytes=0.0), record(job, 2, 8_000.0, sent_bytes=151_200.0)]
    assumed = Assumptions(jitter=0, launch_us=0, overlap=0)
    points, found = scale_report.predictions(measured, assumed)
    assert points[0].training_s == pytest.approx(10)
    assert points[1].training_s == pytest.approx(5 + points[1].links_s + points[1].latency_s)
    noisy, _ = scale_report.predictions(measured, Assumptions())
    assert noisy[0].training_s == pytest.approx(10)
    assert 5 < noisy[1].training_s < 5.1
    late, _ = scale_report.predictions(measured[1:], Assumptions(jitter=0.1, overlap=1))
    assert late[0].training_s == pytest.approx(8, rel=1e-3)
    assert found.jitter == 0
    assert found.utilisation < 1e-3
    slow_host = replace(assumed, launch_us=1e9)
    hosted, found = scale_report.predictions(measured, slow_host)
    assert hosted[0].training_s == pytest.approx(10), "a host is no slower than what was measured"
    assert found.launch_us < slow_host.launch_us
    failed = record(job, 4, error="rank 3: out of memory")
    scale_report.show(job.name, [*measured, failed], assumed)
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    sent = points[1].choice.traffic
    assert rows[0] == ["4", "4", "", "rank 3: out of memory"] + [""] * 6
    assert rows[1] == ["1", "2 x 8", "10.0000", "10.0000", "1.6", "1.6", "100.0%", "100.0%", "0.000", "0.000"]
    assert rows[2][:4] == ["2", "1 x 8", f"{points[1].training_s:.4f}", "8.0000"]
    assert rows[2][7:] == ["62.5%", f"{(sent.gathered + sent.reduced) / 1e6:.3f}", "0.151"]
    assert "with the links of h100, and" in out
    scale_report.show(job.name, [], assumed)
    assert "not measured" in capsys.readouterr().out
    scale_report.show(job.name, [failed], assumed)
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "1"], "--steps: got 1, expected at least 2"),
        (["--sizes", "1,x"], "--sizes: got 1,x, expected numbers of ranks from 1 to 2"),
        (["--sizes", "4"], "--sizes: got 4, expected numbers of ranks from 1 to 2"),
        (["train.global_batch=15", "train.micro_batch=1"], "15 images do not divide over 2 ranks"),
        (["--assume", "jiter=1"], "did you mean jitter"),
    ],
)
def test_wrong_options(
    recipe_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    sentence: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "scale", recipe_file, *arguments])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_other_tasks_are_refused(
    recipe_values: Callable[..., dict[str, Any]],
    saved: Callable[[dict[str, Any]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "scale", saved(recipe_values("contrastive")), "--report"])
    assert "is contrastive, expected distill" in capsys.readouterr().err
