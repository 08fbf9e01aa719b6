"""Kernels of fd-scale: each has a plain PyTorch reference and one op that callers use."""

from fd_kernels.feature_loss import whitened_smooth_l1
from fd_kernels.window_attention import window_attention

__all__ = ["whitened_smooth_l1", "window_attention"]
