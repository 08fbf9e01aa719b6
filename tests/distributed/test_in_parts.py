"""Models that do not fit a rank: built, loaded and run in parts, with the numbers of whole ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import parts_cases
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file
from test_equality import assert_same
from test_students import CONVNEXT, EVA, SWIN_TEACHER, TIMM_TEACHER, VIT
from torch.utils._python_dispatch import TorchDispatchMode

from fd_scale.config import ModelConfig
from fd_scale.engine import quicker_deepspeed
from fd_scale.models import build_model

Values = Callable[..., dict[str, Any]]

FAMILIES = [SWIN_TEACHER, VIT, TIMM_TEACHER, EVA, CONVNEXT]
# 136 M parameters, 519 MiB in fp32; the largest one has 36 MiB.
LARGE: dict[str, Any] = {
    "name": "swin_v2_tiny",
    "overrides": {"embed_dim": 192, "depths": [1, 1, 14, 1], "num_heads": [6, 12, 24, 48], "window_size": 8},
}


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [(1, torch.float32), pytest.param(3, torch.float32, marks=pytest.mark.slow), (2, torch.bfloat16)],
)
def test_initial_values_are_those_of_a_whole_build(ranks: int, dtype: torch.dtype) -> None:
    """Bit for bit, also where a parent initialises again, or scales, what a child has made; all ranks hold parts."""
    for found in run_ranks(parts_cases.built_both_ways, ranks, FAMILIES, dtype):
        assert len(found) == len(FAMILIES)
        for differing, num_values, left_whole in found:
            assert (differing, left_whole) == ([], 0)
            assert num_values > 20


def test_what_was_never_set_is_not_gathered() -> None:
    """What a module initialises in its own constructor, in whatever order and however often, does not travel."""
    for sent, whole in run_ranks(parts_cases.bytes_sent_by_building, 2, SWIN_TEACHER):
        assert sent == 0 < whole


def test_weights_of_files_are_read_into_parts(tmp_path: Path) -> None:
    """A file of other names (a plain ViT's), and an index with two shards."""
    plain = build_model(ModelConfig(**TIMM_TEACHER)).state_dict()
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in plain.items()}, tmp_path / "a.safetensors"
    )
    folder = tmp_path / "shards"
    write_shards(build_model(ModelConfig(**SWIN_TEACHER)).state_dict(), folder, 2)
    sections = [
        TIMM_TEACHER | {"weights": str(tmp_path / "a.safetensors")}, SWIN_TEACHER | {"weights": str(folder)},
    ]  # fmt: skip
    for found in run_ranks(parts_cases.built_both_ways, 2, sections, torch.float32):
        assert [(differing, left) for differing, _, left in found] == [([], 0)] * 2


