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
from fd_kernels.window_attention.reference import relative_position_index, shift_mask
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fd_scale.errors import UserError
from fd_scale.models import Backbone
from fd_scale.models.layers import ResidualBlock
from fd_scale.models.swin_v2 import WindowAttention

_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)
# What leaves a map as it is (in eval mode), by torch's names; getters, as of `mT`, are `__get__`.
_SAME_MAP = frozenset(
    {
        "__get__", "bfloat16", "clone", "contiguous", "detach", "dropout", "expand", "flatten", "float", "half",
        "permute", "reshape", "squeeze", "to", "transpose", "type", "type_as", "unflatten", "unsqueeze", "view",
    }
)  # fmt: skip
# What tells something of a map, and is none.
_ASKS = frozenset(
    {"__get__", "__len__", "data_ptr", "dim", "element_size", "is_contiguous", "numel", "size", "stride"}
)
_PRODUCTS = frozenset({"__matmul__", "bmm", "einsum", "matmul"})
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
    unmasked: Tensor | None = None
    """(M, N, N), bool: pairs that no shift's mask hides; None: all, or not known, as the bias."""


Look = Callable[[int, AttentionMap], None]
"""Gets the number of a layer, from 0 and among all of the model, and its attention, of large windows one by one."""


class _SecondPath(TorchFunctionMode):
    """Computes each attention in plain steps, shows its map before it goes on, and follows it to the values.

    Args:
        name: of the model, for errors.
        show: gets logits and map of an attention that can be looked at.
        skip: gets the reason of one that cannot.
    """

    def __init__(
        self, name: str, show: Callable[[Tensor, Tensor], None], skip: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.name, self.show, self.skip = name, show, skip
        self.maps: list[Tensor] = []
        """The last map, in all the forms in which the model has it, until values are multiplied."""
        self.reason: str | None = None
        """Why it was not shown."""
        self.values: Tensor | None = None
        """What the last shown map was applied to."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        result = function(*args, **kwargs)
        if function in _SOFTMAX and result.dim() >= 3:
            self._begin(args[0], result)
        elif self.maps:
            self._follow(function.__name__, tree_leaves((args, kwargs)), result)
        return result

    def _begin(self, logits: Tensor, probs: Tensor) -> None:
        self._lose("another softmax")
        self.maps, self.reason = [probs], _unlike(probs)
        if self.reason is None:
            self.show(logits, probs)

    def _follow(self, function: str, taken: list[Any], result: Any) -> None:
        tensors = [x for x in taken if isinstance(x, Tensor)]
        is_map = [any(x is seen for seen in self.maps) for x in tensors]
        if not any(is_map):
            return
        if function in _SAME_MAP and isinstance(result, Tensor):
            self.maps.append(result)
        elif (
            function in _PRODUCTS
            and sorted(is_map) == [False, True]
            and _sums_over_keys(
                next((x for x in taken if isinstance(x, str)), None),
                tensors,
                is_map[0],
                self.maps[0].shape[-1],
            )
        ):
            self._applied(tensors[is_map.index(False)])
        elif function not in _ASKS or isinstance(result, Tensor):
            self._lose(function)

    def _lose(self, function: str) -> None:
        """The map becomes another before it meets values, or it was that of no attention."""
        if self.maps and self.reason is None:
            raise UserError(
                f"diagnose: {self.name} changes its attention maps between softmax and values (by {function}), so "
                "what is seen is not what it applies; expected a model that applies them as they are"
            )
        self.maps = []

    def _applied(self, values: Tensor) -> None:
        self.maps = []
        if self.reason is not None:
            self.skip(self.reason)
            return
        last, self.values = self.values, values
        if last is not None and (last.data_ptr(), last.shape) == (values.data_ptr(), values.shape):
            raise UserError(
                f"diagnose: {self.name} applies two attention maps to the same values, as differential attention, "
                "so neither is what it applies; expected one map a head"
            )

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
        self._begin(logits, probs)
        self._applied(v)
        return (probs @ v.float()).to(v.dtype)


def _sums_over_keys(equation: str | None, factors: list[Tensor], map_first: bool, num_keys: int) -> bool:
    """Whether a product of a map and another tensor is one with values, and not, say, of heads."""
    seen = factors[0 if map_first else 1]
    if equation is None:
        return seen.shape[-1 if map_first else -2] == num_keys
    inputs, _, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")[0 if map_first else 1].removeprefix("...")
    sizes = zip(reversed(letters), reversed(seen.shape), strict=False)
    return [size for letter, size in sizes if letter not in output] == [num_keys]


def _unlike(probs: Tensor) -> str | None:
    """Why a map cannot be looked at; None: it can."""
    queries, keys = probs.shape[-2:]
    if queries != keys:
        return f"{queries} queries and {keys} keys"
    if probs.dim() < 4:
        return "3-d maps, in which heads cannot be told from images"
    return "one token" if keys == 1 else None


@torch.no_grad()
def look_at_attention(
    model: Backbone, pixels_BCHW: Tensor, expected_BLD: Tensor, look: Look
) -> list[str | None]:
    """Runs a model and shows the attention of each layer; one layer's maps are held at a time.

    Args:
        model: in eval mode.
        pixels_BCHW: normalised images in the model's dtype.
        expected_BLD: what the model gives for them: what is seen has to come to the same.
        look: called once for each layer, in order, or, where windows are attended to one after the other, for each.

    Returns:
        For each attention of the model why it is left out; None where it was shown.

    Raises:
        UserError: there is no attention among equal tokens, or what was seen is not what the model computes.
    """
    batch, _, height, width = pixels_BCHW.shape
    grid, name = model.grid_size(height, width), _name(model)
    state = _Places(model)
    left_out: list[str | None] = []
    windows, any_whole = 0, False

    def show(logits: Tensor, probs: Tensor) -> None:
        nonlocal windows, any_whole
        found, num_windows = _map_of(logits, probs, state, model, grid, batch, (height, width), windows)
        if found is not None:
            any_whole = True
            look(len(left_out), found)
        windows += probs.numel() // (batch * probs.shape[-3] * probs.shape[-1] ** 2)
        if windows == num_windows:
            left_out.append(None if any_whole else "padding in each window")
            windows, any_whole = 0, False

    with state.followed(), implementation("reference"), _SecondPath(name, show, left_out.append):
        found = model(pixels_BCHW)
    if None not in left_out:
        reasons = f" (it has {'; '.join(sorted({str(each) for each in left_out}))})" if left_out else ""
        raise UserError(
            f"diagnose: {name} has no attention among equally many queries and keys that can be looked at{reasons}; "
            "expected a ViT or a Swin"
        )
    error = float((found.float() - expected_BLD.float()).norm() / expected_BLD.float().norm())
    if not error <= _TOLERANCES[pixels_BCHW.dtype]:
        raise UserError(
            f"diagnose: the attention that was looked at is not what {name} computes: its tokens "
            f"differ by {error:.2g} (relative); expected at most {_TOLERANCES[pixels_BCHW.dtype]:g}"
        )
    return left_out


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
    whole = [_without_padding(*axis) for axis in zip(side, shape, state.rolled_padding, strict=True)]
    count = len(whole[0]) * len(whole[1])
    if count % windows or shape[0] * shape[1] != num_tokens or side[0] < shape[0] or side[1] < shape[1]:
        raise UserError(
            f"diagnose: {windows} windows of {num_tokens} tokens do not lie on a grid of {side[0]} x {side[1]}; "
            "choose an --img-size whose token grids are multiples of the window"
        )
    kept = [row and column for row in whole[0] for column in whole[1]][first : first + windows]
    if not any(kept):
        return None, count
    stride = (image_px[0] / side[0], image_px[1] / side[1])
    kept_M = torch.tensor(kept, device=probs.device)
    unmasked_MNN = None if state.unmasked is None else state.unmasked[first : first + windows][kept_M]
    probs_BMhNN, logits_BMhNN = (x[:, kept_M] for x in shaped)
    is_image = count == 1
    return AttentionMap(
        probs_BMhNN, logits_BMhNN, state.bias, 0, shape, stride, is_image, unmasked_MNN
    ), count


def _without_padding(side: int, window: int, rolled: int) -> list[bool]:
    """For each window along an axis whether it is of tokens alone.

    Args:
        side: tokens along the axis; padding to a multiple of the window lies behind them.
        window: tokens along a window.
        rolled: places that tokens and padding were shifted towards the front, around the border.
    """
    padded = -(-side // window) * window
    padding = {(place - rolled) % padded for place in range(side, padded)}
    return [padding.isdisjoint(range(first, first + window)) for first in range(0, padded, window)]


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
        self.rolled_padding = (0, 0)
        """Places of the cyclic shift, where the grid is padded before it: Transformers' order, not ours or timm's."""
        self.bias: Tensor | None = None
        self.unmasked: Tensor | None = None

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
            self.rolled_padding = (module.shift_size if min(self.grid) > size else 0,) * 2
        self.window = (int(rows), int(columns))

    def _block(self, block: Any, inputs: Any, named: Any) -> None:
        bias = inputs[1] if len(inputs) > 1 else named.get("shared_rel_pos_bias")
        if bias is None and getattr(block.attn, "position_bias", None) is not None:
            bias = block.attn.position_bias()
        elif bias is None and getattr(block.attn, "relative_position_bias_table", None) is not None:
            bias = block.attn._get_rel_pos_bias()[0]
        if bias is not None and bias.dim() == 2:  # a table, of large windows
            bias = bias[:, relative_position_index(block.attn.window_size, bias.device)]
        self.bias = None if bias is None else bias.detach().float()
        self.unmasked = None
        if isinstance(block.attn, WindowAttention):
            side, window = inputs[0].shape[1:3], block.attn.window_size
            rows, columns = (-(-length // of) * of for length, of in zip(side, window, strict=True))
            mask_MNN = shift_mask(rows, columns, window, block.attn.shift_on(side), inputs[0].device)
            self.unmasked = mask_MNN == 0
