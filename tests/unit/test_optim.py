"""Schedules as arrays, parameter groups, and AdamW at stage 0."""

import numpy as np
import pytest
import torch
from torch import nn

from fd_scale.config import OptimConfig
from fd_scale.models import create_model
from fd_scale.optim import ClippedAdamW, learning_rates, parameter_groups


def test_schedule_is_the_authors_for_clip_vit_b() -> None:
    """300 epochs, 10 of warm-up, effective values as released (arXiv 2205.14141); 625 steps an epoch."""
    config = OptimConfig(lr=1.2e-3, warmup_lr=2e-6, min_lr=2e-5, warmup_epochs=10)
    rates = learning_rates(config, 300 * 625, 625)
    assert rates.shape == (187_500,)
    assert rates[0] == pytest.approx(2e-6)
    assert rates[3125] == pytest.approx((2e-6 + 1.2e-3) / 2), "half-way up"
    assert rates[6250] == rates.max() == pytest.approx(1.2e-3)
    half = 6250 + (187_500 - 6250) // 2
    assert rates[half] == pytest.approx((1.2e-3 + 2e-5) / 2)
    assert rates[-1] == pytest.approx(2e-5, rel=1e-3)
    assert (np.diff(rates[6250:]) < 0).all()


def test_a_run_shorter_than_its_warm_up() -> None:
    rates = learning_rates(OptimConfig(lr=1.0, warmup_steps=10), 4, 100)
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.75])


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
