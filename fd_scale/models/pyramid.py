"""Layers of a backbone as maps of falling resolution: what heads for dense prediction read.

Shape legend: B = images, L = tokens, D = channels, H, W = pixels, h, w = rows and columns of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fd_scale.errors import UserError
from fd_scale.models.backbone import Backbone, resolve_layers

NUM_LEVELS = 4
"""Of a plain ViT."""


class Pyramid(nn.Module):
    """A norm on each layer and, of a plain ViT, a resize of each by 4, 2, 1 and 1/2.

    The last layer's norm is the backbone's own final one, which is trained already, and which the caller applies.

    Args:
        backbone: whose layers these are; nothing of it becomes part of this module.
        layers: four layers of a plain ViT, from 0 or from -1 backwards; none: at 1/4, 2/4, 3/4 and 4/4 of its depth. A
            hierarchical model gives all of its stages.
        norm: makes the norm inside the resize of a plain ViT's first layer, from its channels.

    Attributes:
        layers: what to ask the backbone for.
        channels: of each map.

    Raises:
        UserError: the model has no such layers.

    Source: Swin: Liu et al. 2021 (arXiv:2103.14030), section A2.3; ViT: Bao et al. 2021 (arXiv:2106.08254), its
        released code for segmentation, which has no norm on the layers.
    """

    def __init__(
        self, backbone: Backbone, layers: Sequence[int] | None, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        shapes = backbone.layer_shapes()
        plain = len({side for _, side in shapes}) == 1
        if layers is not None and not plain:
            raise UserError("segmentation.layers: a hierarchical model gives all of its stages; remove it")
        if layers is None:
            count = len(shapes)
            layers = range(count)
            if plain:
                layers = [max(count * part // NUM_LEVELS - 1, 0) for part in range(1, NUM_LEVELS + 1)]
        self.layers = resolve_layers(layers, len(shapes))
        self.channels = [shapes[layer][0] for layer in self.layers]
        self.sides = [shapes[layer][1] for layer in self.layers]
        self.num_prefix_tokens = backbone.num_prefix_tokens
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels[:-1])
        self.resizes = nn.ModuleList(nn.Identity() for _ in self.layers)
        if plain:
            width = self.channels[0]
            self.resizes[0] = nn.Sequential(_doubled(width), norm(width), nn.GELU(), _doubled(width))
            self.resizes[1] = _doubled(width)
            self.resizes[3] = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, layers_BLD: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
        """Returns the maps, (B, D, h, w) each, the finest first.

        Args:
            layers_BLD: what `Backbone.intermediates` gives for `layers`; the last one behind `Backbone.final_norm`.
            height: of the images, in pixels.
            width: likewise.
        """
        maps = []
        for index, (tokens_BLD, side) in enumerate(zip(layers_BLD, self.sides, strict=True)):
            patches_BLD = tokens_BLD[:, self.num_prefix_tokens :]
            if index < len(self.norms):
                patches_BLD = self.norms[index](patches_BLD)
            map_BDhw = patches_BLD.mT.unflatten(2, (-(-height // side), -(-width // side)))
            maps.append(self.resizes[index](map_BDhw))
        return maps


def _doubled(channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
