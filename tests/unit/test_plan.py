"""`fd-scale plan`: the arithmetic of memory and time, choices and refusals."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fd_scale import api, cli
from fd_scale.config import Recipe, load_recipe
from fd_scale.data import open_source
from fd_scale.ds_config import grad_accum_dtype
from fd_scale.errors import UserError
from fd_scale.hardware import GPUS, Gpu, find_gpu, mfu, model_flops
from fd_scale.plan import Plan, Policy, count, plan, plot, present_gpu, require_fit, show, to_json, write_json
from fd_scale.plan.counts import Activations, Counts, Line, NotCountedError
from fd_scale.plan.estimate import Traffic, traffic
from fd_scale.plan.memory import Memory, Recorded, Sharding, State, memory, state
from fd_scale.verbs import check

G = 10**9


@pytest.mark.parametrize("task", ["contrastive", "masked", "classification", "segmentation", "detection"])
def test_other_tasks_are_planned(
    make_recipe: Callable[..., Recipe], write_shapes: Callable[..., str], write_objects: Callable[..., str],
    tmp_path: Path, task: str,
) -> None:  # fmt: skip
    writers = {"segmentation": write_shapes, "detection": write_objects}
    data = {"data__train": writers[task](tmp_path / "images", count=16)} if task in writers else {}
    found = plan("small", make_recipe(task, train__micro_batch=16, **data), GPUS["h100"], 1)
    assert found.counts.teacher_flops == found.counts.teacher_bytes == 0
    assert found.best is not None
    assert found.num_steps == 6


@pytest.mark.parametrize("crops", [1, 3, 32])
def test_pairs_of_several_crops_are_planned(make_recipe: Callable[..., Recipe], crops: int) -> None:
    changes = {"data__crops": crops, "train__global_batch": 192, "train__micro_batch": 70}
    found = plan("small", make_recipe("fine-tuning", **changes), GPUS["h100"], 1)
    assert found.own.micro_batch == {1: 64, 3: 48, 32: 64}[crops]
    assert all(choice.micro_batch % (2 * crops) == 0 for choice in found.choices)
    plain = plan("small", make_recipe("classification", **changes), GPUS["h100"], 1)
    assert found.counts.student_flops == plain.counts.student_flops


def test_a_frozen_backbone_is_planned_as_a_teacher(make_recipe: Callable[..., Recipe]) -> None:
    """Its weights have no gradient and no optimizer, its layers no backward pass; ZeRO-3 holds them in parts."""
    head = {"num_classes": 3, "head": "linear", "auxiliary_weight": 0.0}
    trained, frozen = (
        count(make_recipe("segmentation", segmentation=head | {"frozen": frozen})) for frozen in (False, True)
    )
    backbone = 4 * (trained.num_parameters - frozen.num_parameters)  # fp32
    assert (trained.frozen_bytes, frozen.frozen_bytes) == (0, backbone)
    assert frozen.student_flops < 0.2 * trained.student_flops
    assert frozen.student_flops + frozen.teacher_flops == pytest.approx(trained.student_flops)
    none = Policy("none")
    assert frozen.activations[none].kept.an_image < 0.5 * trained.activations[none].kept.an_image
    for stage, whole in (("2", 1.0), ("3", 0.25)):
        held = state(frozen, Sharding(stage, 4, 1, {}), "fp32")
        assert held.teacher == whole * backbone
        assert held.optimizer == 12 * frozen.num_parameters / 4


def numbers(num_parameters: int = 10 * G, kept: float = 1 * G, teacher: int = 0) -> Counts:
    """Counts made up: few large parameters, and small ones that stay whole at stage 3."""
    costs = {
        Policy("none"): Activations(Line(0, 10 * kept), Line(0, 0), 0.0),
        Policy("block"): Activations(Line(0, kept), Line(0, kept), 5.0 * G),
    }
    small = [1000] * 10
    return Counts((num_parameters - sum(small), *small), teacher, Line(0, 0), 5.0 * G, 7.0 * G, costs, {}, "")


@pytest.mark.parametrize(
    ("stage", "gpus", "precision", "accumulation", "expected"),
    [  # parameters, gradients, optimizer; in units of 1e9 bytes, for 1e10 parameters
        ("0", 4, "fp32", 1, (40, 40, 80)),
        ("0", 4, "bf16", 1, (20, 20, 120)),
        ("1", 4, "bf16", 1, (20, 5, 30)),
        ("1", 4, "bf16", 2, (20, 40, 30)),  # gradients of micro-batches are summed in fp32
        ("2", 4, "bf16", 2, (20, 10, 30)),
        ("2", 4, "fp32", 2, (40, 10, 30)),
        ("3", 1, "bf16", 1, (20, 20, 120)),
        ("3", 4, "bf16", 1, (5, 5, 30)),
        ("3", 4, "fp32", 2, (10, 10, 30)),
        ("hierarchical", 4, "bf16", 1, (5, 5, 30)),
        ("hierarchical", 64, "bf16", 1, (2.5, 2.5, 15)),
    ],
)
def test_states_of_every_stage(
    stage: str, gpus: int, precision: str, accumulation: int, expected: tuple[float, ...]
) -> None:
    given = {"zero_optimization": {"stage": int(stage) if stage.isdigit() else 3}}
    sums = grad_accum_dtype(given, precision, accumulation)
    found = state(numbers(), Sharding(stage, gpus, accumulation, {}), precision, sums=sums)
    whole = 10_000 * (4 if precision == "fp32" else 2) if gpus > 1 and stage in ("3", "hierarchical") else 0
    assert found.parameters == expected[0] * G + whole
    assert (found.gradients, found.optimizer) == (expected[1] * G, expected[2] * G)
    assert found.steady == sum(expected) * G + whole


@pytest.mark.parametrize(("stage", "gradients"), [("0", 20), ("1", 20 + 5), ("2", 20 + 5), ("3", 5)])
def test_a_graph_writes_whole_gradients(stage: str, gradients: float) -> None:
    recorded: Recorded = "teacher" if stage == "3" else "all"
    assert state(numbers(), Sharding(stage, 4, 1, {}), "bf16", recorded).gradients == gradients * G


def test_buffers_are_those_of_the_json() -> None:
    def buffers(stage: str, **zero: Any) -> float:
        return state(numbers(), Sharding(stage, 4, 1, zero), "bf16").buffers

    assert buffers("0") == 0
    assert buffers("2") == 2 * 5e8
    assert buffers("2", overlap_comm=True, reduce_bucket_size=100) == 2 * 2 * 100
    assert (
        buffers("3") == 2 * 5e8 + 2 * 1e9
    )  # the bucket, and a billion parameters that are gathered at a time
    assert buffers("3", reduce_bucket_size=100, stage3_max_live_parameters=1000) == 2 * 100 + 2 * 1000
    none_whole = Sharding("3", 4, 1, {"stage3_param_persistence_threshold": 0})
    assert state(numbers(), none_whole, "bf16").parameters == 5 * G


def test_the_fullest_moment() -> None:
    held = State(1, 2, 4, 8, 16, step=1000)
    costs = Activations(Line(10, 100), Line(5, 1), 0.0)
    counts = replace(numbers(), teacher_working=Line(0, 300))
    assert memory(counts, replace(held, step=0), costs, 1) == Memory(replace(held, step=0), 110, 300 - 110)
    assert memory(counts, held, costs, 1).working == 1000 - 110
    assert memory(counts, held, costs, 1).total == 31 + 1000
    alone = replace(counts, teacher_working=Line(0, 0))
    assert memory(alone, held, costs, 10).working == 15
    # What graphs work in stays with them.
    assert memory(counts, held, costs, 1, "teacher").working == 300 + 1000 - 110
    assert memory(counts, replace(held, step=0), costs, 1, "teacher").working == 300 + 6
    assert memory(counts, held, costs, 1, "all").working == 6 + 300 + 1000


def test_recipes_with_graphs_are_planned_with_them() -> None:
    settings = ["distill.teachers.0.model.weights=null", "train.global_batch=64", "train.micro_batch=8"]
    recipe = load_recipe("imagenet/clip_vit_base", [*settings, "train.cuda_graphs=true"])
    counts = count(recipe)

    def totals(recipe: Recipe) -> dict[str, float]:
        planned = plan("b", recipe, find_gpu("h100"), 8, images=0, counts=counts)
        kind = (planned.own.policy, planned.own.micro_batch)
        alike = (each for each in planned.choices if (each.policy, each.micro_batch) == kind)
        return {each.stage: each.memory.total for each in alike}

    plain, found = totals(load_recipe("imagenet/clip_vit_base", settings)), totals(recipe)
    pool = counts.teacher_working.at(8)
    assert found["1"] - plain["1"] > pool + 2 * counts.num_parameters
    assert found["3"] - plain["3"] == pytest.approx(pool)


def test_traffic_by_hand() -> None:
    """1 GB of parameters; NVLink 300 and InfiniBand 25 GB/s."""
    gpu = GPUS["a100-80g"]

    def sent(stage: str, count: int, accumulation: int, gpu: Gpu = gpu, **zero: Any) -> Traffic:
        return traffic(
            [G // 2], 2, Sharding(stage, count, accumulation, {"stage3_max_reuse_distance": 0} | zero), gpu
        )

    alone, node, two = (sent("3", count, 2) for count in (1, 8, 16))
    assert (alone.gathered, alone.reduced, alone.seconds) == (0, 0, 0)
    # Two micro-batches, there and back.
    assert (node.gathered, node.reduced) == (4 * G * 7 / 8, 2 * G * 7 / 8)
    assert node.seconds == pytest.approx(6 * 7 / 8 / 300)
    # Half of 6 GB comes from the other node, over 8 cards; by NVLink it goes on to all GPUs, and that takes longer.
    assert 6 / 8 / 2 / 25 < two.seconds == pytest.approx(6 * 15 / 16 / 300)
    assert sent("3", 16, 2, replace(gpu, infiniband=10e9)).seconds == pytest.approx(6 / 8 / 2 / 10)
    assert (two.gathered, two.reduced) == (4 * G * 15 / 16, 2 * G * 15 / 16)
    # 0.2 of 0.5 G elements are kept until they are read again; a parameter that stays whole is gathered once a step.
    assert sent("3", 8, 2, stage3_max_reuse_distance=0.4 * G).gathered == pytest.approx(3.2 * G * 7 / 8)
    assert sent("3", 8, 2, stage3_param_persistence_threshold=G).gathered == G * 7 / 8
    # An all-reduce of the gradients is 2 GB; stage 1 gathers the parameters after it, stage 2 reduces four times.
    assert sent("0", 8, 4).seconds == pytest.approx(2 * 7 / 8 / 300)
    assert sent("1", 8, 4).seconds == pytest.approx(3 * 7 / 8 / 300)
    assert sent("1", 8, 4, use_multi_rank_bucket_allreduce=False).seconds == pytest.approx(2 * 7 / 8 / 300)
    assert (sent("2", 8, 4).gathered, sent("2", 8, 4).reduced) == (5 * G * 7 / 8, 4 * G * 7 / 8)
    layered = sent("hierarchical", 16, 2)
    assert layered.gathered == 4 * G * 7 / 8 + G / 16
    assert layered.seconds == pytest.approx(max(6 * 7 / 8 / 300, 2 / 8 / 2 / 25))


def test_one_meaning_of_mfu() -> None:
    assert model_flops(10, 4) == 34
    assert mfu(34e12, seconds=2, num_gpus=10, peak_flops=17e12) == pytest.approx(0.1)


@pytest.fixture
def planned(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Plans made-up counts, so that a test can say what fits; the host takes no time unless it is said."""

    def make(counts: Counts, gpus: int = 1, launch_us: float = 0.0, **changes: Any) -> Plan:
        monkeypatch.setattr("fd_scale.plan.estimate.count", lambda recipe, source: counts)
        recipe = make_recipe(train__precision="bf16", train__steps=1000, **changes)
        return plan("made up", recipe, GPUS["a100-80g"], gpus, launch_us=launch_us)

    return make


