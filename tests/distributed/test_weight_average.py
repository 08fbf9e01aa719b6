"""`optim.ema_decay`: timm's moving average at every ZeRO stage, evaluated and exported; training does not notice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fd_scale.api import export
from fd_scale.metrics import read_metrics
from fd_scale.shards import AVERAGE, MASTERS, Shards, fill

pytestmark = pytest.mark.slow

Values = Callable[..., dict[str, Any]]

DECAY = 0.6  # six steps change the average by much more than rounding does
OFFLOADED = {
    "zero_optimization": {"stage": 3, "sub_group_size": 3000, "offload_optimizer": {"device": "cpu"}}
}


def weights(run_dir: str | Path, step: int, kind: str) -> dict[str, Tensor]:
    shards = Shards(Path(run_dir) / f"checkpoints/step_{step:08d}")
    found = {}
    for name, shape in shards.shapes.items():
        found[name] = torch.empty(shape)
        fill(found[name].view(-1), shards.chunks(name, kind))
    return found


def module_of(tensors: dict[str, Tensor]) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name.replace(".", "/"), nn.Parameter(tensor.clone()))
    return module


@pytest.mark.parametrize(
    ("ds_config", "ranks", "precision"),
    [
        ("zero0", 1, "fp32"), ("zero0", 2, "bf16"), ("zero1", 2, "bf16"), ("zero2", 2, "fp32"), ("zero3", 1, "fp32"),
        ("zero3", 2, "bf16"), ("offloaded", 2, "bf16"),
    ],
)  # fmt: skip
def test_it_is_timms_and_training_does_not_notice(
    recipe_values: Values, tmp_path: Path, ds_config: str, ranks: int, precision: str
) -> None:
    """Evaluated after every step: the weights come back from each exchange to the last bit."""
    if ds_config == "offloaded":
        ds_config = str(tmp_path / "offloaded.json")
        Path(ds_config).write_text(json.dumps(OFFLOADED))

    def values(name: str, **changes: Any) -> dict[str, Any]:
        settings = {
            "train__ds_config": ds_config, "train__precision": precision, "checkpoint__save_every_steps": 1,
            "checkpoint__keep_last": 9, "log__evaluate_every_steps": 1, "data__evaluation": "digits:test",
        }  # fmt: skip
        return recipe_values("fine-tuning", run_dir=str(tmp_path / name), **settings | changes)

    averaged, plain = values("averaged", optim__ema_decay=DECAY), values("plain")
    at_start = values("start", train__steps=1, optim__lr=1e-30, optim__warmup_steps=0)
    run_ranks(cases.train_all, ranks, [averaged, plain, at_start])
    assert cases.curve(averaged["run_dir"]) == cases.curve(plain["run_dir"])
    measured = [read_metrics(Path(each["run_dir"]), "evaluation") for each in (averaged, plain)]
    assert [len(lines) for lines in measured] == [6, 6]
    assert all(ours["loss"] != theirs["loss"] for ours, theirs in zip(*measured, strict=True))
    trained = module_of(weights(at_start["run_dir"], 1, MASTERS))
    expected = ModelEmaV3(trained, decay=DECAY)
    for step in range(1, 7):
        masters = weights(averaged["run_dir"], step, MASTERS)
        assert all(map(torch.equal, masters.values(), weights(plain["run_dir"], step, MASTERS).values()))
        trained.load_state_dict({name.replace(".", "/"): tensor for name, tensor in masters.items()})
        expected.update(trained)
        found = module_of(weights(averaged["run_dir"], step, AVERAGE)).state_dict()
        for name, tensor in expected.module.state_dict().items():
            # Two ways to write the same sum: fp32 rounds once or twice a step.
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    differences = [(found[name] - masters[name.replace("/", ".")]).abs().max() for name in found]
    assert max(differences) > 1e-4, "else the test could not tell an average from the weights"


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_it_is_what_is_evaluated_and_exported(
    recipe_values: Values, tmp_path: Path, stage: int, ranks: int
) -> None:
    settings = {"train__ds_config": f"zero{stage}", "data__evaluation": "digits:test"}
    averaged = recipe_values(
        "fine-tuning", optim__ema_decay=0.99, run_dir=str(tmp_path / "averaged"), **settings
    )
    plain = recipe_values("fine-tuning", run_dir=str(tmp_path / "plain"), **settings)
    run_ranks(cases.train_all, ranks, [averaged, plain])
    losses = {}
    for values in (averaged, plain):
        during = read_metrics(Path(values["run_dir"]), "evaluation")[-1]
        (afterwards,) = run_ranks(cases.evaluate, 1, values["run_dir"], [])
        losses[values["run_dir"]] = during["loss"]
        np.testing.assert_allclose(during["loss"], afterwards["loss"], rtol=1e-5)
    assert abs(np.diff(list(losses.values()))) > 1e-4
    found = load_file(export(averaged["run_dir"], tmp_path / "out") / "model.safetensors")
    assert "moving average of those that were trained, decay 0.99" in (tmp_path / "out/README.md").read_text()
    expected = weights(averaged["run_dir"], 6, AVERAGE)
    assert found
    assert all(torch.equal(tensor, expected[f"backbone.{name}"]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("stage", "before", "after"), [(0, 1, 1), (0, 1, 2), (1, 2, 2), (2, 2, 1), (3, 1, 2), (3, 2, 2)]
)
def test_it_goes_on_with_another_number_of_ranks(
    recipe_values: Values, tmp_path: Path, stage: int, before: int, after: int
) -> None:
    def values(name: str) -> dict[str, Any]:
        settings = {
            "train__ds_config": f"zero{stage}",
            "train__micro_batch": 8,
            "checkpoint__save_every_steps": 3,
        }
        return recipe_values("fine-tuning", run_dir=str(tmp_path / name), optim__ema_decay=DECAY, **settings)

    unbroken, resumed = values("unbroken"), values("resumed")
    run_ranks(cases.train, before, unbroken)
    shutil.copytree(unbroken["run_dir"], resumed["run_dir"])
    shutil.rmtree(Path(resumed["run_dir"]) / "checkpoints/step_00000006")
    run_ranks(cases.train, after, resumed)
    assert "resumed" in (Path(resumed["run_dir"]) / "logs/rank_0.log").read_text()
    found, expected = (weights(each["run_dir"], 6, AVERAGE) for each in (resumed, unbroken))
    for name, tensor in expected.items():
        # Gradients that are summed in another order move a weight by less than a hundredth of a step of 1e-3.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0 if before == after else 1e-5)


def test_batch_norm_is_refused(
    recipe_values: Values, write_shapes: Callable[..., str], tmp_path: Path
) -> None:
    shapes = write_shapes(tmp_path / "shapes", count=16)
    values = recipe_values(
        "segmentation",
        data={"train": shapes, "num_workers": 0},
        optim__ema_decay=0.9,
        segmentation__norm="batch",
    )
    assert (
        "optim.ema_decay: got 0.9, and the model has BatchNorm layers"
        in run_ranks(cases.train_or_error, 1, values)[0]
    )
