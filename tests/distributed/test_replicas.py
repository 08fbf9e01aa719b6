"""ZeRO-3 within groups of ranks, which are replicas of one another: the run of one group, and of a bare loop."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from ranks import run_ranks
from test_equality import assert_same

from fd_scale.config import build_recipe

pytestmark = pytest.mark.slow

Values = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("task", "micro_batch", "partitioned"),
    [("distill", 4, False), ("distill", 2, True), ("fine-tuning", 4, False)],
)
def test_equals_a_bare_loop(
    recipe_values: Values, tmp_path: Path, task: str, micro_batch: int, partitioned: bool
) -> None:
    """Also where a step is two micro-batches."""
    plain = recipe_values(task, run_dir=str(tmp_path / "plain"), train__steps=5, train__micro_batch=16)
    expected = run_ranks(cases.plain_curve, 1, build_recipe(plain))[0]
    values = recipe_values(
        task, train__steps=5, train__ds_config="zero3", train__micro_batch=micro_batch, train__mics_shard_size=2
    )
    if task == "distill":
        values["distill"]["teachers"][0]["partitioned"] = partitioned
    run_ranks(cases.train, 4, values)
    assert_same(cases.curve(values["run_dir"]), expected)
    files = {path.name for path in (Path(values["run_dir"]) / "checkpoints/step_00000005").glob("*optim_states.pt")}
    assert len(files) == 2, "one replica writes"
