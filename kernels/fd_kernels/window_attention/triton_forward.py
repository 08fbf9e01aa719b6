"""The forward pass of attention within windows; what it is built of stands in `triton_parts`."""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim, M = windows of an
#   image, G = windows of all images, N = tokens of a window, T = N rounded up to whole tiles, S = splits,
#   R = relative positions of a window, P = numbers kept of a row

import triton
import triton.language as tl

from fd_kernels.window_attention.triton_parts import (
    NOWHERE,
    SIZES,
    bias_and_mask,
    inverse_norm,
    load_keys,
    load_rows,
    logit_factor,
    planes,
    store_rows,
    token_places,
    wide,
)


@triton.jit
def _attend(
    queries, q_norms, largests, totals, accs, bias, writes_norms, group, tokens_an_image, num_images, row_of_image,
    scale, QKV, PAD, K_NORMS, n, token_n, offset_n, is_token_n, column, C,
    N: tl.constexpr, IMAGES: tl.constexpr, COSINE: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys n of a group of images more: the rows' largest logits, softmax sums and outputs so far."""
    new_largests, new_totals, new_accs = (), (), ()
    for i in tl.static_range(IMAGES):
        image = wide(tl.minimum(group * IMAGES + i, num_images - 1))
        qkv = QKV + image * tokens_an_image * (3 * C)
        k = load_keys(qkv + C, PAD + C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        v = load_keys(qkv + 2 * C, PAD + 2 * C, offset_n, is_token_n, token_n, column, 3 * C, PADDED)
        k_norm = inverse_norm(k, COSINE)
        if COSINE:
            tl.store(K_NORMS + image * planes(COSINE) * row_of_image + n, k_norm, mask=(n < N) & writes_norms)
        logits = tl.dot(queries[i], tl.trans(k), input_precision=PRECISION)
        logits = logits * logit_factor(q_norms[i], k_norm, scale, COSINE) + bias
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
    queries, q_norms, largests, totals, accs = (), (), (), (), ()
    for i in tl.static_range(IMAGES):
        image = wide(tl.minimum(group * IMAGES + i, num_images - 1))  # behind the last, that one again
        q = load_rows(QKV + image * tokens_an_image * (3 * C), offset_m, is_token_m, column, 3 * C)
        q_norm = inverse_norm(q, COSINE)
        if COSINE:
            tl.store(ROWS + image * planes(COSINE) * row_of_image + T + m, q_norm)
            behind = N + tl.arange(0, BM)
            k_norms = ROWS + image * planes(COSINE) * row_of_image + 2 * T
            tl.store(k_norms + behind, 0.0, mask=(behind < T) & (query_tile == 0))
        queries += (q,)
        q_norms += (q_norm,)
        largests += (tl.full([BM], NOWHERE, tl.float32),)
        totals += (tl.zeros([BM], tl.float32),)
        accs += (tl.zeros([BM, D], tl.float32),)
    if KEEPS_BIAS:
        for tile in tl.static_range(TILES):
            n = tile * BN + tl.arange(0, BN if tile < TILES - 1 else LAST)
            token_n, offset_n, is_token_n = places[tile]
            largests, totals, accs = _attend(
                queries, q_norms, largests, totals, accs, biases[tile], query_tile == 0, group, tokens_an_image,
                num_images, row_of_image, scale, QKV, PAD, ROWS + 2 * T, n, token_n, offset_n, is_token_n, column, C,
                N, IMAGES, COSINE, PADDED, PRECISION,
            )  # fmt: skip
    else:
        for start in range(0, N, BN):
            n = start + tl.arange(0, BN)
            token_n, offset_n, is_token_n = token_places(TOKENS, window, n, T)
            bias = bias_and_mask(
                BIAS, head, m[:, None], n[None, :], token_m[:, None], token_n[None, :],
                N, N % BM == 0, N % BN == 0, COLUMNS, SHIFTED, False,
            )  # fmt: skip
            largests, totals, accs = _attend(
                queries, q_norms, largests, totals, accs, bias, query_tile == 0, group, tokens_an_image, num_images,
                row_of_image, scale, QKV, PAD, ROWS + 2 * T, n, token_n, offset_n, is_token_n, column, C,
                N, IMAGES, COSINE, PADDED, PRECISION,
            )  # fmt: skip
    for i in tl.static_range(IMAGES):
        image = wide(tl.minimum(group * IMAGES + i, num_images - 1))
        out = OUT + image * tokens_an_image * C
        store_rows(out, accs[i] / totals[i][:, None], offset_m, is_token_m, column, C)
        # Where there is no token, the backward pass shall find probabilities of 0.
        lse = tl.where(is_token_m, largests[i] + tl.log2(totals[i]), -NOWHERE)
        tl.store(ROWS + image * planes(COSINE) * row_of_image + m, lse)


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
    token_m, offset_m, is_token_m = token_places(TOKENS, window, m, T)
    scale = tl.load(SCALE + head)
    row_of_image = windows_an_image * num_heads * T
    ROWS += (wide(window) * num_heads + head) * planes(COSINE) * T
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
