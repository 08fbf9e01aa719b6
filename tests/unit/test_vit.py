"""The ViT student against timm's BEiT, and its ways into other people's weights."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from timm.models.beit import Beit
from torch import Tensor, nn

from fd_scale.errors import UserError
from fd_scale.models import create_model, load_tensors
from fd_scale.models.position_bias import resized_table
from fd_scale.models.vit import BiasedAttention

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def build(**changes: Any) -> Any:
    return create_model("fd_vit_tiny_patch16", **(SMALL | changes))


def randomise(model: nn.Module) -> None:
    """Weights under which every part of the model shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_((1.0 if is_gain else 0.0) + 0.3 * noise)


def images(size: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("shared_bias", [True, False])
def test_tokens_and_gradients_equal_timm(shared_bias: bool) -> None:
    ours = build(shared_bias=shared_bias).double()
    randomise(ours)
    theirs = Beit(
        **SMALL, num_classes=0, global_pool="", init_values=0.1, use_abs_pos_emb=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos_bias=not shared_bias, use_shared_rel_pos_bias=shared_bias,
    ).double()  # fmt: skip
    theirs.load_state_dict(ours.model.state_dict())  # the keys are timm's own
    assert not any(isinstance(module, BiasedAttention) for module in theirs.modules())
    expected = theirs.forward_features(images())
    torch.testing.assert_close(ours(images()), expected, rtol=1e-10, atol=1e-10)  # fp64: order of sums
    upstream = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    theirs_grads = torch.autograd.grad(expected, list(theirs.parameters()), upstream)
    ours_grads = torch.autograd.grad(ours(images()), list(ours.model.parameters()), upstream)
    for gradient, wanted in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-8)


def test_initialisation_is_feature_distillations() -> None:
    torch.manual_seed(0)
    model = build(embed_dim=128, depth=4, num_heads=2).model
    assert not model.rel_pos_bias.relative_position_bias_table.any()
    assert model.rel_pos_bias.relative_position_bias_table.shape == (7 * 7 + 3, 2)
    assert model.pos_embed is None
    for index, block in enumerate(model.blocks):
        assert torch.equal(block.gamma_1, torch.full((128,), 0.1))
        assert block.norm1.eps == 1e-6
        # Truncated at one standard deviation of 0.02: uniform-like, s.d. 0.0108; 4 % covers 16,384 draws.
        for weight, divisor in (
            (block.attn.qkv.weight, 1.0),
            (block.attn.proj.weight, (2 * (index + 1)) ** 0.5),
            (block.mlp.fc2.weight, (2 * (index + 1)) ** 0.5),
        ):
            assert weight.std().item() == pytest.approx(0.0108 / divisor, rel=0.04)
            assert weight.abs().max().item() <= 0.02 / divisor + 1e-7
    assert not any(name.endswith("k_bias") for name, _ in model.named_parameters()), "the keys have no bias"
    assert build().no_weight_decay_names() == {"model.cls_token"}, "the table of positions decays"


def test_drop_path_multiplies_both_branches_of_an_image() -> None:
    model = build(depth=3, drop_path_rate=0.2).double()
    randomise(model)
    assert model.drop_path_rates == pytest.approx((0.1, 0.1, 0.2, 0.2))
    plain = model(images())
    torch.testing.assert_close(model(images(), torch.ones(4, 2)), plain)
    scale = torch.ones(4, 2)
    scale[:, 1] = 0  # the second image loses the last two blocks
    dropped = model(images(), scale)
    torch.testing.assert_close(dropped[0], plain[0])
    shallow = build(depth=1).double()
    shallow.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if name in shallow.state_dict()}
    )
    torch.testing.assert_close(dropped[1], shallow(images())[1])
    assert torch.equal(model.eval()(images()), model.train()(images())), "nothing is drawn in a forward"


def test_weights_of_a_plain_vit_give_its_tokens() -> None:
    """The biases of the keys change nothing, and absent relative positions are zeros; only positions are lost."""
    plain = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=0).double()
    randomise(plain)
    with torch.no_grad():
        plain.pos_embed.zero_()
    ours = build(layer_scale_init=0.5).double()
    load_tensors(ours, plain.state_dict(), "a plain ViT")
    torch.testing.assert_close(ours(images()), plain.forward_features(images()), rtol=1e-10, atol=1e-10)


