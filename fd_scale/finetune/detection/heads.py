"""What is in a box: its class, a better box, its mask; and the class of each place, which helps both.

Shape legend: B = images, C = channels, R = boxes, K = classes, S = classes of places, h, w = places of a map,
7, 14, 28 = sides of what is cut from a map, and of its mask.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.finetune.detection.layers import ChannelNorm, Conv, Doubled, HeadLinear, HiddenConv

BOX_SIDE, MASK_SIDE = 7, 14
FUSED_LEVEL = 1
"""Of the pyramid's maps the one at whose resolution places have a class."""


class BoxHead(nn.Module):
    """Class scores and deltas of boxes.

    Args:
        channels: C.
        num_classes: K.
        kind: `2fc`: two linear layers of 4 C; `4conv1fc`: four convolutions with LayerNorm and one linear layer.
        by_class: whether each class has its own deltas.

    Source: Lin et al. 2017 (arXiv:1612.03144); 4conv1fc: Wu and He 2018 (arXiv:1803.08494), with the norm of
        Li et al. 2022 (arXiv:2203.16527).
    """

    def __init__(
        self, channels: int, num_classes: int, kind: Literal["2fc", "4conv1fc"], by_class: bool
    ) -> None:
        super().__init__()
        hidden = 4 * channels
        convs: list[nn.Module] = []
        for _ in range(4 if kind == "4conv1fc" else 0):
            convs += [Conv(channels, channels, 3, bias=False), ChannelNorm(channels), nn.ReLU()]
        self.convs = nn.Sequential(*convs)
        self.fc1 = HeadLinear(channels * BOX_SIDE**2, hidden)
        self.fc2 = HeadLinear(hidden, hidden) if kind == "2fc" else None
        self.classes = HeadLinear(hidden, num_classes + 1, std=0.01)
        self.deltas = HeadLinear(hidden, 4 * num_classes if by_class else 4, std=0.001)

    def forward(self, x_RC77: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (R, K + 1), the last of the background, and deltas (R, K or 1, 4); fp32."""
        hidden = F.relu(self.fc1(self.convs(x_RC77).flatten(1)))
        if self.fc2 is not None:
            hidden = F.relu(self.fc2(hidden))
        return self.classes(hidden).float(), self.deltas(hidden).float().unflatten(1, (-1, 4))


class MaskBody(nn.Module):
    """Four convolutions over a box.

    Args:
        channels: C.
        informed: whether the features of the stage before come in, as in Hybrid Task Cascade.

    Source: He et al. 2017 (arXiv:1703.06870); Chen et al. 2019 (arXiv:1901.07518), section 3.2.
    """

    def __init__(self, channels: int, informed: bool) -> None:
        super().__init__()
        self.from_before = HiddenConv(channels, 1) if informed else None
        self.convs = nn.Sequential(
            *[layer for _ in range(4) for layer in (HiddenConv(channels, 3), nn.ReLU())]
        )

    def forward(self, x_RCmm: Tensor, before_RCmm: Tensor | None = None) -> Tensor:
        """Returns features of the shape of `x_RCmm`; with those of the stage before where it is informed."""
        if self.from_before is not None:
            assert before_RCmm is not None, "an informed stage has one before it"
            x_RCmm = x_RCmm + F.relu(self.from_before(before_RCmm))
        return self.convs(x_RCmm)


class MaskPredictor(nn.Module):
    """A mask of twice the resolution for each class.

    Source: He et al. 2017 (arXiv:1703.06870), figure 4.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.doubled = Doubled(channels, channels)
        self.classes = Conv(channels, num_classes, 1, std=0.001)

    def forward(self, x_RCmm: Tensor) -> Tensor:
        """Returns logits (R, K, 2 m, 2 m), fp32."""
        return self.classes(F.relu(self.doubled(x_RCmm))).float()


class SemanticHead(nn.Module):
    """A class for each place from all maps of the pyramid, and features that boxes are cut from as well.

    Args:
        channels: C.
        num_maps: of the pyramid.
        num_classes: S.

    Source: Chen et al. 2019 (arXiv:1901.07518), section 3.3.
    """

    def __init__(self, channels: int, num_maps: int, num_classes: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(HiddenConv(channels, 1) for _ in range(num_maps))
        self.convs = nn.Sequential(
            *[layer for _ in range(4) for layer in (HiddenConv(channels, 3), nn.ReLU())]
        )
        self.embedding = HiddenConv(channels, 1)
        self.classes = Conv(channels, num_classes, 1, std=0.01)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns logits (B, S, h, w), fp32, and features (B, C, h, w), of the size of the second map."""
        size = maps[min(FUSED_LEVEL, len(maps) - 1)].shape[2:]
        resized = [
            F.interpolate(F.relu(conv(map_BChw)), size=size, mode="bilinear", align_corners=True)
            for conv, map_BChw in zip(self.lateral, maps, strict=True)
        ]
        hidden_BChw = self.convs(torch.stack(resized).sum(0))
        return self.classes(hidden_BChw).float(), F.relu(self.embedding(hidden_BChw))
