"""The biased attention reference against torch's own attention in fp64, and against its own words."""

import pytest
import torch
import torch.nn.functional as F
from fd_kernels import biased_attention
from torch import Tensor


def inputs(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, tokens, 3 * heads * head_dim, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), 3 * torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64)


def torch_attention(qkv_BNE: Tensor, bias_hNN: Tensor) -> Tensor:
    B, N, E = qkv_BNE.shape
    heads = len(bias_hNN)
    q, k, v = (part.view(B, N, heads, -1).transpose(1, 2) for part in qkv_BNE.split(E // 3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_hNN[None]).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 4), (10, 3, 8), (17, 2, 64)])
def test_output_and_gradients_equal_torch(tokens: int, heads: int, head_dim: int) -> None:
    ours = [tensor.requires_grad_() for tensor in inputs(tokens, heads, head_dim, torch.float64)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    out, expected = biased_attention(*ours), torch_attention(*theirs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)  # fp64: another order of sums
    upstream = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    for gradient, wanted in zip(
        torch.autograd.grad(out, ours, upstream), torch.autograd.grad(expected, theirs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_compute_in_fp32(dtype: torch.dtype) -> None:
    qkv, bias = inputs(10, 3, 8, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = biased_attention(qkv, bias.float())
    assert out.dtype == dtype
    exact = torch_attention(qkv.double(), bias)
    # Only the output is rounded: half a unit in the last place of the largest value.
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 * exact.abs().max() + 1e-5


def test_wrong_arguments_are_named() -> None:
    qkv, bias = inputs(4, 2, 8, torch.float32)
    for arguments, words in (
        ((qkv[0], bias), "qkv_BNE has 2 dimensions"),
        ((qkv, bias[0]), "bias_hNN has 2 dimensions"),
        ((qkv, bias[:, :3]), "bias_hNN has shape"),
        ((qkv[..., :-1], bias), "multiple of 3"),
        ((qkv[..., :0], bias[:0]), "0 channels, and bias 0 heads; expected a positive"),
        ((qkv.int(), bias), "qkv_BNE has dtype"),
        ((qkv, bias.int()), "bias_hNN has dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            biased_attention(*arguments)
