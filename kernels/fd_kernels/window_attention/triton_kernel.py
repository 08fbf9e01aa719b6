"""Attention within windows in Triton: shift, partition, padding and mask are addresses and conditions.

Nothing is rolled, cut or copied: a table gives, for each window and place in it, the token that stands there. The
forward pass keeps the output and one number a row (the log of its softmax sum); the backward pass computes the
logits again. Logits are scaled cosines, or scaled dot products (COSINE false). Their bias is read from
(h, N, N), or, for windows COLUMNS wide (0: not), from one number for each relative position.

One program sees one head. Tiles are BM queries by BN keys; all arithmetic is fp32, products take the inputs'
dtype. Sums over windows are made by splitting the windows over programs and adding the splits' results in order:
no atomics, the same bits in every run.
"""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim, M = windows of an
#   image, G = windows of all images, N = tokens of a window, T = N rounded up to whole tiles, S = splits,
#   R = relative positions of a window

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
def _load(X, offset, is_token, column, stride):
    """Head dim columns of some tokens; zeros where there is none."""
    return tl.load(X + offset[:, None] * stride + column[None, :], mask=is_token[:, None], other=0.0)


@triton.jit
def _load_keys(X, PAD, offset, is_token, token, column, stride, PADDED: tl.constexpr):
    """As `_load`, but a padding position holds what a zero token would: it is a key, though it asks nothing."""
    place = X + offset[:, None] * stride + column[None, :]
    if PADDED:
        place = tl.where(is_token[:, None], place, PAD + column[None, :])
        is_token = token >= 0
    return tl.load(place, mask=is_token[:, None], other=0.0)


@triton.jit
def _store(X, x, offset, is_token, column, stride):
    place = offset[:, None] * stride + column[None, :]
    tl.store(X + place, x.to(X.dtype.element_ty), mask=is_token[:, None])


@triton.jit
def _inverse_norm(x, COSINE: tl.constexpr):
    """What a row is multiplied by before the dot product: 1 / |x|, or 1."""
    inverse_norm = tl.full([x.shape[0]], 1.0, tl.float32)
    if COSINE:
        x = x.to(tl.float32)
        inverse_norm = tl.rsqrt(tl.maximum(tl.sum(x * x, 1), TINY))
    return inverse_norm


@triton.jit
def _without_length(grad, x, along, inverse_norm, COSINE: tl.constexpr):
    """The gradient of a row: a cosine does not change with the row's length, so no part of it lies along the row."""
    if COSINE:
        grad -= x.to(tl.float32) * (along * inverse_norm * inverse_norm)[:, None]
    return grad


