"""Scaled dot-product attention with an additive bias in plain PyTorch: the ground truth of the op."""

# Shape suffix legend
#   B = images, N = tokens (prefix and patches), C = channels, E = 3 * C (q, k, v), h = heads, D = head dim

from contextlib import nullcontext

import torch
from torch import Tensor


def biased_attention_reference(qkv_BNE: Tensor, bias_hNN: Tensor) -> Tensor:
    """Plain PyTorch form of `fd_kernels.biased_attention`, which documents and checks the arguments."""
    B, N, E = qkv_BNE.shape
    heads = len(bias_hNN)
    D = E // (3 * heads)
    compute_dtype = torch.promote_types(qkv_BNE.dtype, torch.float32)
    q_BhND, k_BhND, v_BhND = qkv_BNE.to(compute_dtype).view(B, N, 3, heads, D).permute(2, 0, 3, 1, 4).unbind()
    # Autocast would lower the two products; the meta device has no autocast to switch off.
    device_type = qkv_BNE.device.type
    autocast = torch.amp.is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        logits_BhNN = (q_BhND * D**-0.5) @ k_BhND.mT + bias_hNN.to(compute_dtype)
        out_BhND = logits_BhNN.softmax(dim=-1) @ v_BhND
    return out_BhND.to(qkv_BNE.dtype).transpose(1, 2).reshape(B, N, heads * D)
