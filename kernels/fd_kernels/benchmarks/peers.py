"""Each op, and what stands beside it: the same result by other means."""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim, M = windows of an image,
#   G = B * M, N = tokens of a window (or of an image, where there are none)

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fd_kernels import biased_attention, whitened_smooth_l1, window_attention
from fd_kernels.benchmarks.shapes import Shape
from fd_kernels.biased_attention.reference import biased_attention_reference
from fd_kernels.feature_loss.reference import whitened_smooth_l1_reference
from fd_kernels.window_attention.reference import MASK_LOGIT, shift_mask, window_attention_reference


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to the result."""

    function: Callable[..., Tensor]
    """Of the tensors of `Inputs`."""
    compiled: bool = False
    """Whether it runs under torch.compile."""
    checked: bool = True
    """Whether its results are compared with the reference's."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a call as plain PyTorch cuts them, with what a model keeps in buffers."""

    heads: int
    side: int
    window: int
    mask: Tensor
    """(M, N, N)."""
    region: Tensor
    """(M, N)."""

    @property
    def shift(self) -> int:
        """Rows and columns."""
        return self.window // 2

    def cut(self, x_BHWC: Tensor) -> Tensor:
        """Roll and partition: (G, N, C)."""
        B, _, _, C = x_BHWC.shape
        rows = self.side // self.window
        x = torch.roll(x_BHWC, (-self.shift, -self.shift), (1, 2))
        return (
            x.view(B, rows, self.window, rows, self.window, C).transpose(2, 3).reshape(-1, self.window**2, C)
        )

    def join(self, x_GNC: Tensor) -> Tensor:
        """The inverse of `cut`."""
        rows, C = self.side // self.window, x_GNC.shape[-1]
        x = x_GNC.view(-1, rows, rows, self.window, self.window, C).transpose(2, 3)
        return torch.roll(x.reshape(-1, self.side, self.side, C), (self.shift, self.shift), (1, 2))

    def attend(
        self, core: Callable[..., Tensor], qkv_GNE: Tensor, bias_hNN: Tensor, scale_h: Tensor
    ) -> Tensor:
        """Attention within windows by one of the cores below: (G, N, C)."""
        q, k, v = _split_heads(qkv_GNE, self.heads)
        return (
            core(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, bias_hNN, scale_h, self)
            .transpose(1, 2)
            .flatten(2)
        )


