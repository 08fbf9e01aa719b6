"""The window attention reference against timm, against fp64, and against its own words."""

import math
from typing import Any

import pytest
import torch
from fd_kernels import window_attention
from fd_kernels.window_attention import reference
from fd_kernels.window_attention.launch import architecture
from fd_kernels.window_attention.op import not_served
from fd_kernels.window_attention.reference import shift_mask
from fd_kernels.window_attention.tiles import HOPPER
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor

CPU = torch.device("cpu")

# Grid, window, shift: dividing; not dividing in either side, with padding narrower and wider than the
# shift; non-square windows; a shift in one side only; a window larger than the grid; a single token.
CASES = [
    ((8, 8), (4, 4), (0, 0)),
    ((8, 12), (4, 4), (2, 2)),
    ((7, 9), (4, 4), (2, 2)),
    ((5, 10), (4, 5), (2, 2)),
    ((6, 8), (6, 4), (0, 2)),
    ((9, 4), (4, 4), (2, 0)),
    ((3, 5), (4, 4), (0, 0)),
    ((3, 5), (4, 4), (2, 2)),
    ((1, 1), (1, 1), (0, 0)),
]


def timm_block(window: tuple[int, int], shift: tuple[int, int], dim: int = 8) -> Any:
    block = SwinTransformerV2Block(
        dim=dim,
        input_resolution=(64, 64),  # larger than any window here, so that timm clamps nothing
        num_heads=2,
        window_size=window,
        shift_size=shift,
        dynamic_mask=True,
    )
    return block.double()