def test_step_time_and_cost(planned: Callable[..., Plan]) -> None:
    found = planned(numbers(10**6), gpus=2, train__activation_checkpointing="block")
    own = found.own
    flops = 16 * (3 * 5 + 7 + 5) * G
    assert own.compute_seconds == pytest.approx(flops / (2 * 312e12 * 0.4))
    assert own.step_seconds == max(own.compute_seconds, own.traffic.seconds)
    assert found.mfu(own) == pytest.approx(0.4 * 22 / 27 * own.compute_seconds / own.step_seconds)
    assert found.gpu_hours(own) == pytest.approx(1000 * own.step_seconds * 2 / 3600)


@pytest.mark.parametrize(
    ("stage", "graphs", "micro_batch", "factor"),
    [
        ("1", False, 16, 1),
        ("1", True, 16, 0.4),
        ("1", True, 4, 1),  # refused with several micro-batches
        ("2", True, 4, 0.4),
        ("3", False, 4, 1.9),
        ("3", True, 16, 1.9),
    ],
)
def test_a_step_takes_no_less_than_its_launches(
    planned: Callable[..., Plan], stage: str, graphs: bool, micro_batch: int, factor: float
) -> None:
    counts = numbers(10**6)
    choices = planned(counts, launch_us=1e6, train__cuda_graphs=graphs).choices
    found = [each for each in choices if (each.stage, each.micro_batch) == (stage, micro_batch)]
    assert found
    for choice in found:
        assert choice.launch_seconds == pytest.approx(factor * len(counts.parameters) * 16 / micro_batch)
        assert choice.step_seconds == choice.launch_seconds


