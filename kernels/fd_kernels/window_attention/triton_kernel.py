"""Attention within windows in Triton: shift, partition, padding and mask are addresses and conditions.

Nothing is rolled, cut or copied: a table gives, for each window and place in it, the token that stands there. The
forward pass keeps the output and three numbers a row (log of its softmax sum, inverse lengths of query and key); the
backward pass computes the logits again. Logits are scaled cosines, or scaled dot products (COSINE false). Their bias
is read from (h, N, N), or, for windows COLUMNS wide (0: not), from one number for each relative position.

One program sees one head and one place of the windows in an image, and goes over the images: what does not depend on
the image (addresses, mask, bias) is made once. Where registers allow (KEEPS_BIAS) a tile of bias and mask stays in
them, or its gradient does; the tiles of the other side are then unrolled, BN (BM) wide but for the LAST. Sums over
windows are made by splitting the windows over programs and adding the splits' results in order: no atomics, the same
bits in every run. Arithmetic is fp32, base 2 for logits; products take the inputs' dtype.
"""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim, M = windows of an
#   image, G = windows of all images, N = tokens of a window, T = N rounded up to whole tiles, S = splits,
#   R = relative positions of a window, P = numbers kept of a row

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
# Another batch or grid is no other program.
SIZES = ["tokens_an_image", "windows_an_image", "num_images", "window_splits"]


@triton.jit
def _wide(number):
    """In 64 bits, a loop's index too, which is a plain integer under the interpreter."""
    return tl.full((), 0, tl.int64) + number


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
def _inverse_norm(x, otherwise, COSINE: tl.constexpr):
    """What a row is multiplied by before the dot product: 1 / |x|, or without cosines a number."""
    inverse_norm = tl.full([x.shape[0]], 1.0, tl.float32) * otherwise
    if COSINE:
        x = x.to(tl.float32)
        inverse_norm = tl.rsqrt(tl.maximum(tl.sum(x * x, 1), TINY))
    return inverse_norm


@triton.jit
def _saved_norm(ROWS, n, otherwise, COSINE: tl.constexpr):
    """As `_inverse_norm`, which the forward pass has written down; 0 of keys behind the window."""
    inverse_norm = tl.full([n.shape[0]], 1.0, tl.float32) * otherwise
    if COSINE:
        inverse_norm = tl.load(ROWS + n)
    return inverse_norm


@triton.jit
def _planes(COSINE: tl.constexpr):
    """Numbers that the forward pass keeps of a row."""
    return 3 if COSINE else 1


@triton.jit
def _scaled(x, inverse_norm, scale, COSINE: tl.constexpr):
    """Rows of unit length times the scale, in their own dtype: rounded, as plain torch rounds what it normalises."""
    if COSINE:
        x = (x.to(tl.float32) * (inverse_norm * scale)[:, None]).to(x.dtype)
    return x


