"""From the layers of a backbone to maps of one width at falling resolutions: what detection heads read.

Shape legend: B = images, L = tokens, D = channels of a layer, C = channels of the neck, H, W = pixels, h, w = places.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.errors import UserError
from fd_scale.finetune.detection.layers import ChannelNorm, Conv, Doubled, SelfAttention
from fd_scale.finetune.segmentation.heads import group_norm
from fd_scale.models import Backbone
from fd_scale.models.pyramid import Pyramid


class FeaturePyramid(nn.Module):
    """The stages of a hierarchical model, each with what the coarser ones know.

    Args:
        backbone: whose stages these are; nothing of it becomes part of this module.
        channels: C.
        global_attention: whether the last stage's places attend to each other, as in HTC++.

    Attributes:
        layers: what to ask the backbone for.
        strides: pixels of a place of each map.

    Source: Lin et al. 2017 (arXiv:1612.03144); a norm on each stage: Liu et al. 2021 (arXiv:2103.14030).
    """

    def __init__(self, backbone: Backbone, channels: int, global_attention: bool) -> None:
        super().__init__()
        self.stages = Pyramid(backbone, None, group_norm)
        self.layers, self.strides = self.stages.layers, [float(side) for side in self.stages.sides]
        widths = self.stages.channels
        self.attention = SelfAttention(widths[-1]) if global_attention else nn.Identity()
        self.lateral = nn.ModuleList(Conv(width, channels, 1) for width in widths)
        self.smooth = nn.ModuleList(Conv(channels, channels, 3) for _ in widths)

    def forward(self, layers_BLD: list[Tensor], height: int, width: int) -> list[Tensor]:
        """Returns a map (B, C, h, w) for each stage, the finest first.

        Args:
            layers_BLD: as `Pyramid.forward` takes them.
            height: of the images, in pixels.
            width: likewise.
        """
        maps = self.stages(layers_BLD, height, width)
        maps[-1] = self.attention(maps[-1])
        laterals = [conv(map_BDhw) for conv, map_BDhw in zip(self.lateral, maps, strict=True)]
        for index in range(len(laterals) - 1, 0, -1):
            finer = laterals[index - 1]
            laterals[index - 1] = finer + F.interpolate(laterals[index], size=finer.shape[2:])
        return [conv(lateral) for conv, lateral in zip(self.smooth, laterals, strict=True)]


class SimplePyramid(nn.Module):
    """Maps of 1/4, 1/2, 1 and 2 times a plain ViT's patch from its last layer alone.

    Args:
        backbone: as of `FeaturePyramid`.
        channels: C.

    Attributes:
        layers: as of `FeaturePyramid`.
        strides: likewise.

    Source: Li et al. 2022 (arXiv:2203.16527), section 3; layers as in its released code.
    """

    def __init__(self, backbone: Backbone, channels: int) -> None:
        super().__init__()
        shapes = backbone.layer_shapes()
        width, self.side = shapes[-1]
        self.layers = [len(shapes) - 1]
        self.strides = [self.side / 4, self.side / 2, float(self.side), self.side * 2.0]
        self.num_prefix_tokens = backbone.num_prefix_tokens
        half, quarter = width // 2, width // 4
        self.resizes = nn.ModuleList(
            [
                nn.Sequential(Doubled(width, half), ChannelNorm(half), nn.GELU(), Doubled(half, quarter)),
                Doubled(width, half),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(
                Conv(channels_in, channels, 1, bias=False), ChannelNorm(channels),
                Conv(channels, channels, 3, bias=False), ChannelNorm(channels),
            )
            for channels_in in (quarter, half, width, width)
        )  # fmt: skip

    def forward(self, layers_BLD: list[Tensor], height: int, width: int) -> list[Tensor]:
        """Returns the four maps; arguments as those of `FeaturePyramid.forward`."""
        [tokens_BLD] = layers_BLD
        patches_BLD = tokens_BLD[:, self.num_prefix_tokens :]
        map_BDhw = patches_BLD.mT.unflatten(2, (-(-height // self.side), -(-width // self.side)))
        return [output(resize(map_BDhw)) for resize, output in zip(self.resizes, self.outputs, strict=True)]


def neck_of(backbone: Backbone, channels: int, global_attention: bool) -> FeaturePyramid | SimplePyramid:
    """Returns the neck for a model.

    Raises:
        UserError: the model gives no maps of its layers, or global attention is wanted of a plain ViT.
    """
    if len({side for _, side in backbone.layer_shapes()}) > 1:
        return FeaturePyramid(backbone, channels, global_attention)
    if global_attention:
        raise UserError("detection.global_attention: the blocks of a plain ViT have it; set it to false")
    return SimplePyramid(backbone, channels)