def test_the_choice_that_fits_best(planned: Callable[..., Plan]) -> None:
    """79 GiB: 3e9 parameters take 48 GB on one GPU; 16 images keep 160 GB, or 32 GB where blocks are recomputed."""
    found = planned(numbers(3 * G))
    assert found.best is not None
    assert (found.best.policy, found.best.micro_batch) == (Policy("none"), 2)  # 20 GB; quicker than "block"
    assert require_fit(planned(numbers(3 * G), train__micro_batch=2)) is not None
    assert all(choice.memory.total <= GPUS["a100-80g"].memory for choice in found.fitting)
    nothing = planned(numbers(10 * G))
    assert nothing.best is nothing.nearest is None
    with pytest.raises(UserError, match="nothing does on so many GPUs: take more or larger ones"):
        require_fit(nothing)


def test_what_does_not_fit_is_refused_with_the_nearest_that_does(planned: Callable[..., Plan]) -> None:
    """The recipe has stage 0 and a micro-batch of 8: 3e9 parameters are 48 GB, an image keeps 10 GB or 1 + 1."""
    with pytest.raises(
        UserError, match=r"micro_batch=8 .*=none needs .*: train.ds_config=zero0 train.micro_batch=2 "
    ):
        require_fit(planned(numbers(3 * G)))
    heavy = numbers(3 * G, kept=4 * G)  # 40 GB an image, or 4 GB and as much to work with
    with pytest.raises(UserError, match=r"zero0 train.micro_batch=4 train.activation_checkpointing=block$"):
        require_fit(planned(heavy))
    with pytest.raises(
        UserError, match=r"into the 79.00 GiB of a100-80g on 2 GPUs; .* train.ds_config=zero\d"
    ):
        require_fit(planned(numbers(6 * G), gpus=2))


