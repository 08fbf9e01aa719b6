"""The paper's experiment on CIFAR-10, as a chain of packaged recipes; told as it came out."""

from fd_scale.miniature.run import miniature
from fd_scale.miniature.studies import STUDIES

__all__ = ["STUDIES", "miniature"]
