"""Attention maps of any model, one layer at a time, by a second path through its attention.

Shape legend: B = images, M = windows of an image, h = heads, N = tokens that see each other, D = head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fd_kernels.dispatch import implementation
from fd_kernels.window_attention.reference import relative_position_index
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fd_scale.errors import UserError
from fd_scale.models import Backbone
from fd_scale.models.layers import ResidualBlock

_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)
# Of the last tokens: another order of sums (fp32), another rounding (bf16, which also rounds what lies between).
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class AttentionMap:
    """The attention of one layer over a batch."""

    probs: Tensor
    """(B, M, h, N, N), of a query (rows) to its keys, fp32. Windows that reach over the grid are left out."""
    logits: Tensor
    """Before the softmax, masks among them; fp32, in the shape of `probs`."""
    bias: Tensor | None
    """(h, N, N): the relative position bias in the logits, fp32, where the model is one whose bias is known."""
    num_prefix_tokens: int
    """Tokens before the patches."""
    shape: tuple[int, int]
    """Rows and columns of the patches that see each other: of the window, or of the image."""
    stride_px: tuple[float, float]
    """Pixels from one patch to the next, down and across."""
    is_image: bool = True
    """Whether an image is one window."""


Look = Callable[[int, AttentionMap], None]
"""Gets the number of a layer, from 0, and its attention, of large windows one after the other."""


class _SecondPath(TorchFunctionMode):
    """Computes each attention in plain steps, and shows it before it goes on."""

    def __init__(self, show: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.show = show

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        result = function(*args, **kwargs)
        if function in _SOFTMAX and _is_attention(result):
            self.show(args[0], result)
        return result

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or enable_gqa or dropout_p:
            raise UserError("diagnose: attention that is causal, grouped or with dropout is not looked into")
        logits = (q.float() * (scale or q.shape[-1] ** -0.5)) @ k.float().mT
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                logits = logits.masked_fill(~attn_mask, float("-inf"))
            else:
                logits = logits + attn_mask
        probs = logits.softmax(-1)
        if _is_attention(probs):
            self.show(logits, probs)
        return (probs @ v.float()).to(v.dtype)


def _is_attention(probs: Tensor) -> bool:
    return probs.dim() >= 4 and probs.shape[-1] == probs.shape[-2] > 1


@torch.no_grad()
def look_at_attention(model: Backbone, pixels_BCHW: Tensor, expected_BLD: Tensor, look: Look) -> None:
    """Runs a model and shows the attention of each layer; one layer's maps are held at a time.

    Args:
        model: in eval mode.
        pixels_BCHW: normalised images in the model's dtype.
        expected_BLD: what the model gives for them: what is seen has to come to the same.
        look: called once for each layer, in order, or, where windows are attended to one after the other, for each.

    Raises:
        UserError: there is no attention among equal tokens, or what was seen is not what the model computes.
    """
    batch, _, height, width = pixels_BCHW.shape
    grid = model.grid_size(height, width)
    state = _Places(model)
    layers = windows = 0

    def show(logits: Tensor, probs: Tensor) -> None:
        nonlocal layers, windows
        found, num_windows = _map_of(logits, probs, state, model, grid, batch, (height, width), windows)
        if found is not None:
            look(layers, found)
        windows += probs.numel() // (batch * probs.shape[-3] * probs.shape[-1] ** 2)
        if windows == num_windows:
            layers, windows = layers + 1, 0

    with state.followed(), implementation("reference"), _SecondPath(show):
        found = model(pixels_BCHW)
    if not layers:
        raise UserError(
            f"diagnose: {_name(model)} has no attention among equally many queries and keys; "
            "expected a ViT or a Swin"
        )
    error = float((found.float() - expected_BLD.float()).norm() / expected_BLD.float().norm())
    if not error <= _TOLERANCES[pixels_BCHW.dtype]:
        raise UserError(
            f"diagnose: the attention that was looked at is not what {_name(model)} computes: its tokens "
            f"differ by {error:.2g} (relative); expected at most {_TOLERANCES[pixels_BCHW.dtype]:g}"
        )


def _name(model: Backbone) -> str:
    return type(getattr(model, "model", model)).__name__


def _map_of(
    logits: Tensor,
    probs: Tensor,
    state: _Places,
    model: Backbone,
    grid: tuple[int, int],
    batch: int,
    image_px: tuple[int, int],
    first: int,
) -> tuple[AttentionMap | None, int]:
    """What is seen, in windows that do not reach over the grid, and the number of all windows of the layer.

    `first` is the number, among them, of the first that is seen.
    """
    num_tokens, prefix, heads = probs.shape[-1], model.num_prefix_tokens, probs.shape[-3]
    shaped = [x.detach().float().reshape(batch, -1, heads, num_tokens, num_tokens) for x in (probs, logits)]
    windows = shaped[0].shape[1]
    if state.window is None and windows == 1 and num_tokens == prefix + grid[0] * grid[1]:
        stride = (image_px[0] / grid[0], image_px[1] / grid[1])
        return AttentionMap(shaped[0], shaped[1], state.bias, prefix, grid, stride), 1
    # Without windows, all tokens of a stage: others may be channels, or lie apart.
    if state.window is None and (windows > 1 or num_tokens not in _stages(grid)):
        raise UserError(
            f"diagnose: {_name(model)} lets {num_tokens} tokens or channels see each other in each of {windows} "
            "groups, whose places are not known; expected a ViT or a Swin"
        )
    side = state.grid or (math.isqrt(windows * num_tokens),) * 2
    shape = state.window or (math.isqrt(num_tokens),) * 2
    rows, columns = (-(-length // window) for length, window in zip(side, shape, strict=True))
    whole = (side[0] // shape[0], side[1] // shape[1])
    if (rows * columns) % windows or shape[0] * shape[1] != num_tokens or 0 in whole:
        raise UserError(
            f"diagnose: {windows} windows of {num_tokens} tokens do not lie on a grid of {side[0]} x {side[1]}; "
            "choose an --img-size whose token grids are multiples of the window"
        )
    # Windows that reach over the grid hold padding.
    places = (divmod(window, columns) for window in range(first, first + windows))
    kept = [row < whole[0] and column < whole[1] for row, column in places]
    stride = (image_px[0] / side[0], image_px[1] / side[1])
    if not any(kept):
        return None, rows * columns
    probs_BMhNN, logits_BMhNN = (x[:, torch.tensor(kept, device=x.device)] for x in shaped)
    seen = AttentionMap(probs_BMhNN, logits_BMhNN, state.bias, 0, shape, stride, rows * columns == 1)
    return seen, rows * columns


def _stages(grid: tuple[int, int]) -> set[int]:
    """Tokens of the stages whose last has a grid, each up to twice as long and wide as the next."""
    sides = [grid]
    for _ in range(3):
        sides += [(2 * rows - odd, 2 * columns - odd) for rows, columns in sides for odd in (0, 1)]
    return {rows * columns for rows, columns in sides}


class _Places:
    """Which window, grid and bias belong to the attention that runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.window: tuple[int, int] | None = None
        self.grid: tuple[int, int] | None = None
        self.bias: Tensor | None = None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Watches the model's modules as they run."""
        handles = []
        for module in self.model.modules():
            if isinstance(module, ResidualBlock):
                handles.append(module.register_forward_pre_hook(self._block, with_kwargs=True))
            # A Swin's; the windows of a table of biases may be of tokens that lie apart.
            elif isinstance(getattr(module, "window_size", None), tuple | list | int) and hasattr(
                module, "shift_size"
            ):
                handles.append(module.register_forward_pre_hook(self._windows))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _windows(self, module: Any, inputs: Any) -> None:
        size, x = module.window_size, inputs[0]
        rows, columns = (size, size) if isinstance(size, int) else size
        # A block is given the grid, by Transformers beside the tokens; its attention, in timm's models, windows that
        # are cut.
        if x.dim() == 4:
            self.grid = (x.shape[1], x.shape[2])
        elif isinstance(size, int) and len(inputs) > 1 and isinstance(inputs[1], tuple):
            self.grid = (int(inputs[1][0]), int(inputs[1][1]))
            rows = columns = min(size, *self.grid)
        self.window = (int(rows), int(columns))

    def _block(self, block: Any, inputs: Any, named: Any) -> None:
        shared = inputs[1] if len(inputs) > 1 else named.get("shared_rel_pos_bias")
        bias = shared
        if bias is None and getattr(block.attn, "position_bias", None) is not None:
            bias = block.attn.position_bias()
        elif bias is None and getattr(block.attn, "relative_position_bias_table", None) is not None:
            bias = block.attn._get_rel_pos_bias()[0]
        if bias is not None and bias.dim() == 2:  # a table, of large windows
            bias = bias[:, relative_position_index(block.attn.window_size, bias.device)]
        self.bias = None if bias is None else bias.detach().float()
