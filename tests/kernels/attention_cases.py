"""Calls of window attention, what they should give, and how plain torch does them: for the CPU and a GPU alike."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fd_kernels import biased_attention, window_attention
from fd_kernels.biased_attention.reference import biased_attention_reference
from fd_kernels.dispatch import implementation
from fd_kernels.window_attention.reference import (
    relative_position_index,
    shift_mask,
    window_attention_reference,
)
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call."""

    grid: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    images: int = 1
    heads: int = 1
    head_dim: int = 32
    table: bool = False
    """Whether the bias is given for each relative position."""

    @property
    def padded(self) -> bool:
        return bool(self.grid[0] % self.window[0] or self.grid[1] % self.window[1])

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        rows, columns = self.window
        positions = ((2 * rows - 1) * (2 * columns - 1),) if self.table else (rows * columns,) * 2
        channels = self.heads * self.head_dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return {
            "qkv": normal(self.images, *self.grid, 3 * channels).to(dtype),
            "bias": 4 * normal(self.heads, *positions),
            "scale": 5 + 10 * torch.rand(self.heads, generator=generator),
            "pad": normal(3 * channels).to(dtype),
            "upstream": normal(self.images, *self.grid, channels).to(dtype),
        }


CASES = {
    # One tile of 64: a full one, two heads and images; 49 of 64 tokens; a shift on one side; one window alone.
    "w8": Case(grid=(16, 16), window=(8, 8), shift=(4, 4), images=2, heads=2),
    "w7": Case(grid=(14, 21), window=(7, 7), shift=(3, 3), images=3),
    "w8x4": Case(grid=(8, 8), window=(8, 4), shift=(0, 2)),
    "one_window": Case(grid=(6, 6), window=(6, 6), heads=2),
    "w4_padded": Case(grid=(9, 6), window=(4, 4), shift=(2, 2), heads=2),
    "w8_padded": Case(grid=(15, 10), window=(8, 8), shift=(4, 4)),
    "larger_than_grid": Case(grid=(3, 5), window=(8, 8)),
    # Several tiles.
    "w12": Case(grid=(24, 24), window=(12, 12), shift=(6, 6)),
    "w12_padded": Case(grid=(20, 13), window=(12, 12), shift=(6, 6)),
    "w9": Case(grid=(9, 9), window=(9, 9), heads=2),
    # A bias for each relative position: one tile, several, windows of more rows than columns, padding.
    "w8x4_table": Case(grid=(8, 8), window=(8, 4), shift=(4, 2), images=3, table=True),
    "w5x9_table": Case(grid=(10, 18), window=(5, 9), shift=(2, 4), heads=2, table=True),
    "w10_table_padded": Case(grid=(11, 10), window=(10, 10), shift=(5, 5), table=True),
    # Wider heads leave no registers for the gradient of the bias.
    "w8_d64": Case(grid=(8, 16), window=(8, 8), shift=(0, 4), head_dim=64),
    "w9_d128_padded": Case(grid=(9, 10), window=(9, 9), shift=(4, 4), head_dim=128),
}
ARGUMENTS = ("qkv", "bias", "scale", "pad")


def results(case: Case, values: dict[str, Tensor], attention: Any) -> dict[str, Tensor]:
    """The output and the gradient of every argument, for an upstream gradient that is not 1."""
    given = [values[name].detach().clone().requires_grad_() for name in ARGUMENTS[: 4 if case.padded else 3]]
    out = attention(
        *given[:3],
        window_size=case.window,
        shift_size=case.shift,
        pad_qkv_E=given[3] if case.padded else None,
    )
    gradients = torch.autograd.grad(out, given, values["upstream"])
    return {"out": out.detach()} | {
        f"d_{name}": grad for name, grad in zip(ARGUMENTS, gradients, strict=False)
    }


def kernel(*args: Any, **kwargs: Any) -> Tensor:
    with implementation("triton"):
        return window_attention(*args, **kwargs)


