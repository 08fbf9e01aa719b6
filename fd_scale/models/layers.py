"""Small layers that models share.

Every module initialises the parameters that it owns in its own constructor: a value set by a parent is
lost where DeepSpeed partitions parameters as soon as their owner is built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is where its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Linear):
    """Linear layer with truncated normal weights (std 0.02) and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PostNorm(nn.LayerNorm):
    """LayerNorm that ends a residual branch; its gain starts at `gain_init`, so the branch starts small."""

    def __init__(self, dim: int, gain_init: float) -> None:
        super().__init__(dim)
        nn.init.constant_(self.weight, gain_init)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))
