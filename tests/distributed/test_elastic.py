"""A run saved on n ranks goes on with m: the losses of one that never stopped, whatever the ZeRO stage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from ranks import run_ranks

pytestmark = pytest.mark.slow

Values = Callable[..., dict[str, Any]]

# What a user's JSON may change about where DeepSpeed keeps a parameter.
ELSEWHERE = {
    2: {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True},
    3: {"stage": 3, "sub_group_size": 3000, "offload_optimizer": {"device": "cpu"}},
}


@pytest.mark.parametrize(
    ("stage", "before", "after", "precision"),
    [
        (0, 1, 2, "fp32"), (1, 1, 2, "fp32"), (1, 4, 2, "bf16"), (2, 2, 4, "fp32"), (2, 2, 1, "bf16"),
        (3, 2, 1, "fp32"), (3, 4, 2, "fp32"), (3, 2, 4, "bf16"),
    ],
)  # fmt: skip
def test_another_number_of_ranks_goes_on(
    recipe_values: Values, tmp_path: Path, stage: int, before: int, after: int, precision: str
) -> None:
    values = recipe_values(
        train__ds_config=f"zero{stage}", train__precision=precision, checkpoint__save_every_steps=3
    )
    goes_on(values, tmp_path, before, after, precision)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_fine_tuning_goes_on(recipe_values: Values, tmp_path: Path, stage: int) -> None:
    """In the middle of Mixup, with a group of parameters for each layer."""
    values = recipe_values("fine-tuning", train__ds_config=f"zero{stage}", checkpoint__save_every_steps=3)
    goes_on(values, tmp_path, 2, 1, "fp32")


@pytest.mark.parametrize(("stage", "before", "after"), [(2, 4, 2), (3, 1, 4), (2, 2, 2), (3, 2, 2)])
def test_a_users_json_goes_on_too(
    recipe_values: Values, tmp_path: Path, stage: int, before: int, after: int
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": ELSEWHERE[stage]}))
    values = recipe_values(train__ds_config=str(file), checkpoint__save_every_steps=3)
    # On as many ranks as before it is the JSON alone that changes.
    earlier = str(file) if before != after else f"zero{stage}"
    goes_on(values, tmp_path, before, after, "fp32", earlier)


def goes_on(
    values: dict[str, Any],
    tmp_path: Path,
    before: int,
    after: int,
    precision: str,
    earlier: str | None = None,
) -> None:
    """Goes on from step 3 of a run that went on itself, with another JSON (`earlier`) where one is given."""
    values["train"]["micro_batch"] = 4  # the same micro-batches on 1, 2 and 4 ranks
    ds_config = earlier or values["train"]["ds_config"]
    unbroken = values | {
        "run_dir": str(tmp_path / "unbroken"),
        "train": values["train"] | {"ds_config": ds_config},
    }
    run_ranks(cases.train, before, unbroken)
    shutil.copytree(unbroken["run_dir"], values["run_dir"])
    shutil.rmtree(Path(values["run_dir"]) / "checkpoints" / "step_00000006")
    run_ranks(cases.train, after, values)
    assert "resumed" in (Path(values["run_dir"]) / "logs" / "rank_0.log").read_text()
    found, expected = cases.curve(values["run_dir"]), cases.curve(unbroken["run_dir"])
    assert len(found) == 6
    assert found[:3] == expected[:3]
    # The order of sums alone differs between numbers of ranks: in fp32 it was seen to change a loss by 7e-8, in bf16,
    # whose sums keep 8 bits, by 2e-4. An Adam step counted twice is 2e-5 off after one step, 4e-4 after two.
    tolerance = {"fp32": 1e-6, "bf16": 1e-3}[precision]
    np.testing.assert_allclose(found[3:], expected[3:], rtol=tolerance)


def test_another_stage_is_refused_by_name(recipe_values: Values) -> None:
    values = recipe_values(train__ds_config="zero3")
    run_ranks(cases.train_until_preempted, 1, values, 1)
    values["train"]["ds_config"] = "zero2"
    assert (
        "written with ZeRO stage (train.ds_config)=3, this run has 2"
        in run_ranks(cases.train_or_error, 1, values)[0]
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_training_goes_on_while_a_checkpoint_is_written(
    recipe_values: Values, tmp_path: Path, stage: int
) -> None:
    """The checkpoint of step 2 is held up until step 4 is taken: it is of step 2 all the same."""
    values = recipe_values(train__ds_config=f"zero{stage}", checkpoint__keep_last=3)
    run_ranks(cases.train, 2, values)
    held_up = values | {"run_dir": str(tmp_path / "held_up")}
    run_ranks(cases.train_with_a_slow_disk, 2, held_up, 2, 4)
    expected = cases.curve(values["run_dir"])
    assert cases.curve(held_up["run_dir"]) == expected
    lines = cases.read_metrics(Path(held_up["run_dir"]), "checkpoint")
    assert [line["step"] for line in lines] == [2, 4, 6]
    checkpoints = [Path(held_up["run_dir"]) / f"checkpoints/step_{step:08d}" for step in (2, 4, 6)]
    for line, folder in zip(lines, checkpoints, strict=True):
        assert line["bytes"] == sum(file.stat().st_size for file in folder.glob("*.pt"))
        assert min(line["stall_s"], line["write_s"], line["disk_mb_per_s"]) > 0
    shutil.rmtree(checkpoints[1])
    shutil.rmtree(checkpoints[2])
    run_ranks(cases.train, 2, held_up)
    assert cases.curve(held_up["run_dir"]) == expected


def test_a_written_checkpoint_is_whole_after_the_next_step(recipe_values: Values) -> None:
    values = recipe_values(checkpoint__save_every_steps=3)
    for seen in run_ranks(cases.train_and_watch_a_checkpoint, 2, values):
        assert seen[:3] == [False] * 3
        assert not seen[5], "written by step 4, known to all at step 5, whole before step 6"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_full_for_one_rank_stops_all(recipe_values: Values, victim: int) -> None:
    values = recipe_values(train__ds_config="zero3")
    errors = run_ranks(cases.train_on_a_full_disk, 2, values, 4, victim)
    assert errors[0] == errors[1]
    assert "step_00000004: the checkpoint could not be written ([Errno 28] No space left" in errors[0]
    assert "the last whole one is step_00000002" in errors[0]
    assert [path.name for path in (Path(values["run_dir"]) / "checkpoints").glob("step_*")] == [
        "step_00000002"
    ]