def inputs(
    grid: tuple[int, int] = (3, 5), window: tuple[int, int] = (2, 3), dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    num_tokens = window[0] * window[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "qkv_BHWE": normal(2, *grid, 12).to(dtype),
        "bias": 3 * normal(2, num_tokens, num_tokens),
        "scale_h": 10 * normal(2).exp(),
        "pad_qkv_E": normal(12).to(dtype),
    }


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_shift_mask_equals_timm(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    height, width = (-(-size // side) * side for size, side in zip(grid, window, strict=True))
    expected = timm_block(window, shift).get_attn_mask(torch.zeros(1, height, width, 1))
    mask_MNN = shift_mask(height, width, window, shift, CPU)
    if not any(shift):
        assert expected is None
        assert not mask_MNN.any()
    else:
        assert torch.equal(mask_MNN, expected)


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_matches_timm(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = timm_block(window, shift)
    attn = block.attn
    torch.nn.init.normal_(attn.q_bias)
    torch.nn.init.normal_(attn.v_bias)
    torch.nn.init.normal_(attn.qkv.weight)
    torch.nn.init.eye_(attn.proj.weight)
    torch.nn.init.zeros_(attn.proj.bias)
    attn.logit_scale.data.copy_(torch.tensor([1.0, 4.0])[:, None, None])
    x_BHWC = torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, *grid, 8, dtype=torch.float64)
    learned = [x_BHWC, attn.qkv.weight, attn.q_bias, attn.v_bias, attn.logit_scale, attn.cpb_mlp[2].weight]

    expected = block._attn(x_BHWC)
    expected_grads = torch.autograd.grad(expected, learned, upstream)

    bias_E = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    num_tokens = window[0] * window[1]
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, 2)[attn.relative_position_index.flatten()]
    out = window_attention(
        torch.nn.functional.linear(x_BHWC, attn.qkv.weight, bias_E),
        16 * torch.sigmoid(table).T.reshape(2, num_tokens, num_tokens),
        attn.logit_scale.exp().flatten(),
        window_size=window,
        shift_size=shift,
        pad_qkv_E=bias_E,
    )
    grads = torch.autograd.grad(out, learned, upstream)

    # fp64: only the order of additions differs.
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-10)


def test_gradients_are_those_of_the_function() -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs(grid=(2, 4)).items()}

    def attend(qkv: Tensor, bias: Tensor, scale: Tensor, pad: Tensor) -> Tensor:
        return window_attention(qkv, bias, scale, window_size=(2, 3), shift_size=(1, 1), pad_qkv_E=pad)

    assert torch.autograd.gradcheck(attend, tuple(tensors.values()))


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_windows_one_after_the_other_are_windows_together(
    monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    """The same numbers, but sums over windows in another order; the logits are not kept."""
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs(grid, window).items()}
    logits = (window[0] * window[1],) * 2
    kept: list[bool] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.dim() == 5 and x.shape[-2:] == logits)
        return x

    found = []
    for largest in (reference.LARGEST_TOGETHER, 0):
        monkeypatch.setattr(reference, "LARGEST_TOGETHER", largest)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = window_attention(**tensors, window_size=window, shift_size=shift)
        grads = torch.autograd.grad(out.square().sum(), list(tensors.values()), materialize_grads=True)
        found.append((out, grads, any(kept)))
    (together, grads, with_logits), (sequential, grads_again, sequential_with_logits) = found
    assert torch.equal(sequential, together)
    for grad, again in zip(grads, grads_again, strict=True):
        torch.testing.assert_close(again, grad, rtol=1e-12, atol=1e-12)
    num_windows = math.prod(-(-side // size) for side, size in zip(grid, window, strict=True))
    assert with_logits
    assert sequential_with_logits == (num_windows == 1)


def test_a_table_is_the_bias_of_each_relative_position() -> None:
    tensors = inputs(grid=(4, 6))
    table = torch.randn(2, 3 * 5, dtype=torch.float64, requires_grad=True)
    dense = torch.empty(2, 6, 6, dtype=torch.float64)
    for query in range(6):
        for key in range(6):
            down, right = query // 3 - key // 3, query % 3 - key % 3
            dense[:, query, key] = table.detach()[:, (down + 1) * 5 + right + 2]
    dense.requires_grad_()
    found = {}
    for bias in (table, dense):
        out = window_attention(**(tensors | {"bias": bias}), window_size=(2, 3), shift_size=(1, 1))
        found[bias.dim()] = out, *torch.autograd.grad(out.square().sum(), bias)
    assert torch.equal(found[2][0], found[3][0])
    # Both neighbours to the right of a token, in both rows: the sum over the pairs at that distance.
    right_neighbours = sum(found[3][1][:, query, query - 1] for query in (1, 2, 4, 5))
    torch.testing.assert_close(found[2][1][:, 1 * 5 + 3], right_neighbours)


def test_mask_leaks_at_large_scale() -> None:
    # One window of two tokens in two regions. Each query is opposite to its own key and equal to the other's:
    # at scale s the logits are -s and s - 100. Values are 3 and 5.
    qkv_BHWE = torch.tensor([[1.0, 0.0, -1.0, 0.0, 3.0, 0.0], [-1.0, 0.0, 1.0, 0.0, 5.0, 0.0]]).view(
        1, 1, 2, 6
    )
    arguments: dict[str, Any] = {"window_size": (1, 2), "shift_size": (0, 1)}
    no_bias = torch.zeros(1, 2, 2)

    out = window_attention(qkv_BHWE, no_bias, torch.tensor([100.0]), **arguments)
    # -100 against 0: all weight crosses the regions. Tolerance: fp32 rounding, here and below.
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([5.0, 3.0]), rtol=0, atol=1e-6)
    out = window_attention(qkv_BHWE, no_bias, torch.tensor([50.0]), **arguments)
    # -50 against -50: an even mean.
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([4.0, 4.0]), rtol=0, atol=1e-6)
    out = window_attention(qkv_BHWE, no_bias, torch.tensor([10.0]), **arguments)
    # -10 against -90: nothing crosses.
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([3.0, 5.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_only_rounds_the_result(dtype: torch.dtype) -> None:
    tensors = inputs(dtype=dtype)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    arguments: dict[str, Any] = {"window_size": (2, 3), "shift_size": (1, 1)}
    out = window_attention(**tensors, **arguments)
    expected = window_attention(**exact, **arguments)
    assert out.dtype == dtype
    # Half a unit in the last place of the output dtype, plus what fp32 arithmetic does at logits near 100.
    bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2e-5
    assert ((out.double() - expected).abs() <= bound).all()


def test_autocast_does_not_lower_it() -> None:
    tensors = inputs(dtype=torch.float32)
    expected = window_attention(**tensors, window_size=(2, 3), shift_size=(1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_attention(**tensors, window_size=(2, 3), shift_size=(1, 1))
    assert torch.equal(out, expected)


def test_runs_on_the_meta_device() -> None:
    tensors = {name: tensor.to("meta") for name, tensor in inputs().items()}
    assert window_attention(**tensors, window_size=(2, 3), shift_size=(1, 1)).shape == (2, 3, 5, 4)


def test_strided_inputs_and_zero_vectors() -> None:
    tensors = inputs()
    tensors["qkv_BHWE"][0, 0] = 0.0
    arguments: dict[str, Any] = {"window_size": (2, 3), "shift_size": (1, 1)}
    expected = window_attention(**tensors, **arguments)
    strided = {name: tensor.repeat_interleave(2, dim=-1)[..., ::2] for name, tensor in tensors.items()}
    strided["qkv_BHWE"].requires_grad_()
    out = window_attention(**strided, **arguments)
    assert torch.equal(out, expected)
    # The cosine of a zero vector is 0, not NaN, and so is not its gradient.
    (grad,) = torch.autograd.grad(out.square().sum(), strided["qkv_BHWE"])
    assert out.isfinite().all()
    assert grad.isfinite().all()


def test_padding_is_unused_where_the_window_divides() -> None:
    tensors = inputs(grid=(4, 6))
    pad_qkv_E = tensors.pop("pad_qkv_E")
    arguments: dict[str, Any] = {"window_size": (2, 3), "shift_size": (1, 1)}
    with_padding = window_attention(**tensors, **arguments, pad_qkv_E=pad_qkv_E)
    assert torch.equal(window_attention(**tensors, **arguments), with_padding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_BHWE": torch.zeros(3, 5, 12)}, "qkv_BHWE has 3 dimensions; expected 4"),
        ({"qkv_BHWE": torch.zeros(2, 3, 5, 12, dtype=torch.long)}, "dtype torch.int64; expected a floating"),
        (
            {"qkv_BHWE": torch.zeros(2, 3, 5, 15)},
            "15 channels, .* 2 heads; expected a positive multiple of 3",
        ),
        (
            {"bias": torch.zeros(0, 15), "scale_h": torch.zeros(0)},
            "12 channels, .* 0 heads; expected a positive",
        ),
        ({"bias": torch.zeros(6)}, "bias has 1 dimensions; expected 3"),
        ({"bias": torch.zeros(2, 14)}, r"bias has shape \(2, 14\); expected \(2, 15\)"),
        ({"bias": torch.zeros(2, 4, 4)}, r"bias has shape \(2, 4, 4\); expected \(2, 6, 6\)"),
        ({"scale_h": torch.zeros(3)}, r"scale_h has shape \(3,\); expected \(2,\)"),
        ({"window_size": (0, 3)}, "window_size is .*; expected two positive"),
        ({"window_size": (2, 3, 1)}, "window_size is .*; expected two positive"),
        ({"shift_size": (1,)}, "shift_size is .*; expected two integers"),
        ({"shift_size": (2, 1)}, "shift_size is .*; expected two integers, 0 <= shift < window"),
        ({"shift_size": (0, -1)}, "shift_size is .*; expected two integers, 0 <= shift < window"),
        ({"pad_qkv_E": None}, r"window \(2, 3\) does not divide the grid \(3, 5\); pass pad_qkv_E"),
        ({"pad_qkv_E": None, "qkv_BHWE": torch.zeros(2, 3, 6, 12)}, r"the grid \(3, 6\); pass pad_qkv_E"),
        ({"pad_qkv_E": None, "qkv_BHWE": torch.zeros(2, 4, 5, 12)}, r"the grid \(4, 5\); pass pad_qkv_E"),
        ({"pad_qkv_E": torch.zeros(4, dtype=torch.float64)}, r"pad_qkv_E has shape \(4,\); expected \(12,\)"),
        ({"pad_qkv_E": torch.zeros(12)}, "pad_qkv_E has dtype torch.float32; expected torch.float64"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = {**inputs(), "window_size": (2, 3), "shift_size": (1, 1), **changes}
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)


@pytest.mark.parametrize(
    ("qkv_shape", "bias_shape", "served"),
    [
        ((1, 64, 64, 96), (1, 64, 64), True),
        ((9, 2**12, 2**13, 3 * 32), (1, 64, 64), False),  # 3 * 2^30 numbers an image
        ((1, 2**11, 2**12, 3 * 32), (1, 64, 64), True),
        ((1, 64, 64, 96), (1, 2**16, 2**15), False),
    ],
)
def test_images_and_biases_beyond_32_bits_are_not_served(
    qkv_shape: tuple[int, ...], bias_shape: tuple[int, ...], served: bool
) -> None:
    qkv, bias = (torch.empty(shape, device="meta") for shape in (qkv_shape, bias_shape))
    reason = not_served(qkv, bias, torch.empty(1, device="meta"))
    assert (reason is None) is served
    assert served or "expected fewer than 2**31 numbers" in str(reason)


@pytest.mark.parametrize(("capability", "expected"), [((8, 6), 80), ((9, 0), 90), ((12, 0), 120)])
def test_architectures(capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(torch.device("cuda")) == expected
    assert architecture(torch.device("cpu")) == HOPPER, "the interpreter"
