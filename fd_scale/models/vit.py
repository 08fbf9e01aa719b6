"""The vision transformer of feature distillation: one table of relative position biases for all blocks."""

# Shape suffix legend: B = images, N = tokens, C = channels, h = heads

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from fd_kernels import biased_attention
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from torch import Tensor, nn

from fd_scale.config import ModelConfig
from fd_scale.errors import UserError
from fd_scale.models.layers import INIT_STD, ResidualBlock, at_least_fp32
from fd_scale.models.position_bias import resized_table
from fd_scale.models.timm_backbone import TimmBackbone, timm_config

logger = logging.getLogger(__name__)


class BiasedAttention(BeitAttention):  # type: ignore[misc]  # timm is untyped here
    """timm's BEiT attention on `fd_kernels`: same parameters, same names, same numbers."""

    def forward(self, x_BNC: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Attends over all tokens; the bias of the keys is fixed at 0."""
        biases = [shared_rel_pos_bias] if shared_rel_pos_bias is not None else []
        if self.relative_position_bias_table is not None:
            biases.append(self._get_rel_pos_bias()[0])
        if not biases:
            biases.append(x_BNC.new_zeros(self.num_heads, *[x_BNC.shape[1]] * 2))
        bias_hNN = at_least_fp32(sum(biases[1:], biases[0]))
        qkv_BNE = self.qkv(x_BNC)  # called as a module: ZeRO-3 gathers its weight there
        if self.q_bias is not None:
            qkv_BNE = qkv_BNE + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.proj(biased_attention(qkv_BNE, bias_hNN))


class Block(ResidualBlock, BeitBlock):  # type: ignore[misc]  # timm is untyped here
    """timm's BEiT block in two parts: same parameters, same names, same numbers; drop path is in its modules."""

    norm1: nn.Module
    norm2: nn.Module
    attn: BiasedAttention
    mlp: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module
    gamma_1: Tensor | None
    gamma_2: Tensor | None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.run(x, shared_rel_pos_bias, None)

    def attend(self, x: Tensor, bias_hNN: Tensor | None) -> Tensor:
        """See `ResidualBlock`."""
        return self.attn(self.norm1(x), shared_rel_pos_bias=bias_hNN)

    def finish(self, x: Tensor, attended: Tensor, drop_path_scale_2B: Tensor | None) -> Tensor:
        """See `ResidualBlock`."""
        x = x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        mlp = self.mlp(self.norm2(x))
        return x + self.drop_path2(mlp if self.gamma_2 is None else self.gamma_2 * mlp)


def use_our_blocks(model: Beit) -> None:
    """Makes a timm BEiT call `fd_kernels` in blocks that can be recomputed; parameters stay what and where they are."""
    for block in model.blocks:
        # The same objects with another forward: nothing is copied, no initialisation is drawn twice.
        block.__class__ = Block
        block.attn.__class__ = BiasedAttention


class VisionTransformer(TimmBackbone):
    """ViT with CLS token, shared relative position bias and LayerScale, without absolute position embedding.

    Args:
        img_size: side of the images in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        embed_dim: channels.
        depth: blocks.
        num_heads: heads, a divisor of `embed_dim`.
        mlp_ratio: hidden channels of an MLP over its channels.
        layer_scale_init: initial gain of each residual branch.
        drop_path_rate: drop rate of the last block; earlier ones have less, linearly.
        shared_bias: one table for all blocks (distillation), or one for each block (fine-tuning).

    Raises:
        UserError: an argument does not fit another.

    Source: Wei et al. 2022 (arXiv:2205.14141), the released code; the architecture is BEiT's (arXiv:2106.08254).
    """

    formats = ("fd",)

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        layer_scale_init: float = 0.1,
        drop_path_rate: float = 0.0,
        shared_bias: bool = True,
    ) -> None:
        if min(patch_size, depth, num_heads, img_size) < 1 or img_size % patch_size or embed_dim % num_heads:
            raise UserError(
                f"img_size {img_size}, patch_size {patch_size}, depth {depth}, embed_dim {embed_dim} and num_heads "
                f"{num_heads} do not fit; expected a multiple of the patch, and heads that divide the channels"
            )
        if not 0.0 <= drop_path_rate < 1.0 or mlp_ratio <= 0:
            raise UserError(
                f"drop_path_rate is {drop_path_rate} and mlp_ratio {mlp_ratio}; expected 0 <= rate < 1, ratio > 0"
            )
        arguments: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "global_pool": "token",
            "init_values": layer_scale_init,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": not shared_bias,
            "use_shared_rel_pos_bias": shared_bias,
        }
        model = Beit(
            num_classes=0,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            **arguments,
        )
        _initialise(model)
        super().__init__(model)
        self.arguments = arguments

    def layout_config(self, layout: str, config: ModelConfig) -> dict[str, Any]:
        """See `TimmBackbone`."""
        return timm_config(config, "beit_base_patch16_224", self.arguments) if layout == "timm" else {}

    def no_weight_decay_names(self) -> set[str]:
        """The CLS token; tables of relative position decay, as in the authors' code."""
        return {"model.cls_token"}

    def layer_ids(self) -> dict[str, int]:
        """See `Backbone.layer_ids`; a table that blocks share lies behind them, as in the authors' code."""
        return {
            name: layer for name, layer in super().layer_ids().items() if not name.endswith(_SHARED_TABLE)
        }

    def to_layout(self, state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
        """Also the FD authors': timm's names behind `encoder.`."""
        if layout == "fd":
            return {f"encoder.{name}": tensor for name, tensor in super().to_layout(state, "timm").items()}
        return super().to_layout(state, layout)

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Knows also plain ViTs (DINO, DeiT, MAE): their position embedding is dropped, and said so.

        A bias of the keys adds the same to all logits of a query, so dropping it changes nothing. A shared
        table is copied into blocks that have their own.
        """
        found, stem = dict(state), ""
        for name in [name for name in state if name.endswith("attn.qkv.bias")]:
            stem = name.removesuffix("attn.qkv.bias")
            bias = found.pop(name)
            found[f"{stem}attn.q_bias"], _, found[f"{stem}attn.v_bias"] = bias.chunk(3)
            for gamma in ("gamma_1", "gamma_2"):
                found[f"{stem}{gamma}"] = torch.ones_like(found[f"{stem}attn.q_bias"])
        if len(found) > len(state):
            logger.warning(
                "weights of a plain ViT: their absolute position embedding is dropped, relative ones are 0"
            )
            found = {name: tensor for name, tensor in found.items() if not name.endswith("pos_embed")}
            prefix = stem.partition("blocks.")[0]
            found |= {
                prefix + name.removeprefix("model."): torch.zeros_like(table)
                for name, table in self.named_parameters()
                if name.endswith("relative_position_bias_table")
            }
        if self.model.rel_pos_bias is None:
            for name in [name for name in found if name.endswith(_SHARED_TABLE)]:
                table, stem = found.pop(name), name.removesuffix(_SHARED_TABLE)
                for index in range(len(self.model.blocks)):
                    found[f"{stem}blocks.{index}.attn.relative_position_bias_table"] = table
        return super().translate({name: self._resized(name, tensor) for name, tensor in found.items()})

    def _resized(self, name: str, tensor: Tensor) -> Tensor:
        """A table of relative positions for this model's grid; other tensors as they are."""
        if not name.endswith("relative_position_bias_table") or tensor.is_meta:
            return tensor
        grid = self.model.patch_embed.grid_size[0]
        side = math.isqrt(max(len(tensor) - _NUM_CLS_ROWS, 0))
        if side == 2 * grid - 1 or side < 5 or side**2 + _NUM_CLS_ROWS != len(tensor):
            return tensor  # as wanted, or of no grid of 3 x 3 or more: whoever loads it compares shapes
        logger.warning(
            "weights: %s is resized from %d relative positions to those of %d x %d",
            name,
            len(tensor),
            grid,
            grid,
        )
        table_Th, cls_rows = tensor[:-_NUM_CLS_ROWS], tensor[-_NUM_CLS_ROWS:]
        return torch.cat([resized_table(table_Th, grid), cls_rows])


_NUM_CLS_ROWS = 3
"""Of a table, its last ones: from CLS to a patch, from a patch to CLS, from CLS to CLS."""
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


@torch.no_grad()
def _initialise(model: Beit) -> None:
    """Truncated normal (std 0.02, at one standard deviation), the ends of residual branches smaller with depth."""
    nn.init.trunc_normal_(model.cls_token, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.fix_init_weight()
    use_our_blocks(model)
