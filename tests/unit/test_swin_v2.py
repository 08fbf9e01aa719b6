"""The student against timm's Swin V2, and what timm's has not: shared bias, drop path, recomputation."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinTransformerV2
from torch import Tensor, nn

from fd_scale.errors import UserError
from fd_scale.models import SwinTransformerV2, position_bias

SMALL: dict[str, Any] = {
    "img_size": 32,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """A shape that both models are built with, and the size of the images they see."""

    img_size: tuple[int, int]
    window_size: int
    image: tuple[int, int]
    depths: tuple[int, ...] = (2, 2, 2)
    in_chans: int = 3
    pretrained_window_size: tuple[int, ...] = (0, 0, 0)

    def shape(self) -> dict[str, Any]:
        """Arguments that have one name in both models."""
        return {
            "img_size": self.img_size,
            "in_chans": self.in_chans,
            "embed_dim": 16,
            "depths": self.depths,
            "num_heads": (2, 4, 8),
            "window_size": self.window_size,
        }


PARITY_CASES = {
    # Grids 16, 8 and 4: shifted windows in two stages, and a last stage that one window covers.
    "shift": ParityCase(img_size=(64, 64), window_size=4, image=(64, 64)),
    # Grids 18 x 14, 9 x 7, 5 x 4: padded windows, also in shifted blocks, and odd grids in patch merging.
    "padding": ParityCase(img_size=(64, 64), window_size=5, image=(72, 56), depths=(2, 2, 1)),
    # The last stage clamps the window to 2 x 4; before it, only the long side shifts.
    "non_square": ParityCase(img_size=(32, 64), window_size=4, image=(32, 64)),
    "one_channel": ParityCase(img_size=(32, 32), window_size=4, image=(32, 32), depths=(2, 1, 1), in_chans=1),
    "window_covers_input": ParityCase(img_size=(32, 32), window_size=16, image=(32, 32), depths=(2, 2, 1)),
    "pretrained_window": ParityCase(
        img_size=(64, 64), window_size=8, image=(64, 64), depths=(2, 1, 1), pretrained_window_size=(4, 4, 2)
    ),
}


def randomise(model: nn.Module, mean_logit_scale: float = 1.0) -> None:
    """Weights under which every part of the model shows in the output and in the gradients."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("logit_scale"):
                parameter.copy_(mean_logit_scale + noise)
            elif parameter.dim() == 1:
                is_gain = "norm" in name and name.endswith("weight")
                parameter.copy_(0.3 * noise + (1.0 if is_gain else 0.0))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def build_timm(case: ParityCase) -> Any:
    return TimmSwinTransformerV2(
        **case.shape(),
        pretrained_window_sizes=case.pretrained_window_size,
        strict_img_size=False,
        num_classes=0,
        drop_path_rate=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class Precision:
    """fp64 shows any difference in the mathematics, with logit scales on both sides of the clamp (4.6).

    fp32 differs by the order of operations. Large logit scales multiply that (timm's own distance from fp64
    reaches 1e-4 at 4.0), so they are smaller there. Gradients of logit scale and query bias are sums over
    all queries that nearly cancel: timm's own distance from fp64 reaches 1.4e-5, hence their tolerance.
    """

    dtype: torch.dtype
    mean_logit_scale: float
    tolerance: float
    cancelling_tolerance: float

    def of(self, name: str) -> float:
        """The tolerance for the gradient of the parameter `name`."""
        return self.cancelling_tolerance if name.endswith(("logit_scale", "q_bias")) else self.tolerance


FP64 = Precision(dtype=torch.float64, mean_logit_scale=4.0, tolerance=1e-10, cancelling_tolerance=1e-10)
FP32 = Precision(dtype=torch.float32, mean_logit_scale=1.0, tolerance=1e-5, cancelling_tolerance=5e-5)
both_precisions = pytest.mark.parametrize("precision", [FP64, FP32], ids=["fp64", "fp32"])


def assert_parity(
    model: Any, timm_model: Any, image: tuple[int, int], rename: Any, precision: Precision
) -> None:
    """Equal outputs and gradients under random weights; `rename` takes timm's named tensors to our names."""
    randomise(timm_model, precision.mean_logit_scale)
    timm_model.to(precision.dtype)
    model.to(precision.dtype)
    model.load_state_dict(rename(timm_model.state_dict()))

    generator = torch.Generator().manual_seed(1)
    images_BCHW = (
        torch.randn(2, model.in_chans, *image, generator=generator).to(precision.dtype).requires_grad_()
    )
    expected_BHWC = timm_model.forward_features(images_BCHW)
    upstream_BHWC = torch.randn(expected_BHWC.shape, generator=generator).to(precision.dtype)
    expected_BHWC.backward(upstream_BHWC)
    expected_grads = rename({name: p.grad for name, p in timm_model.named_parameters()})
    expected_grads["images"], images_BCHW.grad = images_BCHW.grad, None
    tokens_BLD = model(images_BCHW)
    tokens_BLD.backward(upstream_BHWC.flatten(1, 2))
    grads = {name: p.grad for name, p in model.named_parameters()} | {"images": images_BCHW.grad}

    assert tokens_BLD.dtype == precision.dtype
    assert model.grid_size(*image) == expected_BHWC.shape[1:3]
    assert relative_error(tokens_BLD, expected_BHWC.flatten(1, 2)) <= precision.tolerance
    assert grads.keys() == expected_grads.keys()
    errors = {name: relative_error(grads[name], expected) for name, expected in expected_grads.items()}
    assert {name: error for name, error in errors.items() if error > precision.of(name)} == {}


@both_precisions
@pytest.mark.parametrize("case", PARITY_CASES.values(), ids=PARITY_CASES.keys())
def test_parity_with_timm(case: ParityCase, precision: Precision) -> None:
    model = SwinTransformerV2(
        **case.shape(), pretrained_window_size=case.pretrained_window_size, shared_bias=False
    )
    assert_parity(model, build_timm(case), case.image, model.translate, precision)


@both_precisions
def test_parity_with_timm_shared_bias_and_extra_norm(precision: Precision) -> None:
    case = PARITY_CASES["shift"]
    timm_model = build_timm(case)
    for stage in timm_model.layers:
        first, second = stage.blocks
        second.attn.cpb_mlp = first.attn.cpb_mlp
        second.norm3 = nn.LayerNorm(second.dim)
        second.register_forward_hook(lambda block, _, output: block.norm3(output))
    model = SwinTransformerV2(**case.shape(), extra_norm_period=2)

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The blocks share a module, whose gradients timm names once: those of a stage's first block."""
        first = {name: tensor for name, tensor in tensors.items() if "blocks.1.attn.cpb_mlp" not in name}
        return model.translate(first)

    assert_parity(model, timm_model, case.image, rename, precision)


def small_model(**overrides: Any) -> Any:
    model = SwinTransformerV2(**(SMALL | overrides))
    randomise(model)
    return model


def random_images(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def test_drop_path_scales_each_residual_branch() -> None:
    model = small_model()
    scale_R = torch.linspace(0.5, 2.0, len(model.drop_path_rates))
    scaled = copy.deepcopy(model)
    blocks = [block for stage in scaled.layers for block in stage.blocks]
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    with torch.no_grad():
        # A branch ends in its norm, so scaling the norm's gain and bias scales the branch.
        for norm, scale in zip(norms, scale_R, strict=True):
            norm.weight.mul_(scale)
            norm.bias.mul_(scale)
        expected = scaled(random_images())
        actual = model(random_images(), scale_R[:, None].expand(-1, 2))
        undropped = model(random_images())
    assert relative_error(actual, expected) <= 1e-5  # fp32, the product in another place
    assert relative_error(undropped, expected) > 0.1


def test_drop_path_is_per_image() -> None:
    model = small_model()
    images_BCHW = random_images(batch=3)
    scale_RB = torch.ones(8, 3)
    scale_RB[:, 1] = 0.0
    scale_RB[3, 2] = 0.0
    with torch.no_grad():
        out = model(images_BCHW, scale_RB)
        plain = model(images_BCHW)
        merged = model.layers[1].downsample(model.patch_embed(images_BCHW[1:2]))
        no_branches = model.norm(merged).flatten(1, 2)
    assert torch.equal(out[0], plain[0])
    # Batched and single products may round differently: fp32.
    assert relative_error(out[1:2], no_branches) <= 1e-5
    assert relative_error(out[2], plain[2]) > 0.01


def test_dropped_branches_get_no_gradient() -> None:
    model = small_model()
    scale_RB = torch.ones(8, 2)
    scale_RB[2:4] = 0.0
    model(random_images(), scale_RB).square().sum().backward()
    first, second = model.layers[0].blocks
    assert all(parameter.grad.abs().max() == 0 for parameter in second.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in first.parameters())


def test_bfloat16_weights() -> None:
    model = small_model()
    lowered = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        expected, tokens_BLD = model(random_images()), lowered(random_images())
    assert tokens_BLD.dtype == torch.bfloat16
    assert lowered.layers[0].position_bias().dtype == torch.float32
    # bf16 keeps 8 bits (error 0.004 a rounding) and the model rounds some tens of times.
    assert relative_error(tokens_BLD.float(), expected) <= 0.1
    tokens_BLD = lowered(random_images())
    tokens_BLD.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in lowered.parameters())


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = SwinTransformerV2(**SMALL, extra_norm_period=2)
    divisors = {
        f"layers.{stage}.blocks.{block}.{end}.weight": (2.0 * layer_id) ** 0.5
        for layer_id, (stage, block) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)], start=1)
        for end in ("attn.proj", "mlp.fc2")
    }
    for name, parameter in model.named_parameters():
        if "norm1" in name or "norm2" in name:
            assert (parameter == (1e-5 if name.endswith("weight") else 0.0)).all(), name
        elif "norm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("logit_scale"):
            torch.testing.assert_close(parameter.exp(), torch.full_like(parameter, 10.0))
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            # At least 512 values are drawn, so 0.2 is more than four standard errors.
            assert parameter.std().item() == pytest.approx(0.02 / divisors.pop(name, 1.0), rel=0.2), name
    assert not divisors
    zero_gain: Any = SwinTransformerV2(**SMALL, post_norm_gain_init=0.0)
    assert (zero_gain.layers[0].blocks[0].norm1.weight == 0).all()


