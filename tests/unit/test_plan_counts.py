"""What a plan counts: FLOPs by hand, and activations as they are really kept."""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from fd_kernels.dispatch import implementation
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fd_scale import api
from fd_scale.config import Recipe, build_recipe
from fd_scale.data import Batch
from fd_scale.models import Backbone, create_model
from fd_scale.plan import Policy, count
from fd_scale.plan.counts import Meter, NotCountedError, keeping


def swin_v2_flops(size: int, window: int, dim: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> int:
    """Forward FLOPs an image of a Swin V2 with one bias a stage, counted by hand; two a multiply-add."""
    grid = size // 4
    total = 2 * grid**2 * 4 * 4 * 3 * dim  # patches
    for stage, (depth, head_count) in enumerate(zip(depths, heads, strict=True)):
        if stage:
            grid, dim = grid // 2, 2 * dim
            total += 2 * grid**2 * (2 * dim) * dim  # four merged tokens of dim / 2 channels to one of dim
        side = min(window, grid)
        positions = (2 * side - 1) ** 2
        total += 2 * positions * (2 * 512 + 512 * head_count)  # the bias, computed once a stage
        products = 2 * grid**2 * (3 + 1 + 4 + 4) * dim * dim  # qkv, projection, MLP
        attention = 2 * 2 * grid**2 * side**2 * dim  # queries x keys, weights x values
        total += depth * (products + attention)
    return total


def forward_flops(model: torch.nn.Module, size: int) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    return int(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "window"), [(192, 12), (224, 14), (640, 40)])
def test_flops_of_the_giant_by_hand(size: int, window: int) -> None:
    with torch.device("meta"):
        model = create_model("swin_v2_giant", img_size=size, window_size=window)
    expected = swin_v2_flops(size, window, 512, (2, 2, 42, 4), (16, 32, 64, 128))
    assert forward_flops(model, size) == expected
    if window <= 24:  # larger ones no kernel serves
        with implementation("triton"):
            assert forward_flops(model, size) == expected


@pytest.mark.slow
@pytest.mark.parametrize("path", ["reference", "triton"])
def test_flops_of_the_base_are_those_of_timm(path: Any) -> None:
    with torch.device("meta"):
        ours = create_model("swin_v2_base", img_size=256, window_size=8, shared_bias=False)
        theirs = timm.create_model("swinv2_base_window8_256", num_classes=0)
    with implementation(path):
        found = forward_flops(ours, 256)
    expected = forward_flops(theirs, 256)
    # Stage 4 has one window, of which timm computes the bias at window 8 x 8 in all stages, as here.
    assert found == expected


def small(recipe_values: Callable[..., dict[str, Any]], **changes: Any) -> Recipe:
    return build_recipe(recipe_values(**changes))


@pytest.mark.slow
def test_what_is_counted_on_meta_is_what_the_cpu_keeps(make_recipe: Callable[..., Recipe]) -> None:
    """The reference path, with numbers: storages that wait for the backward pass, found from outside.

    In fp32: of a bf16 LayerNorm the CPU keeps the statistics in bf16, CUDA and the meta device in fp32.
    """
    recipe = make_recipe(train__kernels="reference", train__precision="fp32")
    counts = count(recipe)
    assert counts.kernels == "PyTorch reference, as train.kernels says"
    for policy, expected in counts.activations.items():
        for size in (2, 3):
            task: Any = api.build_task(recipe, Any)  # type: ignore[arg-type]  # distillation asks its source nothing
            task.module.backbone.set_activation_checkpointing(policy.mode, policy.period)
            images = torch.zeros(size, 3, 24, 24, dtype=torch.uint8)
            batch = Batch(images, torch.zeros(size), torch.arange(size), 0)
            kept: dict[int, Tensor] = {}

            def pack(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
                kept[tensor.untyped_storage().data_ptr()] = tensor
                return tensor.detach()

            inputs = task.inputs(batch)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = task.module(**inputs)
            assert outputs["loss"].requires_grad
            own = {parameter.untyped_storage().data_ptr() for parameter in task.module.parameters()}
            found = sum(
                tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own
            )
            assert found == pytest.approx(expected.kept.at(size), abs=1), (policy, size)


@pytest.mark.slow
def test_the_kernels_keep_less_than_the_reference(make_recipe: Callable[..., Recipe]) -> None:
    """Kernels keep qkv, output and a statistic; the reference keeps its softmax and more."""
    changes: dict[str, Any] = {
        "overrides": {"embed_dim": 32, "depths": [1, 1], "num_heads": [1, 2], "window_size": 8}
    }
    model = {"name": "swin_v2_tiny", "img_size": 32, **changes}
    settings: dict[str, Any] = {"model": model, "distill": {"teachers": [{"model": model}]}}
    kernels = count(make_recipe(**settings))
    reference = count(make_recipe(train__kernels="reference", **settings))
    assert kernels.kernels == "Triton kernels"
    none = Policy("none")
    assert kernels.activations[none].kept.an_image < 0.9 * reference.activations[none].kept.an_image
    assert kernels.student_flops == reference.student_flops
    narrow = count(make_recipe())  # heads of 16 channels: no kernel serves them
    assert narrow.kernels.startswith(
        "PyTorch reference, for window_attention: a head has 12 channels; expected one of"
    )


def test_meter_counts_storages_that_live_at_a_time() -> None:
    with torch.device("meta"):
        given = torch.zeros(256)
    with Meter([given]) as meter:
        view = given[:10]  # no storage of its own
        one = view.new_zeros(1000)
        two = one + 1
        del one
        three = two.view(10, 100) @ two.view(100, 10)
    assert meter.now == 4 * (1000 + 100)
    assert meter.peak == 4 * 2000
    assert meter.flops == 2 * 10 * 100 * 10
    assert three.shape == (10, 10)


def test_an_op_that_the_meter_has_met_gives_the_same_again() -> None:
    def run() -> tuple[list[Any], Meter]:
        with torch.device("meta"):
            given = torch.zeros(6, 4, 5).transpose(1, 2)
        with Meter([given]) as meter:
            normed, mean, scale = torch.native_layer_norm(given, [4], None, None, 1e-5)
            product = normed @ given.new_zeros(4, 3)
            wide = product.double() + 1
            narrow = torch.ops.aten._unsafe_view(wide, [90])
            order = torch.arange(3) + 1  # on the host: values count
        tensors = (normed, mean, scale, product, wide, narrow)
        assert narrow.untyped_storage()._cdata == wide.untyped_storage()._cdata
        assert order.tolist() == [1, 2, 3]
        return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors], meter

    (first, met), (again, met_again) = run(), run()
    assert first == again
    assert (met.flops, met.now, met.peak) == (met_again.flops, met_again.now, met_again.peak)
    assert met.flops == 2 * 30 * 4 * 3
    # Numbers, dtypes and strides are parts of what is asked.
    with torch.device("meta"), Meter([]):
        sums = [torch.zeros(2, 3).sum(axis) for axis in (0, 1)]
        plain = torch.zeros(4, 4, dtype=torch.half) * 1
        wide, turned = plain.float() * 1, plain.t() * 1
    assert [tuple(total.shape) for total in sums] == [(3,), (2,)]
    assert (wide.dtype, turned.dtype, turned.stride()) == (torch.float, torch.half, (1, 4))


