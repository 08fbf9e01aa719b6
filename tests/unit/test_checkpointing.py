"""Activation checkpointing: every policy has the plain model's gradients, and recomputes what it says."""

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fd_scale.errors import UserError
from fd_scale.models import Backbone, create_model
from fd_scale.models.layers import ResidualBlock

SWIN: dict[str, Any] = {
    "name": "swin_v2_tiny", "img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2),
    "window_size": 4, "drop_path_rate": 0.5, "extra_norm_period": 2,
}  # fmt: skip
VIT: dict[str, Any] = {
    "name": "fd_vit_tiny_patch16", "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2,
    "drop_path_rate": 0.5,
}  # fmt: skip
MODELS = {
    "swin": SWIN, "swin, own biases": SWIN | {"shared_bias": False},
    "vit": VIT, "vit, own biases": VIT | {"shared_bias": False},
}  # fmt: skip
POLICIES = [("block", 1), ("block", 2), ("selective", 1), ("selective", 3)]


def built(arguments: dict[str, Any]) -> Backbone:
    torch.manual_seed(0)
    model = create_model(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():  # gains of 1e-5 and tables of 0 would hide a lost branch
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def outputs_and_gradients(model: Backbone) -> list[Tensor]:
    model.zero_grad()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rows = len(model.drop_path_rates)
    scale_RB = torch.tensor([[0.0, 2.0], [2.0, 2.0], [2.0, 0.0]]).repeat(rows, 1)[:rows]
    tokens = model(images, scale_RB)
    tokens.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [tokens.detach(), *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize("name", MODELS)
def test_every_policy_gives_the_plain_gradients(name: str) -> None:
    model = built(MODELS[name])
    plain = outputs_and_gradients(model)
    for mode, period in POLICIES:
        model.set_activation_checkpointing(mode, period)  # type: ignore[arg-type]
        assert (model.activation_checkpointing, model.checkpointing_period) == (mode, period)
        for found, expected in zip(outputs_and_gradients(model), plain, strict=True):
            # The same arithmetic a second time, fp32.
            assert (found - expected).norm() <= 1e-6 * expected.norm(), (mode, period)


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_a_block_trains_behind_frozen_patches(mode: Any) -> None:
    """No input of the first block has a gradient: reentrant recomputation would give its parameters none."""
    model: Any = built(MODELS["swin, own biases"])
    model.patch_embed.requires_grad_(False)
    model.set_activation_checkpointing(mode)
    model(torch.ones(1, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.layers.parameters())


@pytest.mark.parametrize(
    ("mode", "period", "attention", "mlp"),
    [("none", 1, 4, 4), ("block", 1, 8, 8), ("block", 2, 6, 6), ("block", 3, 5, 5), ("block", 5, 4, 4),
     ("selective", 1, 4, 8), ("selective", 2, 4, 6)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["swin", "vit"])
def test_what_is_computed_again(name: str, mode: Any, period: int, attention: int, mlp: int) -> None:
    """Calls in a forward and backward pass of four blocks; the bias that blocks share is computed once."""
    model: Any = built(MODELS[name])
    model.set_activation_checkpointing(mode, period)
    calls: Counter[str] = Counter()
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 4
    biases = [stage.position_bias for stage in model.layers] if name == "swin" else [model.model.rel_pos_bias]
    watched = {
        "bias": biases,
        "attn": [block.attn for block in blocks],
        "mlp": [block.mlp for block in blocks],
    }
    for kind, modules in watched.items():
        for module in modules:
            # Before the forward: recomputation stops early, as soon as it has what it needs.
            module.register_forward_pre_hook(lambda *_, kind=kind: calls.update([kind]))  # type: ignore[misc]
    outputs_and_gradients(model)
    assert calls == {"bias": len(biases), "attn": attention, "mlp": mlp}


def kept_bytes(model: Backbone, mode: Any) -> int:
    model.set_activation_checkpointing(mode)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens = model(torch.zeros(2, 3, 32, 32))
    assert tokens.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_that_recomputes_more_keeps_less(name: str) -> None:
    model = built(MODELS[name])
    none, selective, block = (kept_bytes(model, mode) for mode in ("none", "selective", "block"))
    assert none > 1.2 * selective > 1.2 * 1.2 * block


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # in torch's own compiler
@pytest.mark.parametrize("name", ["swin", "vit"])
def test_compiled_blocks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The plain gradients, and no view of a weight is kept: ZeRO-3 could not let go what it has gathered."""
    # All of inductor but its code, which takes a minute and is torch's to test.
    backend = "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = built(MODELS[name])
    plain = outputs_and_gradients(model)
    assert model.compile_blocks() == 4
    weights = {
        parameter.untyped_storage().data_ptr()
        for module in model.modules()
        if isinstance(module, ResidualBlock)
        for parameter in module.parameters()
    }
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() in weights:
            kept.append(isinstance(tensor, torch.nn.Parameter))
        return tensor

    for mode in ("none", "selective", "block"):
        model.set_activation_checkpointing(mode)  # type: ignore[arg-type]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = outputs_and_gradients(model)
        for value, expected in zip(found, plain, strict=True):
            # fp32 sums in another order.
            assert (value - expected).norm() <= 1e-5 * expected.norm(), mode
    assert kept
    assert all(kept)


def test_what_a_backbone_cannot_do_is_refused() -> None:
    model = built(SWIN)
    with pytest.raises(UserError, match="is 'blocks'; expected one of none, block, selective"):
        model.set_activation_checkpointing("blocks")  # type: ignore[arg-type]
    timm_vit = create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2)
    timm_vit.set_activation_checkpointing("block")
    assert timm_vit.compile_blocks() == 0
    with pytest.raises(UserError, match="can recompute all of each block alone, got selective with period 1"):
        timm_vit.set_activation_checkpointing("selective")
    with pytest.raises(
        UserError, match="got block with period 2; set it to block with checkpointing_period=1"
    ):
        timm_vit.set_activation_checkpointing("block", 2)
    with pytest.raises(UserError, match="HighResolutionNet cannot recompute its blocks; set it to none"):
        create_model("hrnet_w18_small", target="pooled").set_activation_checkpointing("block")
