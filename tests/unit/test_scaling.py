"""`fd-scale plan --scaling`: the model of step time, by hand where a hand can do it."""

import io
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fd_scale import cli
from fd_scale.config import Recipe
from fd_scale.errors import UserError
from fd_scale.hardware import Gpu
from fd_scale.plan import Plan, plan, scaling_report
from fd_scale.plan.counts import Activations, Counts, Line, Policy
from fd_scale.plan.estimate import traffic
from fd_scale.plan.memory import Sharding, state
from fd_scale.plan.scaling import Assumptions, Curve, Point, expected_maximum, parse_sizes, predict, scaling

M, G = 10**6, 10**9

# Whole numbers: 1 TFLOP/s, 100 and 10 GB/s.
GPU = Gpu(name="made up", memory=80 * G, peak_flops=1e12, nvlink=100e9, infiniband=10e9)
# A hundred tensors of 10 M elements; an image costs 1 + 2 GFLOPs, and 0.5 of the teacher's.
COUNTS = Counts(
    (10 * M,) * 100, 0, Line(0, 0), 1.0 * G, 0.5 * G,
    {Policy("none"): Activations(Line(0, 1000), Line(0, 0), 0.0)}, {}, "",
)  # fmt: skip
IDEAL = Assumptions(
    utilisation=0.5, launch_us=0, link_efficiency=1, overlap=1, start_us=0, nvlink_hop_us=0, network_hop_us=0, jitter=0,
    worker_images_per_s=1e9, host_copy_gb_per_s=1e9, disk_gb_per_s=1e9,
)  # fmt: skip


@pytest.fixture
def planned(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Plan]:
    """Plans `COUNTS` at a ZeRO stage, bf16, one image a micro-batch of 64."""

    def make(
        stage: int, gpus: int, counts: Counts = COUNTS, batch: int = 64, micro: int = 1, zero: Any = None, **more: Any
    ) -> Plan:  # fmt: skip
        section = {"stage": stage, "stage3_max_reuse_distance": 0} | (zero or {})
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section}))
        recipe = make_recipe(
            train__precision="bf16", train__global_batch=batch, train__micro_batch=micro,
            train__ds_config=str(tmp_path / "ds.json"), checkpoint__save_every_steps=10, **more,
        )  # fmt: skip
        return plan("made up", recipe, GPU, gpus, images=0, utilisation=0.5, counts=counts)

    return make


def test_nothing_hides_behind_a_recorded_backward(planned: Callable[..., Plan]) -> None:
    plain = planned(1, 8, micro=8, zero={"overlap_comm": True})
    recorded = replace(
        plain, recipe=replace(plain.recipe, train=replace(plain.recipe.train, cuda_graphs=True))
    )
    hidden, shown = (predict(each, IDEAL) for each in (plain, recorded))
    assert hidden.links_s == shown.links_s > 0
    assert hidden.exposed_s < shown.exposed_s == pytest.approx(shown.links_s)


def test_computation_and_launches(planned: Callable[..., Plan]) -> None:
    """64 images of 3.5 GFLOPs on 8 GPUs at 0.5 TFLOP/s: 56 ms. Eight micro-batches of 100 tensors at 20 us: 16 ms."""
    point = predict(planned(0, 8), replace(IDEAL, launch_us=20))
    assert (point.flops_s, point.launch_s) == pytest.approx((0.056, 0.016))
    assert point.compute_s == point.flops_s
    launched = predict(planned(0, 8), replace(IDEAL, launch_us=200))
    assert launched.compute_s == pytest.approx(0.16)
    assert predict(planned(0, 8, micro=8), replace(IDEAL, launch_us=200)).launch_s == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("stage", "zero", "hidden_s", "settling_s"),
    [  # 1 G parameters, 2 GB, on one node; 64 images as 8 micro-batches. 7/8 of it at 100 GB/s is 17.5 ms a pass.
        (0, {}, 0.0, 0.0),  # an all-reduce after the backward pass: behind nothing
        (
            1,
            {"overlap_comm": True},
            0.004,
            0.0175,
        ),  # behind the last of 8 backward passes: 2 of 3.5 GFLOPs of 7 ms
        (1, {}, 0.0, 0.0175),
        (2, {"overlap_comm": True}, 0.032, 0.0175),  # behind all backward passes
        (3, {}, 0.048, 0.0),  # behind the student: 3 of 3.5 of 56 ms; no parameter is small
        (3, {"overlap_comm": False}, 0.0, 0.0),
    ],
)
def test_what_hides_behind_what(
    planned: Callable[..., Plan], stage: int, zero: dict[str, Any], hidden_s: float, settling_s: float
) -> None:
    point = predict(planned(stage, 8, zero=zero), IDEAL)
    passes = {0: 2, 1: 2, 2: 16, 3: 24}[stage]  # stage 3: two gathers and a reduction a micro-batch
    assert point.links_s == pytest.approx(0.0175 * passes + settling_s)
    assert point.exposed_s == pytest.approx(0.0175 * passes - hidden_s + settling_s)
    assert point.overflows
    half = predict(planned(stage, 8, zero=zero), replace(IDEAL, overlap=0.5, link_efficiency=0.5))
    assert half.exposed_s == pytest.approx(2 * point.links_s - hidden_s / 2)


