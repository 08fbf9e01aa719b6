"""The window attention kernels, on the CPU through Triton's interpreter, against fp64 and beside plain torch.

The interpreter sees no races and no reads beyond a tensor; it computes what the kernel says, tile by tile.
"""

from typing import Any

import pytest
import torch
from attention_cases import (
    ARGUMENTS,
    CASES,
    Case,
    assert_no_further_from_fp64_than_plain_torch,
    assert_trains_alike,
    error,
    kernel,
    plain_torch,
    results,
)
from fd_kernels import window_attention
from fd_kernels.window_attention import launch, tiles
from fd_kernels.window_attention.launch import num_splits, token_table
from fd_kernels.window_attention.op import attention
from fd_kernels.window_attention.reference import shift_mask, window_attention_reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fd_scale.models import create_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES]
    + [(name, torch.bfloat16) for name in ("w8", "w8_padded", "w12", "w5x9_table", "w8_d64")]
    + [(name, torch.float16) for name in ("w7", "w12_padded", "w10_table_padded")],
    ids=str,
)
def test_no_further_from_fp64_than_plain_torch(name: str, dtype: torch.dtype) -> None:
    assert_no_further_from_fp64_than_plain_torch(CASES[name], CASES[name].inputs(dtype))


@pytest.mark.parametrize("name", ["w8", "w12_padded", "w5x9_table"])
def test_tiles_of_other_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 runs a Hopper's tiles above: the bias in registers, images one after the other. Here it is read in tiles."""
    monkeypatch.setattr(launch, "architecture", lambda device: 80)
    assert_no_further_from_fp64_than_plain_torch(CASES[name], CASES[name].inputs(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "length", "gradient"),
    [
        ("w8", 100.0, 0.1), ("w8", 3000.0, 1e-2), ("w8", 0.1, 500.0), ("w8", 0.01, 50.0), ("w12", 10.0, 1e-3),
        ("w12_padded", 300.0, 1e-4), ("w12_padded", 100.0, 1e-3),
    ],
)  # fmt: skip
def test_fp16_bears_long_and_short_rows(name: str, length: float, gradient: float) -> None:
    """A cosine's gradient is that of its logits over the row's length, and fp16 holds 6e-8 to 6e4 alone."""
    values = CASES[name].inputs(torch.float16)
    queries_and_keys = 2 * values["qkv"].shape[-1] // 3
    values["qkv"][..., :queries_and_keys] *= length
    values["upstream"] *= gradient
    assert_no_further_from_fp64_than_plain_torch(CASES[name], values)


