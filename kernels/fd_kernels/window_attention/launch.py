"""How the kernels of window attention are started: the token table, tiles, splits, and the sums of parts."""

# Shape suffix legend
#   B = images, H, W = token grid, C = channels, E = 3 * C (q, k, v), h = heads, D = head dim, M = windows of an
#   image, G = windows of all images, N = tokens of a window, T = N rounded up to whole tiles, S = splits

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fd_kernels.aot import Configuration

HEAD_DIMS = (32,)
"""That of all Swin V2 models; with 64 and 128 the backward kernels spill registers."""
LARGEST_WINDOW = 24 * 24
"""Tokens: above, a bias of (heads, N, N) is too large to be read again and again."""
LARGEST_PADDED_WINDOW = 12 * 12
"""Tokens, where windows reach over the grid: above, the backward pass spills registers on sm_100."""
PAD_OFFSET = (1 << 26) - 1
"""Place of a padding position in the token table."""
_ONE_TILE = 64
"""Windows of up to so many tokens are one tile, and their backward pass one kernel."""


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, and the warps of a program."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int = 2


# Chosen so that nothing spills when compiled for sm_80, sm_90 and sm_100; not measured on a GPU yet.
_TILES = {
    "forward": Tiles(64, 32, 4),
    "queries": Tiles(64, 32, 4),
    "keys": Tiles(64, 16, 8, num_stages=1),
    "keys of large windows": Tiles(64, 16, 8),
    "window": Tiles(_ONE_TILE, _ONE_TILE, 8, num_stages=1),
}