def test_all_of_it_may_hide(planned: Callable[..., Plan]) -> None:
    heavy = replace(COUNTS, student_flops=100.0 * G, teacher_flops=0.0)
    assert predict(planned(3, 8, heavy), IDEAL).exposed_s == 0
    point = predict(planned(1, 8, heavy, zero={"overlap_comm": True}), IDEAL)
    assert point.exposed_s == pytest.approx(0.0175), "but for the gather that follows the step"
    assert not point.overflows


def test_an_exchange_hides_behind_the_last_backward_pass_alone(planned: Callable[..., Plan]) -> None:
    """8 micro-batches of 10 + 20 GFLOPs: 0.48 s for 0.42 s within a node, but 0.04 s for 0.04375 s between nodes."""
    counts = replace(COUNTS, student_flops=10.0 * G, teacher_flops=0.0)
    point = predict(planned(3, 64, counts, batch=512), IDEAL, "hierarchical")
    assert point.links_s == pytest.approx(0.42)
    assert point.exposed_s == pytest.approx(0.00375)
    assert point.overflows


def test_a_teacher_in_parts_is_gathered_and_hides_behind_itself(planned: Callable[..., Plan]) -> None:
    in_parts = replace(COUNTS, partitioned_teacher_bytes=2 * G)
    found, plain = planned(3, 8, in_parts).own.traffic, planned(3, 8).own.traffic
    assert found.gathered - plain.gathered == 8 * 2 * G * 7 / 8, "once a micro-batch"
    assert found.reduced == plain.reduced
    assert found.passes == plain.passes + 8 * 20, "50 M elements a gather"
    assert predict(planned(3, 8, in_parts), IDEAL).exposed_s == pytest.approx(0.0175 * 8 * 4 - 0.056)
    # Hierarchically it lies in each node.
    assert state(in_parts, Sharding("hierarchical", 64, 1, {}), "bf16").teacher == 2 * G / 8
    assert state(in_parts, Sharding("3", 64, 1, {}), "bf16").teacher == 2 * G / 64


def test_passes_by_hand() -> None:
    """1 G elements: 20 gathers of 50 M, 2 reductions of 500 M."""

    def passes(
        stage: str, accumulation: int, parameters: tuple[int, ...] = COUNTS.parameters, **zero: Any
    ) -> Any:
        sharding = Sharding(stage, 16, accumulation, {"stage3_max_reuse_distance": 0} | zero)
        found = traffic(parameters, 2, sharding, GPU)
        return found.passes, found.settling_passes

    assert passes("0", 4) == (4, 0)
    assert passes("1", 4) == (4, 2)
    assert passes("1", 4, use_multi_rank_bucket_allreduce=False) == (2, 2)
    assert passes("2", 4) == (16, 2)
    assert passes("3", 4) == passes("hierarchical", 4) == (4 * (20 + 20 + 2), 0)
    assert passes("3", 1, stage3_prefetch_bucket_size=500 * M) == (2 + 2 + 2, 0)
    assert passes("3", 1, (*COUNTS.parameters, 1000, 1000)) == (40 + 3, 2), "small ones travel one by one"


