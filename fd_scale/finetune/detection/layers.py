"""Layers of the detection heads, each with its initial weights.

They set them in their own constructors: where DeepSpeed partitions parameters, a parent's would be gathered for it.

Shape legend: B = images or boxes, C = channels, h, w = rows and columns.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Conv2d):
    """A convolution that keeps the size.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd.
        std: of normal initial weights; none: uniform ones of variance 1 / fan-in (Detectron's "Xavier").
        bias: whether there is one, at first 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        std: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        _initialise(self, std)


class HeadLinear(nn.Linear):
    """A linear layer; arguments as those of `Conv`."""

    def __init__(self, in_features: int, out_features: int, std: float | None = None) -> None:
        super().__init__(in_features, out_features)
        _initialise(self, std)


class HiddenConv(nn.Conv2d):
    """A convolution before a ReLU: normal weights of variance 2 / fan-out (He et al. 2015, arXiv:1502.01852)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class Doubled(nn.ConvTranspose2d):
    """Twice as many rows and columns, by a transposed 2 x 2 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return super().forward(x_BChw.movedim(1, -1)).movedim(-1, 1)


class SelfAttention(nn.Module):
    """x + attention over all places of a map (B, C, h, w), heads of 32 channels where they divide, else one.

    The source says no more than "an extra global self-attention layer appended at the output of last stage": norm,
    heads and the residual connection are those of a pre-norm transformer, and there is no position encoding.

    Source: Liu et al. 2021 (arXiv:2103.14030), supplement, object detection (HTC++).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = channels // 32 if channels % 32 == 0 else 1
        self.norm = nn.LayerNorm(channels)
        self.qkv = HeadLinear(channels, 3 * channels, std=0.02)
        self.proj = HeadLinear(channels, channels, std=0.02)

    def forward(self, x_BChw: Tensor) -> Tensor:
        tokens_BLC = x_BChw.flatten(2).mT
        query, key, value = self.qkv(self.norm(tokens_BLC)).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        out_BLC = tokens_BLC + self.proj(attended.transpose(1, 2).flatten(2))
        return out_BLC.mT.unflatten(2, x_BChw.shape[2:])


def _initialise(layer: nn.Conv2d | nn.Linear, std: float | None) -> None:
    if std is None:
        nn.init.kaiming_uniform_(layer.weight, a=1)
    else:
        nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
