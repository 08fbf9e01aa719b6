"""Shifted-window cosine attention in Triton: shift, partition, padding and mask are addresses and conditions.

Nothing is rolled, cut or copied: a table gives, for each window and place in it, the token that stands there. The
forward pass keeps the output and one number a row (the log of its softmax sum); the backward pass computes the
logits again.

One program sees one head. Tiles are BM queries by BN keys; all arithmetic is fp32, products take the inputs'
dtype. Sums over windows are made by splitting the windows over programs and adding the splits' results in order:
no atomics, the same bits in every run.
"""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim, M = windows of an
#   image, G = windows of all images, N = tokens of a window, T = N rounded up to whole tiles, S = splits

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Additive, as in the reference: with logit scales near 100 it leaks, and -inf would change results.
MASK_LOGIT: tl.constexpr = tl.constexpr(-100.0)
NOWHERE: tl.constexpr = tl.constexpr(-1.0e30)
# An entry of the token table: the token's place in its image, its shift region above; -1 for no token.
OFFSET_BITS: tl.constexpr = tl.constexpr(26)
PAD_OFFSET: tl.constexpr = tl.constexpr((1 << 26) - 1)
TINY: tl.constexpr = tl.constexpr(1e-24)  # the square of F.normalize's eps


@triton.jit
def _place(TOKENS, window, n, T: tl.constexpr):
    """Entries of the token table, the places in the image that they mean, and which are read from there."""
    token = tl.load(TOKENS + window * T + n)
    offset = token & PAD_OFFSET
    is_token = (token >= 0) & (offset != PAD_OFFSET)
    return token, tl.where(is_token, offset, 0), is_token


@triton.jit
def _load(X, PAD, offset, is_token, token, column, stride, PADDED: tl.constexpr):
    """Head dim columns of some tokens; a padding position holds what a zero token would, no token zeros."""
    x = tl.load(X + offset[:, None] * stride + column[None, :], mask=is_token[:, None], other=0.0)
    if PADDED:
        is_pad = (token >= 0) & (is_token == 0)
        x = tl.where(is_pad[:, None], tl.load(PAD + column)[None, :], x)
    return x


@triton.jit
def _inverse_norm(x):
    x = x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, 1), TINY))


@triton.jit
def _biased(logits, BIAS, head, m, n, token_m, token_n, N: tl.constexpr, SHIFTED: tl.constexpr):
    """Logits with bias and mask, of queries m and keys n: two index tiles that broadcast, and their entries.

    Keys behind the window are nowhere.
    """
    logits += tl.load(BIAS + head * N * N + m * N + n, mask=(m < N) & (n < N), other=NOWHERE)
    if SHIFTED:
        logits += tl.where((token_m >> OFFSET_BITS) == (token_n >> OFFSET_BITS), 0.0, MASK_LOGIT)
    return logits