def test_hops_by_hand(planned: Callable[..., Plan]) -> None:
    """Stage 0 is 4 passes: 500 M elements in each of two buckets, there and back."""
    hops = replace(IDEAL, start_us=1000, nvlink_hop_us=10, network_hop_us=100)
    assert predict(planned(0, 1), hops).latency_s == 0
    assert predict(planned(0, 8), hops).latency_s == pytest.approx(4 * (1000 + 7 * 10) * 1e-6)
    assert predict(planned(0, 64), hops).latency_s == pytest.approx(4 * (1000 + 56 * 10 + 7 * 100) * 1e-6)
    tree = replace(hops, tree=1)
    assert predict(planned(0, 64), tree).latency_s == pytest.approx(4 * (1000 + 7 * 10 + 3 * 100) * 1e-6)
    # ZeRO-3, one micro-batch: 42 passes in a node, and 4 between nodes, two buckets there and back.
    layered = predict(planned(3, 64), hops, "hierarchical")
    assert layered.latency_s == pytest.approx((42 * (1000 + 7 * 10) + 4 * (1000 + 7 * 100)) * 1e-6)
    settled = planned(3, 64, replace(COUNTS, parameters=(*COUNTS.parameters, 1000, 1000)))
    flat = predict(settled, replace(hops, small=0.5)).latency_s
    # 43 passes, since the buckets of gradients are three then.
    assert flat == pytest.approx((43 * (1000 + 1260) + 2 * (1000 + 630)) * 1e-6)
    layered = predict(settled, replace(hops, small=0.5), "hierarchical")
    assert layered.latency_s == pytest.approx((43 * 1070 + 6 * 1700 + 2 * 1035) * 1e-6)
    assert predict(planned(3, 8), hops, "hierarchical").latency_s == predict(planned(3, 8), hops).latency_s


def test_stragglers(planned: Callable[..., Plan]) -> None:
    """Expected maxima of standard normal numbers, from tables."""
    assert expected_maximum(1) == 0
    for count, expected in ((2, 0.5642), (8, 1.4236), (100, 2.5076), (1000, 3.2414)):
        assert expected_maximum(count) == pytest.approx(expected, rel=0.05)
    point = predict(planned(0, 8), replace(IDEAL, jitter=0.1))
    assert point.waiting_s == pytest.approx(0.1 * expected_maximum(8) * 0.056)
    assert point.step_s == pytest.approx(0.056 + point.exposed_s + point.waiting_s)


def test_input_and_checkpoints(planned: Callable[..., Plan]) -> None:
    """64 images, 8 workers a node at 1 image/s: 8 s on one node. 14 GB to disk at 1 GB/s, from step to step 10."""
    slow = replace(IDEAL, worker_images_per_s=1)
    assert predict(planned(0, 8), slow).input_s == 8
    assert predict(planned(0, 16), slow).input_s == 4
    assert predict(planned(0, 8, data__num_workers=4), slow).input_s == 2
    assert predict(planned(0, 8), slow).bound == "input"
    assert predict(planned(0, 8), slow).step_s == pytest.approx(8)
    copied = predict(planned(3, 8), replace(IDEAL, host_copy_gb_per_s=1))
    assert copied.checkpoint_s == pytest.approx((2 + 12) / 8 / 10)
    written = predict(planned(3, 8), replace(IDEAL, disk_gb_per_s=1))
    assert written.checkpoint_s == pytest.approx((14 - 10 * written.training_s) / 10), "the next one waits"
    assert written.bound == "checkpoints"


@pytest.fixture
def curves(make_recipe: Callable[..., Recipe]) -> Callable[..., dict[str, Curve]]:
    def make(ds_config: str = "zero3", last: int = 4096, **assumed: float) -> dict[str, Curve]:
        heavy = replace(COUNTS, student_flops=2.0 * G)
        recipe = make_recipe(
            train__precision="bf16", train__global_batch=2048, train__micro_batch=8, train__ds_config=ds_config,
            data__num_workers=8, checkpoint__save_every_steps=1000,
        )  # fmt: skip
        found = scaling("made up", recipe, GPU, parse_sizes(f"8..{last}"), Assumptions(**assumed), heavy)
        return {curve.name: curve for curve in found.curves}

    return make


