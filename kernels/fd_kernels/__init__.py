"""Kernels of fd-scale: each has a plain PyTorch reference and one op that callers use."""

from fd_kernels.biased_attention import biased_attention
from fd_kernels.feature_loss import whitened_smooth_l1
from fd_kernels.window_attention import window_attention

__all__ = ["biased_attention", "whitened_smooth_l1", "window_attention"]
