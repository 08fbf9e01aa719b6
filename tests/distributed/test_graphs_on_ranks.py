"""DeepSpeed around a recorded backbone and teacher; a stand-in for the graphs writes where they would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from ranks import run_ranks

Values = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("stage", "micro_batch", "precision", "world_size"),
    [
        pytest.param(0, 16, "fp32", 1, marks=pytest.mark.slow),
        (1, 16, "bf16", 1),
        pytest.param(2, 4, "fp32", 2, marks=pytest.mark.slow),
    ],
)
def test_the_curve_is_that_without_graphs(
    recipe_values: Values, tmp_path: Path, stage: int, micro_batch: int, precision: str, world_size: int
) -> None:
    """To the bit: also after a checkpoint, an evaluation and pictures."""
    runs = [
        recipe_values(
            run_dir=str(tmp_path / f"graphs_{graphs}"),
            data__evaluation="digits:test",
            train__ds_config=f"zero{stage}",
            train__micro_batch=micro_batch,
            train__precision=precision,
            train__steps=4,
            train__cuda_graphs=graphs,
            log__images_every_steps=2,
            log__evaluate_every_steps=2,
        )
        for graphs in (False, True)
    ]
    run_ranks(cases.train_all_with_stand_ins, world_size, runs)
    for kind in ("train", "evaluation"):
        plain, recorded = (cases.losses(run["run_dir"], kind) for run in runs)
        assert len(plain) == (4 if kind == "train" else 2)
        assert plain == recorded
    plain, recorded = (cases.curve(run["run_dir"]) for run in runs)
    np.testing.assert_array_equal(recorded, plain)
