"""Whitening and smooth L1 in Triton, in one read of each row."""

# Shape suffix legend: B = images, L = tokens, D = channels; R = rows of a tile, C = channels padded to 2^n

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def whitened_smooth_l1_kernel(
    pred_ptr,  # (B, L, D): student features, channels contiguous
    target_ptr,  # (B, L, D): teacher features, channels contiguous
    weight_ptr,  # (B, L): factor of each token, or None
    upstream_ptr,  # (): gradient of the sum, fp32; read where GRADIENT
    token_loss_ptr,  # (B * L,): loss of each token, fp32, contiguous; written unless GRADIENT
    grad_ptr,  # (B, L, D): gradient of pred, contiguous; written where GRADIENT
    num_rows,  # B * L
    num_tokens,  # L
    pred_stride_B,
    pred_stride_L,
    target_stride_B,
    target_stride_L,
    weight_stride_B,
    weight_stride_L,
    beta,
    eps,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """One program for BLOCK_R tokens: loss of each token, or the gradient of their sum."""
    # int64: 2^31 elements are 524,288 tokens of 4096 channels.
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    image_R = row_R // num_tokens
    token_R = row_R % num_tokens
    channel_C = tl.arange(0, BLOCK_C)
    inside_R = row_R < num_rows
    inside_RC = inside_R[:, None] & (channel_C < D)[None, :]

    pred_offset_R = image_R * pred_stride_B + token_R * pred_stride_L
    target_offset_R = image_R * target_stride_B + token_R * target_stride_L
    pred_at_RC = pred_ptr + pred_offset_R[:, None] + channel_C[None, :]
    target_at_RC = target_ptr + target_offset_R[:, None] + channel_C[None, :]
    pred_RC = tl.load(pred_at_RC, mask=inside_RC, other=0.0).to(tl.float32)
    target_RC = tl.load(target_at_RC, mask=inside_RC, other=0.0).to(tl.float32)

    # Two passes over registers: E[x^2] - E[x]^2 cancels where a token's mean is far from 0.
    mean_R = tl.sum(target_RC, axis=1) / D
    centred_RC = tl.where(inside_RC, target_RC - mean_R[:, None], 0.0)
    if target_ptr.dtype.element_ty == tl.float32:
        # The mean's own rounding: of a row that is nearly constant whitening would make a signal of it. Sums of 16 bits
        # are exact where rows are that constant.
        rest_R = tl.sum(centred_RC, axis=1) / D
        centred_RC = tl.where(inside_RC, centred_RC - rest_R[:, None], 0.0)
    variance_R = tl.sum(centred_RC * centred_RC, axis=1) / D
    whitened_RC = centred_RC * tl.rsqrt(variance_R + eps)[:, None]
    difference_RC = pred_RC - whitened_RC

    factor_R = tl.full([BLOCK_R], 1.0 / D, tl.float32)
    if weight_ptr is not None:
        weight_at_R = weight_ptr + image_R * weight_stride_B + token_R * weight_stride_L
        factor_R *= tl.load(weight_at_R, mask=inside_R, other=0.0).to(tl.float32)

    if GRADIENT:
        factor_R *= tl.load(upstream_ptr)
        # Not a clamp: minimum and maximum would turn a NaN into +-1.
        slope_RC = tl.where(difference_RC <= -beta, -1.0, difference_RC / beta)
        slope_RC = tl.where(difference_RC >= beta, 1.0, slope_RC)
        grad_RC = slope_RC * factor_R[:, None]
        grad_at_RC = grad_ptr + (row_R * D)[:, None] + channel_C[None, :]
        tl.store(grad_at_RC, grad_RC.to(grad_ptr.dtype.element_ty), mask=inside_RC)
    else:
        distance_RC = tl.abs(difference_RC)
        squared_RC = 0.5 * distance_RC * distance_RC / beta
        loss_RC = tl.where(distance_RC < beta, squared_RC, distance_RC - 0.5 * beta)
        loss_R = tl.sum(loss_RC, axis=1) * factor_R
        tl.store(token_loss_ptr + row_R, loss_R, mask=inside_R)
