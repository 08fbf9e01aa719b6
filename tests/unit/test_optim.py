"""Schedules as arrays, parameter groups, AdamW at stage 0, and the average of weights."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from fd_scale.config import OptimConfig
from fd_scale.errors import UserError
from fd_scale.models import Backbone, create_model, learning_rate_scales
from fd_scale.optim import ClippedAdamW, WeightAverage, learning_rates, parameter_groups
from fd_scale.shards import AVERAGE


def test_schedule_is_the_authors_for_clip_vit_b() -> None:
    """300 epochs, 10 of warm-up, effective values as released (arXiv 2205.14141); 625 steps an epoch."""
    config = OptimConfig(lr=1.2e-3, warmup_lr=2e-6, min_lr=2e-5, warmup_epochs=10)
    rates = learning_rates(config, 300 * 625, 625)
    assert rates.shape == (187_500, 1)
    rates = rates[:, 0]
    assert rates[0] == pytest.approx(2e-6)
    assert rates[3125] == pytest.approx((2e-6 + 1.2e-3) / 2), "half-way up"
    assert rates[6250] == rates.max() == pytest.approx(1.2e-3)
    half = 6250 + (187_500 - 6250) // 2
    assert rates[half] == pytest.approx((1.2e-3 + 2e-5) / 2)
    assert rates[-1] == pytest.approx(2e-5, rel=1e-3)
    assert (np.diff(rates[6250:]) < 0).all()


def test_a_straight_line() -> None:
    config = OptimConfig(lr=4e-5, warmup_steps=2, min_lr=1e-5, schedule="linear")
    rates = learning_rates(config, 8, 100)[:, 0]
    np.testing.assert_allclose(rates, [0, 2e-5, 4e-5, 3.5e-5, 3e-5, 2.5e-5, 2e-5, 1.5e-5])


def test_a_run_shorter_than_its_warm_up() -> None:
    rates = learning_rates(OptimConfig(lr=1.0, warmup_steps=10), 4, 100)
    np.testing.assert_allclose(rates[:, 0], [0, 0.25, 0.5, 0.75])


def test_layer_decay_scales_the_peak_alone() -> None:
    """CLIP-B's fine-tuning (arXiv 2205.14141): as timm's schedule has it for groups with peaks of their own."""
    config = OptimConfig(lr=5e-3, warmup_lr=2.5e-7, min_lr=2.5e-7, warmup_epochs=20)
    scales = [1.0, 0.6, 0.6**13]
    rates = learning_rates(config, 100 * 5, 5, scales)
    weights = [nn.Parameter(torch.zeros(1)) for _ in scales]
    groups = [{"params": [weight], "lr": 5e-3 * scale} for weight, scale in zip(weights, scales, strict=True)]
    schedule = CosineLRScheduler(
        torch.optim.SGD(groups),
        t_initial=400,
        lr_min=2.5e-7,
        warmup_t=100,
        warmup_lr_init=2.5e-7,
        warmup_prefix=True,
    )
    theirs = []
    for step in range(500):
        schedule.step(step)
        theirs.append([group["lr"] for group in schedule.optimizer.param_groups])
    np.testing.assert_allclose(rates, theirs, rtol=1e-9)
    np.testing.assert_allclose(rates[0], 2.5e-7)


VIT_B = {"model.cls_token": 0, "model.patch_embed.proj.weight": 0, "model.blocks.0.attn.q_bias": 1,
         "model.blocks.0.gamma_1": 1, "model.blocks.5.mlp.fc1.weight": 6, "model.blocks.11.norm2.bias": 12,
         "model.norm.weight": 13, "model.rel_pos_bias.relative_position_bias_table": 13}  # fmt: skip
VIT_L = VIT_B | {"model.blocks.23.attn.qkv.weight": 24, "model.norm.weight": 25,
                 "model.rel_pos_bias.relative_position_bias_table": 25}  # fmt: skip
SWIN_B = {"patch_embed.proj.weight": 0, "patch_embed.norm.bias": 0, "layers.0.blocks.0.attn.qkv.weight": 1,
          "layers.0.blocks.1.mlp.fc2.bias": 2, "layers.1.downsample.reduction.weight": 2,
          "layers.1.blocks.0.norm1.weight": 3, "layers.2.downsample.norm.weight": 4,
          "layers.2.blocks.0.attn.logit_scale": 5, "layers.2.blocks.17.attn.proj.weight": 22,
          "layers.3.downsample.norm.bias": 22, "layers.3.blocks.1.attn.qkv.q_bias": 24,
          "layers.2.position_bias.cpb_mlp.0.weight": 22, "norm.weight": 25}  # fmt: skip
OWN_BIAS = {"model.blocks.3.attn.relative_position_bias_table": 4}
TIMM_VIT = {"model.pos_embed": 0, "model.blocks.0.norm1.weight": 1, "model.norm.bias": 13}


@pytest.mark.parametrize(
    ("name", "overrides", "decay", "table"),
    [
        ("fd_vit_base_patch16", {}, 0.6, VIT_B),
        ("fd_vit_base_patch16", {"shared_bias": False}, 0.65, OWN_BIAS),
        ("fd_vit_large_patch14", {}, 0.75, VIT_L),
        ("swin_v2_base", {}, 0.8, SWIN_B),
        ("vit_base_patch16_224", {}, 0.6, TIMM_VIT),
    ],
)
def test_layers_by_hand(name: str, overrides: dict[str, Any], decay: float, table: dict[str, int]) -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"backbone": create_model(name, **overrides), "head": nn.Linear(2, 2)})
    parameters = dict(module.named_parameters())
    behind = max(table.values()) if table is not OWN_BIAS else 13
    scales = learning_rate_scales(module, decay)
    assert scales.keys() <= parameters.keys()
    for key, layer in table.items():
        assert f"backbone.{key}" in parameters, key
        assert scales.get(f"backbone.{key}", 1.0) == pytest.approx(decay ** (behind - layer)), key
    groups = parameter_groups(module, 0.05, set(), lr_scales=scales)
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    assert (groups[0]["lr_scale"], groups[-1]["lr_scale"]) == (1, pytest.approx(decay**behind))
    head = {id(parameter) for parameter in module["head"].parameters()}
    assert head <= {id(parameter) for group in groups[:2] for parameter in group["params"]}


def test_layers_that_are_not_known_are_refused() -> None:
    class Unordered(Backbone):
        forward = grid_size = no_weight_decay_names = translate = to_layout = layout_config = None

    module = nn.ModuleDict({"backbone": Unordered()})
    assert learning_rate_scales(module, 1.0) == {}
    with pytest.raises(UserError, match="order of Unordered's layers is not known; set it to 1"):
        learning_rate_scales(module, 0.9)


def test_groups_hold_each_parameter_once_and_spare_what_the_model_names() -> None:
    model = create_model(
        "swin_v2_tiny", img_size=32, embed_dim=32, depths=[1, 1], num_heads=[1, 2], window_size=4
    )
    decayed, spared = parameter_groups(model, 0.05, model.no_weight_decay_names())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(map(id, decayed["params"] + spared["params"])) == sorted(names)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    kept = {names[id(parameter)] for parameter in decayed["params"]}
    assert {name.rsplit(".", 1)[1] for name in kept} == {"weight"}
    assert not [name for name in kept if "norm" in name or "cpb_mlp" in name or "logit_scale" in name]
    assert any("qkv" in name for name in kept)


def test_clipped_adamw_equals_clipping_then_adamw_and_refuses_nan() -> None:
    torch.manual_seed(0)
    ours, reference = nn.Linear(4, 4), nn.Linear(4, 4)
    reference.load_state_dict(ours.state_dict())
    config = OptimConfig(lr=0.1, grad_clip=0.5)
    optimizer = ClippedAdamW([{"params": list(ours.parameters()), "weight_decay": 0.05}], config)
    plain = torch.optim.AdamW(reference.parameters(), lr=0.1, weight_decay=0.05)
    for scale in (1.0, 10.0, 0.01):
        x = scale * torch.randn(8, 4)
        for module, step in ((ours, optimizer), (reference, plain)):
            module.zero_grad()
            module(x).square().mean().backward()
            if step is plain:
                norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            step.step()
        assert optimizer._global_grad_norm == pytest.approx(float(norm))
        for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # fused against unfused arithmetic
    before = [parameter.clone() for parameter in ours.parameters()]
    for parameter in ours.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


def test_an_average_waits_for_a_gradient() -> None:
    """Torch takes a state that is not empty for whole: moments would be missing, in the step or in what is saved."""

    def made() -> tuple[list[nn.Parameter], torch.optim.AdamW, WeightAverage]:
        weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
        optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.0)
        return weights, optimizer, WeightAverage(optimizer, weights, 0.5)

    (first, _), optimizer, average = made()
    assert not average.begun
    first.grad = torch.ones(2)
    optimizer.step()
    average.update()
    assert average.begun
    torch.testing.assert_close(
        optimizer.state[first][AVERAGE], torch.full((2,), -0.05)
    )  # half way from the start
    (again, later), other, resumed = made()
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        again.copy_(first)
    for weight in (again, later):
        weight.grad = torch.ones(2)
    other.step()
    resumed.update()
    torch.testing.assert_close(other.state[again][AVERAGE], torch.full((2,), (-0.05 - 0.2) / 2))
    torch.testing.assert_close(other.state[later][AVERAGE], torch.full((2,), -0.1))
    resumed.swap()
    torch.testing.assert_close(again.detach(), torch.full((2,), -0.125))
    resumed.swap()
    torch.testing.assert_close(again.detach(), torch.full((2,), -0.2))