def test_the_authors_keys() -> None:
    source, ours = build(), build()
    randomise(source)
    theirs = {
        f"encoder.{name.removeprefix('model.')}": tensor for name, tensor in source.state_dict().items()
    }
    written = source.to_layout(source.state_dict(), "fd")
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in theirs.items())
    theirs["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(17, 17)
    theirs |= {"decoder.0.weight": torch.zeros(1), "feature_model.visual.proj": torch.zeros(1)}
    load_tensors(ours, theirs, "the authors")
    torch.testing.assert_close(ours(images(dtype=torch.float32)), source(images(dtype=torch.float32)))


def test_a_shared_table_is_copied_into_blocks_that_have_their_own() -> None:
    shared, own = build().double(), build(shared_bias=False).double()
    randomise(shared)
    load_tensors(own, shared.state_dict(), "shared")
    torch.testing.assert_close(own(images()), shared(images()))
    assert torch.equal(own.to_layout(own.state_dict(), "timm")["blocks.2.attn.relative_position_bias_table"],
                       shared.model.rel_pos_bias.relative_position_bias_table)  # fmt: skip


def test_what_does_not_fit_is_refused() -> None:
    clip = timm.create_model("vit_base_patch16_clip_quickgelu_224.openai", **SMALL, num_classes=0)
    with pytest.raises(UserError, match=r"norm_pre\.weight is unknown"):
        load_tensors(build(), clip.state_dict(), "CLIP")
    with pytest.raises(UserError, match=r"rel_pos_bias.relative_position_bias_table is missing"):
        load_tensors(build(), build(shared_bias=False).state_dict(), "per block")
    for wrong, words in (
        ({"img_size": 30}, "do not fit"),
        ({"num_heads": 5}, "do not fit"),
        ({"drop_path_rate": 1.0}, "0 <= rate < 1"),
        ({"depht": 3}, "unknown argument of fd_vit_tiny_patch16 'depht'.*depth"),
        ({"depth": "3"}, "model.overrides.depth: got '3', expected int"),
    ):
        with pytest.raises(UserError, match=words):
            build(**wrong)
    with pytest.raises(UserError, match="this model has the formats ours, timm, fd"):
        build().to_layout({}, "official")


@pytest.mark.parametrize(("old", "new"), [(14, 24), (7, 16), (4, 5), (9, 4), (3, 3)])
def test_a_resized_table_is_a_spline_in_geometric_coordinates(old: int, new: int) -> None:
    """Written out slowly: the ratio by a root finder, a not-a-knot cubic spline along one axis, then the other."""
    torch.manual_seed(0)
    table_Th = torch.randn((2 * old - 1) ** 2, 2, dtype=torch.float64)
    ratio = 1.0
    if new > old:
        ratio = brentq(lambda q: sum(q**k for k in range(old - 1)) - (new - 1), 1, 8, xtol=1e-14)
    distances = [sum(ratio**k for k in range(step)) for step in range(old)]
    places = [-distance for distance in distances[:0:-1]] + distances
    grid_HWh = table_Th.view(2 * old - 1, 2 * old - 1, 2).numpy()
    wanted = np.arange(1 - new, new)
    rows_HWh = CubicSpline(places, grid_HWh, axis=0)(wanted)
    expected = CubicSpline(places, rows_HWh, axis=1)(wanted).reshape(-1, 2)
    found = resized_table(table_Th, new)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    middle = len(found) // 2
    torch.testing.assert_close(found[middle], table_Th[len(table_Th) // 2])  # no distance stays no distance
    torch.testing.assert_close(
        found[middle + 1], table_Th[len(table_Th) // 2 + 1]
    )  # and a neighbour a neighbour


@pytest.mark.parametrize("shared_bias", [True, False])
def test_weights_of_a_smaller_grid_are_resized(shared_bias: bool, caplog: pytest.LogCaptureFixture) -> None:
    """As fine-tuning at 336 px takes them from 224 px: a linear table stays one near the centre, CLS rows are kept."""
    small, large = build(), build(img_size=64, shared_bias=shared_bias)
    randomise(small)
    load_tensors(large, small.state_dict(), "224 px")
    assert "is resized from 52 relative positions to those of 8 x 8" in caplog.text
    table = small.model.rel_pos_bias.relative_position_bias_table
    tables = [
        parameter for name, parameter in large.named_parameters() if name.endswith("position_bias_table")
    ]
    assert len(tables) == (1 if shared_bias else 3)
    for found in tables:
        assert found.shape == (15 * 15 + 3, 2)
        assert torch.equal(found[-3:], table[-3:])
        torch.testing.assert_close(found[:-3], resized_table(table[:-3].detach(), 8))
    tokens = large(images(64, torch.float32))
    assert tokens.isfinite().all()
