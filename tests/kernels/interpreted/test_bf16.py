"""The interpreter, as `fd_kernels.testing` changes it, treats bf16 as a GPU does."""

import torch
import triton
import triton.language as tl


@triton.jit
def round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.load(x_ptr + n).to(out_ptr.dtype.element_ty))


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def test_conversions_are_torchs() -> None:
    step = 2.0**-7  # of bf16 at 1; halves of it are ties
    special = [0.0, -0.0, 1 + step / 2, 1 + 3 * step / 2, -1 - 3 * step / 2, 3.4e38, 1e-40, torch.inf]
    x = torch.cat([torch.tensor(special), torch.randn(56, generator=torch.Generator().manual_seed(0))])
    down = torch.empty(64, dtype=torch.bfloat16)
    round_kernel[(1,)](x, down, N=64)
    assert torch.equal(down.view(torch.int16), x.bfloat16().view(torch.int16))
    up = torch.empty(64)
    round_kernel[(1,)](down, up, N=64)
    assert torch.equal(up.view(torch.int32), down.float().view(torch.int32))


def test_nan_stays_nan() -> None:
    down = torch.empty(64, dtype=torch.bfloat16)
    round_kernel[(1,)](torch.full((64,), torch.nan), down, N=64)
    assert down.isnan().all()


def test_product_is_of_the_values() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    matmul_kernel[(1,)](a, b, out, N=16)
    # Exact products of bf16, added in fp32 in some order.
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