@dataclass(frozen=True)
class Plan:
    """What is fixed by the shapes of a call."""

    window: tuple[int, int]
    shift: tuple[int, int]
    grid: tuple[int, int]
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.window[0] * self.window[1]

    @property
    def one_tile(self) -> bool:
        """Whether the backward pass is one kernel, a window one tile (with padding it would spill on sm_80)."""
        return self.num_tokens <= _ONE_TILE and not self.padded

    @property
    def padded_tokens(self) -> int:
        """T, a multiple of every tile's sides."""
        return -(-self.num_tokens // _ONE_TILE) * _ONE_TILE

    @property
    def windows_an_image(self) -> int:
        """M."""
        return -(-self.grid[0] // self.window[0]) * -(-self.grid[1] // self.window[1])

    @property
    def padded(self) -> bool:
        """Whether a window reaches over the grid."""
        return bool(self.grid[0] % self.window[0] or self.grid[1] % self.window[1])

    def tile(self, kernel: str) -> Tiles:
        """The tile of a kernel: by table, not tuned at run time."""
        return _TILES["keys of large windows" if kernel == "keys" and self.num_tokens > 256 else kernel]

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that all kernels share."""
        return {
            "N": self.num_tokens,
            "T": self.padded_tokens,
            "D": self.head_dim,
            "SHIFTED": any(self.shift),
            # TensorFloat-32 would round fp32 inputs to 10 bits.
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
        }


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
    # Only the last window of a row or column can hold two regions: they part where the shift wrapped.
    region = 2 * (row_H1 >= rows - shift[0]).int() + (column_W >= columns - shift[1]).int()
    packed = torch.where(inside, source, PAD_OFFSET) + (region << 26)
    windows = packed.view(rows // window[0], window[0], columns // window[1], window[1])
    tokens_MN = windows.transpose(1, 2).reshape(-1, window[0] * window[1]).int()
    return torch.nn.functional.pad(tokens_MN, (0, length - tokens_MN.shape[1]), value=-1).to(device)


def num_splits(programs_a_split: int, num_windows: int, device: torch.device) -> int:
    """Returns over how many programs the windows of a head are spread: a few programs for each multiprocessor."""
    if device.type != "cuda":
        return min(2, num_windows)
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(num_windows, -(-wanted // programs_a_split)))


def lse_shape(num_images: int, grid: tuple[int, int], heads: int, window: list[int]) -> tuple[int, int, int]:
    """Shape of what the forward pass keeps beside its output, (G, h, T)."""
    plan = Plan((window[0], window[1]), (0, 0), grid, heads, 0, torch.float32)
    return num_images * plan.windows_an_image, heads, plan.padded_tokens


def _plan(qkv_BHWE: Tensor, heads: int, window: list[int], shift: list[int]) -> Plan:
    _, H, W, E = qkv_BHWE.shape
    return Plan((window[0], window[1]), (shift[0], shift[1]), (H, W), heads, E // (3 * heads), qkv_BHWE.dtype)


def _table(plan: Plan, device: torch.device) -> Tensor:
    return token_table(plan.grid, plan.window, plan.shift, plan.padded_tokens, device)


def forward(
    qkv_BHWE: Tensor,
    bias_hNN: Tensor,
    scale_h: Tensor,
    pad_qkv_E: Tensor | None,
    window: list[int],
    shift: list[int],
) -> tuple[Tensor, Tensor]:
    """Runs the forward kernel.

    Returns:
        out_BHWC, in the dtype of `qkv_BHWE`; lse_GhT, fp32, log2 of the softmax sums.
    """
    from fd_kernels.window_attention.triton_kernel import forward_kernel

    plan = _plan(qkv_BHWE, len(bias_hNN), window, shift)
    B, H, W, E = qkv_BHWE.shape
    num_windows, C = B * plan.windows_an_image, E // 3
    out_BHWC = qkv_BHWE.new_empty(B, H, W, C)
    lse_GhT = qkv_BHWE.new_empty(num_windows, plan.heads, plan.padded_tokens, dtype=torch.float32)
    tile = plan.tile("forward")
    forward_kernel[(num_windows, plan.padded_tokens // tile.queries, plan.heads)](
        qkv_BHWE, qkv_BHWE if pad_qkv_E is None else pad_qkv_E, bias_hNN, scale_h, out_BHWC, lse_GhT,
        _table(plan, qkv_BHWE.device), H * W, plan.windows_an_image, C,
        **plan.constants(), PADDED=plan.padded, BM=tile.queries, BN=tile.keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out_BHWC, lse_GhT


def backward(
    grad_BHWC: Tensor,
    qkv_BHWE: Tensor,
    bias_hNN: Tensor,
    scale_h: Tensor,
    pad_qkv_E: Tensor | None,
    out_BHWC: Tensor,
    lse_GhT: Tensor,
    window: list[int],
    shift: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the backward kernels and adds the parts in a fixed order.

    Returns:
        Gradients of qkv, bias (fp32), scale (fp32) and the padding's qkv (fp32; empty where there is none).
    """
    from fd_kernels.window_attention import triton_kernel

    plan = _plan(qkv_BHWE, len(bias_hNN), window, shift)
    B, H, W, E = qkv_BHWE.shape
    C, N, device = E // 3, plan.num_tokens, qkv_BHWE.device
    num_windows = B * plan.windows_an_image
    pad = qkv_BHWE if pad_qkv_E is None else pad_qkv_E
    table, constants = _table(plan, device), plan.constants()
    sizes = (H * W, plan.windows_an_image)
    grad_qkv = torch.empty_like(qkv_BHWE)

    def parts(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    if plan.one_tile:
        tile = plan.tile("window")
        splits = num_splits(plan.heads, num_windows, device)
        grad_bias, grad_scale = parts(splits, plan.heads, N, N), parts(splits, plan.heads, plan.padded_tokens)
        grad_pad = parts(0)
        triton_kernel.backward_window_kernel[(splits, plan.heads)](
            qkv_BHWE, bias_hNN, scale_h, out_BHWC, lse_GhT, grad_BHWC, grad_qkv, grad_bias, grad_scale,
            table, *sizes, num_windows, C, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    else:
        tile = plan.tile("queries")
        query_tiles = plan.padded_tokens // tile.queries
        delta, grad_scale = torch.empty_like(lse_GhT), torch.empty_like(lse_GhT)
        triton_kernel.backward_queries_kernel[(num_windows, query_tiles, plan.heads)](
            qkv_BHWE, pad, bias_hNN, scale_h, out_BHWC, lse_GhT, grad_BHWC, delta, grad_qkv, grad_scale,
            table, *sizes, C, **constants, PADDED=plan.padded, BM=tile.queries, BN=tile.keys,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        tile = plan.tile("keys")
        key_tiles = -(-N // tile.keys)
        splits = num_splits(key_tiles * plan.heads, num_windows, device)
        grad_bias = parts(splits, plan.heads, N, N)
        grad_pad = parts(splits * key_tiles if plan.padded else 0, 2, C)
        triton_kernel.backward_keys_kernel[(splits, key_tiles, plan.heads)](
            qkv_BHWE, pad, bias_hNN, scale_h, lse_GhT, grad_BHWC, delta, grad_qkv, grad_bias, grad_pad,
            table, *sizes, num_windows, C, **constants, PADDED=plan.padded, BM=tile.queries, BN=tile.keys,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    grad_pad_E = torch.cat([parts(C).zero_(), grad_pad.sum(0).flatten()]) if plan.padded else parts(0)
    return grad_qkv, grad_bias.sum(0), grad_scale.sum((0, 2)) / scale_h, grad_pad_E


def aot_configurations() -> "Iterator[Configuration]":
    """The kernels as the packaged recipes' windows call them, for compilation ahead of time."""
    from fd_kernels.aot import Configuration, triton_dtype
    from fd_kernels.window_attention import triton_kernel

    kernels = {
        "forward": triton_kernel.forward_kernel,
        "queries": triton_kernel.backward_queries_kernel,
        "keys": triton_kernel.backward_keys_kernel,
        "window": triton_kernel.backward_window_kernel,
    }
    calls = [(side, shifted, False) for side in (7, 8, 12, 14, 16, 24) for shifted in (False, True)]
    calls += [(side, True, True) for side in (8, 12)]
    for (side, shifted, padded), head_dim in itertools.product(calls, HEAD_DIMS):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            shift = side // 2 if shifted else 0
            plan = Plan((side, side), (shift, shift), (2 * side + padded,) * 2, 4, head_dim, dtype)
            for name in ("forward", "window") if plan.one_tile else ("forward", "queries", "keys"):
                tile = plan.tile(name)
                own = {} if name == "window" else {"BM": tile.queries, "BN": tile.keys, "PADDED": padded}
                features = dict.fromkeys(
                    ("QKV", "PAD", "OUT", "GRAD_OUT", "GRAD_QKV"), f"*{triton_dtype(dtype)}"
                )
                sizes = dict.fromkeys(("tokens_an_image", "windows_an_image", "num_windows", "C"), "i32")
                types = (
                    dict.fromkeys(kernels[name].arg_names, "*fp32") | features | sizes | {"TOKENS": "*i32"}
                )
                constants = plan.constants() | own
                arguments = [argument for argument in kernels[name].arg_names if argument not in constants]
                yield Configuration(
                    name=f"window_attention {name} {side}x{side} d{head_dim}{' shifted' * shifted}{' padded' * padded}",
                    kernel=kernels[name],
                    dtype=dtype,
                    signature={argument: types[argument] for argument in arguments},
                    constants=constants,
                    divisible_by_16=frozenset({"C"}),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    uses_dot=True,
                )
