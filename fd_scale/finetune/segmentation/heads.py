"""Heads that give each place of a map its class scores.

Shape legend: B = images, D = channels of a level, C = channels of the head, K = classes, h, w = rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

POOLED_SIDES = (1, 2, 3, 6)
MakeNorm = Callable[[int], nn.Module]


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm over the micro-batches of all ranks, on any device, in fp32 whatever the weights are in.

    torch's SyncBatchNorm serves GPUs alone. All ranks have maps of one shape here: a mean of means is the mean.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1.
    """

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x_BDhw, weight_D, bias_D = x.float(), self.weight.float(), self.bias.float()
        # A plan on the meta device may be made by one rank of several.
        ranks = dist.get_world_size() if dist.is_initialized() and not x.is_meta else 1
        if ranks == 1 or not self.training:
            return F.batch_norm(
                x_BDhw, self.running_mean, self.running_var, weight_D, bias_D, self.training,
                self.momentum or 0.0, self.eps,
            ).to(x.dtype)  # fmt: skip
        mean_D = _mean_over_ranks(x_BDhw.mean((0, 2, 3)), ranks)
        var_D = _mean_over_ranks((x_BDhw - mean_D[:, None, None]).square().mean((0, 2, 3)), ranks)
        self._remember(mean_D.detach(), var_D.detach(), ranks * x[:, 0].numel())
        scale_D = weight_D * (var_D + self.eps).rsqrt()
        shift_D = bias_D - mean_D * scale_D
        return (x_BDhw * scale_D[:, None, None] + shift_D[:, None, None]).to(x.dtype)

    def _remember(self, mean_D: Tensor, var_D: Tensor, count: int) -> None:
        assert self.momentum is not None, "torch's default"
        with torch.no_grad():
            self.running_mean.lerp_(mean_D, self.momentum)
            self.running_var.lerp_(var_D * (count / max(count - 1, 1)), self.momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        """As `nn.Module`; the statistics stay in fp32, which small changes of them need."""
        before = (self.running_mean, self.running_var)
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = (
            old.to(new.device) if new.dtype != old.dtype else new
            for old, new in zip(before, (self.running_mean, self.running_var), strict=True)
        )
        return self


def _mean_over_ranks(x_D: Tensor, ranks: int) -> Tensor:
    return all_reduce(x_D) / ranks


def group_norm(channels: int) -> nn.Module:
    """Returns GroupNorm of 32 groups, or of fewer: a group of one channel would make 0 of a map pooled to one place."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels)


NORMS: dict[str, MakeNorm] = {"batch": BatchNorm, "group": group_norm}


class ConvNormReLU(nn.Module):
    """A convolution without bias that keeps the size, a norm, a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: MakeNorm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = norm(out_channels)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x_BDhw)))


class Classifier(nn.Conv2d):
    """A linear layer on each place, in fp32 whatever its weights are in: classes are compared; small weights."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes, kernel_size=1)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Of any float dtype -> fp32."""
        assert self.bias is not None
        return F.conv2d(x_BChw.float(), self.weight.float(), self.bias.float())


class UPerNetHead(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid down to the finest, all of them fused.

    Args:
        in_channels: D of each map, the finest first.
        channels: C.
        num_classes: K.
        norm: makes a norm from its channels.

    Source: Xiao et al. 2018 (arXiv:1807.10221), without the dropout that mmsegmentation adds before the classifier.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, norm: MakeNorm) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pooled = nn.ModuleList(ConvNormReLU(coarsest, channels, 1, norm) for _ in POOLED_SIDES)
        self.top = ConvNormReLU(coarsest + len(POOLED_SIDES) * channels, channels, 3, norm)
        self.lateral = nn.ModuleList(ConvNormReLU(width, channels, 1, norm) for width in finer)
        self.smooth = nn.ModuleList(ConvNormReLU(channels, channels, 3, norm) for _ in finer)
        self.fuse = ConvNormReLU(len(in_channels) * channels, channels, 3, norm)
        self.classifier = Classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Returns logits_BKhw, fp32, at the resolution of the finest map."""
        *finer, coarsest_BDhw = maps
        parts = [coarsest_BDhw]
        for side, conv in zip(POOLED_SIDES, self.pooled, strict=True):
            parts.append(resized(conv(F.adaptive_avg_pool2d(coarsest_BDhw, side)), coarsest_BDhw))
        levels = [self.top(torch.cat(parts, dim=1))]  # the coarsest first
        for conv, map_BDhw in zip(reversed(self.lateral), reversed(finer), strict=True):
            lateral_BChw = conv(map_BDhw)
            levels.append(lateral_BChw + resized(levels[-1], lateral_BChw))
        top_BChw, *laterals = levels
        smoothed = [conv(level) for conv, level in zip(self.smooth, reversed(laterals), strict=True)]
        all_levels = [*smoothed, top_BChw]
        return self.classifier(
            self.fuse(torch.cat([resized(level, all_levels[0]) for level in all_levels], dim=1))
        )


class FCNHead(nn.Module):
    """A 3 x 3 convolution and a classifier on one map.

    Source: Shelhamer et al. 2016 (arXiv:1605.06211), as the auxiliary head of UPerNet in mmsegmentation.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, norm: MakeNorm) -> None:
        super().__init__()
        self.conv = ConvNormReLU(in_channels, channels, 3, norm)
        self.classifier = Classifier(channels, num_classes)

    def forward(self, map_BDhw: Tensor) -> Tensor:
        """Returns logits_BKhw."""
        return self.classifier(self.conv(map_BDhw))


class LinearHead(nn.Module):
    """One linear layer on all maps, brought to the finest one's resolution."""

    def __init__(self, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.classifier = Classifier(sum(in_channels), num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Returns logits_BKhw."""
        return self.classifier(torch.cat([resized(map_BDhw, maps[0]) for map_BDhw in maps], dim=1))


def resized(x_BChw: Tensor, like: Tensor) -> Tensor:
    """Returns a map in the size of another one, bilinear."""
    size = like.shape[2:]
    return x_BChw if x_BChw.shape[2:] == size else F.interpolate(x_BChw, size=size, mode="bilinear")
