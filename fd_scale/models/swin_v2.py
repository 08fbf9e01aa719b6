"""Swin Transformer V2 as a student: bias shared by a stage's blocks, drop path without a generator.

Nothing here draws random numbers in a forward, and every parameter is read in the forward of the module
that owns it: recomputation and any number of ranks see the same model, whole or partitioned.
"""

# Shape suffix legend
#   B = images, H, W = token grid (of images: pixels), C = channels, L, D = tokens and channels of the output,
#   E = 3 * C (q, k, v), h = heads, N = tokens of a window, R = residual branches, two for each block

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fd_kernels import window_attention
from torch import Tensor, nn

from fd_scale.config import ModelConfig
from fd_scale.errors import UserError
from fd_scale.models import layouts
from fd_scale.models.backbone import Backbone, resolve_layers
from fd_scale.models.layers import INIT_STD, BranchEnd, Linear, Mlp, PostNorm, ResidualBlock, at_least_fp32
from fd_scale.models.position_bias import ContinuousPositionBias
from fd_scale.models.timm_backbone import timm_config

LOGIT_SCALE_INIT = math.log(10.0)
LOGIT_SCALE_MAX = math.log(100.0)


class QKV(nn.Module):
    """Projection to queries, keys and values, with biases for queries and values only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.weight, std=INIT_STD)

    def forward(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Returns qkv_BHWE and pad_qkv_E, the projection of a zero token, both in one dtype."""
        bias_E = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv_BHWE = F.linear(x_BHWC, self.weight, bias_E)
        return qkv_BHWE, bias_E.to(qkv_BHWE.dtype)


class WindowAttention(nn.Module):
    """Scaled cosine attention in shifted windows; owns its position bias unless the stage shares one."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        shift_size: tuple[int, int],
        position_bias: ContinuousPositionBias | None,
        layer_id: int,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), LOGIT_SCALE_INIT))
        self.position_bias = position_bias
        self.qkv = QKV(dim)
        self.proj = BranchEnd(dim, dim, layer_id)

    def forward(self, x_BHWC: Tensor, shared_bias: Tensor | None) -> Tensor:
        bias = shared_bias if self.position_bias is None else self.position_bias()
        assert bias is not None
        qkv_BHWE, pad_qkv_E = self.qkv(x_BHWC)
        out_BHWC = window_attention(
            qkv_BHWE,
            bias,
            at_least_fp32(self.logit_scale).clamp(max=LOGIT_SCALE_MAX).exp().flatten(),
            window_size=self.window_size,
            shift_size=self.shift_on(x_BHWC.shape[1:3]),
            pad_qkv_E=pad_qkv_E,
        )
        return self.proj(out_BHWC)

    def shift_on(self, grid: Sequence[int]) -> tuple[int, int]:
        """The shift on a grid of (rows, columns), which a window may cover where images are small."""
        rows, columns = (
            shift if side > window else 0
            for side, window, shift in zip(grid, self.window_size, self.shift_size, strict=True)
        )
        return rows, columns


class Block(ResidualBlock):
    """Attention and MLP, each normalised at the end of its residual branch, then perhaps an extra norm."""

    def __init__(
        self,
        dim: int,
        attn: WindowAttention,
        mlp_ratio: float,
        post_norm_gain_init: float,
        extra_norm: bool,
        layer_id: int,
    ) -> None:
        super().__init__()
        self.attn = attn
        self.norm1 = PostNorm(dim, post_norm_gain_init)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), layer_id)
        self.norm2 = PostNorm(dim, post_norm_gain_init)
        self.norm3 = nn.LayerNorm(dim) if extra_norm else nn.Identity()

    def forward(
        self, x_BHWC: Tensor, shared_bias: Tensor | None, drop_path_scale_2B: Tensor | None
    ) -> Tensor:
        return self.run(x_BHWC, shared_bias, drop_path_scale_2B)

    def attend(self, x: Tensor, bias_hNN: Tensor | None) -> Tensor:
        """See `ResidualBlock`."""
        return self.attn(x, bias_hNN)

    def finish(self, x: Tensor, attended: Tensor, drop_path_scale_2B: Tensor | None) -> Tensor:
        """See `ResidualBlock`."""
        attn_scale_B, mlp_scale_B = (
            (None, None) if drop_path_scale_2B is None else drop_path_scale_2B.unbind()
        )
        x_BHWC = _with_branch(x, self.norm1(attended), attn_scale_B)
        x_BHWC = _with_branch(x_BHWC, self.norm2(self.mlp(x_BHWC)), mlp_scale_B)
        return self.norm3(x_BHWC)


def _with_branch(x_BHWC: Tensor, residual_BHWC: Tensor, scale_B: Tensor | None) -> Tensor:
    if scale_B is None:
        return x_BHWC + residual_BHWC
    return torch.addcmul(x_BHWC, residual_BHWC, scale_B.to(x_BHWC.dtype)[:, None, None, None])


class PatchEmbed(nn.Module):
    """Patches of an image to tokens: a strided convolution and a LayerNorm."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        nn.init.trunc_normal_(self.proj.weight, std=INIT_STD)
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.proj(images_BCHW.to(self.proj.weight.dtype))
        return self.norm(x_BCHW.permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Two by two tokens to one of twice the channels; an odd grid is padded with zeros, as timm does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        _, H, W, _ = x_BHWC.shape
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, W % 2, 0, H % 2))
        B, H, W, C = x_BHWC.shape
        # Column before row, the order in which published weights expect the four tokens.
        x_BHWC = x_BHWC.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.norm(self.reduction(x_BHWC))


