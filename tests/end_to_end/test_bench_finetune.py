"""`fd-scale bench finetune`: both loops take steps of the same recipe."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fd_scale.benchmarks.finetune import TimmLoop
from fd_scale.config import Recipe

pytestmark = pytest.mark.slow


def test_timms_loop_trains_every_parameter(make_recipe: Callable[..., Recipe]) -> None:
    loop = TimmLoop(make_recipe("fine-tuning"), torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in loop.module.named_parameters()}
    for _ in range(2):  # gains of 1e-5 let little through in the first
        loop.take_step()
    still = [
        name for name, parameter in loop.module.named_parameters() if torch.equal(parameter, before[name])
    ]
    assert still == []


def test_both_loops_are_measured(
    recipe_values: Callable[..., dict[str, Any]], saved: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    file, out = saved(recipe_values("fine-tuning")), tmp_path / "out.json"
    command = [sys.executable, "-m", "fd_scale", "bench", "finetune", file, "--steps", "2"]
    subprocess.run([*command, "--json", str(out)], check=True, timeout=120)
    found = json.loads(out.read_text())
    for loop in ("ours_ms", "timm_ms"):
        assert len(found[loop]) == 2
        assert min(found[loop]) > 0
    other = subprocess.run(
        [*command[:5], "digits/distill"], capture_output=True, text=True, timeout=120, check=False
    )
    assert other.returncode == 2
    assert "bench finetune expects classification" in other.stderr
