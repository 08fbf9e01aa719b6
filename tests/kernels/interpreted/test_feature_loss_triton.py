"""The Triton kernel of the feature loss against an fp64 oracle, and as an op of PyTorch."""

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fd_kernels import whitened_smooth_l1
from fd_kernels.dispatch import implementation
from fd_kernels.feature_loss import op
from fd_kernels.feature_loss.launch import TILES, tile
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UPSTREAM = 2.5


@pytest.fixture(autouse=True)
def _kernel_runs() -> Any:
    """A call that the kernel does not serve is an error here, not a quiet pass of the reference."""
    with implementation("triton"):
        yield


def features(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    mean: float = 7.0,
) -> tuple[Tensor, Tensor]:
    """Student and teacher features: some differences are below beta = 2 and some above, on either side."""
    generator = torch.Generator().manual_seed(0)
    pred_BLD = 2 * torch.randn(shape, generator=generator)
    target_BLD = mean + 3 * torch.randn(shape, generator=generator)
    return pred_BLD.to(dtype).requires_grad_(), target_BLD.to(target_dtype or dtype)


def oracle(
    pred_BLD: Tensor,
    target_BLD: Tensor,
    weight_BL: Tensor | None = None,
    beta: float = 2.0,
    eps: float = 1e-5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient by plain torch in one dtype; in fp64 the truth, in the features' own eager's answer."""
    pred_BLD = pred_BLD.detach().to(dtype).requires_grad_()
    whitened_BLD = F.layer_norm(target_BLD.to(dtype), target_BLD.shape[-1:], eps=eps)
    loss_BL = F.smooth_l1_loss(pred_BLD, whitened_BLD, beta=beta, reduction="none").mean(-1)
    loss = (loss_BL if weight_BL is None else loss_BL * weight_BL.to(dtype)).sum()
    return loss.detach(), torch.autograd.grad(UPSTREAM * loss, pred_BLD)[0]


def check(
    pred_BLD: Tensor, target_BLD: Tensor, weight_BL: Tensor | None = None, **settings: float
) -> tuple[Tensor, Tensor]:
    """Hold loss and gradient of the kernel to twice eager's error; returns both."""
    loss = whitened_smooth_l1(pred_BLD, target_BLD, token_weight_BL=weight_BL, **settings)
    (grad_BLD,) = torch.autograd.grad(UPSTREAM * loss, pred_BLD)
    exact, exact_grad = oracle(pred_BLD, target_BLD, weight_BL, **settings)
    eager_dtype = torch.promote_types(pred_BLD.dtype, target_BLD.dtype)
    eager, eager_grad = oracle(pred_BLD, target_BLD, weight_BL, dtype=eager_dtype, **settings)
    assert loss.dtype == torch.float32
    assert grad_BLD.dtype == pred_BLD.dtype
    assert grad_BLD.shape == pred_BLD.shape
    # Floor: a few fp32 roundings in the chain mean, variance, difference, sum; eager may hit the value exactly.
    assert abs(loss - exact) <= 2 * abs(eager - exact) + 1e-6 * exact
    # Floor: the one rounding to the gradient's own dtype (half its eps), and fp32 arithmetic before it.
    floor = (torch.finfo(pred_BLD.dtype).eps / 2 + 4e-6) * exact_grad.abs().max()
    error, eager_error = ((g.double() - exact_grad).abs().max() for g in (grad_BLD, eager_grad))
    assert error <= 2 * eager_error + floor
    return loss, grad_BLD


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 65, 100, 768, 1000, 1024, 4096, 8192])
def test_matches_fp64(channels: int, dtype: torch.dtype) -> None:
    check(*features(2, 5, channels, dtype=dtype))  # 10 tokens: no tile of several rows divides them evenly


