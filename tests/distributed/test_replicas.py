"""ZeRO-3 within groups of ranks, which are replicas of one another: the run of one group, and of a bare loop.

And hpZ, DeepSpeed's own way to gather within a group.
"""

import json
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

# Let go between the forward and the backward pass: what is gathered for it comes from the second copy.
LET_GO = {
    "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0,
}  # fmt: skip


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
        task,
        train__steps=5,
        train__ds_config="zero3",
        train__micro_batch=micro_batch,
        train__mics_shard_size=2,
    )
    if task == "distill":
        values["distill"]["teachers"][0]["partitioned"] = partitioned
    run_ranks(cases.train, 4, values)
    assert_same(cases.curve(values["run_dir"]), expected)
    files = list((Path(values["run_dir"]) / "checkpoints/step_00000005").glob("*optim_states.pt"))
    assert len(files) == 2, "a file for each part, not for each rank"


@pytest.mark.parametrize(
    ("before", "after"), [((4, 2), (4, 0)), ((2, 0), (4, 2)), ((4, 2), (2, 0)), ((4, 2), (4, 2))]
)
def test_a_run_goes_on_with_other_replicas(
    recipe_values: Values, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Ranks, and ranks of a replica; the moving average of the weights too."""

    def values(name: str, size: int) -> dict[str, Any]:
        return recipe_values(
            run_dir=str(tmp_path / name), train__ds_config="zero3", train__micro_batch=4, train__mics_shard_size=size,
            optim__ema_decay=0.6, checkpoint__save_every_steps=3, log__evaluate_every_steps=3,
            data__evaluation="digits:test",
        )  # fmt: skip

    unbroken, broken = values("unbroken", before[1]), values("broken", after[1])
    run_ranks(cases.train, before[0], unbroken)
    shutil.copytree(unbroken["run_dir"], broken["run_dir"])
    shutil.rmtree(Path(broken["run_dir"]) / "checkpoints/step_00000006")
    run_ranks(cases.train, after[0], broken)
    assert "resumed" in (Path(broken["run_dir"]) / "logs/rank_0.log").read_text()
    found, expected = (cases.curve(each["run_dir"]) for each in (broken, unbroken))
    assert len(found) == 6
    np.testing.assert_allclose(found, expected, rtol=0 if before == after else 1e-6)  # as in test_elastic.py
    averages = [cases.losses(each["run_dir"], "evaluation") for each in (broken, unbroken)]
    assert averages[0] == pytest.approx(averages[1], rel=1e-6)


def test_what_is_not_finite_in_one_replica_is_skipped_in_all(recipe_values: Values) -> None:
    values = recipe_values(
        train__precision="bf16", train__ds_config="zero3", train__micro_batch=4, train__mics_shard_size=2
    )
    for skipped, error in run_ranks(cases.train_with_bad_losses, 4, values, [1, 2, 4], float("nan")):
        assert (skipped, error) == ([False, True, True, False, True, False], "")


def test_other_runs_in_the_same_process(recipe_values: Values, tmp_path: Path) -> None:
    """DeepSpeed keeps the groups of the last engine in globals: each run has its own."""
    runs = []
    for name, stage, replica, near in (
        ("replicas", 3, 2, 1), ("whole", 3, 0, 1), ("near", 3, 0, 2), ("none_near", 3, 0, 4), ("again", 3, 2, 1),
        ("not_in_parts", 1, 0, 1),
    ):  # fmt: skip
        file = tmp_path / f"{name}.json"
        zero = {"stage": stage, "zero_hpz_partition_size": near} | LET_GO
        file.write_text(json.dumps({"zero_optimization": zero}))
        runs.append(recipe_values(
            run_dir=str(tmp_path / name), train__ds_config=str(file), train__micro_batch=4, train__steps=4,
            train__mics_shard_size=replica,
        ))  # fmt: skip
    run_ranks(cases.train_all, 4, runs)
    for values in runs[1:]:
        assert_same(cases.curve(values["run_dir"]), cases.curve(runs[0]["run_dir"]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hpz_changes_no_loss(recipe_values: Values, tmp_path: Path, precision: str) -> None:
    """Its second copies are those of the same step and dtype: after an exchange with averages, and a resume, too."""
    curves, evaluated = [], []
    for zero in ({}, {"zero_hpz_partition_size": 2}):
        file = tmp_path / f"{len(zero)}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 3} | LET_GO | zero}))
        values = recipe_values(
            run_dir=str(tmp_path / f"run_{len(zero)}"), train__ds_config=str(file), train__micro_batch=4,
            train__precision=precision, optim__ema_decay=0.6, log__evaluate_every_steps=3,
            data__evaluation="digits:test",
        )  # fmt: skip
        values["distill"]["teachers"][0]["partitioned"] = True
        run_ranks(cases.train_until_preempted, 4, values, 4)
        run_ranks(cases.train, 4, values)
        curves.append(cases.curve(values["run_dir"]))
        evaluated.append(cases.losses(values["run_dir"], "evaluation"))
    assert len(curves[0]) == 6
    assert curves[1] == curves[0]
    assert evaluated[1] == evaluated[0]


def test_a_run_of_replicas_goes_back(recipe_values: Values) -> None:
    """To its checkpoint, in the middle of a process, and takes other samples from there."""
    values = recipe_values(
        watch={"max_bad_steps": 2, "max_rollbacks": 1}, train__ds_config="zero3", train__micro_batch=4,
        train__mics_shard_size=2,
    )  # fmt: skip
    for skipped, error in run_ranks(cases.train_with_bad_losses, 4, values, [2, 3], float("nan")):
        assert (skipped, error) == ([False, False, True, True, False, False, False, False], "")
    undisturbed = recipe_values(run_dir=values["run_dir"] + "_undisturbed", train__ds_config="zero3")
    run_ranks(cases.train, 2, undisturbed)
    after, before = cases.losses(values["run_dir"]), cases.losses(undisturbed["run_dir"])
    np.testing.assert_allclose(after[:2], before[:2], rtol=1e-5)
    assert len(after) == 6
    assert abs(after[2] / before[2] - 1) > 1e-3, "other samples"
