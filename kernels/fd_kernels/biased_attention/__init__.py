"""Global attention with a relative position bias, for vision transformers."""

from fd_kernels.biased_attention.op import biased_attention

__all__ = ["biased_attention"]
