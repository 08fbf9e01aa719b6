"""Global attention with a relative position bias: the function that models call."""

# Shape suffix legend: B = images, N = tokens (prefix and patches), C = channels, E = 3 * C (q, k, v), h = heads

import torch
from torch import Tensor

from fd_kernels.biased_attention.reference import biased_attention_reference
from fd_kernels.checks import check_floating, check_heads, check_shape
from fd_kernels.dispatch import use_triton
from fd_kernels.window_attention.op import attention, not_served


def biased_attention(qkv_BNE: Tensor, bias_hNN: Tensor) -> Tensor:
    """Scaled dot-product attention over all tokens, with a bias added to the logits.

    Logits, softmax and the product with the values are computed in fp32 at least.

    Args:
        qkv_BNE: queries, keys and values, (B, N, 3 * C), each part laid out as heads x head dim; fp64,
            fp32, bf16 or fp16.
        bias_hNN: bias of each pair of a query and a key, (heads, N, N), any floating point dtype.

    Returns:
        out_BNC, (B, N, C), in the dtype of `qkv_BNE`.

    On CUDA the kernel of window attention runs where it serves the call, an image one window (fp32, bf16 or fp16;
    head dim 32, 64 or 128; fp32 bias; contiguous tensors), elsewhere the PyTorch reference: see
    `fd_kernels.dispatch`.

    Raises:
        ValueError: a shape or dtype does not fit; or the kernel is asked for by name and does not serve the call.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; bias: Bao et al. 2021 (arXiv:2106.08254).
    """
    if qkv_BNE.dim() != 3:
        raise ValueError(f"qkv_BNE has {qkv_BNE.dim()} dimensions; expected 3, (B, N, 3 * C)")
    if bias_hNN.dim() != 3:
        raise ValueError(f"bias_hNN has {bias_hNN.dim()} dimensions; expected 3, (heads, N, N)")
    _, N, E = qkv_BNE.shape
    heads = len(bias_hNN)
    check_floating("qkv_BNE", qkv_BNE)
    check_floating("bias_hNN", bias_hNN)
    check_shape("bias_hNN", bias_hNN, (heads, N, N), f"the {N} tokens of qkv_BNE")
    check_heads("qkv_BNE", E, heads)
    qkv_B1NE = qkv_BNE.unsqueeze(1)
    scale_h = torch.full((heads,), (E // (3 * heads)) ** -0.5, dtype=torch.float32, device=qkv_BNE.device)
    served = not_served(qkv_B1NE, bias_hNN, scale_h)
    if not use_triton("biased_attention", qkv_BNE, bias_hNN, served=served):
        return biased_attention_reference(qkv_BNE, bias_hNN)
    out_B1NC, _ = attention(qkv_B1NE, bias_hNN, scale_h, None, [1, N], [0, 0], False)
    return out_B1NC.squeeze(1)