@pytest.mark.parametrize("channels", [1, 2, 3, 64, 1536])
@pytest.mark.parametrize("tokens", [1, 17])
def test_matches_fp64_at_the_edges(tokens: int, channels: int) -> None:
    check(*features(1, tokens, channels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
def test_dtypes_mix(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    check(*features(2, 3, 96, dtype=dtype, target_dtype=target_dtype))


@pytest.mark.parametrize("beta", [0.5, 2.0, 100.0])
@pytest.mark.parametrize("eps", [1e-5, 10.0])
def test_settings(beta: float, eps: float) -> None:
    check(*features(2, 3, 96), beta=beta, eps=eps)


def test_mean_far_from_zero() -> None:
    # E[x^2] - E[x]^2 in fp32 would lose the variance, 9, beside 10^8.
    check(*features(1, 4, 256, mean=1e4))


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize(("value", "noise"), [(7.3, 0.0), (12345.678, 0.0), (12345.678, 1e-3), (-0.1, 1e-8)])
@pytest.mark.parametrize("channels", [1000, 1024])
def test_rows_that_are_nearly_constant(
    channels: int, value: float, noise: float, target_dtype: torch.dtype
) -> None:
    """Whitening divides by a deviation of next to nothing: what is left of the mean would be a signal."""
    pred_BLD, target_BLD = features(1, 4, channels)
    target_BLD = value + noise * (target_BLD - 7) / 3
    check(pred_BLD, target_BLD.to(target_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_views_are_read_in_place(dtype: torch.dtype) -> None:
    pred_BLD, target_BLD = features(3, 6, 200, dtype=dtype)
    # Without the CLS token; every second token of a part of the channels; one token for all images.
    check(pred_BLD[:, 1:], target_BLD[:, :-1])
    check(pred_BLD[:, ::2, :100], target_BLD[:, 1::2, 100:])
    check(pred_BLD.transpose(0, 1), target_BLD.transpose(0, 1))
    check(pred_BLD, target_BLD[:, :1].expand(3, 6, 200))


def test_gradient_of_a_view_reaches_its_base() -> None:
    pred_BLD, target_BLD = features(2, 4, 64)
    (grad_BLD,) = torch.autograd.grad(whitened_smooth_l1(pred_BLD[:, 1:], target_BLD[:, 1:]), pred_BLD)
    assert not grad_BLD[:, 0].any()
    _, exact_grad = oracle(pred_BLD[:, 1:], target_BLD[:, 1:])
    # fp32 arithmetic on gradients of at most 2.5 / 64.
    torch.testing.assert_close(UPSTREAM * grad_BLD[:, 1:].double(), exact_grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_token_weights(weight_dtype: torch.dtype) -> None:
    pred_BLD, target_BLD = features(3, 5, 100)
    weight_BL = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).mul(3).round().to(weight_dtype).T
    assert not weight_BL.is_contiguous()
    assert not weight_BL.all()
    _, grad_BLD = check(pred_BLD, target_BLD, weight_BL)
    assert torch.equal(grad_BLD.any(-1), weight_BL.bool())
    check(pred_BLD, target_BLD, torch.tensor([[2.0], [0.0], [1.0]]).to(weight_dtype).expand(3, 5))


def test_offsets_beyond_32_bits() -> None:
    # Three tokens 2^30 elements apart, in 4 GiB of addresses of which three pages are touched.
    stride, channels = 2**30, 64
    memory = mmap.mmap(-1, 2 * (2 * stride + channels), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    far_BLD = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((1, 3, channels), (0, stride, 1))
    pred_BLD, target_BLD = features(1, 3, channels, dtype=torch.bfloat16)
    far_BLD.copy_(target_BLD)
    check(pred_BLD, far_BLD)


def test_nan_of_one_token_is_seen() -> None:
    for side in range(2):
        pair = features(2, 3, 64)
        with torch.no_grad():
            pair[side][1, 1, 7] = torch.nan
        loss = whitened_smooth_l1(*pair)
        (grad_BLD,) = torch.autograd.grad(loss, pair[0])
        assert loss.isnan()
        assert grad_BLD[1, 1].isnan().any()
        assert grad_BLD[0].isfinite().all()


def test_small_gradients_survive_fp16() -> None:
    # Scaled up only after a rounding to fp16, gradients near 1e-8 would be 0: the smallest fp16 is 6e-8.
    pred_BLD, target_BLD = features(1, 2, 512, dtype=torch.float16)
    weight_BL = torch.full((1, 2), 1e-5)
    loss = whitened_smooth_l1(pred_BLD, target_BLD, token_weight_BL=weight_BL)
    (grad_BLD,) = torch.autograd.grad(65536 * loss, pred_BLD)
    _, exact_grad = oracle(pred_BLD, target_BLD, weight_BL)
    # One rounding to fp16, relative; the floor is half of fp16's smallest step.
    torch.testing.assert_close(grad_BLD.double(), exact_grad * 65536 / UPSTREAM, rtol=5e-4, atol=6e-8)


def test_tokens_of_a_tile_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    pred_BLD, target_BLD = features(2, 9, 64)
    loss, grad_BLD = check(pred_BLD, target_BLD)
    monkeypatch.setitem(TILES, 256, (2, 4))
    assert tile(64) == (2, 64, 4)
    again, grad_again_BLD = check(pred_BLD, target_BLD)
    assert torch.equal(loss, again)
    assert torch.equal(grad_BLD, grad_again_BLD)


@pytest.mark.parametrize("weighted", [False, True])
def test_is_a_proper_op(weighted: bool) -> None:
    pred_BLD, target_BLD = features(2, 3, 65, dtype=torch.bfloat16)
    weight_BL = torch.rand(2, 3) if weighted else None
    torch.library.opcheck(op._triton_loss, (pred_BLD, target_BLD, weight_BL, 2.0, 1e-5))
    upstream = torch.tensor(UPSTREAM)
    torch.library.opcheck(
        op._triton_gradient, (pred_BLD.detach(), target_BLD, weight_BL, upstream, 2.0, 1e-5)
    )


def double(pred_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    return whitened_smooth_l1(2 * pred_BLD, target_BLD)


def compiled(pred_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    return torch.compile(double, backend="aot_eager", fullgraph=True)(pred_BLD, target_BLD)


def checkpointed(pred_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    return checkpoint(double, pred_BLD, target_BLD, use_reentrant=False)


def under_autocast(pred_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return double(pred_BLD, target_BLD)


@pytest.mark.parametrize("call", [compiled, checkpointed, under_autocast])
def test_same_bits_compiled_checkpointed_and_under_autocast(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    pred_BLD, target_BLD = features(2, 3, 96)
    expected, loss = double(pred_BLD, target_BLD), call(pred_BLD, target_BLD)
    (expected_grad,), (grad,) = (torch.autograd.grad(value, pred_BLD) for value in (expected, loss))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)


def test_no_gradient_to_target_and_weight() -> None:
    pred_BLD, target_BLD = features(1, 3, 64)
    weight_BL = torch.ones(1, 3, requires_grad=True)
    loss = whitened_smooth_l1(pred_BLD, target_BLD.requires_grad_(), token_weight_BL=weight_BL)
    loss.backward()
    assert pred_BLD.grad is not None
    assert target_BLD.grad is None
    assert weight_BL.grad is None
    assert not whitened_smooth_l1(pred_BLD.detach(), target_BLD, token_weight_BL=weight_BL).requires_grad


def test_a_second_derivative_is_refused() -> None:
    pred_BLD, target_BLD = features(1, 1, 64)
    (grad_BLD,) = torch.autograd.grad(whitened_smooth_l1(pred_BLD, target_BLD), pred_BLD, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad_BLD.sum().backward()


@pytest.mark.parametrize(
    ("pred_BLD", "message"),
    [
        (torch.zeros(1, 2, 64, dtype=torch.float64), "dtype torch.float64; expected one of"),
        (torch.zeros(1, 2, 8193), "8193 channels; expected 1 to 8192"),
        (torch.zeros(1, 64, 2).mT, "stride 2 between channels; expected 1"),
        (torch.zeros(0, 2, 64), r"shape \(0, 2, 64\); expected at least one token"),
    ],
)
def test_what_the_kernel_does_not_serve(pred_BLD: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whitened_smooth_l1(pred_BLD, pred_BLD)
    with implementation("auto"):
        assert whitened_smooth_l1(pred_BLD, pred_BLD).item() == 0
