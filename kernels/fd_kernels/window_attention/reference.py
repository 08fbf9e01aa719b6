"""Shifted-window cosine attention in plain PyTorch: the ground truth of the op."""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim,
#   M = windows of an image, N = tokens of a window, R = relative positions of a window

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Additive, as Swin was trained: with logit scales near 100 it leaks, and -inf would change results.
MASK_LOGIT = -100.0
LARGEST_TOGETHER = 24 * 24
"""Tokens: larger windows are attended to one after the other (40 x 40 tokens, 16 heads: 0.16 GB of logits a window)."""


def shift_mask(
    height: int, width: int, window_size: tuple[int, int], shift_size: tuple[int, int], device: torch.device
) -> Tensor:
    """Logits to add so that tokens brought together by the cyclic shift hardly see each other.

    As in timm the grid is rolled, then padded, and regions part at the padded grid's end less the shift: where anything
    is padded, that is in the padding, and tokens from both ends of the grid do see each other.

    Args:
        height: rows of the rolled and padded token grid, a multiple of the window's.
        width: columns of that grid, a multiple of the window's.
        window_size: rows and columns of a window.
        shift_size: rows and columns of the cyclic shift, each less than the window's.
        device: where to build the mask.

    Returns:
        mask_MNN, (windows, N, N), fp32: 0 within a region, -100 across regions.

    Source: Liu et al. 2021 (arXiv:2103.14030), section 3.2, "Efficient batch computation".
    """
    # Only the last window of a row or column can hold two regions.
    wrapped_H = torch.arange(height, device=device) >= height - shift_size[0]
    wrapped_W = torch.arange(width, device=device) >= width - shift_size[1]
    region_HW = 2 * wrapped_H[:, None].int() + wrapped_W.int()
    rows, columns = height // window_size[0], width // window_size[1]
    region_MN = (
        region_HW.view(rows, window_size[0], columns, window_size[1])
        .transpose(1, 2)
        .reshape(rows * columns, -1)
    )
    return (region_MN[:, :, None] != region_MN[:, None, :]) * MASK_LOGIT


def _pad_grid(qkv_BHWE: Tensor, height: int, width: int, pad_qkv_E: Tensor) -> Tensor:
    """Extend the grid at the bottom and right with the qkv of a zero token."""
    B, H, W, _ = qkv_BHWE.shape
    if width > W:
        qkv_BHWE = torch.cat([qkv_BHWE, pad_qkv_E.expand(B, H, width - W, -1)], dim=2)
    if height > H:
        qkv_BHWE = torch.cat([qkv_BHWE, pad_qkv_E.expand(B, height - H, width, -1)], dim=1)
    return qkv_BHWE


def relative_position_index(window_size: tuple[int, int], device: torch.device) -> Tensor:
    """Place of each pair of a query and a key in a table of relative positions, as `window_attention` takes it.

    Returns:
        index_NN, (N, N), int64, from 0 to (2 * rows - 1) * (2 * columns - 1) - 1.
    """
    rows, columns = window_size
    # In a table that is 2 * columns - 1 wide, the index of a difference is the difference of the indices.
    place_N = (
        torch.arange(rows, device=device)[:, None] * (2 * columns - 1) + torch.arange(columns, device=device)
    ).flatten()
    return place_N[:, None] - place_N + place_N[-1]


def window_attention_reference(
    qkv_BHWE: Tensor,
    bias: Tensor,
    scale_h: Tensor,
    *,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    pad_qkv_E: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch form of `fd_kernels.window_attention`, which documents and checks the arguments."""
    B, H, W, E = qkv_BHWE.shape
    heads, N = len(bias), window_size[0] * window_size[1]
    D = E // (3 * heads)
    (window_H, window_W), shifted = window_size, any(shift_size)
    rows, columns = -(-H // window_H), -(-W // window_W)
    compute_dtype = torch.promote_types(qkv_BHWE.dtype, torch.float32)

    grid_BHWE = qkv_BHWE
    if shifted:
        grid_BHWE = torch.roll(grid_BHWE, (-shift_size[0], -shift_size[1]), dims=(1, 2))
    if pad_qkv_E is not None:
        grid_BHWE = _pad_grid(grid_BHWE, rows * window_H, columns * window_W, pad_qkv_E)
    parts = grid_BHWE.reshape(B, rows, window_H, columns, window_W, 3, heads, D).permute(
        5, 0, 1, 3, 6, 2, 4, 7
    )
    q_BMhND, k_BMhND, v_BMhND = parts.to(compute_dtype).reshape(3, B, rows * columns, heads, N, D).unbind(0)

    bias_hNN = bias if bias.dim() == 3 else bias[:, relative_position_index(window_size, bias.device)]
    mask_MNN = None
    if shifted:
        mask_MNN = shift_mask(rows * window_H, columns * window_W, window_size, shift_size, qkv_BHWE.device)
    scale_h, bias_hNN = scale_h.to(compute_dtype), bias_hNN.to(compute_dtype)
    # Autocast would lower the two products; the meta device has no autocast to switch off.
    device_type = qkv_BHWE.device.type
    autocast = torch.amp.is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        if N <= LARGEST_TOGETHER or rows * columns == 1:
            out_BMhND = _attend(q_BMhND, k_BMhND, v_BMhND, scale_h, bias_hNN, mask_MNN)
        else:
            # Sequentially, and again in the backward pass: logits of one window of each image are held at a time.
            windows = [part.split(1, dim=1) for part in (q_BMhND, k_BMhND, v_BMhND)]
            masks = [None] * rows * columns if mask_MNN is None else mask_MNN.split(1)
            outs = [
                checkpoint(
                    _attend, *window, scale_h, bias_hNN, mask, use_reentrant=False, preserve_rng_state=False
                )
                for *window, mask in zip(*windows, masks, strict=True)
            ]
            out_BMhND = torch.cat(outs, dim=1)

    out = out_BMhND.to(qkv_BHWE.dtype).view(B, rows, columns, heads, window_H, window_W, D)
    out_BHWC = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, rows * window_H, columns * window_W, heads * D)
    out_BHWC = out_BHWC[:, :H, :W]
    return torch.roll(out_BHWC, shift_size, dims=(1, 2)) if shifted else out_BHWC


def _attend(
    q_BMhND: Tensor,
    k_BMhND: Tensor,
    v_BMhND: Tensor,
    scale_h: Tensor,
    bias_hNN: Tensor,
    mask_MNN: Tensor | None,
) -> Tensor:
    # The scale goes on the queries: N * D multiplications a window and head, not N * N.
    query_BMhND = F.normalize(q_BMhND, dim=-1) * scale_h[:, None, None]
    bias_MhNN = bias_hNN if mask_MNN is None else bias_hNN + mask_MNN[:, None]
    logits_BMhNN = query_BMhND @ F.normalize(k_BMhND, dim=-1).mT + bias_MhNN
    return logits_BMhNN.softmax(dim=-1) @ v_BMhND
