"""Shifted-window cosine attention of Swin V2."""

from fd_kernels.window_attention.op import window_attention

__all__ = ["window_attention"]