@pytest.mark.parametrize("name", ["w8", "w12"])
def test_rows_of_next_to_no_length_are_directions(name: str) -> None:
    values = CASES[name].inputs(torch.float32)
    values["qkv"][..., : 2 * values["qkv"].shape[-1] // 3] *= 1e-6
    assert_no_further_from_fp64_than_plain_torch(CASES[name], values)


def test_images_of_one_window_are_spread_over_programs() -> None:
    """One tile, one window: a split is a part of the images, and each is counted once."""
    case = Case(grid=(8, 8), window=(8, 8), images=3)
    assert launch.Plan((8, 8), (0, 0), (8, 8), 1, 32, torch.bfloat16, False, True).splits(1, 3, CPU) == (3, 1)
    assert_no_further_from_fp64_than_plain_torch(case, case.inputs(torch.bfloat16))


@pytest.mark.parametrize("name", ["w8", "w9", "w8x4_table"])
def test_the_largest_scale(name: str) -> None:
    """At a scale of 100 plain torch's rounded cosines are far off; logits in fp32, alike in all kernels, are not.

    Were operands rounded after their normalisation, errors would come near to plain torch's, not to a quarter of them.
    """
    values = CASES[name].inputs(torch.bfloat16)
    values["scale"][:] = 100.0
    doubles = {key: value.double() for key, value in values.items()}
    exact = results(CASES[name], doubles, window_attention_reference)
    found, plain = results(CASES[name], values, kernel), results(CASES[name], values, plain_torch)
    for key in ("out", "d_qkv", "d_bias"):
        assert error(found[key], exact[key]) <= error(plain[key], exact[key]) / 4, key


def test_no_images_are_left_to_the_reference() -> None:
    case = Case(grid=(8, 8), window=(8, 8), images=0)
    values = case.inputs(torch.bfloat16)
    call = (values["qkv"], values["bias"], values["scale"])
    assert window_attention(*call, window_size=(8, 8), shift_size=(0, 0)).shape == (0, 8, 8, 32)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("keeps_bias", [False, True])
def test_images_that_share_a_tile(images: int, keeps_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of a program at a time, and an odd number of them: the last is done again, and counts once."""
    case = Case(grid=(5, 4), window=(4, 4), shift=(2, 2), images=images)
    tile = tiles.Tiles(64, 16, images=2, keeps_bias=keeps_bias)
    keys = tiles.Tiles(16, 64, keeps_bias=keeps_bias)
    chosen = {"forward": tile, "queries": tile, "keys": keys, "bias": tile}
    monkeypatch.setattr(launch, "find_tile", lambda kernel, *_, **__: chosen.get(kernel))
    assert_no_further_from_fp64_than_plain_torch(case, case.inputs(torch.float32))


def test_parts_of_a_sum_are_of_one_size() -> None:
    plan = launch.Plan((8, 8), (4, 4), (24, 16), 2, 32, torch.bfloat16, False, True)
    for wanted in range(1, 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                launch, "num_splits", lambda programs, most, device, wanted=wanted: min(wanted, most)
            )
            parts, windows = plan.splits(1, 12, CPU)
        assert plan.windows_an_image % windows == 0
        assert parts % windows == 0
        assert parts <= plan.windows_an_image * 12


def test_the_mask_is_additive() -> None:
    """A bias of the mask's size between the regions outweighs it, as in the models that were trained so."""
    case = Case(grid=(8, 8), window=(8, 8), shift=(4, 4), heads=2)  # one window of four regions
    values = case.inputs(torch.float32)
    half = torch.arange(8) >= 4
    region = (2 * half[:, None] + half.int()).flatten()  # where a shift by 4 parts a window
    values["bias"] += 100.0 * (region[:, None] != region)
    assert_no_further_from_fp64_than_plain_torch(case, values)


def test_fp16_bears_the_zero_keys_of_a_models_padding() -> None:
    """Swin V2 has no bias on keys: one over the length of a padding key is beyond fp16, and of infinity comes NaN."""
    case = CASES["w4_padded"]
    values = case.inputs(torch.float16)
    values["pad"][case.heads * case.head_dim : 2 * case.heads * case.head_dim] = 0
    exact = results(case, {key: value.double() for key, value in values.items()}, window_attention_reference)
    found = results(case, values, kernel)
    for key in ("out", "d_qkv", "d_bias", "d_scale"):
        # fp16 rounds operands to 2^-11, and some ten of them stand behind a number.
        assert error(found[key], exact[key], least=1.0) <= 5e-3, key


def test_the_same_bits_in_every_run() -> None:
    for name in ("w8", "w12_padded"):
        values = CASES[name].inputs(torch.bfloat16)
        first, second = (results(CASES[name], values, kernel) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_token_table() -> None:
    table = token_table((5, 6), (4, 4), (2, 2), 20, CPU)
    assert table.shape == (4, 20)
    assert (table[:, 16:] == -1).all()
    offsets, regions = table[:, :16] & ((1 << 26) - 1), table[:, :16] >> 26
    held = offsets[offsets < 30]
    assert sorted(held.tolist()) == list(range(30)), "each token once"
    assert offsets[0, 0] == 2 * 6 + 2, "the grid is rolled by the shift"
    different = regions[:, :, None] != regions[:, None, :]
    assert torch.equal(different * -100.0, shift_mask(8, 8, (4, 4), (2, 2), CPU))


def test_windows_are_spread_over_programs() -> None:
    assert num_splits(4, 1, CPU) == 1
    assert num_splits(4, 100, CPU) == 2


def test_the_op_passes_torchs_own_checks() -> None:
    for name in ("w8x4", "w4_padded", "w8x4_table"):
        case = CASES[name]
        values = case.inputs(torch.float32)
        tensors = [values[key].requires_grad_() for key in ARGUMENTS]
        pad = tensors[3] if case.padded else None
        torch.library.opcheck(attention, (*tensors[:3], pad, list(case.window), list(case.shift), True))


def test_compiled_recomputed_and_under_autocast_the_same() -> None:
    case = CASES["w8x4"]
    values = case.inputs(torch.float32)
    expected = results(case, values, kernel)

    def compiled(*args: Any, **kwargs: Any) -> Tensor:
        return torch.compile(kernel, fullgraph=True, backend="aot_eager")(*args, **kwargs)

    def recomputed(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(kernel, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def autocast(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return kernel(*args, **kwargs)

    for other in (compiled, recomputed, autocast):
        found = results(case, values, other)
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (other.__name__, key)


def test_a_gradient_without_strides_and_a_sum_of_flops() -> None:
    case = CASES["w8x4"]
    values = case.inputs(torch.float32)
    qkv = values["qkv"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        kernel(
            qkv, values["bias"], values["scale"], window_size=case.window, shift_size=case.shift
        ).sum().backward()
    assert qkv.grad is not None
    # Two products forward, five backward, of 2 * N * N * D for each of two windows.
    assert counter.get_total_flops() == 7 * 2 * 2 * 32 * 32 * 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": lambda t: t.double()}, "qkv has dtype torch.float64; expected float32, bfloat16 or float16"),
        ({"bias": lambda t: t.half()}, "bias and scale have dtypes"),
        ({"qkv": lambda t: t[..., :48]}, "a head has 16 channels; expected one of"),
        ({"qkv": lambda t: t.transpose(1, 2)}, "expected contiguous ones"),
    ],
)
def test_what_the_kernel_does_not_serve(change: dict[str, Any], words: str) -> None:
    case = Case(grid=(8, 8), window=(8, 8))
    values = case.inputs(torch.float32)
    values |= {key: function(values[key]) for key, function in change.items()}
    call = (values["qkv"], values["bias"], values["scale"])
    with pytest.raises(ValueError, match=words):
        kernel(*call, window_size=case.window, shift_size=case.shift)
    out = window_attention(*call, window_size=case.window, shift_size=case.shift)  # the reference serves it
    assert out.isfinite().all()


def test_a_swin_v2_trains_alike_with_kernels_and_reference() -> None:
    """Padded windows, a shared bias, recomputed blocks: the tokens, and the gradient of every parameter."""
    model: Any = create_model(
        "swin_v2_tiny",
        img_size=40,
        patch_size=4,
        embed_dim=32,
        depths=(2, 1),
        num_heads=(1, 2),
        window_size=4,
    )
    model.set_activation_checkpointing("block")
    assert_trains_alike(model, 40)
