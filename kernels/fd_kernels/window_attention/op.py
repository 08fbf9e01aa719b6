"""Shifted-window cosine attention: the function that models call."""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, N = tokens of a window

from torch import Tensor

from fd_kernels.checks import check_floating, check_shape
from fd_kernels.window_attention.reference import window_attention_reference


def window_attention(
    qkv_BHWE: Tensor,
    bias_hNN: Tensor,
    scale_h: Tensor,
    *,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    pad_qkv_E: Tensor | None = None,
) -> Tensor:
    """Scaled cosine attention within (shifted) windows of a token grid.

    The grid is rolled by -shift, padded at the bottom and right to a multiple of the window, and cut into
    windows; the result is put back in place. Queries and keys are L2-normalised; logits, softmax and the
    product with the values are computed in fp32 at least. Across shift regions -100 is added to a logit.

    Args:
        qkv_BHWE: queries, keys and values, (B, H, W, 3 * C), each part laid out as heads x head dim; fp64,
            fp32, bf16 or fp16.
        bias_hNN: relative position bias, (heads, N, N), with N tokens of a window row by row; fp32.
        scale_h: factor of the cosine similarity per head, (heads,), the exponential of the clamped logit
            scale; fp32.
        window_size: rows and columns of a window, any size.
        shift_size: rows and columns of the cyclic shift, each 0 or more and less than the window's.
        pad_qkv_E: queries, keys and values of a zero token (the bias of the projection), (3 * C,), dtype of
            `qkv_BHWE`. Padding positions hold it and stay in the softmax. Needed where the window does not
            divide the grid, unused elsewhere.

    Returns:
        out_BHWC, (B, H, W, C), in the dtype of `qkv_BHWE`.

    Raises:
        ValueError: a shape, dtype, window or shift does not fit, or `pad_qkv_E` is missing.

    Source: Liu et al. 2022 (arXiv:2111.09883), equation 2; shift: Liu et al. 2021 (arXiv:2103.14030).
    """
    if qkv_BHWE.dim() != 4:
        raise ValueError(f"qkv_BHWE has {qkv_BHWE.dim()} dimensions; expected 4, (B, H, W, 3 * C)")
    if bias_hNN.dim() != 3:
        raise ValueError(f"bias_hNN has {bias_hNN.dim()} dimensions; expected 3, (heads, N, N)")
    _, H, W, E = qkv_BHWE.shape
    heads = bias_hNN.shape[0]
    num_tokens = window_size[0] * window_size[1]
    check_floating("qkv_BHWE", qkv_BHWE)
    if min(window_size) < 1:
        raise ValueError(f"window_size is {window_size}; expected two positive integers")
    if not all(0 <= shift < window for shift, window in zip(shift_size, window_size, strict=True)):
        raise ValueError(
            f"shift_size is {shift_size}; expected 0 <= shift < window, window_size is {window_size}"
        )
    check_shape("bias_hNN", bias_hNN, (heads, num_tokens, num_tokens), f"a window of {window_size} tokens")
    check_shape("scale_h", scale_h, (heads,), "one factor for each head of bias_hNN")
    if E % (3 * heads):
        raise ValueError(f"qkv_BHWE has {E} channels; expected a multiple of 3 * heads = {3 * heads}")

    if H % window_size[0] or W % window_size[1]:
        if pad_qkv_E is None:
            raise ValueError(
                f"window {window_size} does not divide the grid {(H, W)}; pass pad_qkv_E, a zero token's qkv"
            )
        check_shape("pad_qkv_E", pad_qkv_E, (E,), "the last dimension of qkv_BHWE")
        if pad_qkv_E.dtype != qkv_BHWE.dtype:
            raise ValueError(
                f"pad_qkv_E has dtype {pad_qkv_E.dtype}; expected {qkv_BHWE.dtype}, that of qkv_BHWE"
            )
    return window_attention_reference(
        qkv_BHWE, bias_hNN, scale_h, window_size=window_size, shift_size=shift_size, pad_qkv_E=pad_qkv_E
    )
