"""The backward pass of attention within windows: gradients of queries, then of keys and values."""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim, M = windows of an
#   image, G = windows of all images, N = tokens of a window, T = N rounded up to whole tiles, S = splits,
#   R = relative positions of a window, P = numbers kept of a row

import triton
import triton.language as tl

from fd_kernels.window_attention.triton_parts import (
    SIZES,
    add_directions,
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


@triton.jit
def _query_step(
    queries, q_norms, grads, lses, deltas, grad_queries, bias, group, tokens_an_image, num_images, row_of_image, scale,
    QKV, PAD, K_NORMS, n, token_n, offset_n, is_token_n, column, C,
    IMAGES: tl.constexpr, COSINE: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What keys n of a group of images add to the gradients of the queries, but for the rows' own factor."""
    new_grad_queries = ()
    for i in tl.static_range(IMAGES):
        image = wide(tl.minimum(group * IMAGES + i, num_images - 1))
        qkv = QKV + image * tokens_an_image * (3 * C)
        k = load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        v = load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        k_norm = saved_norm(K_NORMS + image * planes(COSINE) * row_of_image, n, COSINE)
        logits = tl.dot(queries[i], tl.trans(k), input_precision=PRECISION)
        logits = logits * logit_factor(q_norms[i], k_norm, scale, COSINE) + bias
        p = tl.exp2(logits - lses[i][:, None])
        grad_logits = p * (tl.dot(grads[i], tl.trans(v), input_precision=PRECISION) - deltas[i][:, None])
        new_grad_queries += (add_directions(grad_queries[i], grad_logits, k, k_norm, COSINE, PRECISION),)
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
    q_norms, queries, grads, lses, deltas, grad_queries = (), (), (), (), (), ()
    for i in tl.static_range(IMAGES):
        image = wide(tl.minimum(group * IMAGES + i, num_images - 1))
        base = image * tokens_an_image
        q = load_rows(QKV + base * (3 * C), offset_m, is_token_m, column, 3 * C)
        grad = load_rows(GRAD_OUT + base * C, offset_m, is_token_m, column, C)
        out = load_rows(OUT + base * C, offset_m, is_token_m, column, C)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        rows = ROWS + image * planes(COSINE) * row_of_image
        tl.store(DELTA + first_row + image * row_of_image + m, delta)
        q_norm = saved_norm(rows + T, m, COSINE)
        q_norms += (q_norm,)
        queries += (q,)
        grads += (grad,)
        deltas += (delta,)
        lses += (tl.load(rows + m),)
        grad_queries += (tl.zeros([BM, D], tl.float32),)
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            n = tile * BN + tl.arange(0, BN if tile < TILES - 1 else LAST)
            token_n, offset_n, is_token_n = places[tile]
            grad_queries = _query_step(
                queries, q_norms, grads, lses, deltas, grad_queries, biases[tile], group, tokens_an_image, num_images,
                row_of_image, scale, QKV, PAD, ROWS + 2 * T, n, token_n, offset_n, is_token_n, column, C,
                IMAGES, COSINE, PADDED, PRECISION,
            )  # fmt: skip
    else:
        for start in range(0, N, BN):
            n = start + tl.arange(0, BN)
            token_n, offset_n, is_token_n = token_places(TOKENS, window, n, T)
            bias = bias_and_mask(
                BIAS, head, m[:, None], n[None, :], token_m[:, None], token_n[None, :],
                N, N % BM == 0, N % BN == 0, COLUMNS, SHIFTED, False,
            )  # fmt: skip
            grad_queries = _query_step(
                queries, q_norms, grads, lses, deltas, grad_queries, bias, group, tokens_an_image, num_images,
                row_of_image, scale, QKV, PAD, ROWS + 2 * T, n, token_n, offset_n, is_token_n, column, C,
                IMAGES, COSINE, PADDED, PRECISION,
            )  # fmt: skip
    for i in tl.static_range(IMAGES):
        image = wide(tl.minimum(group * IMAGES + i, num_images - 1))
        grad_q = grad_queries[i] * (q_norms[i] * scale)[:, None]
        along = tl.sum(grad_q * queries[i].to(tl.float32), 1)
        grad_q = without_length(grad_q, queries[i], along, q_norms[i], COSINE)
        store_rows(GRAD_QKV + image * tokens_an_image * (3 * C), grad_q, offset_m, is_token_m, column, 3 * C)
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
    token_m, offset_m, is_token_m = token_places(TOKENS, window, m, T)
    scale = tl.load(SCALE + head)
    row_of_image = windows_an_image * num_heads * T
    first_row = (wide(window) * num_heads + head) * T
    ROWS += planes(COSINE) * first_row
    TILES: tl.constexpr = (N + BN - 1) // BN
    biases, places = (), ()
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            n = tile * BN + tl.arange(0, BN if tile < TILES - 1 else LAST)
            token_n, offset_n, is_token_n = token_places(TOKENS, window, n, T)
            places += ((token_n, offset_n, is_token_n),)
            biases += (
                bias_and_mask(
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
    k, k_norm, v, grad_k, grad_v, bias, image, tokens_an_image, row, QKV, ROWS, GRAD_OUT, DELTA, m, offset_m,
    is_token_m, scale, column, C, T: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries m of an image add to the gradients of keys, and the gradient of the logits.

    Tiles stand on their side, keys by queries: then every product takes what is in registers as its left side.
    """
    base = image * tokens_an_image
    q = load_rows(QKV + base * (3 * C), offset_m, is_token_m, column, 3 * C)
    grad = load_rows(GRAD_OUT + base * C, offset_m, is_token_m, column, C)
    q_norm = saved_norm(ROWS + planes(COSINE) * row + T, m, COSINE)
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    logits = logits * logit_factor(k_norm, q_norm, scale, COSINE) + bias
    p = tl.exp2(logits - tl.load(ROWS + planes(COSINE) * row + m)[None, :])
    grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    grad_logits = p * (grad_p - tl.load(DELTA + row + m)[None, :])
    return add_directions(grad_k, grad_logits, q, q_norm, COSINE, PRECISION), grad_v, grad_logits


@triton.jit
def _keys_of_image(
    image, grad_biases, grad_pad_k, grad_pad_v, biases, places, QKV, PAD, BIAS, ROWS, GRAD_OUT, DELTA,
    GRAD_QKV, TOKENS, tokens_an_image, row_of_image, window, head, scale, n, token_n, offset_n, is_token_n, column, C,
    N: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LAST: tl.constexpr,
    KEEPS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, COSINE: tl.constexpr, SHIFTED: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys n and their values, of an image; and the sums so far over images."""
    TILES: tl.constexpr = (N + BM - 1) // BM
    image = wide(image)
    qkv = QKV + image * tokens_an_image * (3 * C)  # offsets within an image fit 32 bits
    k = load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
    v = load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
    row = image * row_of_image + (wide(window) * (C // D) + head) * T
    k_norm = saved_norm(ROWS + planes(COSINE) * row + 2 * T, n, COSINE)
    grad_k = tl.zeros([BN, D], tl.float32)
    grad_v = tl.zeros([BN, D], tl.float32)
    if KEEPS_BIAS:
        new_biases = ()
        for tile in tl.static_range(TILES):
            m = tile * BM + tl.arange(0, BM if tile < TILES - 1 else LAST)
            offset_m, is_token_m = places[tile]
            grad_k, grad_v, grad_logits = _key_step(
                k, k_norm, v, grad_k, grad_v, biases[tile], image, tokens_an_image, row, QKV, ROWS, GRAD_OUT, DELTA,
                m, offset_m, is_token_m, scale, column, C, T, COSINE, PRECISION,
            )  # fmt: skip
            new_biases += (grad_biases[tile] + grad_logits,)
        grad_biases = new_biases
    else:
        for start in range(0, N, BM):
            m = start + tl.arange(0, BM)
            token_m, offset_m, is_token_m = token_places(TOKENS, window, m, T)
            bias = bias_and_mask(
                BIAS, head, m[None, :], n[:, None], token_m[None, :], token_n[:, None],
                N, N % BM == 0, N % BN == 0, COLUMNS, SHIFTED, True,
            )  # fmt: skip
            grad_k, grad_v, _ = _key_step(
                k, k_norm, v, grad_k, grad_v, bias, image, tokens_an_image, row, QKV, ROWS, GRAD_OUT, DELTA,
                m, offset_m, is_token_m, scale, column, C, T, COSINE, PRECISION,
            )  # fmt: skip
    grad_k = grad_k * (k_norm * scale)[:, None]
    along = tl.sum(grad_k * k.to(tl.float32), 1)
    grad_k = without_length(grad_k, k, along, k_norm, COSINE)
    grad_qkv = GRAD_QKV + image * tokens_an_image * (3 * C)
    store_rows(grad_qkv + C, grad_k, offset_n, is_token_n, column, 3 * C)
    store_rows(grad_qkv + 2 * C, grad_v, offset_n, is_token_n, column, 3 * C)
    if PADDED:
        padding = (token_n >= 0) & (is_token_n == 0)
        grad_pad_k += tl.sum(tl.where(padding[:, None], grad_k, 0.0), 0)
        grad_pad_v += tl.sum(tl.where(padding[:, None], grad_v, 0.0), 0)
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
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDED: tl.constexpr,
    KEEPS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of a head, over a split of windows and images.

    KEEPS_BIAS: their bias and its gradient stay in registers, and the queries' tiles are unrolled for it. Else a split
    is one window of an image, and the gradient is left to `backward_bias_kernel`.
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
            token_n, offset_n, is_token_n = token_places(TOKENS, window, n, T)
            biases, places = (), ()
            for tile in tl.static_range(TILES):
                m = tile * BM + tl.arange(0, BM if tile < TILES - 1 else LAST)
                token_m, offset_m, is_token_m = token_places(TOKENS, window, m, T)
                places += ((offset_m, is_token_m),)
                biases += (
                    bias_and_mask(
                        BIAS, head, m[None, :], n[:, None], token_m[None, :], token_n[:, None],
                        N, tile < TILES - 1 or tile * BM + LAST == N, N % BN == 0, COLUMNS, SHIFTED, True,
                    ),
                )  # fmt: skip
            for image in range(split // window_splits, num_images, splits // window_splits):
                grad_biases, grad_pad_k, grad_pad_v = _keys_of_image(
                    image, grad_biases, grad_pad_k, grad_pad_v, biases, places, QKV, PAD, BIAS, ROWS, GRAD_OUT, DELTA,
                    GRAD_QKV, TOKENS, tokens_an_image, row_of_image, window, head, scale, n, token_n, offset_n,
                    is_token_n, column, C, N, T, D, BM, BN, LAST, KEEPS_BIAS, COLUMNS, COSINE, SHIFTED, PADDED,
                    PRECISION,
                )  # fmt: skip
    else:
        window = split % windows_an_image
        token_n, offset_n, is_token_n = token_places(TOKENS, window, n, T)
        biases, places = (), ()
        grad_biases, grad_pad_k, grad_pad_v = _keys_of_image(
            split // windows_an_image, grad_biases, grad_pad_k, grad_pad_v, biases, places, QKV, PAD, BIAS, ROWS,
            GRAD_OUT, DELTA, GRAD_QKV, TOKENS, tokens_an_image, row_of_image, window, head, scale, n, token_n,
            offset_n, is_token_n, column, C, N, T, D, BM, BN, LAST, KEEPS_BIAS, COLUMNS, COSINE, SHIFTED, PADDED,
            PRECISION,
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