def write_shards(state: dict[str, torch.Tensor], folder: Path, num_shards: int) -> None:
    folder.mkdir()
    names = list(state)
    size = -(-len(names) // num_shards)
    weight_map = {name: f"{index // size}.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "task",
    [
        "distill",
        *(pytest.param(task, marks=pytest.mark.slow) for task in ("contrastive", "masked", "classification")),
    ],
)
def test_a_task_starts_from_the_same_values(recipe_values: Values, task: str) -> None:
    """Also where the student starts from a teacher that is itself in parts."""
    values = recipe_values(task)
    if task == "distill":
        values["distill"]["teachers"][0]["partitioned"] = True
        values["model"] = values["distill"]["teachers"][0]["model"] | {"weights": "teacher"}
    for differing in run_ranks(parts_cases.task_built_both_ways, 2, values):
        assert differing == []


@pytest.mark.slow
@pytest.mark.parametrize("from_files", [False, True])
def test_a_rank_never_holds_all(tmp_path: Path, from_files: bool) -> None:
    """Peak host memory of building: a rank's part, a few of the largest parameters and one shard of the files."""
    section = dict(LARGE)
    if from_files:
        write_shards(build_model(ModelConfig(**LARGE)).state_dict(), tmp_path / "shards", 16)
        section["weights"] = str(tmp_path / "shards")
    # Five times the largest parameter (whole, gathered, in transit), 32 MiB that are not trimmed yet, a shard of 36.
    slack = (5 * 36 + 32 + 36) * parts_cases.MIB
    for grown, whole in run_ranks(parts_cases.peak_of_building, 2, section, True):
        assert grown < whole / 2 + slack < whole, f"{grown / 2**20:.0f} of {whole / 2**20:.0f} MiB"
    if not from_files:
        [(grown, whole)] = run_ranks(parts_cases.peak_of_building, 1, section, False)
        assert grown > 0.9 * whole, "the peak is seen where all is whole"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_partitioned_teacher_teaches_alike(recipe_values: Values, tmp_path: Path, stage: int) -> None:
    """Also where a rank has no image for it, where pictures are drawn by rank 0, and in evaluations."""
    curves, held = [], []
    for partitioned in (False, True):
        teachers = [
            {"model": SWIN_TEACHER, "partitioned": partitioned, "share": 0.1},
            {"model": TIMM_TEACHER, "partitioned": partitioned, "layers": [0, -1]},
        ]
        values = recipe_values(
            run_dir=str(tmp_path / str(partitioned)), model=VIT, distill={"teachers": teachers},
            train__ds_config=f"zero{stage}", train__micro_batch=2, train__steps=3,
            data__evaluation="digits:test", log__images_every_steps=1,
        )  # fmt: skip
        held.append(run_ranks(parts_cases.train_and_measure_teacher, 2, values))
        curves.append((cases.curve(values["run_dir"]), cases.losses(values["run_dir"], "evaluation")))
    (plain, evaluated), (parts, evaluated_in_parts) = curves
    assert_same(parts, plain)
    assert len(evaluated) == 1
    assert evaluated_in_parts == pytest.approx(evaluated, rel=1e-5)  # as the losses of training
    (whole, _), (part, left_whole) = held[0][0], held[1][0]
    assert left_whole == 0
    assert whole / 2 <= part < whole / 2 + 100  # padding: less than an element a parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3_offload_optimizer", "zero3_offload_param"])
def test_offload_changes_no_loss_and_resumes_exactly(
    recipe_values: Values, tmp_path: Path, name: str
) -> None:
    plain = recipe_values(run_dir=str(tmp_path / "plain"), train__ds_config="zero3")
    run_ranks(cases.train, 2, plain)
    whole = recipe_values(run_dir=str(tmp_path / "whole"), train__ds_config=name)
    on_host = run_ranks(parts_cases.where_states_are, 2, whole)[0]
    assert on_host == ["offload_optimizer=True", f"offload_param={name.endswith('param')}"]
    assert_same(cases.curve(whole["run_dir"]), cases.curve(plain["run_dir"]))
    killed = recipe_values(run_dir=str(tmp_path / "killed"), train__ds_config=name)
    assert run_ranks(cases.train_then_die, 2, killed, 5, "between steps", 1)[1] == -9
    run_ranks(cases.train, 2, killed)
    assert cases.curve(killed["run_dir"]) == cases.curve(whole["run_dir"])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (SWIN_TEACHER, ["layers.0.blocks.0", "layers.1.blocks.0"]),
        pytest.param(VIT, ["model.blocks.0", "model.blocks.1", "model.blocks.2"], marks=pytest.mark.slow),
        pytest.param(EVA, ["model.blocks.0", "model.blocks.1"], marks=pytest.mark.slow),
    ],
)
def test_zero3_gathers_block_by_block(
    recipe_values: Values, model: dict[str, Any], expected: list[str]
) -> None:
    values = recipe_values(model=model, train__ds_config="zero3")
    assert run_ranks(parts_cases.leaves, 2, values)[0] == [f"backbone.{name}" for name in expected]


def test_weight_decay_knows_the_whole_shapes(recipe_values: Values, tmp_path: Path) -> None:
    """In parts every parameter has one dimension, and those do not decay."""
    groups = [
        run_ranks(
            parts_cases.decay_groups, 2, recipe_values(run_dir=str(tmp_path / name), train__ds_config=name)
        )
        for name in ("zero1", "zero3")
    ]
    assert groups[0] == groups[1]
    assert [len(names) > 10 for names in groups[0][0]] == [True, True]


class Operations(TorchDispatchMode):
    """Notes which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_hooks_are_put_on_what_has_a_gradient() -> None:
    """As DeepSpeed's own: its function knows the module's, sees the gradient, and changes no value."""
    seen: list[Any] = []

    class Hook(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("what looks at signatures is not called")

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: Any) -> None:
            seen.append(inputs[0])

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(grad)
            return grad

    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert quicker_deepspeed._hooked(Hook.apply, (x, 1))[0] is x
    assert seen == []
    out, other = quicker_deepspeed._hooked(Hook.apply, (x, 1))
    (2 * out).sum().backward()
    assert torch.equal(out, x)
    assert other == 1
    assert x.grad is not None
    assert seen[0] is x
    assert [each.tolist() for each in (*seen[1:], x.grad)] == [[2.0] * 3] * 2


def test_the_bias_is_added_in_the_product() -> None:
    """ZeRO-3's linear layer would add it in a pass of its own; values and gradients are torch's."""
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 3), (4, 3), (4,))]
    with Operations() as operations:
        out_BLE = quicker_deepspeed._linear(*inputs)
    assert "addmm" in operations.names
    assert not {"mm", "add", "add_"} & set(operations.names)
    theirs_BLE = torch.ops.aten.linear(*inputs)
    for each in (out_BLE, theirs_BLE):
        each.mul_(2).add_(1)  # as models do
    torch.testing.assert_close(out_BLE, theirs_BLE)
    ours, theirs = (torch.autograd.grad(each.square().sum(), inputs) for each in (out_BLE, theirs_BLE))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)  # fp32: sums may go in another order
