"""`evaluate` gives a run's own metrics again, on any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
from ranks import run_ranks

Values = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("task", "stage", "precision"), [("classification", 3, "bf16"), ("distill", 0, "fp32")]
)
def test_evaluate_gives_the_metrics_of_the_run(
    recipe_values: Values, task: str, stage: int, precision: str
) -> None:
    """300 test images do not divide over 3 ranks' batches of 7."""
    values = recipe_values(
        task, data__evaluation="digits:test", train__ds_config=f"zero{stage}", train__precision=precision,
        train__steps=4, checkpoint__save_every_steps=2,
    )  # fmt: skip
    run_ranks(cases.train, 2, values)
    run_dir = Path(values["run_dir"])
    [logged] = cases.read_metrics(run_dir, "evaluation")
    for ranks, overrides in ((1, []), (3, ["train.micro_batch=7"])):
        found = run_ranks(cases.evaluate, ranks, values["run_dir"], overrides)
        assert all(metrics == found[0] for metrics in found)
        assert found[0]["step"] == 4
        names = [name for name in logged if name in found[0] and name not in ("step", "kind")]
        assert {"top1", "top5", "loss", "calibration_error"} <= set(names) or names == ["loss"]
        for name in names:
            # Batches of another size sum in another order; in bf16 a logit may round to its neighbour.
            assert found[0][name] == pytest.approx(logged[name], rel=2e-2 if precision == "bf16" else 1e-5), (
                name
            )
    written = json.loads((run_dir / "evaluations/step_00000004.json").read_text())
    assert written == found[0]
    if task == "classification":
        assert sum(entry["images"] for entry in written["classes"]) == written["images"] == 300
        assert [entry["name"] for entry in written["classes"]] == list("0123456789")
    earlier = run_ranks(cases.evaluate, 1, str(run_dir / "checkpoints/step_00000002"), [])[0]
    assert earlier["step"] == 2
    assert earlier["loss"] != found[0]["loss"]