def test_flops_of_a_plan(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    counts = count(recipe)
    assert recipe.distill is not None
    teacher = recipe.distill.teachers[0]
    with torch.device("meta"):
        backbone = create_model("swin_v2_tiny", img_size=24, **teacher.model.overrides)
        student = create_model("swin_v2_tiny", img_size=24, **recipe.model.overrides)
    projector = 2 * 9 * 32 * 48  # 3 x 3 tokens
    assert counts.teacher_flops == forward_flops(backbone, 24)
    assert counts.student_flops == forward_flops(student, 24) + projector
    none, selective, block = (counts.activations[Policy(mode)] for mode in ("none", "selective", "block"))
    assert none.recomputed_flops == 0
    blocks = forward_flops(student, 24) - sum(  # all but patches, merging and the biases
        [2 * 36 * 48 * 16, 2 * 9 * 64 * 32, 2 * 49 * (1024 + 512), 2 * 25 * (1024 + 1024)]
    )
    mlps = 2 * (36 * 8 * 16**2 + 2 * 9 * 8 * 32**2)
    assert block.recomputed_flops == blocks
    assert selective.recomputed_flops == mlps
    assert none.kept.an_image > selective.kept.an_image > block.kept.an_image
    assert block.working.at(64) > none.working.at(64)
    half = replace(recipe, distill=replace(recipe.distill, teachers=[replace(teacher, share=0.5)]))
    assert count(half).teacher_flops == counts.teacher_flops / 2


def test_what_cannot_be_followed_is_named(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_values(self: Backbone, images: Tensor, scale: Tensor | None = None) -> Tensor:
        return images[images > 0]

    monkeypatch.setattr("fd_scale.models.swin_v2.SwinTransformerV2.forward", needs_values)
    with pytest.raises(
        NotCountedError, match="swin_v2_tiny or a teacher of it cannot be followed without values"
    ):
        count(make_recipe())


@pytest.mark.slow
def test_three_billion_parameters_in_seconds() -> None:
    """No GPU, no data, no weights: under 20 s and 2 GiB, imports included."""
    arguments = ["plan", "imagenet/swin_v2_giant", "--gpus", "64", "--gpu", "h100", "--images", "1281167"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import resource, sys; from fd_scale import cli; cli.main(sys.argv[1:]); "
        "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The processor's seconds, not the clock's: other tests run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
    assert int(done.stdout.split("KiB")[1]) < 2 * 2**20
    assert "trained parameters 3012.99 M" in done.stdout
    expected = swin_v2_flops(192, 12, 512, (2, 2, 42, 4), (16, 32, 64, 128)) + 2 * 36 * 4096**2
    assert f"student forward {expected / 1e9:.2f} G" in done.stdout


def test_kept_bytes_leave_parameters_out() -> None:
    module = torch.nn.Linear(8, 8, device="meta")
    given = torch.zeros(4, 8, device="meta", requires_grad=True)
    with keeping(module) as storages:
        module(given)
    assert [storage.nbytes() for storage in storages.values()] == [4 * 8 * 4]
