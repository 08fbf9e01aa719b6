"""The feature loss reference against its formula, against fp64 and by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fd_kernels import whitened_smooth_l1
from torch import Tensor


def features(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Student and teacher features, (2, 5, 24): some differences are below beta = 2 and some above."""
    generator = torch.Generator().manual_seed(0)
    pred_BLD = 2 * torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    target_BLD = 7 + 3 * torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    return pred_BLD.to(dtype), target_BLD.to(dtype)


def plain_loss(pred_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    whitened_BLD = F.layer_norm(target_BLD, target_BLD.shape[-1:], eps=1e-5)
    return F.smooth_l1_loss(pred_BLD, whitened_BLD, beta=2.0) * pred_BLD.shape[0] * pred_BLD.shape[1]


def test_value_by_hand() -> None:
    # Whitened target: (-1, 1) / sqrt(1 + eps). Differences: 1 (quadratic, 1 / 4) and 4 (linear, 4 - 1).
    one = 1 / math.sqrt(1 + 1e-5)
    target_BLD = torch.tensor([[[4.0, 6.0]]], dtype=torch.float64)
    pred_BLD = torch.tensor([[[1 - one, 4 + one]]], dtype=torch.float64)
    loss = whitened_smooth_l1(pred_BLD, target_BLD)
    assert loss.item() == pytest.approx((0.25 + 3.0) / 2, abs=1e-12)  # fp64 rounding
    assert whitened_smooth_l1(pred_BLD, target_BLD, beta=8.0).item() == pytest.approx(
        (1 + 16) / 16 / 2, abs=1e-12
    )


def test_matches_layer_norm_and_smooth_l1_in_fp64() -> None:
    pred_BLD, target_BLD = features()
    pred_BLD.requires_grad_()
    loss, expected = whitened_smooth_l1(pred_BLD, target_BLD), plain_loss(pred_BLD, target_BLD)
    assert loss.dtype == torch.float64
    # fp64: only the order of additions differs.
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    (grad,), (expected_grad,) = (
        torch.autograd.grad(2.5 * loss, pred_BLD),
        torch.autograd.grad(expected, pred_BLD),
    )
    torch.testing.assert_close(grad, 2.5 * expected_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_worse_than_twice_plain_torch(dtype: torch.dtype) -> None:
    pred_BLD, target_BLD = features(dtype)
    pred_BLD.requires_grad_()
    exact_BLD = pred_BLD.detach().double().requires_grad_()
    exact = whitened_smooth_l1(exact_BLD, target_BLD.double())
    loss, plain = whitened_smooth_l1(pred_BLD, target_BLD), plain_loss(pred_BLD, target_BLD)
    assert loss.dtype == torch.float32
    # At most twice the error of plain torch in the same dtype; the floor is fp32 rounding of a sum of 240.
    floor = 1e-6 * exact.item()
    assert abs(loss.item() - exact.item()) <= 2 * abs(plain.item() - exact.item()) + floor

    (exact_grad,) = torch.autograd.grad(exact, exact_BLD)
    (grad,) = torch.autograd.grad(loss, pred_BLD)
    (plain_grad,) = torch.autograd.grad(plain, pred_BLD)
    assert grad.dtype == dtype
    error = (grad.double() - exact_grad).abs().max()
    plain_error = (plain_grad.double() - exact_grad).abs().max()
    # Here the floor is the rounding of the gradient to its own dtype.
    assert error <= 2 * plain_error + torch.finfo(dtype).eps * exact_grad.abs().max()


def test_gradient_is_that_of_the_function() -> None:
    pred_BLD, target_BLD = features()
    weight_BL = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(pred: Tensor) -> Tensor:
        return whitened_smooth_l1(pred, target_BLD, beta=1.5, token_weight_BL=weight_BL)

    assert torch.autograd.gradcheck(loss, pred_BLD.requires_grad_())


def test_no_gradient_to_target_and_weight() -> None:
    pred_BLD, target_BLD = features()
    weight_BL = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    pred_BLD.requires_grad_()
    target_BLD.requires_grad_()
    whitened_smooth_l1(pred_BLD, target_BLD, token_weight_BL=weight_BL).backward()
    assert pred_BLD.grad is not None
    assert target_BLD.grad is None
    assert weight_BL.grad is None


def test_token_weights_select_tokens() -> None:
    pred_BLD, target_BLD = features()
    weight_BL = torch.zeros(2, 5)
    weight_BL[0, 1], weight_BL[1, 4] = 1.0, 3.0
    loss = whitened_smooth_l1(pred_BLD, target_BLD, token_weight_BL=weight_BL)
    first = whitened_smooth_l1(pred_BLD[:1, 1:2], target_BLD[:1, 1:2])
    second = whitened_smooth_l1(pred_BLD[1:, 4:], target_BLD[1:, 4:])
    torch.testing.assert_close(loss, first + 3 * second, rtol=1e-13, atol=0)  # fp64 rounding


@pytest.mark.parametrize(
    ("pred_dtype", "target_dtype", "loss_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_dtypes_mix(pred_dtype: torch.dtype, target_dtype: torch.dtype, loss_dtype: torch.dtype) -> None:
    pred_BLD, target_BLD = features()
    pred_BLD, target_BLD = pred_BLD.to(pred_dtype), target_BLD.to(target_dtype)
    loss = whitened_smooth_l1(pred_BLD, target_BLD)
    assert loss.dtype == loss_dtype
    # The inputs are already rounded, so what is left is fp32 arithmetic.
    torch.testing.assert_close(
        loss.double(), whitened_smooth_l1(pred_BLD.double(), target_BLD.double()), rtol=1e-6, atol=0
    )


def test_whitening_ignores_scale_and_offset_of_a_token() -> None:
    pred_BLD, target_BLD = features()
    loss = whitened_smooth_l1(pred_BLD, target_BLD, eps=1e-12)
    changed = whitened_smooth_l1(pred_BLD, 1000 * target_BLD - 5, eps=1e-12)
    torch.testing.assert_close(loss, changed, rtol=1e-10, atol=0)  # eps itself is the difference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred_BLD": torch.zeros(5, 24)}, "pred_BLD has 2 dimensions; expected 3"),
        ({"target_BLD": torch.zeros(2, 5, 23)}, r"target_BLD has shape \(2, 5, 23\); expected \(2, 5, 24\)"),
        ({"target_BLD": torch.zeros(2, 5, 24, dtype=torch.int32)}, "target_BLD has dtype torch.int32"),
        ({"token_weight_BL": torch.ones(5)}, r"token_weight_BL has shape \(5,\); expected \(2, 5\)"),
        (
            {"token_weight_BL": torch.ones(2, 5) * 1j},
            "token_weight_BL has dtype torch.complex64; expected a real",
        ),
        ({"beta": 0.0}, "beta is 0.0; expected a positive"),
        ({"eps": 0.0}, "eps is 0.0; expected a positive"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    pred_BLD, target_BLD = features()
    with pytest.raises(ValueError, match=message):
        whitened_smooth_l1(**{"pred_BLD": pred_BLD, "target_BLD": target_BLD, **changes})