def make_windows(shape: Shape, device: torch.device) -> Windows:
    """The windows of a call, shifted by half their side."""
    side, window = shape.side, shape.window
    mask_MNN = shift_mask(side, side, (window, window), (window // 2, window // 2), device)
    # Only the last window of a row or column can hold two regions: they part where the shift wrapped.
    wrapped = (torch.arange(side, device=device) >= side - window // 2).int()
    region = (2 * wrapped[:, None] + wrapped).view(side // window, window, side // window, window)
    return Windows(shape.heads, side, window, mask_MNN, region.transpose(1, 2).reshape(-1, window**2))


def _split_heads(qkv_GNE: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, (G, h, N, D) each."""
    G, N, E = qkv_GNE.shape
    return qkv_GNE.view(G, N, 3, heads, E // (3 * heads)).permute(2, 0, 3, 1, 4).unbind()


def _eager_core(
    q: Tensor, k: Tensor, v: Tensor, bias_hNN: Tensor, scale_h: Tensor, windows: Windows
) -> Tensor:
    """As timm: products in the inputs' dtype, softmax in fp32, a mask for every window of an image."""
    logits = (q @ k.mT).float() * scale_h[:, None, None] + bias_hNN
    logits = logits.unflatten(0, (-1, len(windows.mask))) + windows.mask[:, None]
    return logits.flatten(0, 1).softmax(-1).to(v.dtype) @ v


def _sdpa_core(
    q: Tensor, k: Tensor, v: Tensor, bias_hNN: Tensor, scale_h: Tensor, windows: Windows
) -> Tensor:
    """Windows of an image become heads, so that bias and mask are of one image."""
    q, k, v = (
        x.reshape(-1, len(windows.mask) * x.shape[1], *x.shape[2:])
        for x in (q * scale_h[:, None, None].to(q.dtype), k, v)
    )
    logits = (bias_hNN + windows.mask[:, None]).flatten(0, 1).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, logits.expand(len(q), -1, -1, -1), scale=1.0)
    return out.reshape(-1, windows.heads, *out.shape[2:])


def _flex_core(
    q: Tensor, k: Tensor, v: Tensor, bias_hNN: Tensor, scale_h: Tensor, windows: Windows
) -> Tensor:
    region_MN, M = windows.region, len(windows.region)

    def add(score: Tensor, g: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        apart = region_MN[g % M, i] != region_MN[g % M, j]
        return score + bias_hNN[h, i, j] + torch.where(apart, MASK_LOGIT, 0.0)

    return flex_attention(q * scale_h[:, None, None].to(q.dtype), k, v, score_mod=add, scale=1.0)


def _windowed(
    core: Callable[..., Tensor], windows: Windows, qkv_BHWE: Tensor, bias_hNN: Tensor, scale_h: Tensor
) -> Tensor:
    return windows.join(windows.attend(core, windows.cut(qkv_BHWE), bias_hNN, scale_h))


def _global(core: str, qkv_BNE: Tensor, bias_hNN: Tensor) -> Tensor:
    """Attention of a ViT over all tokens."""
    q, k, v = _split_heads(qkv_BNE, len(bias_hNN))
    if core == "flex":
        out = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + bias_hNN[h, i, j])
    elif core == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, bias_hNN.to(q.dtype).expand(len(q), -1, -1, -1))
    else:
        logits = ((q * q.shape[-1] ** -0.5) @ k.mT).float() + bias_hNN
        out = logits.softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2)


def _block(
    attend: Callable[..., Tensor],
    windows: Windows | None,
    x_BHWC: Tensor,
    bias_hNN: Tensor,
    scale_h: Tensor,
    *weights: Tensor,
) -> Tensor:
    """A Swin V2 block: x + norm(attention(x)), then x + norm(mlp(x)); `windows` are cut before qkv, as in timm."""
    qkv, qkv_bias, proj, proj_bias, norm1, norm1_bias, fc1, fc1_bias, fc2, fc2_bias, norm2, norm2_bias = (
        weights
    )
    C = x_BHWC.shape[-1]
    tokens = x_BHWC if windows is None else windows.cut(x_BHWC)
    mixed = F.linear(attend(F.linear(tokens, qkv, qkv_bias), bias_hNN, scale_h), proj, proj_bias)
    mixed = mixed if windows is None else windows.join(mixed)
    x_BHWC = x_BHWC + F.layer_norm(mixed, (C,), norm1, norm1_bias)
    hidden = F.linear(F.gelu(F.linear(x_BHWC, fc1, fc1_bias)), fc2, fc2_bias)
    return x_BHWC + F.layer_norm(hidden, (C,), norm2, norm2_bias)


class _Copy(torch.autograd.Function):
    """Moves as many bytes as the loss kernel, two rows forward and three backward, by copies of the device."""

    @staticmethod
    def forward(ctx: Any, pred_BLD: Tensor, target_BLD: Tensor) -> Tensor:
        ctx.shape = pred_BLD.shape
        ctx.save_for_backward(pred_BLD.new_empty(pred_BLD.numel() * 3 // 2))
        target_BLD.clone()
        return pred_BLD.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        (source,) = ctx.saved_tensors
        return source.clone()[: ctx.shape.numel()].view(ctx.shape), None


def _copy(pred_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    out = _Copy.apply(pred_BLD, target_BLD)
    assert isinstance(out, Tensor)
    return out


def reference(shape: Shape) -> Callable[..., Tensor]:
    """The ground truth of a call."""
    if shape.op == "whitened_smooth_l1":
        return partial(whitened_smooth_l1_reference, beta=2.0, eps=1e-5, token_weight_BL=None)
    if shape.op == "biased_attention":
        return biased_attention_reference
    attention = partial(
        window_attention_reference, window_size=shape.window_size, shift_size=shape.shift_size
    )
    return partial(_block, attention, None) if shape.op == "block" else attention


def variants(shape: Shape, device: torch.device) -> dict[str, Variant]:
    """Ours, whose names begin so, and the peers of a call."""
    if shape.op == "whitened_smooth_l1":
        plain = reference(shape)
        return {
            "ours": Variant(whitened_smooth_l1), "eager": Variant(plain), "compiled": Variant(plain, compiled=True),
            "copy": Variant(_copy, checked=False),
        }  # fmt: skip
    if shape.op == "biased_attention":
        ours: Callable[..., Tensor] = biased_attention
        peers = [partial(_global, core) for core in ("eager", "sdpa", "flex")]
    else:
        windows = make_windows(shape, device)
        ours = partial(window_attention, window_size=shape.window_size, shift_size=shape.shift_size)
        if shape.op == "block":
            ours = partial(_block, ours, None)
            plain = partial(_block, partial(windows.attend, _eager_core), windows)
            return {
                "ours": Variant(ours), "ours_compiled": Variant(ours, compiled=True),
                "eager": Variant(plain), "compiled": Variant(plain, compiled=True),
            }  # fmt: skip
        peers = [partial(_windowed, core, windows) for core in (_eager_core, _sdpa_core, _flex_core)]
    eager, sdpa, flex = peers
    return {
        "ours": Variant(ours), "eager": Variant(eager), "compiled": Variant(eager, compiled=True),
        "sdpa": Variant(sdpa), "flex": Variant(flex, compiled=True),
    }  # fmt: skip