def test_replicas(planned: Callable[..., Plan]) -> None:
    """Hierarchical is run, by a setting: where there are several whole replicas."""

    def stages(gpus: int, **changes: Any) -> set[str]:
        found = planned(numbers(10**6), gpus, train__global_batch=48, train__micro_batch=1, **changes)
        return {choice.stage for choice in found.fitting}

    assert stages(16) == {"0", "1", "2", "3", "hierarchical"}
    assert stages(8) == stages(12) == {"0", "1", "2", "3"}
    settings = {"train__ds_config": "zero3", "train__mics_shard_size": 2}
    assert "hierarchical" in stages(12, **settings)
    found = planned(numbers(6 * G), 4, train__micro_batch=1, **settings)
    assert found.own.stage == "hierarchical"
    assert found.own.memory.state.parameters == 6 * G + 2 * 10_000, (
        "half of 2 bytes a parameter, small ones whole"
    )
    # Both halves: gathered and reduced within two, and a quarter of all once there and back between them.
    pair = traffic([G // 2], 2, Sharding("3", 2, 1, {}), GPUS["a100-80g"])
    both = traffic([G // 2], 2, Sharding("hierarchical", 4, 1, {}, replica=2), GPUS["a100-80g"])
    assert both.gathered + both.reduced == pair.gathered + pair.reduced + 2 * (G / 2) / 2
    assert both.seconds == pytest.approx(pair.seconds + G / 2 / 300e9), "over the same links"
    with pytest.raises(
        UserError, match=r"needs .* GiB a GPU .*: train.ds_config=zero3 train.mics_shard_size=0"
    ):
        require_fit(planned(numbers(11 * G), 4, train__micro_batch=1, **settings))
    assert planned(numbers(6 * G), 2, train__micro_batch=1, **settings).own.stage == "3", (
        "one replica is none"
    )


def test_hpz_holds_a_copy_in_a_node_and_gathers_from_there() -> None:
    hpz = {"zero_hpz_partition_size": 8}

    def held(num_gpus: int, zero: dict[str, Any]) -> float:
        return state(numbers(), Sharding("3", num_gpus, 1, zero), "bf16").parameters

    assert held(64, hpz) - held(64, {}) == 2 * 10 * G / 8
    assert held(8, hpz) == held(8, {})
    sharding = Sharding("3", 16, 2, {"stage3_max_reuse_distance": 0} | hpz)
    sent = traffic([G // 2], 2, sharding, GPUS["a100-80g"])
    assert sent.gathered == G * 15 / 16 + 3 * G * 7 / 8, "the first forward pass of two, and all else"
    assert sent.reduced == 2 * G * 15 / 16
    # Of six gigabytes the three that are not gathered nearby come half from the other node, over its eight cards.
    slow = replace(GPUS["a100-80g"], infiniband=1e9)
    assert traffic([G // 2], 2, sharding, slow).seconds == pytest.approx(3 / 8 / 2)


def test_report_json_and_plot(planned: Callable[..., Plan], tmp_path: Path) -> None:
    found = planned(numbers(3 * G))
    console = Console(width=200, file=io.StringIO())
    show(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "made up on 1 x a100-80g, 79.00 GiB each" in text
    assert "recipe as it is: does not fit" in text
    assert "best: train.ds_config=zero0 train.micro_batch=2 train.activation_checkpointing=none" in text
    assert "40% of 312 TFLOP/s (dense bf16, NVIDIA's datasheet) is assumed" in text
    assert "hierarchical: ZeRO-3 with train.mics_shard_size=8; each so many GPUs hold a replica" in text
    write_json(to_json(found), str(tmp_path / "plan.json"))
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["best"]["micro_batch"] == 2
    assert values["own"]["fits"] is False
    assert sum(values["own"]["memory"].values()) == pytest.approx(values["own"]["memory_total"])
    plot(found, str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UserError, match=r"nowhere/plan.png: cannot be written \(No such file"):
        plot(found, str(tmp_path / "nowhere" / "plan.png"))


@pytest.fixture
def recipe(recipe_values: Callable[..., dict[str, Any]], saved: Callable[[dict[str, Any]], str]) -> str:
    return saved(recipe_values())


def test_the_verb(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings may stand behind the options; a refusal is a row, not an end."""
    cli.main(["plan", recipe, "--gpus", "2", "--gpu", "h200", "train.micro_batch=4"])
    out = capsys.readouterr().out
    assert "micro-batch 4, checkpointing none" in out
    assert "recipe as it is: fits" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "2", "--gpu", "H-100"], "got H-100, expected one of a100-40g, .*; did you mean h100"),
        (["--gpus", "2"], "--gpus N and --gpu NAME are needed"),
        (["--gpus", "0", "--gpu", "h100"], "--gpus: got 0, expected at least 1"),
        (["--gpus", "2", "--gpu", "h100", "--images", "0"], "--images: got 0, expected at least 1"),
        (["--gpus", "3", "--gpu", "h100"], "16 images do not divide over 3 ranks"),
    ],
)
def test_wrong_options(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", recipe, *arguments])
    assert ended.value.code == 2
    found = capsys.readouterr().err
    assert found.startswith("fd-scale: ")
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(found)


def test_unknown_arguments_are_still_refused(recipe: str) -> None:
    for arguments in (["plan", recipe, "--gpuz=3"], ["recipes", "a=b"], ["plan", recipe, "--gpus", "2", "x"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2


def test_check_refuses_what_does_not_fit(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    arguments = ["check", recipe, "--gpus", "2", "--gpu", "h100"]
    cli.main(arguments)
    assert "GiB of h100, x 2" in capsys.readouterr().out
    monkeypatch.setattr(check, "find_gpu", lambda name: replace(find_gpu(name), memory=2**20))
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    out = capsys.readouterr().out
    assert "GiB a GPU, micro-batch 8" in out
    assert "nothing does on so many GPUs" in out


@pytest.mark.slow
def test_training_is_refused_where_it_cannot_fit(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What `build_trainer` calls on CUDA."""
    world: Any = SimpleNamespace(device=torch.device("cuda"), size=2)
    recipe = make_recipe()
    source = open_source(recipe.data.train)
    monkeypatch.setattr(api, "present_gpu", lambda device: replace(GPUS["h100"], memory=2**40))
    api._refuse_what_does_not_fit(recipe, source, world)
    monkeypatch.setattr(api, "present_gpu", lambda device: replace(GPUS["h100"], memory=2**20))
    with pytest.raises(UserError, match=r"does not fit into the 0.00 GiB of h100"):
        api._refuse_what_does_not_fit(recipe, source, world)

    def not_counted(recipe: Recipe, source: Any) -> Counts:
        raise NotCountedError("an op has no shapes")

    monkeypatch.setattr("fd_scale.plan.estimate.count", not_counted)
    api._refuse_what_does_not_fit(recipe, source, world)
    assert "whether the run fits into memory is not known: an op has no shapes" in caplog.text


@pytest.mark.parametrize(
    ("name", "gib", "rates"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80g"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA L40S", 44.4, "a100-40g"),
    ],
)
def test_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch, name: str, gib: float, rates: str) -> None:
    found = SimpleNamespace(name=name, total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    gpu = present_gpu(torch.device("cuda", 0))
    assert (gpu.name, gpu.memory) == (name, found.total_memory)
    assert gpu.peak_flops == GPUS[rates].peak_flops


def test_from_python(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fd_scale.plan.estimate.count", lambda recipe, source: numbers())
    found = api.plan(make_recipe(), "h100", 2)
    assert found.num_steps == 6
    epochs = api.plan(make_recipe(train__steps=None, train__epochs=2.0), "h100", 2)
    assert epochs.num_steps == 2 * (1497 // 16)
    assert api.plan(make_recipe(train__steps=None, train__epochs=2.0), "h100", 2, images=160).num_steps == 20
    elsewhere = make_recipe(train__steps=None, train__epochs=2.0, data__train="imagefolder:/nowhere")
    assert api.plan(elsewhere, "h100", 2).num_steps is None


def test_a_timm_student_is_planned_as_far_as_timm_recomputes(make_recipe: Callable[..., Recipe]) -> None:
    model = {
        "name": "vit_tiny_patch16_224",
        "img_size": 32,
        "overrides": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    }
    counts = count(make_recipe(model=model, distill={"teachers": [{"model": model}]}))
    assert set(counts.activations) == {Policy("none"), Policy("block")}
    assert "got selective" in counts.refused[Policy("selective")]
    own = make_recipe(
        model=model, distill={"teachers": [{"model": model}]}, train__activation_checkpointing="selective"
    )
    with pytest.raises(UserError, match="got selective with period 1"):
        require_fit(plan("timm", own, GPUS["h100"], 1))


def test_a_period_of_the_recipe_is_planned(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train__activation_checkpointing="block", train__checkpointing_period=2)
    found = plan("period", recipe, GPUS["h100"], 2)
    assert str(found.own.policy) == "block/2"
    none, half, block = (
        found.counts.activations[policy] for policy in (Policy("none"), found.own.policy, Policy("block"))
    )
    assert none.kept.an_image > half.kept.an_image > block.kept.an_image


def test_the_giants_recipe_is_planned_for_its_own_hardware() -> None:
    recipe = load_recipe("imagenet/swin_v2_giant")
    assert (recipe.train.activation_checkpointing, recipe.train.ds_config) == ("none", "zero3")


def test_measure_takes_no_options_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    from fd_scale.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["plan", "digits/distill", "--measure", "--gpu", "h100", "--json", "out.json"])
    assert ended.value.code == 2
    assert "remove --gpu, --json" in capsys.readouterr().err
