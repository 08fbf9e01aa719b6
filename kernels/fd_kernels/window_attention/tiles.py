"""Which tile a kernel takes: by table, not tuned at run time."""

from dataclasses import dataclass
from math import inf

ONE_TILE = 64
"""Windows of up to so many tokens can be one tile, and their backward pass one kernel."""
HOPPER = 90


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, and how its program is compiled."""

    queries: int
    keys: int
    num_warps: int = 4
    num_stages: int = 2
    images: int = 1
    """Images that a program does at a time, forward or for queries: they share what it reads of the bias."""
    keeps_bias: bool = False
    """Whether the bias of all keys, or bias and gradient of all queries, stay in registers."""
    maxnreg: int | None = None
    """Registers of a thread at most, so that more programs are on a multiprocessor at a time."""
    may_spill: bool = False
    """Whether registers may be spilled: in bf16 it measured faster than any that spills none; fp16 takes the same."""


Rules = tuple[tuple[float, Tiles], ...]
"""Tokens of a window up to which a tile is taken, ascending."""

# 16 bits on Hopper, by kernel and head dim: the fastest of some 700 on an H200 (SwinV2-G at windows of 8 to 24 tokens
# a side, ViT-B and -L). Above 256 tokens the bias does not fit into the registers, nor, in `keys`, its gradient above
# 144; there, programs on the multiprocessor count for more than what they spill.
_HOPPER: dict[tuple[str, int], Rules] = {
    ("forward", 32): (
        (ONE_TILE, Tiles(64, 64, keeps_bias=True)),
        (160, Tiles(64, 128, keeps_bias=True)),
        (256, Tiles(64, 64, keeps_bias=True, may_spill=True)),
        (inf, Tiles(64, 64, images=4, may_spill=True)),
    ),
    ("queries", 32): (
        (ONE_TILE, Tiles(64, 64, keeps_bias=True, maxnreg=168, may_spill=True)),
        (160, Tiles(64, 32, keeps_bias=True)),
        (256, Tiles(64, 32, keeps_bias=True, may_spill=True)),
        (inf, Tiles(64, 32, images=2)),
    ),
    ("keys", 32): (
        (ONE_TILE, Tiles(64, 64, keeps_bias=True, may_spill=True)),
        (144, Tiles(32, 64, keeps_bias=True, may_spill=True)),
        (inf, Tiles(32, 64, maxnreg=128, may_spill=True)),
    ),
    ("bias", 32): ((inf, Tiles(64, 64, may_spill=True)),),
    ("window", 32): ((ONE_TILE, Tiles(ONE_TILE, ONE_TILE, may_spill=True)),),
    ("forward", 64): ((inf, Tiles(64, 32, images=2, maxnreg=168, may_spill=True)),),
    ("queries", 64): ((inf, Tiles(64, 32, images=2, may_spill=True)),),
    ("keys", 64): ((inf, Tiles(64, 64, num_stages=1, maxnreg=168, may_spill=True)),),
    ("bias", 64): ((inf, Tiles(64, 64, may_spill=True)),),
}
# fp32, where the tiles below would spill hundreds of registers and more. Not measured.
_FP32: dict[tuple[str, int], Rules] = {
    ("forward", 64): ((inf, Tiles(64, 32, 8)),),
    ("queries", 128): ((inf, Tiles(64, 16, 8)),),
}
# Elsewhere: what in 16 bits spills nothing when compiled for sm_80, sm_90 and sm_100. Not measured.
_ANYWHERE: dict[tuple[str, int], Rules] = {
    ("forward", 32): ((inf, Tiles(64, 32)),),
    ("forward", 64): ((inf, Tiles(64, 32)),),
    ("forward", 128): ((inf, Tiles(64, 16, 8)),),
    ("queries", 32): ((16, Tiles(64, 16)), (inf, Tiles(64, 32, num_stages=1))),
    ("queries", 64): ((inf, Tiles(64, 32, 8)),),
    ("queries", 128): ((inf, Tiles(64, 16, 8, num_stages=1)),),
    ("keys", 32): ((inf, Tiles(32, 32, 8, num_stages=1)),),
    ("keys", 64): ((inf, Tiles(32, 16, 8, num_stages=1)),),
    ("keys", 128): ((inf, Tiles(32, 32, 8)),),
    ("bias", 32): ((inf, Tiles(64, 32, 8)),),
    ("bias", 64): ((inf, Tiles(64, 16, 8)),),
    ("bias", 128): ((inf, Tiles(32, 16, 8, num_stages=1)),),
}


def find_tile(
    kernel: str, head_dim: int, tokens: int, *, sixteen_bit: bool, table: bool, architecture: int
) -> Tiles | None:
    """Returns the tile of a kernel, or None where it does not serve so many tokens.

    Args:
        kernel: "forward", "queries", "keys", "bias", or "window", which stands for the last three.
        head_dim: channels of a head.
        tokens: of a window.
        sixteen_bit: whether the features are bf16 or fp16.
        table: whether the bias is one number for each relative position.
        architecture: as 90 for compute capability 9.0.
    """
    own = _HOPPER if architecture == HOPPER else {}
    rules = own if sixteen_bit else _FP32
    found = rules.get((kernel, head_dim)) or _ANYWHERE.get((kernel, head_dim), ())
    for most, tile in found:
        # The gradient of a table is not that of the dense bias which `keys` keeps.
        if tokens <= most and not (table and tile.keeps_bias and kernel == "keys"):
            return tile
    return None