@triton.jit
def _biased(
    logits, BIAS, head, m, n, token_m, token_n, N: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr
):
    """Logits with bias and mask, of queries m and keys n: two index tiles that broadcast, and their entries.

    Keys behind the window are nowhere.
    """
    inside = (m < N) & (n < N)
    if COLUMNS == 0:
        place = BIAS + head * N * N + m * N + n
    else:  # in a table 2 * COLUMNS - 1 wide, the index of a difference is the difference of the indices
        WIDTH: tl.constexpr = 2 * COLUMNS - 1
        MIDDLE: tl.constexpr = (N // COLUMNS - 1) * WIDTH + COLUMNS - 1
        of_query = m // COLUMNS * WIDTH + m % COLUMNS
        of_key = n // COLUMNS * WIDTH + n % COLUMNS
        place = BIAS + (head * (2 * MIDDLE + 1) + MIDDLE) + (of_query - of_key)
    logits += tl.load(place, mask=inside, other=NOWHERE)
    if SHIFTED:
        logits += tl.where((token_m >> OFFSET_BITS) == (token_n >> OFFSET_BITS), 0.0, MASK_LOGIT)
    return logits


@triton.jit
def forward_kernel(
    QKV,  # (B, H * W, 3 * C)
    PAD,  # (3 * C,), queries, keys and values of a padding position; unused where nothing is padded
    BIAS,  # (h, N, N) or (h, R), fp32
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
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
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
    q = _load(qkv, offset_m, is_token_m, column, 3 * C)
    q_scale = _inverse_norm(q, COSINE) * tl.load(SCALE + head)
    largest = tl.full([BM], NOWHERE, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
        k = _load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        v = _load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        factor = q_scale[:, None] * _inverse_norm(k, COSINE)[None, :]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        logits = _biased(
            logits,
            BIAS,
            head,
            m[:, None],
            n[None, :],
            token_m[:, None],
            token_n[None, :],
            N,
            COLUMNS,
            SHIFTED,
        )
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        shrink = tl.exp2((largest - new_largest) * LOG2_E)
        p = tl.exp2((logits - new_largest[:, None]) * LOG2_E)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    _store(OUT + base * C, acc / total[:, None], offset_m, is_token_m, column, C)
    statistics = (g * (C // D) + head).to(tl.int64) * T + m
    tl.store(LSE + statistics, largest * LOG2_E + tl.log2(total))


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
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BM queries of a window and head."""
    g = tl.program_id(0)
    head = tl.program_id(2)
    window = g % windows_an_image
    base = (g // windows_an_image).to(tl.int64) * tokens_an_image
    qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
    column = head * D + tl.arange(0, D)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
    q = _load(qkv, offset_m, is_token_m, column, 3 * C)
    inverse_norm = _inverse_norm(q, COSINE)
    q_scale = inverse_norm * tl.load(SCALE + head)
    grad = _load(GRAD_OUT + base * C, offset_m, is_token_m, column, C)
    out = _load(OUT + base * C, offset_m, is_token_m, column, C)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    statistics = (g * (C // D) + head).to(tl.int64) * T + m
    tl.store(DELTA + statistics, delta)
    lse = tl.load(LSE + statistics)
    grad_q = tl.zeros([BM, D], tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
        k = _load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        v = _load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        factor = q_scale[:, None] * _inverse_norm(k, COSINE)[None, :]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        logits = _biased(
            logits,
            BIAS,
            head,
            m[:, None],
            n[None, :],
            token_m[:, None],
            token_n[None, :],
            N,
            COLUMNS,
            SHIFTED,
        )
        p = tl.exp2(logits * LOG2_E - lse[:, None])
        p = tl.where(is_token_m[:, None], p, 0.0)  # a row without a token may be infinite
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_dot = p * (grad_p - delta[:, None]) * factor
        grad_q = tl.dot(grad_dot.to(k.dtype), k, grad_q, input_precision=PRECISION)
    along = tl.sum(grad_q * q.to(tl.float32), 1)
    grad_q = _without_length(grad_q, q, along, inverse_norm, COSINE)
    _store(GRAD_QKV + base * (3 * C), grad_q, offset_m, is_token_m, column, 3 * C)
    tl.store(GRAD_SCALE + statistics, along)  # not summed here: Triton 3.7 crashes on that for sm_100


@triton.jit
def _key_step(
    m, n, token_n, k, v, k_scale, grad_k, grad_v,
    qkv, grad_out, BIAS, lse, delta, TOKENS, window, head, column, C,
    N: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr, COSINE: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries m add to the gradients of keys n: the sums so far, and the gradient of the logits.

    Tiles stand on their side, keys by queries: then every product takes what is in registers as its left side.
    """
    token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
    q = _load(qkv, offset_m, is_token_m, column, 3 * C)
    grad = _load(grad_out, offset_m, is_token_m, column, C)
    factor = k_scale[:, None] * _inverse_norm(q, COSINE)[None, :]
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
    logits = _biased(
        logits, BIAS, head, m[None, :], n[:, None], token_m[None, :], token_n[:, None], N, COLUMNS, SHIFTED
    )
    p = tl.exp2(logits * LOG2_E - tl.load(lse + m)[None, :])
    p = tl.where(is_token_m[None, :], p, 0.0)
    grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    grad_logits = p * (grad_p - tl.load(delta + m)[None, :])
    grad_k = tl.dot((grad_logits * factor).to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v, grad_logits


@triton.jit
def backward_keys_kernel(
    QKV, PAD, BIAS, SCALE, LSE, GRAD_OUT, DELTA,  # as above
    GRAD_QKV,  # (B, H * W, 3 * C), the thirds of keys and values are written
    GRAD_BIAS,  # (S, h, N, N), fp32, written where it is kept: the sum over this split's windows
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
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    KEEPS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of a head, over the windows of a split.

    KEEPS_BIAS: the gradient of their bias stays in registers, and the queries' tiles are unrolled for it; else it
    is left to `backward_bias_kernel`.
    """
    split = tl.program_id(0)
    head = tl.program_id(2)
    num_heads = C // D
    column = head * D + tl.arange(0, D)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    scale = tl.load(SCALE + head)
    TILES: tl.constexpr = (N + BM - 1) // BM
    grad_biases = ()
    if KEEPS_BIAS:
        for _ in tl.static_range(TILES):
            grad_biases += (tl.zeros([BN, BM], tl.float32),)
    grad_pad_k = tl.zeros([D], tl.float32)
    grad_pad_v = tl.zeros([D], tl.float32)
    for g in range(split, num_windows, tl.num_programs(0)):
        window = g % windows_an_image
        base = (g // windows_an_image).to(tl.int64) * tokens_an_image
        qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
        statistics = (g * num_heads + head).to(tl.int64) * T
        lse, delta, grad_out = LSE + statistics, DELTA + statistics, GRAD_OUT + base * C
        token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
        k = _load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        v = _load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        inverse_norm = _inverse_norm(k, COSINE)
        k_scale = inverse_norm * scale
        grad_k = tl.zeros([BN, D], tl.float32)
        grad_v = tl.zeros([BN, D], tl.float32)
        if KEEPS_BIAS:
            new_biases = ()
            for tile in tl.static_range(TILES):
                grad_k, grad_v, grad_logits = _key_step(
                    tile * BM + tl.arange(0, BM), n, token_n, k, v, k_scale, grad_k, grad_v,
                    qkv, grad_out, BIAS, lse, delta, TOKENS, window, head, column, C,
                    N, T, COLUMNS, COSINE, SHIFTED, PRECISION,
                )  # fmt: skip
                new_biases += (grad_biases[tile] + grad_logits,)
            grad_biases = new_biases
        else:
            for start in range(0, N, BM):
                grad_k, grad_v, _ = _key_step(
                    start + tl.arange(0, BM), n, token_n, k, v, k_scale, grad_k, grad_v,
                    qkv, grad_out, BIAS, lse, delta, TOKENS, window, head, column, C,
                    N, T, COLUMNS, COSINE, SHIFTED, PRECISION,
                )  # fmt: skip
        along = tl.sum(grad_k * k.to(tl.float32), 1)
        grad_k = _without_length(grad_k, k, along, inverse_norm, COSINE)
        grad_qkv = GRAD_QKV + base * (3 * C)
        _store(grad_qkv + C, grad_k, offset_n, is_token_n, column, 3 * C)
        _store(grad_qkv + 2 * C, grad_v, offset_n, is_token_n, column, 3 * C)
        if PADDED:
            is_pad = ((token_n >= 0) & (is_token_n == 0))[:, None]
            grad_pad_k += tl.sum(tl.where(is_pad, grad_k, 0.0), 0)
            grad_pad_v += tl.sum(tl.where(is_pad, grad_v, 0.0), 0)
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            m = tile * BM + tl.arange(0, BM)
            place = (split * num_heads + head).to(tl.int64) * N * N + m[None, :] * N + n[:, None]
            tl.store(GRAD_BIAS + place, grad_biases[tile], mask=(m[None, :] < N) & (n[:, None] < N))
    if PADDED:
        part = (split * tl.num_programs(1) + tl.program_id(1)) * 2 * C + column
        tl.store(GRAD_PAD + part, grad_pad_k)
        tl.store(GRAD_PAD + part + C, grad_pad_v)


@triton.jit
def backward_bias_kernel(
    QKV, PAD, BIAS, SCALE, LSE, GRAD_OUT, DELTA,  # as above
    GRAD_BIAS,  # (S, h, N, N), or (S, h, 2 * rows - 1, COLUMNS, COLUMNS), fp32, written
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
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the bias gradient of a head, over the windows of a split.

    Dense: BM queries by BN keys. Table: BM by BN columns of two rows a given distance apart, over all such rows of
    a window; what lies on a diagonal is added outside. The dense one is the case of a single row of N columns.
    """
    split = tl.program_id(0)
    head = tl.program_id(2)
    num_heads = C // D
    column = head * D + tl.arange(0, D)
    scale = tl.load(SCALE + head)
    EDGE: tl.constexpr = COLUMNS if COLUMNS else N
    ROWS: tl.constexpr = N // EDGE
    KEY_TILES: tl.constexpr = (EDGE + BN - 1) // BN
    TILES: tl.constexpr = KEY_TILES * ((EDGE + BM - 1) // BM)
    pair, tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    in_m, in_n = tile // KEY_TILES * BM + tl.arange(0, BM), tile % KEY_TILES * BN + tl.arange(0, BN)
    distance = pair - (ROWS - 1)
    first_m, first_n = tl.maximum(distance, 0) * EDGE + in_m, tl.maximum(-distance, 0) * EDGE + in_n
    grad_bias = tl.zeros([BM, BN], tl.float32)
    for g in range(split, num_windows, tl.num_programs(0)):
        window = g % windows_an_image
        base = (g // windows_an_image).to(tl.int64) * tokens_an_image
        qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
        statistics = (g * num_heads + head).to(tl.int64) * T
        for step in range(ROWS - tl.abs(distance)):
            # Behind the window, and behind the row, there are no entries: whatever stands there is not stored.
            m, n = tl.minimum(first_m + step * EDGE, N - 1), tl.minimum(first_n + step * EDGE, N - 1)
            token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
            token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
            q = _load(qkv, offset_m, is_token_m, column, 3 * C)
            k = _load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
            v = _load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
            grad = _load(GRAD_OUT + base * C, offset_m, is_token_m, column, C)
            factor = (_inverse_norm(q, COSINE) * scale)[:, None] * _inverse_norm(k, COSINE)[None, :]
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            logits = _biased(
                logits,
                BIAS,
                head,
                m[:, None],
                n[None, :],
                token_m[:, None],
                token_n[None, :],
                N,
                COLUMNS,
                SHIFTED,
            )
            p = tl.exp2(logits * LOG2_E - tl.load(LSE + statistics + m)[:, None])
            p = tl.where(is_token_m[:, None], p, 0.0)
            grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_bias += p * (grad_p - tl.load(DELTA + statistics + m)[:, None])
    part = ((split * num_heads + head) * (2 * ROWS - 1) + pair).to(tl.int64)
    place = part * (EDGE * EDGE) + in_m[:, None] * EDGE + in_n[None, :]
    tl.store(GRAD_BIAS + place, grad_bias, mask=(in_m[:, None] < EDGE) & (in_n[None, :] < EDGE))


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
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
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
        q = _load(qkv, offset, is_token, column, 3 * C)
        k = _load(qkv + C, offset, is_token, column, 3 * C)
        q_norm, k_norm = _inverse_norm(q, COSINE), _inverse_norm(k, COSINE)
        factor = (q_norm * scale)[:, None] * k_norm[None, :]
        # Read again for each window, from cache: kept, it would take the registers that the products need.
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        logits = _biased(
            logits, BIAS, head, n[:, None], n[None, :], token[:, None], token[None, :], N, COLUMNS, SHIFTED
        )
        lse = tl.load(LSE + (g * num_heads + head).to(tl.int64) * T + n)
        p = tl.where(is_token[:, None], tl.exp2(logits * LOG2_E - lse[:, None]), 0.0)
        grad = _load(GRAD_OUT + base * C, offset, is_token, column, C)
        out = _load(OUT + base * C, offset, is_token, column, C)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        v = _load(qkv + 2 * C, offset, is_token, column, 3 * C)
        grad_v = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
        grad_logits = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        grad_bias += grad_logits
        grad_dot = (grad_logits * factor).to(q.dtype)
        grad_q = tl.dot(grad_dot, k, input_precision=PRECISION)
        along_q = tl.sum(grad_q * q.to(tl.float32), 1)
        grad_scale += along_q
        grad_q = _without_length(grad_q, q, along_q, q_norm, COSINE)
        grad_k = tl.dot(tl.trans(grad_dot), q, input_precision=PRECISION)
        along_k = tl.sum(grad_k * k.to(tl.float32), 1)
        grad_k = _without_length(grad_k, k, along_k, k_norm, COSINE)
        grad_qkv = GRAD_QKV + base * (3 * C)
        _store(grad_qkv, grad_q, offset, is_token, column, 3 * C)
        _store(grad_qkv + C, grad_k, offset, is_token, column, 3 * C)
        _store(grad_qkv + 2 * C, grad_v, offset, is_token, column, 3 * C)
    place = (split * num_heads + head).to(tl.int64) * N * N + n[:, None] * N + n[None, :]
    tl.store(GRAD_BIAS + place, grad_bias, mask=(n[:, None] < N) & (n[None, :] < N))
    tl.store(GRAD_SCALE + (split * num_heads + head) * T + n, grad_scale)
