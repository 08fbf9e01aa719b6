"""Teachers' features as bytes: bf16, or 8-bit integers with a scale for each 32 channels.

Shape legend: B = images, L = tokens, D = channels of a target, G = groups of 32 channels, R = bytes of a record.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.teachers import Target

_GROUP = 32
_LARGEST = 127


class FeatureCodec:
    """What a record of one image's features holds: each target of each teacher, one behind the other.

    In 8 bits a value is an integer in -127..127 times its group's scale: it is wrong by half a scale at most, 0.4%
    of the largest value among its 32 channels. The few large channels of a ViT spoil none but those beside them.

    Args:
        targets: of all teachers.
        precision: "bf16" or "int8".

    Attributes:
        record_bytes: R.
    """

    def __init__(self, targets: Sequence[Target], precision: str) -> None:
        self.targets, self.precision = tuple(targets), precision
        self.record_bytes = sum(num_bytes for sizes in map(self._sizes, self.targets) for num_bytes in sizes)

    def encode(self, features: Sequence[Tensor]) -> Tensor:
        """Returns records, uint8 (B, R), of the targets, each (B, L, D) of any float dtype."""
        parts = []
        for target, tokens_BLD in zip(self.targets, features, strict=True):
            assert tokens_BLD.shape[1:] == (target.num_tokens, target.num_features), tokens_BLD.shape
            if self.precision == "bf16":
                parts.append(tokens_BLD.to(torch.bfloat16))
                continue
            groups = F.pad(tokens_BLD.float(), (0, -target.num_features % _GROUP)).unflatten(2, (-1, _GROUP))
            scale_BLG = (groups.abs().amax(3) / _LARGEST).bfloat16()
            units = groups / scale_BLG.float().clamp(min=1e-30)[..., None]  # of nothing but zeros, too
            codes = (
                units.round().clamp(-_LARGEST, _LARGEST).to(torch.int8).flatten(2)[..., : target.num_features]
            )
            parts += [scale_BLG, codes]
        return torch.cat([part.flatten(1).contiguous().view(torch.uint8) for part in parts], dim=1)

    def decode(self, records_BR: Tensor) -> list[Tensor]:
        """Returns the targets, bf16 (B, L, D), of records, uint8 (B, R), on their device."""
        sizes = [num_bytes for sizes in map(self._sizes, self.targets) for num_bytes in sizes]
        # Copies: a part may begin at an odd byte, where no bf16 may, and that of one record has no gaps.
        parts = (part.clone(memory_format=torch.contiguous_format) for part in records_BR.split(sizes, dim=1))
        features = []
        for target in self.targets:
            shape = (target.num_tokens, target.num_features)
            if self.precision == "bf16":
                features.append(next(parts).view(torch.bfloat16).unflatten(1, shape))
                continue
            scale_BLG = next(parts).view(torch.bfloat16).unflatten(1, (shape[0], -1))
            codes = next(parts).view(torch.int8).unflatten(1, shape)
            scale_BLD = scale_BLG.float().repeat_interleave(_GROUP, dim=2)[..., : shape[1]]
            features.append((codes * scale_BLD).to(torch.bfloat16))
        return features

    def _sizes(self, target: Target) -> list[int]:
        """Bytes of a target's parts."""
        values = target.num_tokens * target.num_features
        if self.precision == "bf16":
            return [2 * values]
        return [2 * target.num_tokens * -(-target.num_features // _GROUP), values]
