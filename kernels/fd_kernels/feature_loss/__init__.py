"""Distance between student features and whitened teacher features."""

from fd_kernels.feature_loss.op import whitened_smooth_l1

__all__ = ["whitened_smooth_l1"]