def test_the_seed_decides_the_weights_and_the_forward_draws_nothing() -> None:
    torch.manual_seed(3)
    model = SwinTransformerV2(**SMALL, drop_path_rate=0.5)
    state = torch.get_rng_state()
    with torch.no_grad():
        model.train()(random_images())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    again = SwinTransformerV2(**SMALL)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_drop_path_rates_are_linear_over_blocks() -> None:
    model = SwinTransformerV2(**SMALL, drop_path_rate=0.3)
    # fp64 rounding
    assert model.drop_path_rates == pytest.approx((0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3))
    one_block = SwinTransformerV2(**(SMALL | {"depths": (1,), "num_heads": (2,)}), drop_path_rate=0.3)
    assert one_block.drop_path_rates == (0.0, 0.0)


def test_weight_decay_skips_bias_mlp_and_logit_scale() -> None:
    names = SwinTransformerV2(**SMALL).no_weight_decay_names()
    per_stage = {
        f"layers.{i}.position_bias.cpb_mlp.{part}" for i in (0, 1) for part in ("0.weight", "0.bias")
    }
    per_stage |= {f"layers.{i}.position_bias.cpb_mlp.2.weight" for i in (0, 1)}
    per_block = {f"layers.{i}.blocks.{j}.attn.logit_scale" for i in (0, 1) for j in (0, 1)}
    assert names == per_stage | per_block