class Stage(nn.Module):
    """Patch merging (in all stages but the first), then blocks; odd blocks shift their windows.

    Args:
        dim: channels of the stage.
        grid: rows and columns of its token grid at the model's `img_size`.
        window_size: rows and columns wanted; where a side covers the grid it is clamped and not shifted.
        downsample: whether the stage starts with patch merging, from half the channels.
        first_layer_id: number of its first block in the model, from 1.

    The other arguments are those of `SwinTransformerV2`, for this stage.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        grid: Sequence[int],
        window_size: Sequence[int],
        downsample: bool,
        first_layer_id: int,
        mlp_ratio: float,
        shared_bias: bool,
        extra_norm_period: int | None,
        pretrained_window_size: int,
        post_norm_gain_init: float,
    ) -> None:
        super().__init__()
        window = (min(window_size[0], grid[0]), min(window_size[1], grid[1]))
        shift = (window[0] // 2 if grid[0] > window[0] else 0, window[1] // 2 if grid[1] > window[1] else 0)

        def position_bias() -> ContinuousPositionBias:
            return ContinuousPositionBias(num_heads, window, pretrained_window_size)

        self.downsample = PatchMerging(dim // 2) if downsample else nn.Identity()
        self.position_bias = position_bias() if shared_bias else None
        self.blocks = nn.ModuleList()
        for index in range(depth):
            own_bias = None if shared_bias else position_bias()
            layer_id = first_layer_id + index
            attn = WindowAttention(dim, num_heads, window, shift if index % 2 else (0, 0), own_bias, layer_id)
            extra_norm = extra_norm_period is not None and (index + 1) % extra_norm_period == 0
            self.blocks.append(Block(dim, attn, mlp_ratio, post_norm_gain_init, extra_norm, layer_id))

    def forward(self, x_BHWC: Tensor, drop_path_scale_RB: Tensor | None) -> Tensor:
        x_BHWC = self.downsample(x_BHWC)
        # Handed to the blocks as a tensor: computed once, and not again when a block is recomputed.
        shared_bias = None if self.position_bias is None else self.position_bias()
        for index, block in enumerate(self.blocks):
            scale_2B = None if drop_path_scale_RB is None else drop_path_scale_RB[2 * index : 2 * index + 2]
            x_BHWC = block(x_BHWC, shared_bias, scale_2B)
        return x_BHWC


class SwinTransformerV2(Backbone):
    """Swin Transformer V2 without a head.

    Args:
        img_size: height and width in pixels (one number for both), a multiple of `patch_size`. It fixes each
            stage's window; images of other sizes can be given later, padded to the window, which is not shifted
            where it covers them.
        patch_size: side of a patch in pixels.
        in_chans: channels of an image.
        embed_dim: channels of the first stage; each later stage has twice as many.
        depths: blocks of each stage.
        num_heads: heads of each stage, a divisor of its channels.
        window_size: rows and columns of a window in tokens (one number for both), at most the stage's grid.
        mlp_ratio: hidden channels of an MLP over its channels.
        shared_bias: one position bias MLP a stage (feature distillation), else one a block (Swin V2).
        extra_norm_period: a LayerNorm on the main branch after each block of this count in a stage, or None.
        pretrained_window_size: side of the windows in pre-training, where the weights come from another
            size; one number for all stages or one for each; 0 means `window_size`.
        post_norm_gain_init: gain at the end of a residual branch: 1e-5 in feature distillation, 0 in Swin V2.
        drop_path_rate: drop rate of the last block; earlier ones have less, linearly.

    Attributes:
        num_features: D, channels of the output tokens.
        drop_path_rates: rate of each residual branch, R = 2 * blocks entries. The caller draws the masks.

    Raises:
        UserError: an argument does not fit another.

    Source: Liu et al. 2022 (arXiv:2111.09883); shared bias and gain: Wei et al. 2022 (arXiv:2205.14141).
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Sequence[int],
        mlp_ratio: float = 4.0,
        shared_bias: bool = True,
        extra_norm_period: int | None = None,
        pretrained_window_size: int | Sequence[int] = 0,
        post_norm_gain_init: float = 1e-5,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_arguments(
            embed_dim, patch_size, depths, num_heads, mlp_ratio, extra_norm_period, drop_path_rate
        )
        num_stages, num_blocks = len(depths), sum(depths)
        self.takes_any_size = True
        self.depths = tuple(depths)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.num_heads = tuple(num_heads)
        self.mlp_ratio = mlp_ratio
        self.shared_bias = shared_bias
        self.num_features = embed_dim * 2 ** (num_stages - 1)
        rates = [drop_path_rate * index / max(num_blocks - 1, 1) for index in range(num_blocks)]
        self.drop_path_rates = tuple(rate for rate in rates for _ in range(2))

        grid = self._patch_grid(*_repeat("img_size", img_size, 2))
        self.patch_grid = grid
        window = _repeat("window_size", window_size, 2)
        if min(window) < 1:
            raise UserError(f"window_size is {window}; expected at least 1 token on each side")
        self.window_size = window
        pretrained_windows = _repeat("pretrained_window_size", pretrained_window_size, num_stages)
        self.pretrained_window_sizes = pretrained_windows
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.layers = nn.ModuleList(
            Stage(
                dim=embed_dim * 2**index,
                depth=depths[index],
                num_heads=num_heads[index],
                grid=_halved(grid, index),
                window_size=window,
                downsample=index > 0,
                first_layer_id=1 + sum(depths[:index]),
                mlp_ratio=mlp_ratio,
                shared_bias=shared_bias,
                extra_norm_period=extra_norm_period,
                pretrained_window_size=pretrained_windows[index],
                post_norm_gain_init=post_norm_gain_init,
            )
            for index in range(num_stages)
        )
        self.norm = nn.LayerNorm(self.num_features)

    @property
    def bias_windows(self) -> list[int]:
        """Side of the windows, of each stage, over whose distances its position biases are learned."""
        stages: Any = self.layers
        return [
            side or stage.blocks[0].attn.window_size[0]
            for side, stage in zip(self.pretrained_window_sizes, stages, strict=True)
        ]

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output tokens for images of `height` x `width` pixels.

        Raises:
            UserError: a side is not a multiple of the patch size.
        """
        return _halved(self._patch_grid(height, width), len(self.layers) - 1)

    def no_weight_decay_names(self) -> set[str]:
        """Names of parameters without weight decay, besides those with one dimension."""
        return {name for name, _ in self.named_parameters() if "cpb_mlp" in name or "logit_scale" in name}

    def layer_ids(self) -> dict[str, int]:
        """See `Backbone.layer_ids`. Patch merging goes with the block before it, a stage's bias with its last block."""
        ids = {f"patch_embed.{name}": 0 for name, _ in self.patch_embed.named_parameters()}
        before = 0
        for index, (stage, depth) in enumerate(zip(self.layers, self.depths, strict=True)):
            for name, _ in stage.named_parameters():
                part, _, rest = name.partition(".")
                block = {"downsample": 0, "position_bias": depth}.get(part)
                ids[f"layers.{index}.{name}"] = before + (
                    1 + int(rest.split(".")[0]) if block is None else block
                )
            before += depth
        return ids

    def forward(self, images_BCHW: Tensor, drop_path_scale_RB: Tensor | None = None) -> Tensor:
        """Tokens of the last stage after the final LayerNorm.

        Args:
            images_BCHW: normalised images, (B, in_chans, H, W), floating point; H and W multiples of the
                patch size. They are cast to the dtype of the weights.
            drop_path_scale_RB: factor of each residual branch and image, (len(drop_path_rates), B): 0 to
                drop it, 1 / (1 - rate) to keep it. None keeps all as they are.

        Returns:
            tokens_BLD, (B, rows * columns of `grid_size`, num_features), row by row.

        Raises:
            UserError: a shape does not fit.
        """
        if images_BCHW.dim() != 4 or images_BCHW.shape[1] != self.in_chans:
            raise UserError(
                f"images have shape {tuple(images_BCHW.shape)}; expected (B, {self.in_chans}, height, width)"
            )
        self._patch_grid(*images_BCHW.shape[2:])
        if drop_path_scale_RB is not None:
            expected = (len(self.drop_path_rates), len(images_BCHW))
            if tuple(drop_path_scale_RB.shape) != expected:
                raise UserError(
                    f"drop path scales have shape {tuple(drop_path_scale_RB.shape)}; expected {expected}, "
                    "(residual branches, images)"
                )
        return self.norm(self._stages(images_BCHW, drop_path_scale_RB)[-1]).flatten(1, 2)

    def _stages(self, images_BCHW: Tensor, drop_path_scale_RB: Tensor | None = None) -> list[Tensor]:
        x_BHWC = self.patch_embed(images_BCHW)
        scales: Sequence[Tensor | None] = [None] * len(self.layers)
        if drop_path_scale_RB is not None:
            scales = torch.split(drop_path_scale_RB, [2 * depth for depth in self.depths])
        outputs = []
        for stage, scale_RB in zip(self.layers, scales, strict=True):
            x_BHWC = stage(x_BHWC, scale_RB)
            outputs.append(x_BHWC)
        return outputs

    def intermediates(
        self, images_BCHW: Tensor, layers: Sequence[int], drop_path_scale_RB: Tensor | None = None
    ) -> list[Tensor]:
        """See `Backbone.intermediates`: the tokens after each chosen stage."""
        outputs = self._stages(images_BCHW, drop_path_scale_RB)
        return [outputs[index].flatten(1, 2) for index in resolve_layers(layers, len(outputs))]

    def layer_shapes(self) -> list[tuple[int, int]]:
        """See `Backbone.layer_shapes`: a stage doubles both."""
        return [(self.embed_dim * 2**index, self.patch_size * 2**index) for index in range(len(self.depths))]

    def final_norm(self) -> nn.LayerNorm:
        """See `Backbone.final_norm`."""
        return self.norm

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of any layout in `layouts.LAYOUTS` by this model's names; others come back as they are.

        Raises:
            UserError: the blocks of a stage have different position biases, and this model has one.
        """
        return layouts.from_layout(state, shared_bias=self.shared_bias)

    def to_layout(self, state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
        """Tensors of this model by the names of a layout in `layouts.LAYOUTS`.

        Raises:
            UserError: an unknown layout, or one that has no place for a part of this model.
        """
        return layouts.to_layout(state, layout)

    def layout_config(self, layout: str, config: ModelConfig) -> dict[str, Any]:
        """For layout `hf`, the `config.json` of the `transformers.Swinv2Model` that computes the same; for `timm` too.

        Raises:
            UserError: there is none: Transformers' has one square window, rounds odd grids down, and pads before it
                shifts.
        """
        height, width = (side * self.patch_size for side in self.patch_grid)
        image_size = height if height == width else [height, width]
        if layout == "timm":
            return timm_config(config, "swinv2_tiny_window8_256", {
                "img_size": image_size, "patch_size": self.patch_size, "embed_dim": self.embed_dim,
                "depths": list(self.depths), "num_heads": list(self.num_heads), "window_size": list(self.window_size),
                "mlp_ratio": self.mlp_ratio, "pretrained_window_sizes": list(self.pretrained_window_sizes),
            })  # fmt: skip
        if layout != "hf":
            return {}
        side = self.window_size[0]
        for index, depth in enumerate(self.depths):
            rows = self.patch_grid[0] // 2**index
            theirs = (min(rows, side), side // 2 if rows > side else 0)
            for grid, window in zip(_halved(self.patch_grid, index), self.window_size, strict=True):
                ours = (min(grid, window), window // 2 if grid > window else 0)
                if ours != theirs or (grid > window and depth > 1 and grid % window):
                    raise UserError(
                        f"layout hf: Transformers cannot put windows of {window} on stage {index} as this model does, "
                        f"{grid} tokens a side; choose a square image whose grids are multiples of the window, "
                        "or another layout"
                    )
        return {
            "architectures": ["Swinv2Model"],
            "model_type": "swinv2",
            "image_size": image_size,
            "patch_size": self.patch_size,
            "num_channels": self.in_chans,
            "embed_dim": self.embed_dim,
            "depths": list(self.depths),
            "num_heads": list(self.num_heads),
            "window_size": side,
            "pretrained_window_sizes": list(self.pretrained_window_sizes),
            "mlp_ratio": self.mlp_ratio,
            "drop_path_rate": self.drop_path_rates[-1],
        }

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"images are {height} x {width} px; expected multiples of the patch size {self.patch_size}, "
                "resize or crop them"
            )
        return height // self.patch_size, width // self.patch_size


def _check_arguments(
    embed_dim: int,
    patch_size: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
    extra_norm_period: int | None,
    drop_path_rate: float,
) -> None:
    if len(depths) != len(num_heads) or not depths:
        raise UserError(
            f"depths is {tuple(depths)}, num_heads {tuple(num_heads)}; expected one entry a stage"
        )
    for name, values in (
        ("embed_dim", [embed_dim]),
        ("patch_size", [patch_size]),
        ("depths", depths),
        ("num_heads", num_heads),
    ):
        if min(values) < 1:
            raise UserError(
                f"{name} is {values[0] if len(values) == 1 else tuple(values)}; expected at least 1"
            )
    for index, heads in enumerate(num_heads):
        dim = embed_dim * 2**index
        if dim % heads:
            raise UserError(
                f"stage {index} has {dim} channels and {heads} heads; expected heads that divide them"
            )
    if extra_norm_period is not None and extra_norm_period < 1:
        raise UserError(
            f"extra_norm_period is {extra_norm_period}; expected at least 1, or null for no extra norm"
        )
    if mlp_ratio <= 0:
        raise UserError(f"mlp_ratio is {mlp_ratio}; expected more than 0")
    if not 0.0 <= drop_path_rate < 1.0:
        raise UserError(f"drop_path_rate is {drop_path_rate}; expected 0 <= rate < 1")


def _repeat(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One number for all, or one for each."""
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} entries; expected one number or {count}")
    return values


def _halved(grid: tuple[int, int], times: int) -> tuple[int, int]:
    """The grid after that many patch mergings; an odd side is padded first."""
    return -(-grid[0] // 2**times), -(-grid[1] // 2**times)
