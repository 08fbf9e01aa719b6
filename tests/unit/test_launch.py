"""Runs started as processes: how they end, and which are not begun again."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fd_scale import launch
from fd_scale.config import load_recipe, to_yaml
from fd_scale.data import open_source
from fd_scale.errors import UserError
from fd_scale.launch import Launcher, OutOfTimeError, concurrently, is_evaluated, is_of
from fd_scale.models import resolved
from fd_scale.run_folder import create


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is run in Python's place; a test writes it."""
    file = tmp_path / "program"
    file.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    return file


def test_a_run_of_ranks_and_settings(program: Path, tmp_path: Path) -> None:
    program.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS $@" > {tmp_path}/seen\n')
    assert Launcher(num_ranks=2).run("distill", "a.yaml", tmp_path / "run", ["seed=1"]) == tmp_path / "run"
    threads, *arguments = (tmp_path / "seen").read_text().split()
    assert threads == "1"
    assert arguments == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fd_scale", "distill", "a.yaml",
        f"run_dir={tmp_path}/run", "seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["exit 75", "kill -TERM $$"])
def test_a_run_that_was_preempted(program: Path, tmp_path: Path, end: str) -> None:
    program.write_text(f"#!/bin/sh\n{end}\n")
    with pytest.raises(
        OutOfTimeError, match="run: not complete when the time was up; the same command goes on"
    ):
        Launcher().run("distill", "a.yaml", tmp_path / "run", [])


def test_the_time_is_up_while_it_runs(program: Path, tmp_path: Path) -> None:
    program.write_text('#!/bin/sh\ntrap "exit 75" TERM\nwhile true; do sleep 0.05; done\n')
    with pytest.raises(OutOfTimeError):
        Launcher(end=time.monotonic() + 0.3).run("distill", "a.yaml", tmp_path / "run", [])


def test_what_a_run_that_failed_said(program: Path, tmp_path: Path) -> None:
    program.write_text("#!/bin/sh\necho the reason >&2\nexit 2\n")
    with pytest.raises(
        UserError, match=r"`fd-scale distill a\.yaml run_dir=.*` ended with code 2: the reason"
    ):
        Launcher().run("distill", "a.yaml", tmp_path / "run", [])
    # torchrun's report of each rank follows.
    report = "  exitcode: 2\n  error_file: <N/A>\n  traceback: none\n======"
    program.write_text(f"#!/bin/sh\nprintf 'step 1\nfd-scale: the reason\n{report}\n' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"` ended with code 1: fd-scale: the reason$"):
        Launcher(num_ranks=2).run("distill", "a.yaml", tmp_path / "run", [])


class LastFirst(ThreadPoolExecutor):
    """Its threads are slow to begin what comes first."""

    def map(self, function: Callable[..., Any], arguments: Iterable[Any]) -> Iterator[Any]:  # type: ignore[override]
        begun = [self.submit(function, each) for each in reversed(list(arguments))]
        return (each.result() for each in reversed(begun))


def test_what_did_not_begin_has_the_error_of_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two threads, one may fail in what is second before the other has begun what is first."""
    monkeypatch.setattr(launch, "ThreadPoolExecutor", LastFirst)
    calls = []

    def fail(number: int) -> None:
        calls.append(number)
        raise OutOfTimeError("the time was up")

    with pytest.raises(OutOfTimeError, match="the time was up"):
        list(concurrently(fail, [(0,), (1,)], 1))
    assert calls == [1]


def test_which_runs_are_complete(tmp_path: Path) -> None:
    settings = ["data.evaluation=digits:test", "train.steps=3", "train.epochs=null", "model.weights=null"]
    settings += ["optim.warmup_epochs=0"]
    recipe = resolved(load_recipe("digits/finetune", [*settings, f"run_dir={tmp_path}"]))
    assert not is_of(tmp_path, "digits/finetune", settings)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert not is_of(tmp_path, "digits/finetune", settings), "of which weights, is not said"
    (tmp_path / "environment.json").write_text(json.dumps([{}, {"weights": {"model.weights": None}}]))
    assert is_of(tmp_path, "digits/finetune", settings)
    without = [line for line in to_yaml(recipe).splitlines() if "erasing" not in line]
    (tmp_path / "recipe.yaml").write_text("\n".join(without))
    assert is_of(tmp_path, "digits/finetune", settings), "of a version that had no such setting"
    assert not is_of(tmp_path, "digits/finetune", [*settings, "optim.lr=0.5"])
    for step, complete in ((2, False), (3, True)):
        line = json.dumps({"kind": "evaluation", "step": step, "top1": 0.5})
        (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
        assert is_evaluated(tmp_path, "digits/finetune", settings) == complete
    assert not is_evaluated(tmp_path, "digits/finetune", [*settings, "seed=7"])
    (tmp_path / "preempt").touch()
    assert not is_evaluated(tmp_path, "digits/finetune", settings), "a start removes it"


def test_other_weights_of_one_name_make_another_run(tmp_path: Path) -> None:
    weights, run = tmp_path / "a.safetensors", tmp_path / "run"
    settings = ["train.steps=3", "train.epochs=null", "optim.warmup_epochs=0", f"model.weights={weights}"]
    for number in (0.0, 1.0):
        save_file({"x": torch.full((1,), number)}, weights)
        assert not is_of(run, "digits/finetune", settings)
        recipe = resolved(load_recipe("digits/finetune", [*settings, f"run_dir={run}"]))
        create(recipe, open_source(recipe.data.train))
        assert is_of(run, "digits/finetune", settings)
