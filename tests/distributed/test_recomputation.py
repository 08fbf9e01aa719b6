"""Activation checkpointing where ZeRO-3 partitions every parameter: the losses and gradient norms of the plain run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
from ranks import run_ranks
from test_equality import assert_same
from test_students import VIT

from fd_scale import ds_config

pytestmark = pytest.mark.slow

POLICIES = [("none", 1), ("block", 1), ("block", 2), ("selective", 1)]


@pytest.fixture
def zero3(tmp_path: Path) -> str:
    """ZeRO-3 that leaves nothing whole between modules."""
    config = ds_config.read("zero3")
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    return str(tmp_path / "zero3.json")


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_every_policy_trains_alike(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path, zero3: str, name: str
) -> None:
    runs = []
    for mode, period in POLICIES:
        settings: dict[str, Any] = {} if name == "swin" else {"model": VIT}
        runs.append(
            recipe_values(
                run_dir=str(tmp_path / f"{mode}{period}"), train__steps=3, train__micro_batch=4,
                train__ds_config=zero3, train__activation_checkpointing=mode,
                train__checkpointing_period=period, **settings,
            )
        )  # fmt: skip
    run_ranks(cases.train_all, 2, runs)
    plain, *others = [cases.curve(values["run_dir"]) for values in runs]
    assert len(plain) == 3
    for other in others:
        assert_same(other, plain)


def test_compiled_blocks_train_alike(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path, zero3: str
) -> None:
    """With each policy, as traced and differentiated by torch.compile; inductor, which takes a minute, left out."""
    runs = [
        recipe_values(
            run_dir=str(tmp_path / f"{mode}{compiled}"), train__steps=3, train__micro_batch=4, train__ds_config=zero3,
            train__activation_checkpointing=mode, train__compile=compiled,
        )
        for mode, compiled in [("none", False), ("none", True), ("selective", True), ("block", True)]
    ]  # fmt: skip
    run_ranks(cases.train_all_compiled, 2, runs, "aot_eager")
    plain, *others = [cases.curve(values["run_dir"]) for values in runs]
    for other in others:
        assert_same(other, plain)