@triton.jit
def forward_kernel(
    QKV,  # (B, H * W, 3 * C)
    PAD,  # (3 * C,), queries, keys and values of a padding position; unused where nothing is padded
    BIAS,  # (h, N, N), fp32
    SCALE,  # (h,), fp32
    OUT,  # (B, H * W, C)
    LSE,  # (G, h, T), fp32, log2 of the softmax sums
    TOKENS,  # (M, T), int32
    tokens_an_image,
    windows_an_image,
    C,
    N: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BM queries of a window and head; windows vary fastest, so that a head's bias stays in cache."""
    g = tl.program_id(0)
    head = tl.program_id(2)
    window = g % windows_an_image
    base = (g // windows_an_image).to(tl.int64) * tokens_an_image
    qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
    column = head * D + tl.arange(0, D)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
    q = _load(
        qkv, PAD, offset_m, is_token_m, token_m, column, 3 * C, False
    )  # a padding position asks nothing
    q_scale = _inverse_norm(q) * tl.load(SCALE + head)
    largest = tl.full([BM], NOWHERE, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for start in range(0, T, BN):
        n = start + tl.arange(0, BN)
        token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
        k = _load(qkv, PAD, offset_n, is_token_n, token_n, C + column, 3 * C, PADDED)
        v = _load(qkv, PAD, offset_n, is_token_n, token_n, 2 * C + column, 3 * C, PADDED)
        logits = (
            tl.dot(q, tl.trans(k), input_precision=PRECISION) * q_scale[:, None] * _inverse_norm(k)[None, :]
        )
        logits = _biased(
            logits, BIAS, head, m[:, None], n[None, :], token_m[:, None], token_n[None, :], N, SHIFTED
        )
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        shrink = tl.exp2((largest - new_largest) * LOG2_E)
        p = tl.exp2((logits - new_largest[:, None]) * LOG2_E)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    out = (acc / total[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + base * C + offset_m[:, None] * C + column[None, :], out, mask=is_token_m[:, None])
    num_heads = C // D
    tl.store(LSE + (g * num_heads + head).to(tl.int64) * T + m, largest * LOG2_E + tl.log2(total))


@triton.jit
def backward_queries_kernel(
    QKV, PAD, BIAS, SCALE, OUT, LSE, GRAD_OUT,  # as in the forward pass
    DELTA,  # (G, h, T), fp32, written: the sum of output times gradient of each row
    GRAD_QKV,  # (B, H * W, 3 * C), the queries' third is written
    GRAD_SCALE,  # (G, h, T), fp32, written: each row's part, times the scale
    TOKENS,
    tokens_an_image,
    windows_an_image,
    C,
    N: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BM queries of a window and head."""
    g = tl.program_id(0)
    head = tl.program_id(2)
    num_heads = C // D
    window = g % windows_an_image
    base = (g // windows_an_image).to(tl.int64) * tokens_an_image
    qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
    column = head * D + tl.arange(0, D)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
    q = _load(
        qkv, PAD, offset_m, is_token_m, token_m, column, 3 * C, False
    )  # a padding position asks nothing
    inverse_norm = _inverse_norm(q)
    q_scale = inverse_norm * tl.load(SCALE + head)
    out_place = offset_m[:, None] * C + column[None, :]
    grad = tl.load(GRAD_OUT + base * C + out_place, mask=is_token_m[:, None], other=0.0)
    out = tl.load(OUT + base * C + out_place, mask=is_token_m[:, None], other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    statistics = (g * num_heads + head).to(tl.int64) * T + m
    tl.store(DELTA + statistics, delta)
    lse = tl.load(LSE + statistics)
    grad_q = tl.zeros([BM, D], tl.float32)
    for start in range(0, T, BN):
        n = start + tl.arange(0, BN)
        token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
        k = _load(qkv, PAD, offset_n, is_token_n, token_n, C + column, 3 * C, PADDED)
        v = _load(qkv, PAD, offset_n, is_token_n, token_n, 2 * C + column, 3 * C, PADDED)
        factor = q_scale[:, None] * _inverse_norm(k)[None, :]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        logits = _biased(
            logits, BIAS, head, m[:, None], n[None, :], token_m[:, None], token_n[None, :], N, SHIFTED
        )
        p = tl.exp2(logits * LOG2_E - lse[:, None])
        p = tl.where(
            is_token_m[:, None], p, 0.0
        )  # a row without a token has no gradient, and may be infinite
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_dot = p * (grad_p - delta[:, None]) * factor
        grad_q = tl.dot(grad_dot.to(k.dtype), k, grad_q, input_precision=PRECISION)
    along = tl.sum(grad_q * q.to(tl.float32), 1)  # the part along q changes its length alone
    grad_q -= q.to(tl.float32) * (along * inverse_norm * inverse_norm)[:, None]
    place = offset_m[:, None] * (3 * C) + column[None, :]
    tl.store(
        GRAD_QKV + base * (3 * C) + place, grad_q.to(GRAD_QKV.dtype.element_ty), mask=is_token_m[:, None]
    )
    tl.store(GRAD_SCALE + statistics, along)  # not summed here: Triton 3.7 crashes on that for sm_100


@triton.jit
def backward_keys_kernel(
    QKV, PAD, BIAS, SCALE, LSE, GRAD_OUT, DELTA,  # as above
    GRAD_QKV,  # (B, H * W, 3 * C), the thirds of keys and values are written
    GRAD_BIAS,  # (S, h, N, N), fp32, written: the sum over this split's windows
    GRAD_PAD,  # (S * tiles, 2, C), fp32, written where anything is padded: keys, values
    TOKENS,
    tokens_an_image,
    windows_an_image,
    num_windows,
    C,
    N: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of a head, over the windows of a split; the bias gradient stays in registers.

    Tiles stand on their side, keys by queries: then every product takes what is in registers as its left side.
    """
    split = tl.program_id(0)
    head = tl.program_id(2)
    num_heads = C // D
    column = head * D + tl.arange(0, D)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    scale = tl.load(SCALE + head)
    grad_biases = ()
    for _ in tl.static_range(T // BM):
        grad_biases += (tl.zeros([BN, BM], tl.float32),)
    grad_pad_k = tl.zeros([D], tl.float32)
    grad_pad_v = tl.zeros([D], tl.float32)
    for g in range(split, num_windows, tl.num_programs(0)):
        window = g % windows_an_image
        base = (g // windows_an_image).to(tl.int64) * tokens_an_image
        qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
        token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
        k = _load(qkv, PAD, offset_n, is_token_n, token_n, C + column, 3 * C, PADDED)
        v = _load(qkv, PAD, offset_n, is_token_n, token_n, 2 * C + column, 3 * C, PADDED)
        inverse_norm = _inverse_norm(k)
        k_scale = inverse_norm * scale
        grad_k = tl.zeros([BN, D], tl.float32)
        grad_v = tl.zeros([BN, D], tl.float32)
        new_biases = ()
        for tile in tl.static_range(T // BM):
            m = tile * BM + tl.arange(0, BM)
            token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
            q = _load(
                qkv, PAD, offset_m, is_token_m, token_m, column, 3 * C, False
            )  # a padding position asks nothing
            grad = tl.load(
                GRAD_OUT + base * C + offset_m[:, None] * C + column[None, :],
                mask=is_token_m[:, None],
                other=0.0,
            )
            statistics = (g * num_heads + head).to(tl.int64) * T + m
            factor = k_scale[:, None] * _inverse_norm(q)[None, :]
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
            logits = _biased(
                logits, BIAS, head, m[None, :], n[:, None], token_m[None, :], token_n[:, None], N, SHIFTED
            )
            p = tl.exp2(logits * LOG2_E - tl.load(LSE + statistics)[None, :])
            p = tl.where(is_token_m[None, :], p, 0.0)
            grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
            grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            grad_logits = p * (grad_p - tl.load(DELTA + statistics)[None, :])
            new_biases += (grad_biases[tile] + grad_logits,)
            grad_k = tl.dot((grad_logits * factor).to(q.dtype), q, grad_k, input_precision=PRECISION)
        grad_biases = new_biases
        along = tl.sum(grad_k * k.to(tl.float32), 1)
        grad_k -= k.to(tl.float32) * (along * inverse_norm * inverse_norm)[:, None]
        place = offset_n[:, None] * (3 * C) + column[None, :]
        tl.store(
            GRAD_QKV + base * (3 * C) + place + C,
            grad_k.to(GRAD_QKV.dtype.element_ty),
            mask=is_token_n[:, None],
        )
        tl.store(
            GRAD_QKV + base * (3 * C) + place + 2 * C,
            grad_v.to(GRAD_QKV.dtype.element_ty),
            mask=is_token_n[:, None],
        )
        if PADDED:
            is_pad = ((token_n >= 0) & (is_token_n == 0))[:, None]
            grad_pad_k += tl.sum(tl.where(is_pad, grad_k, 0.0), 0)
            grad_pad_v += tl.sum(tl.where(is_pad, grad_v, 0.0), 0)
    for tile in tl.static_range(T // BM):
        m = tile * BM + tl.arange(0, BM)
        place = (split * num_heads + head).to(tl.int64) * N * N + m[None, :] * N + n[:, None]
        tl.store(GRAD_BIAS + place, grad_biases[tile], mask=(m[None, :] < N) & (n[:, None] < N))
    if PADDED:
        part = (split * tl.num_programs(1) + tl.program_id(1)) * 2 * C + column
        tl.store(GRAD_PAD + part, grad_pad_k)
        tl.store(GRAD_PAD + part + C, grad_pad_v)


@triton.jit
def backward_window_kernel(
    QKV, BIAS, SCALE, OUT, LSE, GRAD_OUT,  # as in the forward pass
    GRAD_QKV,  # (B, H * W, 3 * C), written
    GRAD_BIAS,  # (S, h, N, N), fp32, written: the sum over this split's windows
    GRAD_SCALE,  # (S, h, T), fp32, written: the rows' parts over this split's windows, times the scale
    TOKENS,
    tokens_an_image,
    windows_an_image,
    num_windows,
    C,
    N: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: all gradients of a head, over a split's windows of one tile, T by T; none of them is padded."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = C // D
    column = head * D + tl.arange(0, D)
    n = tl.arange(0, T)
    scale = tl.load(SCALE + head)
    grad_bias = tl.zeros([T, T], tl.float32)
    grad_scale = tl.zeros([T], tl.float32)
    for g in range(split, num_windows, tl.num_programs(0)):
        base = (g // windows_an_image).to(tl.int64) * tokens_an_image
        qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
        token, offset, is_token = _place(TOKENS, g % windows_an_image, n, T)
        q = _load(qkv, qkv, offset, is_token, token, column, 3 * C, False)
        k = _load(qkv, qkv, offset, is_token, token, C + column, 3 * C, False)
        q_norm, k_norm = _inverse_norm(q), _inverse_norm(k)
        factor = (q_norm * scale)[:, None] * k_norm[None, :]
        # Read again for each window, from cache: kept, it would take the registers that the products need.
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        logits = _biased(
            logits, BIAS, head, n[:, None], n[None, :], token[:, None], token[None, :], N, SHIFTED
        )
        lse = tl.load(LSE + (g * num_heads + head).to(tl.int64) * T + n)
        p = tl.where(is_token[:, None], tl.exp2(logits * LOG2_E - lse[:, None]), 0.0)
        out_place = offset[:, None] * C + column[None, :]
        grad = tl.load(GRAD_OUT + base * C + out_place, mask=is_token[:, None], other=0.0)
        out = tl.load(OUT + base * C + out_place, mask=is_token[:, None], other=0.0)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        v = _load(qkv, qkv, offset, is_token, token, 2 * C + column, 3 * C, False)
        grad_v = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
        grad_logits = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        grad_bias += grad_logits
        grad_dot = (grad_logits * factor).to(q.dtype)
        grad_q = tl.dot(grad_dot, k, input_precision=PRECISION)
        along_q = tl.sum(grad_q * q.to(tl.float32), 1)
        grad_scale += along_q
        grad_q -= q.to(tl.float32) * (along_q * q_norm * q_norm)[:, None]
        grad_k = tl.dot(tl.trans(grad_dot), q, input_precision=PRECISION)
        along_k = tl.sum(grad_k * k.to(tl.float32), 1)
        grad_k -= k.to(tl.float32) * (along_k * k_norm * k_norm)[:, None]
        place = offset[:, None] * (3 * C) + column[None, :]
        tl.store(
            GRAD_QKV + base * (3 * C) + place, grad_q.to(GRAD_QKV.dtype.element_ty), mask=is_token[:, None]
        )
        tl.store(
            GRAD_QKV + base * (3 * C) + place + C,
            grad_k.to(GRAD_QKV.dtype.element_ty),
            mask=is_token[:, None],
        )
        tl.store(
            GRAD_QKV + base * (3 * C) + place + 2 * C,
            grad_v.to(GRAD_QKV.dtype.element_ty),
            mask=is_token[:, None],
        )
    place = (split * num_heads + head).to(tl.int64) * N * N + n[:, None] * N + n[None, :]
    tl.store(GRAD_BIAS + place, grad_bias, mask=(n[:, None] < N) & (n[None, :] < N))
    tl.store(GRAD_SCALE + (split * num_heads + head) * T + n, grad_scale)