def plain_torch(
    qkv: Tensor, bias: Tensor, scale: Tensor, *, window_size: Any, shift_size: Any, pad_qkv_E: Tensor | None
) -> Tensor:
    """As models write it: roll, pad, partition, products in the inputs' dtype, softmax in fp32."""
    B, H, W, E = qkv.shape
    (h, w), C, heads = window_size, E // 3, len(bias)
    N = h * w
    if bias.dim() == 2:
        bias = bias[:, relative_position_index(window_size, bias.device)]
    rows, columns = -(-H // h), -(-W // w)
    x = torch.roll(qkv, (-shift_size[0], -shift_size[1]), (1, 2))
    if pad_qkv_E is not None:
        whole = pad_qkv_E.expand(B, rows * h, columns * w, E).clone()
        whole[:, :H, :W] = x
        x = whole
    x = x.view(B, rows, h, columns, w, 3, heads, C // heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = x.reshape(3, B, rows * columns, heads, N, C // heads).unbind()
    cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    logits = cosine.float() * scale[:, None, None] + bias
    if any(shift_size):
        logits = logits + shift_mask(rows * h, columns * w, window_size, shift_size, qkv.device)[:, None]
    out = logits.softmax(-1).to(v.dtype) @ v
    out = out.view(B, rows, columns, heads, h, w, C // heads).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(B, rows * h, columns * w, C)[:, :H, :W]
    return torch.roll(out, shift_size, (1, 2))


def error(found: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """Norm of the difference, relative to the exact norm or to `least` where that is larger."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(least))


def assert_no_further_from_fp64_than_plain_torch(case: Case, values: dict[str, Tensor]) -> None:
    """The bound explains itself: twice the error of torch in the same dtype, and a floor of some ten roundings.

    The gradient of the scale is a sum over thousands of pairs that nearly cancels (the softmax gradients of a row
    sum to 0): where it comes out below 1, its error is measured in absolute terms, and the floor is higher.
    """
    dtype = values["qkv"].dtype
    exact = results(case, {key: value.double() for key, value in values.items()}, window_attention_reference)
    found, plain = results(case, values, kernel), results(case, values, plain_torch)
    assert set(found) == set(exact)
    for key, tensor in found.items():
        assert tensor.dtype == (values[key[2:]].dtype if key != "out" else dtype)
        floor = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}[dtype]
        floor *= 10 if key == "d_scale" else 1
        least = 1.0 if key == "d_scale" else 0.0
        bound = 2 * error(plain[key], exact[key], least) + floor
        assert error(tensor, exact[key], least) <= bound, (key, error(tensor, exact[key], least), bound)


def plain_vit(qkv_BNE: Tensor, bias_hNN: Tensor) -> Tensor:
    B, N, _ = qkv_BNE.shape
    q, k, v = qkv_BNE.view(B, N, 3, len(bias_hNN), -1).permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_hNN.to(q.dtype)).transpose(1, 2).flatten(2)


def assert_vit_no_further_from_fp64_than_plain_torch(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, tokens, 3 * heads * head_dim, generator=generator).to(device, dtype)
    bias = 3 * torch.randn(heads, tokens, tokens, generator=generator).to(device)
    upstream = torch.randn(2, tokens, heads * head_dim, generator=generator).to(device, dtype)

    def results(attention: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        given = [tensor.to(dtype or tensor.dtype).requires_grad_() for tensor in (qkv, bias)]
        out = attention(*given)
        return [out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))]

    exact, plain = results(biased_attention_reference, torch.float64), results(plain_vit)
    with implementation("triton"):
        found = results(biased_attention)
    floor = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}[dtype]  # some ten roundings
    for ours, other, wanted in zip(found, plain, exact, strict=True):
        # The absolute term: with a single key only the values have a gradient, and the bias has none.
        assert error(ours, wanted, 1.0) <= 2 * error(other, wanted, 1.0) + floor


def assert_trains_alike(model: nn.Module, side: int) -> None:
    """With the kernels and the reference: the tokens of two images, and the gradient of every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("reference", "triton"):
        with implementation(name):  # type: ignore[arg-type]
            tokens = model(images)
            gradients = torch.autograd.grad(tokens.square().sum(), list(model.parameters()))
        found[name] = [tokens.detach(), *gradients]
    for ours, reference in zip(found["triton"], found["reference"], strict=True):
        # fp32 sums in another order, through a few blocks; relative to the largest value of a tensor.
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))
