"""A job in which one rank hangs: all ranks say where they are, the job ends, and the same command resumes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import os, sys, time
from fd_scale import api
from fd_scale.distill import DistillationTask

given = DistillationTask.inputs
calls = []

def inputs(self, batch):
    calls.append(batch)
    if len(calls) == 6 and os.environ["RANK"] == "1" and os.environ["HANGS"] == "1":
        time.sleep(600)  # as a file system that has gone away would
    return given(self, batch)

DistillationTask.inputs = inputs
api.train(api.load_recipe(sys.argv[1], []))
"""


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_with_the_stacks_of_all(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = recipe_values(train__ds_config="zero3", train__timeout_s=3)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(hangs: str) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path / "recipe.yaml")],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HANGS": hangs},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    job = run("1")
    assert job.returncode != 0
    assert "nothing has happened for 3 s since step 5 (train.timeout_s)" in job.stderr
    logs = Path(values["run_dir"]) / "logs"
    assert "in inputs" in (logs / "rank_1.stacks").read_text(), "where it hangs"
    assert "in train_step" in (logs / "rank_0.stacks").read_text(), "where the others wait"
    again = run("0")
    assert again.returncode == 0, again.stderr
    assert "resumed" in again.stderr
    # The save of step 4 waits for that of step 2; itself it may be in writing when the job ends.
    assert "step_00000002" in again.stderr or "step_00000004" in again.stderr
    assert not list(logs.glob("*.stacks"))
