"""How the kernels of window attention are started: the token table, tiles, splits, and the sums of parts."""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim, M = windows of an
#   image, G = windows of all images, N = tokens of a window, T = N rounded up to whole tiles, S = splits,
#   R = relative positions of a window

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fd_kernels.window_attention.tiles import HOPPER, ONE_TILE, Tiles, find_tile

if TYPE_CHECKING:
    from fd_kernels.aot import Configuration

HEAD_DIMS = (32, 64, 128)
PAD_OFFSET = (1 << 26) - 1
"""Place of a padding position in the token table."""


@dataclass(frozen=True)
class Plan:
    """What is fixed by the shapes of a call."""

    window: tuple[int, int]
    shift: tuple[int, int]
    grid: tuple[int, int]
    heads: int
    head_dim: int
    dtype: torch.dtype
    table: bool
    """Whether the bias is one number for each relative position."""
    cosine: bool
    architecture: int = HOPPER

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.window[0] * self.window[1]

    @property
    def one_tile(self) -> bool:
        """Whether the backward pass is one kernel, a window one tile."""
        # Its products take logits' gradients times both inverse lengths, for which fp16 has too small a range.
        in_range = self.dtype == torch.bfloat16
        return in_range and not self.padded and not self.table and self._find("window") is not None

    @property
    def padded_tokens(self) -> int:
        """T, whole tiles of queries."""
        return -(-self.num_tokens // ONE_TILE) * ONE_TILE

    def rows(self, num_images: int) -> tuple[int, ...]:
        """Shape of what the forward pass keeps of each row."""
        numbers = 3 if self.cosine else 1
        return num_images * self.windows_an_image, self.heads, numbers, self.padded_tokens

    @property
    def windows_an_image(self) -> int:
        """M."""
        return -(-self.grid[0] // self.window[0]) * -(-self.grid[1] // self.window[1])

    @property
    def padded(self) -> bool:
        """Whether a window reaches over the grid."""
        return bool(self.grid[0] % self.window[0] or self.grid[1] % self.window[1])

    @property
    def bias_parts(self) -> tuple[int, ...]:
        """Shape in which one split writes the gradient of the bias."""
        rows, columns = self.window if self.table else (1, self.num_tokens)
        return self.heads, 2 * rows - 1, columns, columns

    def tile(self, kernel: str) -> Tiles:
        """The tile of a kernel: by table, not tuned at run time."""
        tile = self._find(kernel)
        assert tile is not None, f"no tile of {kernel} for {self}"
        return tile

    def _find(self, kernel: str) -> Tiles | None:
        return find_tile(
            kernel, self.head_dim, self.num_tokens, sixteen_bit=self.dtype != torch.float32, table=self.table,
            architecture=self.architecture,
        )  # fmt: skip

    def constants(self, kernel: str) -> dict[str, Any]:
        """Compile-time arguments of a kernel."""
        tile = self.tile(kernel)
        across = tile.queries if kernel == "keys" else tile.keys
        last = self.num_tokens % across or across
        constants = {
            "N": self.num_tokens,
            "T": self.padded_tokens,
            "D": self.head_dim,
            "COLUMNS": self.window[1] if self.table else 0,
            "COSINE": self.cosine,
            "SHIFTED": any(self.shift),
            # TensorFloat-32 would round fp32 inputs to 10 bits.
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
        }
        if kernel != "window":
            constants |= {"BM": tile.queries, "BN": tile.keys, "PADDED": self.padded}
        if kernel in ("forward", "queries", "keys"):
            last = max(16, 1 << (last - 1).bit_length())
            constants |= {"KEEPS_BIAS": tile.keeps_bias, "LAST": last}
        if kernel in ("forward", "queries"):
            constants["IMAGES"] = tile.images
        return constants

    def grid_of_queries(self, kernel: str, num_images: int, device: torch.device) -> tuple[int]:
        """Programs of a kernel that goes by queries."""
        tile = self.tile(kernel)
        programs = self.heads * -(-self.num_tokens // tile.queries) * self.windows_an_image
        if tile.keeps_bias:
            return (programs * num_splits(programs, num_images, device, waves=16),)
        return (programs * -(-num_images // tile.images),)

    def splits(self, programs: int, num_images: int, device: torch.device) -> tuple[int, int]:
        """Into how many parts a sum over windows and images is made, and over how many of them windows are spread."""
        wanted = num_splits(programs, num_images * self.windows_an_image, device)
        # Parts of one size, where they are enough: the slowest one is waited for.
        windows = max(part for part in range(1, wanted + 1) if self.windows_an_image % part == 0)
        if 2 * windows * num_images < wanted:
            windows = min(self.windows_an_image, wanted)
        images_a_part = num_images // min(num_images, -(-wanted // windows))
        return windows * -(-num_images // images_a_part), windows

    def options(self, kernel: str) -> dict[str, Any]:
        """Compile-time arguments of a kernel, and how it is compiled."""
        tile = self.tile(kernel)
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        if tile.maxnreg is not None:  # not all of Triton's backends know it
            options["maxnreg"] = tile.maxnreg
        return self.constants(kernel) | options


@cache
def token_table(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], length: int, device: torch.device
) -> Tensor:
    """Returns which token of an image stands at each place of each window.

    Args:
        grid: rows and columns of the tokens.
        window: rows and columns of a window.
        shift: rows and columns of the cyclic shift.
        length: entries of a row, T.
        device: where the table is.

    Returns:
        tokens_MT, int32: the token's place in its image (row by row; `PAD_OFFSET` for padding), its shift
        region in the bits from 26 on; -1 beyond the window.
    """
    rows, columns = (-(-grid[side] // window[side]) * window[side] for side in (0, 1))
    row_H1, column_W = torch.arange(rows)[:, None], torch.arange(columns)
    source = (row_H1 + shift[0]) % grid[0] * grid[1] + (column_W + shift[1]) % grid[1]
    inside = (row_H1 < grid[0]) & (column_W < grid[1])
    # As the reference's mask: only the last window of a row or column can hold two regions.
    region = 2 * (row_H1 >= rows - shift[0]).int() + (column_W >= columns - shift[1]).int()
    packed = torch.where(inside, source, PAD_OFFSET) + (region << 26)
    windows = packed.view(rows // window[0], window[0], columns // window[1], window[1])
    tokens_MN = windows.transpose(1, 2).reshape(-1, window[0] * window[1]).int()
    return torch.nn.functional.pad(tokens_MN, (0, length - tokens_MN.shape[1]), value=-1).to(device)


def num_splits(programs_a_split: int, most: int, device: torch.device, waves: int = 8) -> int:
    """Returns over how many programs windows are spread, so that each multiprocessor gets `waves` of them."""
    if device.type != "cuda":
        return min(2, most)
    wanted = waves * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, -(-wanted // programs_a_split)))


def architecture(device: torch.device) -> int:
    """Compute capability of a device as in sm_90; elsewhere, under the interpreter, a Hopper's."""
    if device.type != "cuda":
        return HOPPER
    major, _ = torch.cuda.get_device_capability(device)
    return 10 * major


def plan(
    qkv_BHWE: Tensor, bias: Tensor, scale_h: Tensor, window: list[int], shift: list[int], cosine: bool
) -> Plan:
    """What the shapes of a call fix; arguments as of `forward`."""
    _, H, W, E = qkv_BHWE.shape
    heads = len(scale_h)
    return Plan(
        (window[0], window[1]), (shift[0], shift[1]), (H, W), heads, E // (3 * heads), qkv_BHWE.dtype,
        bias.dim() == 2, cosine, architecture(qkv_BHWE.device),
    )  # fmt: skip


def _table(plan: Plan, device: torch.device) -> Tensor:
    return token_table(plan.grid, plan.window, plan.shift, plan.padded_tokens, device)


def forward(
    qkv_BHWE: Tensor,
    bias: Tensor,
    scale_h: Tensor,
    pad_qkv_E: Tensor | None,
    window: list[int],
    shift: list[int],
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """Runs the forward kernel; `bias` is (h, N, N) or (h, R).

    Returns:
        out_BHWC, in the dtype of `qkv_BHWE`; rows_GhPT, fp32, log2 of the softmax sums and, with cosines,
        the inverse lengths of queries and keys.
    """
    from fd_kernels.window_attention.triton_forward import forward_kernel

    call = plan(qkv_BHWE, bias, scale_h, window, shift, cosine)
    B, H, W, E = qkv_BHWE.shape
    C = E // 3
    out_BHWC = qkv_BHWE.new_empty(B, H, W, C)
    rows_GhPT = qkv_BHWE.new_empty(call.rows(B), dtype=torch.float32)
    forward_kernel[call.grid_of_queries("forward", B, qkv_BHWE.device)](
        qkv_BHWE, qkv_BHWE if pad_qkv_E is None else pad_qkv_E, bias, scale_h, out_BHWC, rows_GhPT,
        _table(call, qkv_BHWE.device), H * W, call.windows_an_image, B, C, **call.options("forward"),
    )  # fmt: skip
    return out_BHWC, rows_GhPT


def backward(
    grad_BHWC: Tensor,
    qkv_BHWE: Tensor,
    bias: Tensor,
    scale_h: Tensor,
    pad_qkv_E: Tensor | None,
    out_BHWC: Tensor,
    rows_GhPT: Tensor,
    window: list[int],
    shift: list[int],
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the backward kernels and adds the parts in a fixed order.

    Returns:
        Gradients of qkv, bias (fp32), scale (fp32) and the padding's qkv (fp32; empty where there is none).
    """
    from fd_kernels.window_attention import triton_backward, triton_backward_bias

    call = plan(qkv_BHWE, bias, scale_h, window, shift, cosine)
    B, H, W, E = qkv_BHWE.shape
    C, N, device = E // 3, call.num_tokens, qkv_BHWE.device
    pad = qkv_BHWE if pad_qkv_E is None else pad_qkv_E
    sizes = (_table(call, device), H * W, call.windows_an_image, B)
    grad_qkv = torch.empty_like(qkv_BHWE)

    def parts(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    if call.one_tile:
        splits, window_splits = call.splits(call.heads, B, device)
        grad_bias, grad_scale = parts(splits, *call.bias_parts), parts(splits, call.heads, call.padded_tokens)
        grad_pad = parts(0)
        triton_backward_bias.backward_window_kernel[(call.heads, splits)](
            qkv_BHWE, bias, scale_h, out_BHWC, rows_GhPT, grad_BHWC, grad_qkv, grad_bias, grad_scale,
            *sizes, window_splits, C, **call.options("window"),
        )  # fmt: skip
        return grad_qkv, _sum_bias(grad_bias, call), grad_scale.sum((0, 2)) / scale_h, grad_pad

    delta, grad_scale = (parts(*rows_GhPT[:, :, 0].shape) for _ in range(2))
    triton_backward.backward_queries_kernel[call.grid_of_queries("queries", B, device)](
        qkv_BHWE, pad, bias, scale_h, out_BHWC, rows_GhPT, grad_BHWC, delta, grad_qkv, grad_scale,
        *sizes, C, **call.options("queries"),
    )  # fmt: skip
    key_tiles = -(-N // call.tile("keys").keys)
    tile = call.tile("keys")
    if tile.keeps_bias:
        splits, window_splits = call.splits(key_tiles * call.heads, B, device)
    else:
        splits, window_splits = call.windows_an_image * B, call.windows_an_image
    grad_bias = parts(splits, *call.bias_parts) if tile.keeps_bias else parts(0)
    grad_pad = parts(splits * key_tiles if call.padded else 0, 2, C)
    rows = (scale_h, rows_GhPT, grad_BHWC, delta)
    keys_first = bias if call.table else bias.mT
    keys_first = torch.mul(keys_first, math.log2(math.e), out=bias.new_empty(keys_first.shape))
    triton_backward.backward_keys_kernel[(call.heads * key_tiles * splits,)](
        qkv_BHWE, pad, keys_first, *rows, grad_qkv, grad_bias, grad_pad, *sizes, window_splits, C,
        **call.options("keys"),
    )  # fmt: skip
    if not tile.keeps_bias:
        tile = call.tile("bias")
        *_, pairs, queries, keys = call.bias_parts
        pairs *= -(-queries // tile.queries) * -(-keys // tile.keys)
        splits, window_splits = call.splits(pairs * call.heads, B, device)
        grad_bias = parts(splits, *call.bias_parts)
        triton_backward_bias.backward_bias_kernel[(call.heads * pairs * splits,)](
            qkv_BHWE, pad, bias, *rows, grad_bias, *sizes, window_splits, C, **call.options("bias"),
        )  # fmt: skip
    grad_pad_E = torch.cat([parts(C).zero_(), grad_pad.sum(0).flatten()]) if call.padded else parts(0)
    return grad_qkv, _sum_bias(grad_bias, call), grad_scale[..., :N].sum((0, 2)) / scale_h, grad_pad_E


def _sum_bias(parts: Tensor, call: Plan) -> Tensor:
    """Adds the splits' gradients of the bias, and, for a table, the pairs of columns at one distance."""
    grad = parts.sum(0)
    if not call.table:
        return grad.squeeze(1)
    columns = call.window[1]
    # Keys backwards in rows of 2 * columns: read in rows one shorter, each distance is a column.
    skewed = torch.nn.functional.pad(grad.flip(-1), (0, columns)).flatten(-2)
    distances = skewed[..., : columns * (2 * columns - 1)].unflatten(-1, (columns, 2 * columns - 1))
    return distances.sum(-2).flatten(1)


def aot_configurations(architecture: int) -> "Iterator[Configuration]":
    """The kernels as the packaged recipes' windows call them, for compilation ahead of time."""
    sides, shifted, padded = (4, 6, 7, 8, 12, 14, 16, 20, 24), True, True
    calls = [(side, 32, shift, False) for side in sides for shift in (False, shifted)]
    calls += [(side, 32, shifted, padded) for side in (8, 12, 16, 24)]
    calls += [(side, 32, shifted, False) for side in (32, 40, 48, 56)] + [(40, 32, shifted, padded)]
    calls += [(side, head_dim, shifted, padded) for head_dim in (64, 128) for side in (7, 14, 40)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for side, head_dim, is_shifted, is_padded in calls:
            shift = side // 2 if is_shifted else 0
            call = Plan(
                (side, side),
                (shift, shift),
                (2 * side + is_padded,) * 2,
                4,
                head_dim,
                dtype,
                side > 24,
                True,
                architecture,
            )
            name = f"{side}x{side} d{head_dim}{' shifted' * is_shifted}{' padded' * is_padded}"
            yield from _configurations(call, f"window_attention {{}} {name}")
        for tokens, head_dim in ((197, 64), (257, 64), (577, 64), (257, 32), (257, 128)):
            call = Plan((1, tokens), (0, 0), (1, tokens), 4, head_dim, dtype, False, False, architecture)
            yield from _configurations(call, f"biased_attention {{}} {tokens} d{head_dim}")


def _configurations(call: Plan, name: str) -> "Iterator[Configuration]":
    from fd_kernels.aot import Configuration, triton_dtype
    from fd_kernels.window_attention import triton_backward, triton_backward_bias, triton_forward

    kernels = {
        "forward": triton_forward.forward_kernel,
        "queries": triton_backward.backward_queries_kernel,
        "keys": triton_backward.backward_keys_kernel,
        "bias": triton_backward_bias.backward_bias_kernel,
        "window": triton_backward_bias.backward_window_kernel,
    }
    several = ("forward", "queries", "keys") + (() if call.tile("keys").keeps_bias else ("bias",))
    for which in ("forward", "window") if call.one_tile else several:
        kernel, tile, constants = kernels[which], call.tile(which), call.constants(which)
        features = dict.fromkeys(
            ("QKV", "PAD", "OUT", "GRAD_OUT", "GRAD_QKV"), f"*{triton_dtype(call.dtype)}"
        )
        sizes = dict.fromkeys(
            ("tokens_an_image", "windows_an_image", "num_images", "window_splits", "C"), "i32"
        )
        types = dict.fromkeys(kernel.arg_names, "*fp32") | features | sizes | {"TOKENS": "*i32"}
        yield Configuration(
            name=name.format(which),
            kernel=kernel,
            dtype=call.dtype,
            signature={
                argument: types[argument] for argument in kernel.arg_names if argument not in constants
            },
            constants=constants,
            divisible_by_16=frozenset({"C"}),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.maxnreg,
            may_spill=tile.may_spill,
            uses_dot=True,
        )
