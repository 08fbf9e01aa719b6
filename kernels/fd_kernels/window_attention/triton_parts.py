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
def wide(number):
    """In 64 bits, a loop's index too, which is a plain integer under the interpreter."""
    return tl.full((), 0, tl.int64) + number


@triton.jit
def token_places(TOKENS, window, n, T: tl.constexpr):
    """Entries of the token table, the places in the image that they mean, and which are read from there."""
    token = tl.load(TOKENS + window * T + n)
    offset = token & PAD_OFFSET
    is_token = (token >= 0) & (offset != PAD_OFFSET)
    return token, tl.where(is_token, offset, 0), is_token


@triton.jit
def load_rows(X, offset, is_token, column, stride):
    """Head dim columns of some tokens; zeros where there is none."""
    return tl.load(X + offset[:, None] * stride + column[None, :], mask=is_token[:, None], other=0.0)


@triton.jit
def load_keys(X, PAD, offset, is_token, token, column, stride, PADDED: tl.constexpr):
    """As `load_rows`, but a padding position holds what a zero token would: it is a key, though it asks nothing."""
    place = X + offset[:, None] * stride + column[None, :]
    if PADDED:
        place = tl.where(is_token[:, None], place, PAD + column[None, :])
        is_token = token >= 0
    return tl.load(place, mask=is_token[:, None], other=0.0)


@triton.jit
def store_rows(X, x, offset, is_token, column, stride):
    """Writes head dim columns of some tokens, in the dtype of X."""
    place = offset[:, None] * stride + column[None, :]
    tl.store(X + place, x.to(X.dtype.element_ty), mask=is_token[:, None])


@triton.jit
def inverse_norm(x, COSINE: tl.constexpr):
    """1 / |x| of each row, or 1 without cosines.

    Of a row without length, as a padding key of Swin V2 is, it is 0: such a row is no direction, and gives none.
    """
    inverse = tl.full([x.shape[0]], 1.0, tl.float32)
    if COSINE:
        x = x.to(tl.float32)
        squared = tl.sum(x * x, 1)
        inverse = tl.where(squared > TINY, tl.rsqrt(tl.maximum(squared, TINY)), 0.0)
    return inverse


@triton.jit
def saved_norm(ROWS, n, COSINE: tl.constexpr):
    """As `inverse_norm`, which the forward pass has written down; 0 of keys behind the window."""
    inverse = tl.full([n.shape[0]], 1.0, tl.float32)
    if COSINE:
        inverse = tl.load(ROWS + n)
    return inverse


@triton.jit
def planes(COSINE: tl.constexpr):
    """Numbers that the forward pass keeps of a row."""
    return 3 if COSINE else 1


@triton.jit
def logit_factor(row_norm, column_norm, scale, COSINE: tl.constexpr):
    """What a tile of dot products is multiplied by to be logits in base 2.

    In fp32, in every kernel alike: operands rounded after their normalisation in one kernel and not in another would
    make softmaxes that do not sum to 1.
    """
    factor = scale * LOG2_E
    if COSINE:
        factor = (row_norm * factor)[:, None] * column_norm[None, :]
    return factor


@triton.jit
def add_directions(total, weights, x, inverse_norm, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """Adds rows of x, brought to length 1, times weights."""
    if COSINE:
        if x.dtype == tl.float16:
            # Where rows are short or long, weights times 1 / |x| would leave fp16's range.
            x = (x.to(tl.float32) * inverse_norm[:, None]).to(tl.float16)
        else:
            weights *= inverse_norm[None, :]
    return tl.dot(weights.to(x.dtype), x, total, input_precision=PRECISION)


@triton.jit
def without_length(grad, x, along, inverse_norm, COSINE: tl.constexpr):
    """The gradient of a row: a cosine does not change with the row's length, so no part of it lies along the row."""
    if COSINE:
        grad -= x.to(tl.float32) * (along * inverse_norm * inverse_norm)[:, None]
    return grad


@triton.jit
def bias_and_mask(
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
