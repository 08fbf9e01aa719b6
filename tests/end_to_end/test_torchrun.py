"""As a user runs it: torchrun, a recipe file, and what stands in the run folder afterwards."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fd_scale.config import load_recipe
from fd_scale.models import resolved
from fd_scale.run_folder import read_recipe


@pytest.mark.slow
def test_two_ranks_from_the_command_line(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = recipe_values(
        train__ds_config="zero3",
        data__num_workers=1,
        log__images_every_steps=2,
        data__evaluation="digits:test",
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "fd_scale",
        "distill",
    ]
    done = subprocess.run(
        [sys.executable, *command, str(file), "train.steps=4"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = Path(values["run_dir"])
    assert "distill step 4/4" in done.stderr, "plain lines where there is no terminal"
    assert done.stderr.count("distill step 4/4  loss") == 1, "rank 0 alone speaks"

    assert read_recipe(run) == resolved(load_recipe(file, ["train.steps=4"]))
    start = json.loads((run / "environment.json").read_text())[0]
    assert "distill" in start["command"]
    assert start["versions"]["deepspeed"]
    assert {path.name for path in (run / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["train"] * 4 + ["evaluation"]

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("loss", "learning_rate", "grad_norm", "images_per_s", "memory_peak_gib"):
        assert f"train/{name}" in scalars
        assert np.isfinite([event.value for event in events.Scalars(f"train/{name}")]).all()
    pictures = events.Images("features")
    assert [picture.step for picture in pictures] == [2, 4]
    size = (pictures[0].width, pictures[0].height)
    assert size == (3 * 24, 8 * 24), "eight rows: image, teacher and student side by side"
