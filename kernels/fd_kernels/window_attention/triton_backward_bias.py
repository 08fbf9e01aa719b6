"""The backward pass of attention within windows: the gradient of the bias alone, and all of a small window."""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim, M = windows of an
#   image, G = windows of all images, N = tokens of a window, T = N rounded up to whole tiles, S = splits,
#   R = relative positions of a window, P = numbers kept of a row

import triton
import triton.language as tl

from fd_kernels.window_attention.triton_parts import (
    LOG2_E,
    SIZES,
    bias_and_mask,
    load_keys,
    load_rows,
    logit_factor,
    planes,
    saved_norm,
    store_rows,
    token_places,
    wide,
    without_length,
)


@triton.jit(do_not_specialize=SIZES)
def backward_bias_kernel(
    QKV, PAD, BIAS, SCALE, ROWS, GRAD_OUT, DELTA,  # as above
    GRAD_BIAS,  # (S, h, N, N), or (S, h, 2 * rows - 1, COLUMNS, COLUMNS), fp32, written
    TOKENS,
    tokens_an_image,
    windows_an_image,
    num_images,
    window_splits,
    C,
    N: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the bias gradient of a head, over the windows and images of a split.

    Dense: BM queries by BN keys. Table: BM by BN columns of two rows a given distance apart, over all such rows of
    a window; what lies on a diagonal is added outside. The dense one is the case of a single row of N columns.
    """
    num_heads = C // D
    head, at = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    column = head * D + tl.arange(0, D)
    scale = tl.load(SCALE + head)
    row_of_image = windows_an_image * num_heads * T
    EDGE: tl.constexpr = COLUMNS if COLUMNS else N
    ROWS_A_WINDOW: tl.constexpr = N // EDGE
    KEY_TILES: tl.constexpr = (EDGE + BN - 1) // BN
    TILES: tl.constexpr = KEY_TILES * ((EDGE + BM - 1) // BM)
    PAIRS: tl.constexpr = (2 * ROWS_A_WINDOW - 1) * TILES
    split, splits = at // PAIRS, tl.num_programs(0) // (num_heads * PAIRS)
    pair, tile = at % PAIRS // TILES, at % TILES
    in_m, in_n = tile // KEY_TILES * BM + tl.arange(0, BM), tile % KEY_TILES * BN + tl.arange(0, BN)
    distance = pair - (ROWS_A_WINDOW - 1)
    first_m, first_n = tl.maximum(distance, 0) * EDGE + in_m, tl.maximum(-distance, 0) * EDGE + in_n
    grad_bias = tl.zeros([BM, BN], tl.float32)
    steps = ROWS_A_WINDOW - tl.abs(distance)
    for at in range(
        0, (windows_an_image - split % window_splits + window_splits - 1) // window_splits * steps
    ):
        window = split % window_splits + at // steps * window_splits
        # Behind the window, and behind the row, there are no entries: whatever stands there is not stored.
        m = tl.minimum(first_m + at % steps * EDGE, N - 1)
        n = tl.minimum(first_n + at % steps * EDGE, N - 1)
        token_m, offset_m, is_token_m = token_places(TOKENS, window, m, T)
        token_n, offset_n, is_token_n = token_places(TOKENS, window, n, T)
        bias = bias_and_mask(
            BIAS,
            head,
            m[:, None],
            n[None, :],
            token_m[:, None],
            token_n[None, :],
            N,
            True,
            True,
            COLUMNS,
            SHIFTED,
            False,
        )
        for image in range(split // window_splits, num_images, splits // window_splits):
            base = wide(image) * tokens_an_image
            qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
            first_row = wide(image) * row_of_image + (wide(window) * num_heads + head) * T
            rows = ROWS + planes(COSINE) * first_row
            q = load_rows(qkv, offset_m, is_token_m, column, 3 * C)
            k = load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
            v = load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
            grad = load_rows(GRAD_OUT + base * C, offset_m, is_token_m, column, C)
            q_norm, k_norm = saved_norm(rows + T, m, COSINE), saved_norm(rows + 2 * T, n, COSINE)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            logits = logits * logit_factor(q_norm, k_norm, scale, COSINE) + bias
            p = tl.exp2(logits - tl.load(rows + m)[:, None])
            grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_bias += p * (grad_p - tl.load(DELTA + first_row + m)[:, None])
    part = ((split * num_heads + head) * (2 * ROWS_A_WINDOW - 1) + pair).to(tl.int64)
    place = part * (EDGE * EDGE) + in_m[:, None] * EDGE + in_n[None, :]
    tl.store(GRAD_BIAS + place, grad_bias, mask=(in_m[:, None] < EDGE) & (in_n[None, :] < EDGE))


@triton.jit(do_not_specialize=SIZES)
def backward_window_kernel(
    QKV, BIAS, SCALE, OUT, ROWS, GRAD_OUT,  # as in the forward pass
    GRAD_QKV,  # (B, H * W, 3 * C), written
    GRAD_BIAS,  # (S, h, N, N), fp32, written: the sum over this split's windows
    GRAD_SCALE,  # (S, h, T), fp32, written: the rows' parts over this split's windows, times the scale
    TOKENS,
    tokens_an_image,
    windows_an_image,
    num_images,
    window_splits,
    C,
    N: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: all gradients of a head, over a split's windows of one tile, T by T; none of them is padded."""
    head, split = tl.program_id(0), tl.program_id(1)
    num_heads = C // D
    column = head * D + tl.arange(0, D)
    n = tl.arange(0, T)
    scale = tl.load(SCALE + head)
    row_of_image = windows_an_image * num_heads * T
    grad_bias = tl.zeros([T, T], tl.float32)
    grad_scale = tl.zeros([T], tl.float32)
    for window in range(split % window_splits, windows_an_image, window_splits):
        token, offset, is_token = token_places(TOKENS, window, n, T)
        bias = bias_and_mask(
            BIAS, head, n[:, None], n[None, :], token[:, None], token[None, :],
            N, N == T, N == T, COLUMNS, SHIFTED, False,
        )  # fmt: skip
        for image in range(split // window_splits, num_images, tl.num_programs(1) // window_splits):
            base = wide(image) * tokens_an_image
            qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
            rows = ROWS + planes(COSINE) * (
                wide(image) * row_of_image + (wide(window) * num_heads + head) * T
            )
            q = load_rows(qkv, offset, is_token, column, 3 * C)
            k = load_rows(qkv + C, offset, is_token, column, 3 * C)
            v = load_rows(qkv + 2 * C, offset, is_token, column, 3 * C)
            grad = load_rows(GRAD_OUT + base * C, offset, is_token, column, C)
            out = load_rows(OUT + base * C, offset, is_token, column, C)
            q_norm, k_norm = saved_norm(rows + T, n, COSINE), saved_norm(rows + 2 * T, n, COSINE)
            factor = logit_factor(q_norm, k_norm, scale, COSINE)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
            p = tl.exp2(logits - tl.load(rows + n)[:, None])
            delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            grad_v = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
            grad_logits = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            grad_bias += grad_logits
            grad_dot = (grad_logits * factor).to(q.dtype)  # times log2(e), which the factor holds
            grad_q = tl.dot(grad_dot, k, input_precision=PRECISION) / LOG2_E
            along_q = tl.sum(grad_q * q.to(tl.float32), 1)
            grad_scale += along_q
            grad_q = without_length(grad_q, q, along_q, q_norm, COSINE)
            grad_k = tl.dot(tl.trans(grad_dot), q, input_precision=PRECISION) / LOG2_E
            along_k = tl.sum(grad_k * k.to(tl.float32), 1)
            grad_k = without_length(grad_k, k, along_k, k_norm, COSINE)
            grad_qkv = GRAD_QKV + base * (3 * C)
            store_rows(grad_qkv, grad_q, offset, is_token, column, 3 * C)
            store_rows(grad_qkv + C, grad_k, offset, is_token, column, 3 * C)
            store_rows(grad_qkv + 2 * C, grad_v, offset, is_token, column, 3 * C)
    place = (split * num_heads + head).to(tl.int64) * N * N + n[:, None] * N + n[None, :]
    tl.store(GRAD_BIAS + place, grad_bias, mask=(n[:, None] < N) & (n[None, :] < N))
    tl.store(GRAD_SCALE + (split * num_heads + head) * T + n, grad_scale)
