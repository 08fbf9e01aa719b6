"""What is measured: calls of the ops at the sizes of real models, and their inputs."""

# Shape suffix legend
#   B = images, H, W = token grid, N = tokens that see each other (of a window, or of an image), C = channels,
#   E = 3 * C (q, k, v), F = hidden channels of the MLP, h = heads

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DTYPE = torch.bfloat16
MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One call of an op, or one whole block."""

    name: str
    op: Literal["window_attention", "biased_attention", "whitened_smooth_l1", "block"]
    images: int
    tokens: int
    """Of an image."""
    channels: int
    heads: int = 1
    window: int = 0
    """Side in tokens; windows are shifted by half of it. 0: no windows."""

    @property
    def side(self) -> int:
        """H and W, where there are windows."""
        return math.isqrt(self.tokens)

    @property
    def group(self) -> int:
        """N."""
        return self.window**2 or self.tokens

    @property
    def window_size(self) -> tuple[int, int]:
        return self.window, self.window

    @property
    def shift_size(self) -> tuple[int, int]:
        return self.window // 2, self.window // 2


def _swin(op: Literal["window_attention", "block"], model: str, window: int) -> Shape:
    """Stage 3 of SwinV2-B or -G, 2 x 2 windows an image."""
    images, channels = {"b": (128, 512), "g": (64, 2048)}[model]
    prefix = "block_" if op == "block" else ""
    return Shape(
        name=f"{prefix}swin_{model}_w{window}", op=op, images=images, tokens=(2 * window) ** 2,
        channels=channels, heads=channels // 32, window=window,
    )  # fmt: skip


SHAPES = (
    Shape(name="loss_16k_1024", op="whitened_smooth_l1", images=64, tokens=256, channels=1024),
    Shape(name="loss_64k_1024", op="whitened_smooth_l1", images=256, tokens=256, channels=1024),
    *(_swin("window_attention", model, window) for model in "bg" for window in (8, 12, 14, 16, 24)),
    Shape(name="vit_b_197", op="biased_attention", images=128, tokens=197, channels=768, heads=12),
    Shape(name="vit_l_577", op="biased_attention", images=64, tokens=577, channels=1024, heads=16),
    _swin("block", "b", 16),
    _swin("block", "g", 12),
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one call, in the order of its arguments; what requires a gradient gets one."""

    batched: tuple[Tensor, ...]
    """First dimension: images."""
    shared: tuple[Tensor, ...]
    upstream: Tensor
    """Gradient of the output."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All arguments of the call."""
        return self.batched + self.shared

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The arguments that get a gradient."""
        return tuple(tensor for tensor in self.tensors if tensor.requires_grad)

    @property
    def num_bytes(self) -> int:
        """Of the tensors, with the gradient of the output."""
        return sum(tensor.nbytes for tensor in (*self.tensors, self.upstream))

    def images(self, start: int, stop: int) -> "Inputs":
        """Some of the images, in fp32, as leaves of their own."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().float().requires_grad_(tensor.requires_grad)

        return Inputs(
            tuple(leaf(tensor[start:stop]) for tensor in self.batched),
            tuple(leaf(tensor) for tensor in self.shared),
            self.upstream[start:stop].float() if self.upstream.dim() else self.upstream,
        )


def make_inputs(shape: Shape, device: torch.device, seed: int, dtype: torch.dtype = DTYPE) -> Inputs:
    """Random inputs of a call.

    Args:
        shape: the call.
        device: where they are.
        seed: the same seed gives the same inputs on a kind of device.
        dtype: of the features and, in a block, of the weights; bias and scale are fp32.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0, like: torch.dtype = dtype) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=like)
        return values.mul_(std).requires_grad_()

    B, C, h, N = shape.images, shape.channels, shape.heads, shape.group
    if shape.op == "whitened_smooth_l1":
        pred, target = normal(B, shape.tokens, C), normal(B, shape.tokens, C, std=3.0).detach()
        return Inputs((pred, target), (), torch.full((), 0.5, device=device))
    bias_hNN = normal(h, N, N, like=torch.float32)
    if shape.op == "biased_attention":
        return Inputs((normal(B, N, 3 * C),), (bias_hNN,), normal(B, N, C).detach())
    scale_h = torch.linspace(5.0, 15.0, h, device=device).requires_grad_()
    grid = (B, shape.side, shape.side)
    weights = tuple(_block_weights(C, normal)) if shape.op == "block" else ()
    channels = C if shape.op == "block" else 3 * C
    return Inputs((normal(*grid, channels),), (bias_hNN, scale_h, *weights), normal(*grid, C).detach())


def _block_weights(C: int, normal: Callable[..., Tensor]) -> Iterator[Tensor]:
    """Weight and bias of: qkv, projection, norm, MLP in, MLP out, norm."""
    hidden = MLP_RATIO * C
    for rows, columns in ((3 * C, C), (C, C), (C, 0), (hidden, C), (C, hidden), (C, 0)):
        yield normal(rows, columns, std=columns**-0.5) if columns else normal(rows)
        yield normal(rows, std=0.1)