@triton.jit
def _without_length(grad, x, along, inverse_norm, COSINE: tl.constexpr):
    """The gradient of a row: a cosine does not change with the row's length, so no part of it lies along the row."""
    if COSINE:
        grad -= x.to(tl.float32) * (along * inverse_norm * inverse_norm)[:, None]
    return grad


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """A product's left side in the dtype of its right side. fp16 ends where 1 / |k| of a zero token does not."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@triton.jit
def _bias(
    BIAS, head, m, n, token_m, token_n, N: tl.constexpr, M_INSIDE: tl.constexpr, N_INSIDE: tl.constexpr,
    COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Bias and mask in base 2, of queries m and keys n: two index tiles that broadcast, and their entries.

    Keys behind the window are nowhere, queries behind it have any bias (INSIDE: there are none of them).
    KEYS_FIRST: a dense bias is (h, keys, queries), and any is in base 2 already.
    """
    inside = (m < N) & (n < N)
    if COLUMNS == 0:
        place = BIAS + head * N * N + (n * N + m if KEYS_FIRST else m * N + n)
    else:  # in a table 2 * COLUMNS - 1 wide, the index of a difference is the difference of the indices
        WIDTH: tl.constexpr = 2 * COLUMNS - 1
        MIDDLE: tl.constexpr = (N // COLUMNS - 1) * WIDTH + COLUMNS - 1
        of_query = m // COLUMNS * WIDTH + m % COLUMNS
        of_key = n // COLUMNS * WIDTH + n % COLUMNS
        place = BIAS + (head * (2 * MIDDLE + 1) + MIDDLE) + (of_query - of_key)
    bias = tl.load(place) if M_INSIDE and N_INSIDE else tl.load(place, mask=inside, other=NOWHERE)
    if not KEYS_FIRST:
        bias *= LOG2_E
    if SHIFTED:
        bias += tl.where((token_m >> OFFSET_BITS) == (token_n >> OFFSET_BITS), 0.0, MASK_LOGIT * LOG2_E)
    return bias


@triton.jit
def _attend(
    queries, largests, totals, accs, bias, writes_norms, group, tokens_an_image, num_images, row_of_image, scale,
    QKV, PAD, K_NORMS, n, token_n, offset_n, is_token_n, column, C,
    N: tl.constexpr, IMAGES: tl.constexpr, COSINE: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys n of a group of images more: the rows' largest logits, softmax sums and outputs so far."""
    new_largests, new_totals, new_accs = (), (), ()
    for i in tl.static_range(IMAGES):
        image = _wide(tl.minimum(group * IMAGES + i, num_images - 1))
        qkv = QKV + image * tokens_an_image * (3 * C)
        k = _load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        v = _load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        k_norm = _inverse_norm(k, scale, COSINE)
        if COSINE:
            tl.store(
                K_NORMS + image * _planes(COSINE) * row_of_image + n, k_norm, mask=(n < N) & writes_norms
            )
        logits = tl.dot(queries[i], tl.trans(k), input_precision=PRECISION) * k_norm[None, :] + bias
        largest = tl.maximum(largests[i], tl.max(logits, 1))
        shrink = tl.exp2(largests[i] - largest)
        p = tl.exp2(logits - largest[:, None])
        new_largests += (largest,)
        new_totals += (totals[i] * shrink + tl.sum(p, 1),)
        new_accs += (tl.dot(p.to(v.dtype), v, accs[i] * shrink[:, None], input_precision=PRECISION),)
    return new_largests, new_totals, new_accs


@triton.jit
def _forward_group(
    group, biases, places, QKV, PAD, BIAS, OUT, ROWS, TOKENS, tokens_an_image, num_images, row_of_image,
    window, head, query_tile, scale, m, token_m, offset_m, is_token_m, column, C,
    N: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, KEEPS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, COSINE: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and statistics of queries m, of a group of images."""
    TILES: tl.constexpr = (N + BN - 1) // BN
    queries, largests, totals, accs = (), (), (), ()
    for i in tl.static_range(IMAGES):
        image = _wide(tl.minimum(group * IMAGES + i, num_images - 1))  # behind the last, that one again
        q = _load(QKV + image * tokens_an_image * (3 * C), offset_m, is_token_m, column, 3 * C)
        q_norm = _inverse_norm(q, 1.0, COSINE)
        if COSINE:
            tl.store(ROWS + image * _planes(COSINE) * row_of_image + T + m, q_norm)
            behind = N + tl.arange(0, BM)
            k_norms = ROWS + image * _planes(COSINE) * row_of_image + 2 * T
            tl.store(k_norms + behind, 0.0, mask=(behind < T) & (query_tile == 0))
        queries += (_scaled(q, q_norm, scale, COSINE),)
        largests += (tl.full([BM], NOWHERE, tl.float32),)
        totals += (tl.zeros([BM], tl.float32),)
        accs += (tl.zeros([BM, D], tl.float32),)
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            n = tile * BN + tl.arange(0, BN if tile < TILES - 1 else LAST)
            token_n, offset_n, is_token_n = places[tile]
            largests, totals, accs = _attend(
                queries, largests, totals, accs, biases[tile], query_tile == 0, group, tokens_an_image, num_images,
                row_of_image, scale, QKV, PAD, ROWS + 2 * T, n, token_n, offset_n, is_token_n, column, C,
                N, IMAGES, COSINE, PADDED, PRECISION,
            )  # fmt: skip
    else:
        for start in range(0, N, BN):
            n = start + tl.arange(0, BN)
            token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
            bias = _bias(
                BIAS, head, m[:, None], n[None, :], token_m[:, None], token_n[None, :],
                N, N % BM == 0, N % BN == 0, COLUMNS, SHIFTED, False,
            )  # fmt: skip
            largests, totals, accs = _attend(
                queries, largests, totals, accs, bias, query_tile == 0, group, tokens_an_image, num_images,
                row_of_image, scale, QKV, PAD, ROWS + 2 * T, n, token_n, offset_n, is_token_n, column, C,
                N, IMAGES, COSINE, PADDED, PRECISION,
            )  # fmt: skip
    for i in tl.static_range(IMAGES):
        image = _wide(tl.minimum(group * IMAGES + i, num_images - 1))
        out = OUT + image * tokens_an_image * C
        _store(out, accs[i] / totals[i][:, None], offset_m, is_token_m, column, C)
        # Where there is no token, the backward pass shall find probabilities of 0.
        lse = tl.where(is_token_m, largests[i] + tl.log2(totals[i]), -NOWHERE)
        tl.store(ROWS + image * _planes(COSINE) * row_of_image + m, lse)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    QKV,  # (B, H * W, 3 * C)
    PAD,  # (3 * C,), queries, keys and values of a padding position; unused where nothing is padded
    BIAS,  # (h, N, N) or (h, R), fp32
    SCALE,  # (h,), fp32
    OUT,  # (B, H * W, C)
    ROWS,  # (G, h, P, T), fp32: log2 of the softmax sums; where COSINE 1 / |q| and 1 / |k| too (P = 3, else 1)
    TOKENS,  # (M, T), int32
    tokens_an_image,
    windows_an_image,
    num_images,
    C,
    N: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LAST: tl.constexpr,
    IMAGES: tl.constexpr,
    KEEPS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BM queries of a head and window, of a split of the images, IMAGES of them at a time.

    KEEPS_BIAS: the bias of all keys stays in registers. Else the images of a group share a tile that is read.
    """
    num_heads = C // D
    QUERY_TILES: tl.constexpr = (N + BM - 1) // BM
    # Heads vary fastest: they stand side by side in memory. Then the tiles of a window, which read the same keys.
    head, at = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    query_tile, at = at % QUERY_TILES, at // QUERY_TILES
    window, split = at % windows_an_image, at // windows_an_image
    splits = tl.num_programs(0) // (num_heads * QUERY_TILES * windows_an_image)
    column = head * D + tl.arange(0, D)
    m = query_tile * BM + tl.arange(0, BM)
    token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
    scale = tl.load(SCALE + head) * LOG2_E
    row_of_image = windows_an_image * num_heads * T
    ROWS += (window * num_heads + head) * _planes(COSINE) * T
    TILES: tl.constexpr = (N + BN - 1) // BN
    biases, places = (), ()
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            n = tile * BN + tl.arange(0, BN if tile < TILES - 1 else LAST)
            token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
            places += ((token_n, offset_n, is_token_n),)
            biases += (
                _bias(
                    BIAS, head, m[:, None], n[None, :], token_m[:, None], token_n[None, :],
                    N, N % BM == 0, tile < TILES - 1 or tile * BN + LAST == N, COLUMNS, SHIFTED, False,
                ),
            )  # fmt: skip
    if KEEPS_BIAS:
        for group in range(split, (num_images + IMAGES - 1) // IMAGES, splits):
            _forward_group(
                group, biases, places, QKV, PAD, BIAS, OUT, ROWS, TOKENS, tokens_an_image, num_images, row_of_image,
                window, head, query_tile, scale, m, token_m, offset_m, is_token_m, column, C, N, T, D, BM, BN, LAST,
                IMAGES, KEEPS_BIAS, COLUMNS, COSINE, SHIFTED, PADDED, PRECISION,
            )  # fmt: skip
    else:  # a program for each group: a loop around the one over keys would take registers from it
        _forward_group(
            split, biases, places, QKV, PAD, BIAS, OUT, ROWS, TOKENS, tokens_an_image, num_images, row_of_image,
            window, head, query_tile, scale, m, token_m, offset_m, is_token_m, column, C, N, T, D, BM, BN, LAST,
            IMAGES, KEEPS_BIAS, COLUMNS, COSINE, SHIFTED, PADDED, PRECISION,
        )  # fmt: skip


@triton.jit
def _query_step(
    queries, grads, lses, deltas, grad_queries, bias, group, tokens_an_image, num_images, row_of_image, scale,
    QKV, PAD, K_NORMS, n, token_n, offset_n, is_token_n, column, C,
    IMAGES: tl.constexpr, COSINE: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What keys n of a group of images add to the gradients of the queries, but for the rows' own factor."""
    new_grad_queries = ()
    for i in tl.static_range(IMAGES):
        image = _wide(tl.minimum(group * IMAGES + i, num_images - 1))
        qkv = QKV + image * tokens_an_image * (3 * C)
        k = _load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        v = _load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        k_norm = _saved_norm(K_NORMS + image * _planes(COSINE) * row_of_image, n, scale * LOG2_E, COSINE)[
            None, :
        ]
        logits = tl.dot(queries[i], tl.trans(k), input_precision=PRECISION) * k_norm + bias
        p = tl.exp2(logits - lses[i][:, None])
        grad_logits = p * (tl.dot(grads[i], tl.trans(v), input_precision=PRECISION) - deltas[i][:, None])
        if COSINE:
            grad_logits *= k_norm
        new_grad_queries += (
            tl.dot(_narrow(grad_logits, k.dtype), k, grad_queries[i], input_precision=PRECISION),
        )
    return new_grad_queries


@triton.jit
def _queries_group(
    group, biases, places, QKV, PAD, BIAS, OUT, ROWS, GRAD_OUT, DELTA, GRAD_QKV, GRAD_SCALE, TOKENS,
    tokens_an_image, num_images, row_of_image, first_row, window, head, scale, m, token_m, offset_m,
    is_token_m, column, C,
    N: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, KEEPS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, COSINE: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries m, of a group of images."""
    TILES: tl.constexpr = (N + BN - 1) // BN
    unscaled, q_norms, queries, grads, lses, deltas, grad_queries = (), (), (), (), (), (), ()
    for i in tl.static_range(IMAGES):
        image = _wide(tl.minimum(group * IMAGES + i, num_images - 1))
        base = image * tokens_an_image
        q = _load(QKV + base * (3 * C), offset_m, is_token_m, column, 3 * C)
        grad = _load(GRAD_OUT + base * C, offset_m, is_token_m, column, C)
        out = _load(OUT + base * C, offset_m, is_token_m, column, C)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        rows = ROWS + image * _planes(COSINE) * row_of_image
        tl.store(DELTA + first_row + image * row_of_image + m, delta)
        q_norm = _saved_norm(rows + T, m, 1.0, COSINE)
        unscaled += (q,)
        q_norms += (q_norm,)
        queries += (_scaled(q, q_norm, scale * LOG2_E, COSINE),)
        grads += (grad,)
        deltas += (delta,)
        lses += (tl.load(rows + m),)
        grad_queries += (tl.zeros([BM, D], tl.float32),)
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            n = tile * BN + tl.arange(0, BN if tile < TILES - 1 else LAST)
            token_n, offset_n, is_token_n = places[tile]
            grad_queries = _query_step(
                queries, grads, lses, deltas, grad_queries, biases[tile], group, tokens_an_image, num_images,
                row_of_image, scale, QKV, PAD, ROWS + 2 * T, n, token_n, offset_n, is_token_n, column, C,
                IMAGES, COSINE, PADDED, PRECISION,
            )  # fmt: skip
    else:
        for start in range(0, N, BN):
            n = start + tl.arange(0, BN)
            token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
            bias = _bias(
                BIAS, head, m[:, None], n[None, :], token_m[:, None], token_n[None, :],
                N, N % BM == 0, N % BN == 0, COLUMNS, SHIFTED, False,
            )  # fmt: skip
            grad_queries = _query_step(
                queries, grads, lses, deltas, grad_queries, bias, group, tokens_an_image, num_images,
                row_of_image, scale, QKV, PAD, ROWS + 2 * T, n, token_n, offset_n, is_token_n, column, C,
                IMAGES, COSINE, PADDED, PRECISION,
            )  # fmt: skip
    for i in tl.static_range(IMAGES):
        image = _wide(tl.minimum(group * IMAGES + i, num_images - 1))
        grad_q = grad_queries[i] * (q_norms[i] * scale)[:, None]
        along = tl.sum(grad_q * unscaled[i].to(tl.float32), 1)
        grad_q = _without_length(grad_q, unscaled[i], along, q_norms[i], COSINE)
        _store(GRAD_QKV + image * tokens_an_image * (3 * C), grad_q, offset_m, is_token_m, column, 3 * C)
        # Not summed here: Triton 3.7 crashes on that for sm_100.
        tl.store(GRAD_SCALE + first_row + image * row_of_image + m, along)


@triton.jit(do_not_specialize=SIZES)
def backward_queries_kernel(
    QKV, PAD, BIAS, SCALE, OUT, ROWS, GRAD_OUT,  # as in the forward pass
    DELTA,  # (G, h, T), fp32, written: the sum of output times gradient of each row
    GRAD_QKV,  # (B, H * W, 3 * C), the queries' third is written
    GRAD_SCALE,  # (G, h, T), fp32, written: each row's part, times the scale
    TOKENS,
    tokens_an_image,
    windows_an_image,
    num_images,
    C,
    N: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LAST: tl.constexpr,
    IMAGES: tl.constexpr,
    KEEPS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BM queries of a head and window, of a split of the images as in the forward pass."""
    num_heads = C // D
    QUERY_TILES: tl.constexpr = (N + BM - 1) // BM
    head, at = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    query_tile, at = at % QUERY_TILES, at // QUERY_TILES
    window, split = at % windows_an_image, at // windows_an_image
    splits = tl.num_programs(0) // (num_heads * QUERY_TILES * windows_an_image)
    column = head * D + tl.arange(0, D)
    m = query_tile * BM + tl.arange(0, BM)
    token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
    scale = tl.load(SCALE + head)
    row_of_image = windows_an_image * num_heads * T
    first_row = (window * num_heads + head) * T
    ROWS += _planes(COSINE) * first_row
    TILES: tl.constexpr = (N + BN - 1) // BN
    biases, places = (), ()
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            n = tile * BN + tl.arange(0, BN if tile < TILES - 1 else LAST)
            token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
            places += ((token_n, offset_n, is_token_n),)
            biases += (
                _bias(
                    BIAS, head, m[:, None], n[None, :], token_m[:, None], token_n[None, :],
                    N, N % BM == 0, tile < TILES - 1 or tile * BN + LAST == N, COLUMNS, SHIFTED, False,
                ),
            )  # fmt: skip
    if KEEPS_BIAS:
        for group in range(split, (num_images + IMAGES - 1) // IMAGES, splits):
            _queries_group(
                group, biases, places, QKV, PAD, BIAS, OUT, ROWS, GRAD_OUT, DELTA, GRAD_QKV, GRAD_SCALE, TOKENS,
                tokens_an_image, num_images, row_of_image, first_row, window, head, scale, m, token_m, offset_m,
                is_token_m, column, C, N, T, D, BM, BN, LAST,
                IMAGES, KEEPS_BIAS, COLUMNS, COSINE, SHIFTED, PADDED, PRECISION,
            )  # fmt: skip
    else:
        _queries_group(
            split, biases, places, QKV, PAD, BIAS, OUT, ROWS, GRAD_OUT, DELTA, GRAD_QKV, GRAD_SCALE, TOKENS,
            tokens_an_image, num_images, row_of_image, first_row, window, head, scale, m, token_m, offset_m,
            is_token_m, column, C, N, T, D, BM, BN, LAST,
            IMAGES, KEEPS_BIAS, COLUMNS, COSINE, SHIFTED, PADDED, PRECISION,
        )  # fmt: skip


@triton.jit
def _key_step(
    keys, values, grad_keys, grad_values, bias, group, tokens_an_image, num_images, row_of_image, first_row,
    QKV, ROWS, GRAD_OUT, DELTA, m, offset_m, is_token_m, scale, column, C,
    T: tl.constexpr, IMAGES: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries m of a group of images add to the gradients of keys; and the gradient of the last one's logits.

    Tiles stand on their side, keys by queries: then every product takes what is in registers as its left side.
    """
    new_grad_keys, new_grad_values = (), ()
    for i in tl.static_range(IMAGES):
        image = _wide(tl.minimum(group * IMAGES + i, num_images - 1))
        base, row = image * tokens_an_image, image * row_of_image + first_row
        q = _load(QKV + base * (3 * C), offset_m, is_token_m, column, 3 * C)
        grad = _load(GRAD_OUT + base * C, offset_m, is_token_m, column, C)
        q_norm = _saved_norm(ROWS + _planes(COSINE) * row + T, m, scale * LOG2_E, COSINE)[None, :]
        logits = tl.dot(keys[i], tl.trans(q), input_precision=PRECISION) * q_norm + bias
        p = tl.exp2(logits - tl.load(ROWS + _planes(COSINE) * row + m)[None, :])
        new_grad_values += (tl.dot(p.to(grad.dtype), grad, grad_values[i], input_precision=PRECISION),)
        grad_p = tl.dot(values[i], tl.trans(grad), input_precision=PRECISION)
        grad_logits = p * (grad_p - tl.load(DELTA + row + m)[None, :])
        grad_dot = grad_logits
        if COSINE:
            grad_dot *= q_norm
        new_grad_keys += (tl.dot(_narrow(grad_dot, q.dtype), q, grad_keys[i], input_precision=PRECISION),)
    return new_grad_keys, new_grad_values, grad_logits


@triton.jit
def _keys_group(
    group, grad_biases, grad_pad_k, grad_pad_v, biases, places, QKV, PAD, BIAS, ROWS, GRAD_OUT, DELTA,
    GRAD_QKV, TOKENS, tokens_an_image, num_images, row_of_image, window, head, scale, n, token_n,
    offset_n, is_token_n, column, C,
    N: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LAST: tl.constexpr,
    IMAGES: tl.constexpr, KEEPS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, COSINE: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys n and their values, of a group of images; and the sums so far over groups."""
    TILES: tl.constexpr = (N + BM - 1) // BM
    num_heads = C // D
    windows_row = (window * num_heads + head) * T
    keys, k_norms, scaled_keys, values, grad_keys, grad_values = (), (), (), (), (), ()
    for i in tl.static_range(IMAGES):
        image = _wide(tl.minimum(group * IMAGES + i, num_images - 1))  # behind the last, that one again
        qkv = QKV + image * tokens_an_image * (3 * C)  # offsets within an image fit 32 bits
        k = _load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        v = _load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        row = image * row_of_image + windows_row
        k_norm = _saved_norm(ROWS + _planes(COSINE) * row + 2 * T, n, 1.0, COSINE)
        keys += (k,)
        k_norms += (k_norm,)
        scaled_keys += (_scaled(k, k_norm, scale * LOG2_E, COSINE),)
        values += (v,)
        grad_keys += (tl.zeros([BN, D], tl.float32),)
        grad_values += (tl.zeros([BN, D], tl.float32),)
    if KEEPS_BIAS:
        new_biases = ()
        for tile in tl.static_range(TILES):
            m = tile * BM + tl.arange(0, BM if tile < TILES - 1 else LAST)
            offset_m, is_token_m = places[tile]
            grad_keys, grad_values, grad_logits = _key_step(
                scaled_keys, values, grad_keys, grad_values, biases[tile], group, tokens_an_image,
                num_images, row_of_image, windows_row, QKV, ROWS, GRAD_OUT, DELTA,
                m, offset_m, is_token_m, scale, column, C, T, IMAGES, COSINE, PRECISION,
            )  # fmt: skip
            new_biases += (grad_biases[tile] + grad_logits,)
        grad_biases = new_biases
    else:
        for start in range(0, N, BM):
            m = start + tl.arange(0, BM)
            token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
            bias = _bias(
                BIAS, head, m[None, :], n[:, None], token_m[None, :], token_n[:, None],
                N, N % BM == 0, N % BN == 0, COLUMNS, SHIFTED, True,
            )  # fmt: skip
            grad_keys, grad_values, _ = _key_step(
                scaled_keys, values, grad_keys, grad_values, bias, group, tokens_an_image,
                num_images, row_of_image, windows_row, QKV, ROWS, GRAD_OUT, DELTA,
                m, offset_m, is_token_m, scale, column, C, T, IMAGES, COSINE, PRECISION,
            )  # fmt: skip
    for i in tl.static_range(IMAGES):
        image = tl.minimum(group * IMAGES + i, num_images - 1)
        grad_k = grad_keys[i] * (k_norms[i] * scale)[:, None]
        along = tl.sum(grad_k * keys[i].to(tl.float32), 1)
        grad_k = _without_length(grad_k, keys[i], along, k_norms[i], COSINE)
        grad_qkv = GRAD_QKV + _wide(image) * tokens_an_image * (3 * C)
        _store(grad_qkv + C, grad_k, offset_n, is_token_n, column, 3 * C)
        _store(grad_qkv + 2 * C, grad_values[i], offset_n, is_token_n, column, 3 * C)
        if PADDED:
            # An image that is done again counts once.
            counts = (group * IMAGES + i < num_images) & (token_n >= 0) & (is_token_n == 0)
            grad_pad_k += tl.sum(tl.where(counts[:, None], grad_k, 0.0), 0)
            grad_pad_v += tl.sum(tl.where(counts[:, None], grad_values[i], 0.0), 0)
    return grad_biases, grad_pad_k, grad_pad_v


@triton.jit(do_not_specialize=SIZES)
def backward_keys_kernel(
    QKV, PAD,
    BIAS,  # as above, but times log2(e), and a dense one is (h, keys, queries)
    SCALE, ROWS, GRAD_OUT, DELTA,
    GRAD_QKV,  # (B, H * W, 3 * C), the thirds of keys and values are written
    GRAD_BIAS,  # (S, h, N, N), fp32, written where it is kept: the sum over this split's windows
    GRAD_PAD,  # (S * tiles, 2, C), fp32, written where anything is padded: keys, values
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
    LAST: tl.constexpr,
    IMAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    KEEPS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of a head, over a split of windows and images.

    KEEPS_BIAS: their bias and its gradient stay in registers, and the queries' tiles are unrolled for it. Else a split
    is one window of a group of images, and the gradient is left to `backward_bias_kernel`.
    """
    num_heads = C // D
    KEY_TILES: tl.constexpr = (N + BN - 1) // BN
    head, at = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    key_tile, split = at % KEY_TILES, at // KEY_TILES
    splits = tl.num_programs(0) // (num_heads * KEY_TILES)
    column = head * D + tl.arange(0, D)
    n = key_tile * BN + tl.arange(0, BN)
    scale = tl.load(SCALE + head)
    row_of_image = windows_an_image * num_heads * T
    TILES: tl.constexpr = (N + BM - 1) // BM
    grad_biases = ()
    grad_pad_k = tl.zeros([D], tl.float32)
    grad_pad_v = tl.zeros([D], tl.float32)
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            grad_biases += (tl.zeros([BN, BM if tile < TILES - 1 else LAST], tl.float32),)
        for window in range(split % window_splits, windows_an_image, window_splits):
            token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
            biases, places = (), ()
            for tile in tl.static_range(TILES):
                m = tile * BM + tl.arange(0, BM if tile < TILES - 1 else LAST)
                token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
                places += ((offset_m, is_token_m),)
                biases += (
                    _bias(
                        BIAS, head, m[None, :], n[:, None], token_m[None, :], token_n[:, None],
                        N, tile < TILES - 1 or tile * BM + LAST == N, N % BN == 0, COLUMNS, SHIFTED, True,
                    ),
                )  # fmt: skip
            groups = (num_images + IMAGES - 1) // IMAGES
            for group in range(split // window_splits, groups, splits // window_splits):
                grad_biases, grad_pad_k, grad_pad_v = _keys_group(
                    group, grad_biases, grad_pad_k, grad_pad_v, biases, places, QKV, PAD, BIAS, ROWS, GRAD_OUT, DELTA,
                    GRAD_QKV, TOKENS, tokens_an_image, num_images, row_of_image, window, head, scale, n, token_n,
                    offset_n, is_token_n, column, C, N, T, D, BM, BN, LAST, IMAGES, KEEPS_BIAS, COLUMNS, COSINE,
                    SHIFTED, PADDED, PRECISION,
                )  # fmt: skip
    else:
        window = split % windows_an_image
        token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
        biases, places = (), ()
        grad_biases, grad_pad_k, grad_pad_v = _keys_group(
            split // windows_an_image, grad_biases, grad_pad_k, grad_pad_v, biases, places, QKV, PAD, BIAS, ROWS,
            GRAD_OUT, DELTA, GRAD_QKV, TOKENS, tokens_an_image, num_images, row_of_image, window, head, scale, n,
            token_n, offset_n, is_token_n, column, C, N, T, D, BM, BN, LAST, IMAGES, KEEPS_BIAS, COLUMNS, COSINE,
            SHIFTED, PADDED, PRECISION,
        )  # fmt: skip
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            m = tile * BM + tl.arange(0, BM if tile < TILES - 1 else LAST)
            place = (split * num_heads + head).to(tl.int64) * N * N + m[None, :] * N + n[:, None]
            tl.store(GRAD_BIAS + place, grad_biases[tile], mask=(m[None, :] < N) & (n[:, None] < N))
    if PADDED:
        part = (split * KEY_TILES + key_tile).to(tl.int64) * 2 * C + column
        tl.store(GRAD_PAD + part, grad_pad_k)
        tl.store(GRAD_PAD + part + C, grad_pad_v)


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
    head, split = tl.program_id(0), tl.program_id(2)
    num_heads = C // D
    column = head * D + tl.arange(0, D)
    scale = tl.load(SCALE + head)
    row_of_image = windows_an_image * num_heads * T
    EDGE: tl.constexpr = COLUMNS if COLUMNS else N
    ROWS_A_WINDOW: tl.constexpr = N // EDGE
    KEY_TILES: tl.constexpr = (EDGE + BN - 1) // BN
    TILES: tl.constexpr = KEY_TILES * ((EDGE + BM - 1) // BM)
    pair, tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
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
        token_m, offset_m, is_token_m = _place(TOKENS, window, m, T)
        token_n, offset_n, is_token_n = _place(TOKENS, window, n, T)
        bias = _bias(
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
        for image in range(split // window_splits, num_images, tl.num_programs(2) // window_splits):
            base = _wide(image) * tokens_an_image
            qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
            first_row = _wide(image) * row_of_image + (window * num_heads + head) * T
            rows = ROWS + _planes(COSINE) * first_row
            q = _load(qkv, offset_m, is_token_m, column, 3 * C)
            k = _load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
            v = _load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
            grad = _load(GRAD_OUT + base * C, offset_m, is_token_m, column, C)
            q = _scaled(q, _saved_norm(rows + T, m, 1.0, COSINE), scale * LOG2_E, COSINE)
            k_norm = _saved_norm(rows + 2 * T, n, scale * LOG2_E, COSINE)[None, :]
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * k_norm + bias
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
        token, offset, is_token = _place(TOKENS, window, n, T)
        bias = _bias(
            BIAS, head, n[:, None], n[None, :], token[:, None], token[None, :],
            N, N == T, N == T, COLUMNS, SHIFTED, False,
        )  # fmt: skip
        for image in range(split // window_splits, num_images, tl.num_programs(1) // window_splits):
            base = _wide(image) * tokens_an_image
            qkv = QKV + base * (3 * C)  # offsets within an image fit 32 bits
            rows = ROWS + _planes(COSINE) * (_wide(image) * row_of_image + (window * num_heads + head) * T)
            q = _load(qkv, offset, is_token, column, 3 * C)
            k = _load(qkv + C, offset, is_token, column, 3 * C)
            v = _load(qkv + 2 * C, offset, is_token, column, 3 * C)
            grad = _load(GRAD_OUT + base * C, offset, is_token, column, C)
            out = _load(OUT + base * C, offset, is_token, column, C)
            q_norm = _saved_norm(rows + T, n, 1.0, COSINE)
            k_norm = _saved_norm(rows + 2 * T, n, scale * LOG2_E, COSINE)
            scaled_q = _scaled(q, q_norm, scale * LOG2_E, COSINE)
            logits = tl.dot(scaled_q, tl.trans(k), input_precision=PRECISION) * k_norm[None, :] + bias
            p = tl.exp2(logits - tl.load(rows + n)[:, None])
            delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            grad_v = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
            grad_logits = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            grad_bias += grad_logits
            if COSINE:
                grad_logits *= k_norm[None, :]
            grad_dot = _narrow(grad_logits, q.dtype)
            grad_q = tl.dot(grad_dot, k, input_precision=PRECISION) * (q_norm * scale)[:, None]
            along_q = tl.sum(grad_q * q.to(tl.float32), 1)
            grad_scale += along_q
            grad_q = _without_length(grad_q, q, along_q, q_norm, COSINE)
            grad_k = tl.dot(tl.trans(grad_dot), scaled_q, input_precision=PRECISION)
            grad_k *= 1.0 / LOG2_E if COSINE else scale  # a scaled query has its norm and scale, and base 2
            along_k = tl.sum(grad_k * k.to(tl.float32), 1)
            grad_k = _without_length(grad_k, k, along_k, k_norm, COSINE)
            grad_qkv = GRAD_QKV + base * (3 * C)
            _store(grad_qkv, grad_q, offset, is_token, column, 3 * C)
            _store(grad_qkv + C, grad_k, offset, is_token, column, 3 * C)
            _store(grad_qkv + 2 * C, grad_v, offset, is_token, column, 3 * C)
    place = (split * num_heads + head).to(tl.int64) * N * N + n[:, None] * N + n[None, :]
    tl.store(GRAD_BIAS + place, grad_bias, mask=(n[:, None] < N) & (n[None, :] < N))
    tl.store(GRAD_SCALE + (split * num_heads + head) * T + n, grad_scale)
