"""The kernels on a GPU: error beside plain torch's, and the same bits in every run. `make gpu-check` runs these."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    CASES,
    Case,
    assert_no_further_from_fp64_than_plain_torch,
    assert_vit_no_further_from_fp64_than_plain_torch,
    kernel,
    results,
)
from fd_kernels import whitened_smooth_l1
from fd_kernels.dispatch import implementation
from torch import Tensor

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Stages of SwinV2-B and -G, of few images and heads: what a tile is does not depend on their number.
SHAPES = CASES | {
    f"swin_w{side}": Case(
        grid=(2 * side, 2 * side), window=(side, side), shift=(side // 2,) * 2, images=3, heads=4
    )
    for side in (7, 8, 12, 14, 16, 20, 24)
}
SHAPES |= {
    f"swin_w{side}_table": Case(
        grid=(side, 2 * side), window=(side, side), shift=(side // 2,) * 2, table=True
    )
    for side in (32, 40, 48, 56)
}
SHAPES |= {
    f"swin_w{side}_d{head_dim}": Case(
        grid=(2 * side, side), window=(side, side), shift=(side // 2,) * 2, heads=2, head_dim=head_dim
    )
    for side in (7, 14)
    for head_dim in (64, 128)
}


def on_gpu(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in case.inputs(dtype).items()}


# Each shape in bf16 and a few in all dtypes: most of the time here is the compiler's.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in SHAPES]
    + [(name, dtype) for name in ("w7", "w12_padded", "swin_w32_table", "w8_d64") for dtype in DTYPES[1:]],
    ids=str,
)
def test_window_attention(name: str, dtype: torch.dtype) -> None:
    assert_no_further_from_fp64_than_plain_torch(SHAPES[name], on_gpu(SHAPES[name], dtype))


@pytest.mark.parametrize("name", ["swin_w8", "swin_w16", "swin_w24", "swin_w40_table", "w12_padded"])
def test_window_attention_has_the_same_bits_over_20_runs(name: str) -> None:
    values = on_gpu(SHAPES[name], torch.bfloat16)
    first = results(SHAPES[name], values, kernel)
    for _ in range(20):
        again = results(SHAPES[name], values, kernel)
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("side", [8, 12, 24])
def test_images_beyond_32_bits_are_found(side: int) -> None:
    """The same image again and again: the last ones lie behind the first 2^31 numbers, and give what the first does."""
    case = Case(grid=(2 * side, 2 * side), window=(side, side), shift=(side // 2,) * 2)
    values = on_gpu(case, torch.bfloat16)
    alone = results(case, values, kernel)
    images = 2**31 // values["qkv"].numel() + 2
    found = results(
        case, values | {key: values[key].repeat(images, 1, 1, 1) for key in ("qkv", "upstream")}, kernel
    )
    for key in ("out", "d_qkv"):
        assert torch.equal(found[key], alone[key].expand_as(found[key])), key


@pytest.mark.parametrize(("tokens", "head_dim"), [(197, 64), (577, 64), (257, 128)])
def test_biased_attention(tokens: int, head_dim: int) -> None:
    assert_vit_no_further_from_fp64_than_plain_torch(
        tokens, 2, head_dim, torch.bfloat16, torch.device("cuda")
    )


def test_tokens_beyond_32_bits_are_found() -> None:
    """As with images: the gradient of the last token is that of the first."""
    generator = torch.Generator().manual_seed(0)
    pred, target = (3 * torch.randn(1, 1, 8192, generator=generator).bfloat16().cuda() for _ in range(2))
    tokens = 2**31 // 8192 + 2

    def gradient(count: int) -> Tensor:
        leaf = pred.repeat(1, count, 1).requires_grad_()
        with implementation("triton"):
            loss = whitened_smooth_l1(leaf, target.expand(1, count, 8192))
        return torch.autograd.grad(loss, leaf)[0]

    found = gradient(tokens)
    assert torch.equal(found, gradient(1).expand_as(found))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 100, 768, 1024, 2048, 8192])
def test_feature_loss(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pred, target = (3 * torch.randn(3, 50, width, generator=generator) for _ in range(2))
    pred, target = pred.to(dtype).cuda(), target.to(dtype).cuda()

    def run(loss: Callable[[Tensor], Tensor], given: Tensor) -> tuple[Tensor, Tensor]:
        leaf = given.detach().clone().requires_grad_()
        value = loss(leaf)
        return value.detach(), torch.autograd.grad(2.5 * value, leaf)[0]

    def plain(given: Tensor) -> Tensor:
        whitened = F.layer_norm(target.to(given.dtype), (width,))
        return F.smooth_l1_loss(given, whitened, beta=2.0, reduction="sum") / width

    with implementation("triton"):
        runs = [run(lambda leaf: whitened_smooth_l1(leaf, target), pred) for _ in range(20)]
    exact, eager = run(plain, pred.double()), run(plain, pred)
    for found, wanted, other in zip(runs[0], exact, eager, strict=True):
        error, bound = (float((tensor.double() - wanted).norm() / wanted.norm()) for tensor in (found, other))
        assert error <= 2 * bound + 1e-6
    assert all(torch.equal(a, b) for again in runs for a, b in zip(again, runs[0], strict=True))
