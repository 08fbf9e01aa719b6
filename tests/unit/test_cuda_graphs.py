"""Recorded modules, with a stand-in for CUDA graphs; real ones are replayed in tests/distributed/test_gpu.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_graphs import STAND_INS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fd_scale import ds_config
from fd_scale.config import FeaturesConfig, ModelConfig, Recipe, load_recipe, packaged_recipes
from fd_scale.cuda_graphs import record
from fd_scale.errors import UserError
from fd_scale.models import build_model, resolved_model


@pytest.fixture(autouse=True)
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STAND_INS.items():
        monkeypatch.setattr(torch.cuda, name, value)


class Layers(nn.Module):
    """Two outputs, a parameter without a part in them, and a count of what was not replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.calls = 0

    def forward(self, x: Tensor, scale: Tensor | None = None) -> list[Tensor]:
        self.calls += 1
        hidden = self.first(x).tanh()
        return [hidden, self.second(hidden if scale is None else hidden * scale)]


def gradients(module: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    module.zero_grad()
    sum(output.square().sum() for output in module(*inputs)).backward()
    return [None if each.grad is None else each.grad.clone() for each in module.parameters()]


def test_replays_are_the_module() -> None:
    """Outputs and gradients, of other inputs and after an optimizer's step, in any order."""
    torch.manual_seed(0)
    module, plain = Layers(), Layers()
    plain.load_state_dict(module.state_dict())
    record(module, torch.zeros(4, 3), torch.zeros(4, 1), name="layers")
    calls = module.calls
    for _ in range(3):
        x, scale = torch.randn(4, 3), torch.rand(4, 1)
        for ours, theirs in zip(module(x, scale), plain(x, scale), strict=True):
            assert torch.equal(ours, theirs)
        for mine, other in zip(gradients(module, x, scale), gradients(plain, x, scale), strict=True):
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)
        with torch.no_grad():
            for each in (module, plain):
                each.first.weight.add_(1)
    assert module.calls == calls, "all was replayed"