def test_grid_size_is_that_of_the_tokens() -> None:
    model = small_model()
    assert model.grid_size(32, 32) == (4, 4)
    assert model.grid_size(36, 20) == (5, 3)  # 9 x 5 patches, padded in patch merging
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 36, 20)).shape == (1, 15, model.num_features)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": (32, 30)}, "images are 32 x 30 px; expected multiples of the patch size 4"),
        ({"img_size": (32, 32, 32)}, "img_size has 3 entries; expected one number or 2"),
        ({"num_heads": (2, 3)}, "stage 1 has 32 channels and 3 heads"),
        ({"num_heads": (2,)}, r"depths is \(2, 2\), num_heads \(2,\)"),
        ({"window_size": 0}, "window_size is .*; expected at least 1"),
        ({"pretrained_window_size": (8,)}, "pretrained_window_size has 1 entries"),
        ({"extra_norm_period": 0}, "extra_norm_period is 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
    ],
)
def test_wrong_arguments_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SwinTransformerV2(**(SMALL | overrides))


def test_wrong_inputs_are_named() -> None:
    model = small_model()
    with pytest.raises(UserError, match="images are 32 x 33 px"):
        model(torch.zeros(1, 3, 32, 33))
    with pytest.raises(UserError, match=r"images have shape \(1, 1, 32, 32\); expected \(B, 3"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(UserError, match=r"drop path scales have shape \(4, 1\); expected \(8, 1\)"):
        model(torch.zeros(1, 3, 32, 32), torch.ones(4, 1))


def test_large_windows_read_the_table_of_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens and gradients, up to the order of sums, whichever way the bias reaches the blocks."""
    model = SwinTransformerV2(
        img_size=32, patch_size=4, embed_dim=16, depths=(2,), num_heads=(2,), window_size=(4, 8)
    ).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for limit, dims in ((position_bias.LARGEST_DENSE_WINDOW, 3), (31, 2)):
        monkeypatch.setattr(position_bias, "LARGEST_DENSE_WINDOW", limit)
        assert model.layers[0].position_bias().dim() == dims
        tokens = model(images)
        found.append([tokens, *torch.autograd.grad(tokens[:, :5].square().sum(), list(model.parameters()))])
    for table, dense in zip(*reversed(found), strict=True):
        torch.testing.assert_close(table, dense, rtol=1e-9, atol=1e-12)


def test_a_window_that_covers_a_smaller_image_is_not_shifted() -> None:
    """As in a model that was made for it."""
    shape: dict[str, Any] = {"embed_dim": 32, "depths": [2], "num_heads": [1], "window_size": 8}
    large, small = (SwinTransformerV2(img_size=size, **shape) for size in (64, 32))
    for parameter in large.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    small.load_state_dict(large.state_dict())
    for size in ((32, 32), (32, 24)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(large(images), small(images), rtol=0, atol=0)
    wide = torch.randn(2, 3, 32, 64)  # shifted along the longer side alone
    assert not torch.equal(large(wide), small(wide))
