"""`compare`: ordinary runs from several starts, resumed, paired by seed."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fd_scale import cli
from fd_scale.errors import UserError
from fd_scale.launch import Launcher
from fd_scale.verbs import compare
from fd_scale.verbs.compare import Comparison

Values = Callable[..., dict[str, Any]]


@pytest.fixture
def recipe(recipe_values: Values, saved: Callable[[dict[str, Any]], str]) -> str:
    return saved(recipe_values("classification", data__evaluation="digits:test", train__steps=4))


@pytest.mark.slow
def test_runs_of_two_starts(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "compare", recipe, "--run-dir", str(tmp_path / "out"), "--seeds", "2", "--side-by-side", "2", "optim.lr=2e-3",
        "--start", "plain", "--start", "larger", "model.overrides.embed_dim=32", "classification.label_smoothing=0",
    ]  # fmt: skip
    cli.main(arguments)
    assert "less plain, paired" in capsys.readouterr().out
    written = json.loads((tmp_path / "out/compare.json").read_text())
    assert list(written) == ["plain", "larger"]
    runs = sorted(path.parent.name for path in (tmp_path / "out").glob("*/recipe.yaml"))
    assert runs == ["larger-0", "larger-1", "plain-0", "plain-1"]
    lines = [json.loads(line) for line in (tmp_path / "out/larger-1/metrics.jsonl").read_text().splitlines()]
    assert written["larger"]["top1"][1] == next(
        line["top1"] for line in lines if line["kind"] == "evaluation"
    )
    assert (tmp_path / "out/compare.png").stat().st_size > 5000
    assert written["larger"]["difference"] == pytest.approx(
        sum(written["larger"]["top1"]) / 2 - sum(written["plain"]["top1"]) / 2
    )
    # A second call repeats nothing: complete runs end at once, and none begins anew.
    before = (tmp_path / "out/plain-0/metrics.jsonl").read_text()
    cli.main([*arguments, "--seeds", "1"])
    assert (tmp_path / "out/plain-0/metrics.jsonl").read_text() == before


def test_differences_are_paired() -> None:
    found = Comparison({"a": [0.5, 0.7], "b": [0.6, 0.8], "c": [0.4, 0.9]})
    values: Any = found.to_json()
    assert values["b"]["difference"] == pytest.approx(0.1)
    assert values["b"]["difference_sd"] == pytest.approx(0, abs=1e-12)
    assert values["c"]["difference"] == pytest.approx(0.05)
    assert values["c"]["difference_sd"] == pytest.approx(0.3 / 2**0.5)
    assert values["a"]["sd"] == pytest.approx(0.2 / 2**0.5)
    one: Any = Comparison({"a": [0.5], "b": [0.6]}).to_json()
    assert one["b"]["sd"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "a"], "got 1, expected two starting points"),
        (["--start", "a", "--start", "a"], "two have one name"),
        (["--start", "a b", "--start", "a-b"], "do not make different folders"),
        (["--start", "a/b", "--start", "c"], "becomes part of a folder"),
        (["--start", "a", "--start", "b", "--seeds", "0"], "--seeds: got 0"),
        (["--start", "a", "--start", "b", "--side-by-side", "0"], "--side-by-side: got 0"),
        (["--start", "a", "--start", "b", "--ranks", "0"], "--ranks: got 0"),
        (["--start", "a", "--start", "b", "optim.lrr=1"], "optim.lrr"),
        (["data.evaluation=null", "--start", "a", "--start", "b"], "with data.evaluation"),
    ],
)
def test_what_cannot_be_compared(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", recipe, "--run-dir", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_fails_says_why(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([
            "compare", recipe, "--run-dir", str(tmp_path / "out"), "--seeds", "1",
            "--start", "a", "model.weights=/no.safetensors", "--start", "b",
        ])  # fmt: skip
    error = capsys.readouterr().err
    assert "ended with code 2" in error
    assert "/no.safetensors does not exist" in error


def test_no_run_begins_after_one_that_failed(recipe: str, tmp_path: Path) -> None:
    """With hours of it, the reason would be told hours late."""
    begun = []

    class Failing(Launcher):
        def run(self, verb: str, recipe: str, run_dir: Path, settings: Sequence[str]) -> Path:
            begun.append(run_dir.name)
            time.sleep(0.05)  # all runs are in the queue
            raise UserError("no such weights")

    with pytest.raises(UserError, match="no such weights"):
        compare.compare(recipe, {"a": [], "b": []}, tmp_path / "out", 3, launcher=Failing())
    assert begun == ["a-0"]


def test_a_run_that_was_stopped_does_not_count(tmp_path: Path) -> None:
    """A preempted run ends well below torchrun, with evaluations of earlier steps."""
    with pytest.raises(UserError, match="stopped before its last step; the same command goes on"):
        compare._metric(tmp_path, "top1")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 2, "top1": 0.25}\n')
    assert compare._metric(tmp_path, "top1") == 0.25
    (tmp_path / "preempt").touch()
    with pytest.raises(UserError, match="stopped before its last step"):
        compare._metric(tmp_path, "top1")


def test_every_metric_has_a_name() -> None:
    assert set(compare.METRICS.values()) == set(compare.NAMES)