def test_a_backbone_replays() -> None:
    overrides = {"patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    module = build_model(ModelConfig(name="swin_v2_tiny", img_size=32, overrides=overrides))
    sample, scale = torch.zeros(2, 3, 32, 32), torch.ones(len(module.drop_path_rates), 2)
    images, drop = torch.randn(2, 3, 32, 32), torch.rand_like(scale)
    module(images, drop).square().sum().backward()
    expected = [each.grad.clone() for each in module.parameters() if each.grad is not None]
    record(module, sample, scale, name="swin")
    module.zero_grad()
    module(images, drop).square().sum().backward()
    assert [each.grad is not None for each in module.parameters()] == [True] * len(expected)
    for each, other in zip(module.parameters(), expected, strict=True):
        assert each.grad is not None
        assert torch.equal(each.grad, other)


def test_a_frozen_module_has_no_backward() -> None:
    module = Layers().eval().requires_grad_(False)
    with torch.no_grad():
        record(module, torch.zeros(4, 3), name="layers")
    x = torch.randn(4, 3)
    calls = module.calls
    outputs = module(x, None)
    assert module.calls == calls
    assert torch.equal(outputs[0], module.first(x).tanh())


@pytest.mark.parametrize("change", ["fewer images", "other scale", "no scale", "the other mode"])
def test_others_are_not_replayed(change: str) -> None:
    module = Layers()
    record(module, torch.zeros(4, 3), torch.zeros(4, 1), name="layers")
    inputs: list[Tensor | None] = [torch.randn(4, 3), torch.rand(4, 1)]
    if change == "fewer images":
        inputs = [torch.randn(3, 3), torch.rand(3, 1)]
    elif change == "other scale":
        inputs[1] = torch.rand(4, 5)
    elif change == "no scale":
        inputs[1] = None
    else:
        module.eval()
    calls = module.calls
    outputs = module(*inputs)
    assert module.calls == calls + 1
    assert torch.equal(outputs[0], module.first(inputs[0]).tanh())


def test_running_statistics_do_not_count_what_was_recorded() -> None:
    module, plain = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    plain.load_state_dict(module.state_dict())
    record(module, torch.zeros(2, 3, 8, 8), name="layers")
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(module(x), plain(x))
    for mine, other in zip(module.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, other)


def test_what_cannot_be_recorded_is_named() -> None:
    """As a GPU says it: while it records, and in other words at the end of the recording."""

    class Reading(Layers):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> list[Tensor]:
            if self.calls == 3:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().forward(x, scale)

    with pytest.raises(
        UserError, match=r"train.cuda_graphs: some_model cannot be recorded: operation not .*false"
    ):
        record(Reading(), torch.zeros(4, 3), name="some_model")


class OnTheHost(TorchDispatchMode):
    """Notes what gives tensors on the CPU: copied to a GPU from there, they end a recording."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(leaf.device.type == "cpu" for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self.found.add(str(func))
        return out


@pytest.mark.slow
def test_packaged_models_make_nothing_on_the_host() -> None:
    """On the meta device, where a number that the host would wait for is an error."""
    models = {}
    for name in packaged_recipes():
        recipe = load_recipe(name)
        if recipe.distill is not None and name.startswith("imagenet/"):
            for model in (recipe.model, *(teacher.model for teacher in recipe.distill.teachers)):
                models[repr(resolved_model(replace(model, weights=None)))] = model
    assert len(models) > 12
    for config in map(resolved_model, models.values()):
        with torch.device("meta"):
            module = build_model(replace(config, weights=None))
            pixels_BCHW = torch.zeros(2, 3, config.size, config.size)
            scale_RB = torch.ones(len(module.drop_path_rates), 2)
        module(pixels_BCHW, scale_RB)  # tables that are kept
        with OnTheHost() as host:
            module(pixels_BCHW, scale_RB)
        assert not host.found, config.name


@pytest.mark.parametrize(
    ("stage", "micro_batch", "teacher", "features", "sentence"),
    [
        (1, 4, {}, None, "a step is 2 micro-batches"),
        (3, 8, {"partitioned": True}, None, "no teacher is whole"),
        (3, 8, {"share": 0.5}, None, "shown all images"),
        (3, 8, {}, FeaturesConfig(folder="features", views=1), "run here"),
        (1, 8, {"partitioned": True}, None, None),
        (2, 4, {"partitioned": True}, None, None),
        (3, 8, {}, None, None),
    ],
)
def test_graphs_are_refused_where_they_would_be_wrong(
    make_recipe: Callable[..., Recipe],
    stage: int,
    micro_batch: int,
    teacher: dict[str, Any],
    features: FeaturesConfig | None,
    sentence: str | None,
) -> None:
    changes: dict[str, Any] = {"train__cuda_graphs": True, "train__micro_batch": micro_batch}
    recipe = make_recipe(train__global_batch=8, train__ds_config=f"zero{stage}", **changes)
    assert recipe.distill is not None
    teachers = [replace(recipe.distill.teachers[0], **teacher)]
    recipe = replace(recipe, distill=replace(recipe.distill, teachers=teachers, features=features))
    if sentence is None:
        ds_config.resolve(ds_config.read(recipe.train.ds_config), recipe, 1, "cuda")
        return
    with pytest.raises(UserError, match=rf"train.cuda_graphs: .*{sentence}"):
        ds_config.resolve(ds_config.read(recipe.train.ds_config), recipe, 1, "cuda")


@pytest.mark.parametrize("micro_batch", [4, 8])
def test_gradients_of_micro_batches_must_be_copied(
    make_recipe: Callable[..., Recipe], micro_batch: int
) -> None:
    recipe = make_recipe(train__global_batch=8, train__micro_batch=micro_batch, train__cuda_graphs=True)
    in_place = {"zero_optimization": {"stage": 2, "contiguous_gradients": False}}
    if micro_batch == 8:
        ds_config.resolve(in_place, recipe, 1, "cuda")
        return
    with pytest.raises(UserError, match=r"train.cuda_graphs: .*contiguous_gradients"):
        ds_config.resolve(in_place, recipe, 1, "cuda")