def test_curves_fall_and_hierarchical_is_better_beyond_some_size(
    curves: Callable[..., dict[str, Curve]],
) -> None:
    found = curves()
    assert list(found) == ["strong, ZeRO-3", "strong, hierarchical", "weak, ZeRO-3", "weak, hierarchical"]
    for curve in found.values():
        shares = [curve.efficiency(point) for point in curve.points]
        assert shares[0] == 1
        # Rising launches and falling waits may be even, to a per mille.
        assert all(later <= earlier + 1e-3 for earlier, later in itertools.pairwise(shares))
        assert shares[-1] < 0.97
        for point in curve.points:
            assert point.step_s >= point.compute_s > 0
    for kind in ("strong", "weak"):
        flat, layered = found[f"{kind}, ZeRO-3"].points, found[f"{kind}, hierarchical"].points
        assert flat[0].step_s == layered[0].step_s, "one node is one node"
        # As long as all of it hides, they differ by what a checkpoint copies.
        assert all(
            one.step_s == pytest.approx(other.step_s, rel=1e-3)
            for one, other in zip(flat[:5], layered[:5], strict=True)
        )
        assert all(one.step_s > other.step_s for one, other in zip(flat[5:], layered[5:], strict=True))
    strong, weak = found["strong, ZeRO-3"], found["weak, ZeRO-3"]
    assert [point.num_gpus for point in strong.points] == [8 << k for k in range(9)], "up to an image a GPU"
    assert (strong.points[-1].choice.micro_batch, strong.points[-1].bound) == (1, "latency")
    assert {point.global_batch for point in strong.points} == {2048}
    assert [point.global_batch for point in weak.points] == [64 << k for k in range(10)]
    assert strong.reaches(0.0) == 2048
    assert strong.reaches(1.0) == 8
    assert curves(tree=1)["weak, ZeRO-3"].points[-1].step_s < weak.points[-1].step_s
    assert list(curves("zero1")) == ["strong, ZeRO-1", "weak, ZeRO-1"]


def test_what_bounds_a_step() -> None:
    base: dict[str, Any] = {
        "num_gpus": 8, "global_batch": 8, "choice": None, "fits": True, "flops_s": 1.0, "launch_s": 0.5, "links_s": 0.8,
        "latency_s": 0.1, "exposed_s": 0.0, "overflows": False, "waiting_s": 0.0, "input_s": 0.9, "checkpoint_s": 0.0,
    }  # fmt: skip
    for changes, bound in (
        ({}, "computation"),
        ({"launch_s": 2.0}, "launches"),
        ({"links_s": 1.5, "overflows": True, "exposed_s": 0.6}, "bandwidth"),
        ({"latency_s": 1.5, "overflows": True, "exposed_s": 0.6}, "latency"),
        (
            {"latency_s": 1.5, "exposed_s": 0.6},
            "computation",
        ),  # what follows the step alone is less than computation
        ({"waiting_s": 1.1}, "stragglers"),
        ({"input_s": 1.1}, "input"),
        ({"checkpoint_s": 1.1}, "checkpoints"),
    ):
        assert Point(**base | changes).bound == bound, changes
    assert Point(**base).step_s == 1.0
    assert Point(**base | {"exposed_s": 0.2, "waiting_s": 0.1, "checkpoint_s": 0.5}).step_s == pytest.approx(
        1.8
    )


def test_sizes() -> None:
    assert parse_sizes("8..4096") == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert parse_sizes("6..30") == [6, 12, 24]
    assert parse_sizes("1..1") == [1]
    for wrong in ("8", "8..4", "0..8", "8..5000", "a..b", "8..-9", "..8"):
        with pytest.raises(UserError, match=r"--scaling: got .*, expected FIRST..LAST GPUs up to 4096"):
            parse_sizes(wrong)


def test_assumptions() -> None:
    found = Assumptions.given(["jitter=0.1", "utilisation=0.5"])
    assert (found.jitter, found.utilisation, found.overlap) == (0.1, 0.5, 0.9)
    lines = found.lines()
    assert len(lines) == len(Assumptions.__slots__), "each has a docstring"
    assert lines[0].startswith("utilisation = 0.5: Share of a GPU's dense bf16 peak")
    for wrong, sentence in (
        ("jiter=1", "did you mean jitter"),
        ("jitter", "got '', expected a number"),
        ("jitter=-1", "expected a number, 0 or more"),
        ("jitter=nan", "expected a number, 0 or more"),
        ("utilisation=0", "expected a number, above 0 and at most 1"),
        ("overlap=1.5", "expected a number, 0 or more and at most 1"),
        ("disk_gb_per_s=inf", "expected a number, above 0"),
    ):
        with pytest.raises(UserError, match=f"--assume .*{sentence}"):
            Assumptions.given([wrong])
    assert Assumptions.given(["overlap=1"]).overlap == 1


@pytest.fixture
def recipe_file(recipe_values: Callable[..., dict[str, Any]], saved: Callable[[dict[str, Any]], str]) -> str:
    return saved(recipe_values(train__ds_config="zero3"))


def test_a_curve_says_where_it_ends(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train__precision="bf16", train__global_batch=16, train__micro_batch=8)
    found = scaling("made up", recipe, GPU, parse_sizes("8..32"), Assumptions(), COUNTS)
    strong, *_, weak = scaling_report.reach(found)
    assert strong.endswith("; ends at 16: a batch of 16 has no image for each of 32")
    assert "ends at" not in weak


def test_the_verb(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    cli.main(["plan", recipe_file, "--scaling", "2..16", "--gpu", "h100", "--assume", "jitter=0", *files])
    out = capsys.readouterr().out
    assert "on h100, modelled, not measured" in out
    assert "strong, hierarchical: efficiency of 80% up to" in out
    assert "jitter = 0: Standard deviation" in out
    values = json.loads((tmp_path / "s.json").read_text())
    assert values["what"] == "modelled, not measured"
    assert values["assumptions"]["jitter"] == 0
    [first, *_] = values["curves"]
    assert [point["num_gpus"] for point in first["points"]] == [2, 4, 8, 16]
    for point in first["points"]:
        busy = max(point["flops_s"], point["launch_s"]) + point["exposed_s"] + point["waiting_s"]
        assert point["step_s"] == pytest.approx(max(busy, point["input_s"]) + point["checkpoint_s"])
        assert math.isclose(point["images_per_s"], 16 / point["step_s"])
    assert (tmp_path / "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scaling", "8..16", "--gpu", "h100", "--gpus", "8"], "remove --gpus"),
        (["--scaling", "8..16", "--gpu", "h100", "--images", "8"], "remove --images"),
        (["--scaling", "8..16"], "--gpu NAME says on what to scale"),
        (["--scaling", "32..64", "--gpu", "h100"], "has an image for no more than 16; begin with fewer"),
        (["--scaling", "3..6", "--gpu", "h100"], "16 images do not divide over 3 ranks"),
        (["--gpus", "8", "--gpu", "h100", "--assume", "jitter=0"], "remove jitter=0"),
        (["--gpus", "8", "--gpu", "h100", "--assume", "utilisation=2"], "--assume utilisation"),
        (["--measure", "--scaling", "8..16"], "remove --scaling"),
    ],
)
def test_wrong_options(
    recipe_file: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", recipe_file, *arguments])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_what_does_not_fit_is_marked(make_recipe: Callable[..., Recipe]) -> None:
    small = replace(GPU, memory=10 * G)
    recipe = make_recipe(train__precision="bf16", train__ds_config="zero3", train__global_batch=64)
    found = scaling("made up", recipe, small, [1, 8], counts=COUNTS)
    assert [point.fits for point in found.curves[0].points] == [False, True]
    console = Console(width=200, file=io.StringIO())
    scaling_report.show(found, console)
    assert console.file.getvalue().count("does not fit") == 4  # type: ignore[attr-defined]
