"""The tokens that a model's blocks give, as maps, whatever their layout.

Shape legend: B = images, L = tokens, D = channels, H, W = rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


@contextmanager
def followed(blocks: Sequence[nn.Module], see: Callable[[int, nn.Module, Tensor], None]) -> Iterator[None]:
    """Shows what each block gives while its model runs: its number, itself, its tokens."""

    def hook_of(index: int) -> Any:
        def hook(block: nn.Module, _: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            if isinstance(tokens, Tensor):
                see(index, block, tokens)

        return hook

    handles = [block.register_forward_hook(hook_of(index)) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layouts(
    model: nn.Module, blocks: Sequence[nn.Module], image_1CHW: Tensor, grid: Grid
) -> dict[type[nn.Module], bool]:
    """Whether blocks of a class give channels last, of all classes that give maps some of which tell so."""
    found: dict[type[nn.Module], bool] = {}

    def see(_: int, block: nn.Module, tokens: Tensor) -> None:
        last = _channels_last(tokens, grid) if tokens.dim() == 4 else None
        if last is not None:
            found[type(block)] = last

    with followed(blocks, see):
        model(image_1CHW)
    return found


def as_map(tokens: Tensor, num_prefix_tokens: int, grid: Grid, of_others: bool | None) -> Tensor | None:
    """Returns what a block gives as a map; None where its layout cannot be known.

    Args:
        tokens: (B, L, D), with the prefix tokens or without, (B, D, H, W) or (B, H, W, D).
        num_prefix_tokens: of the model's last tokens.
        grid: of them; those of all blocks are as wide for their height.
        of_others: whether other blocks of the class give channels last, which decides where D = H = W.

    Returns:
        map_BDHW.
    """
    if tokens.dim() == 4:
        last = _channels_last(tokens, grid)
        last = of_others if last is None else last
        return None if last is None else tokens.permute(0, 3, 1, 2) if last else tokens
    for prefix in (num_prefix_tokens, 0) if tokens.dim() == 3 else ():
        count = tokens.shape[1] - prefix
        rows = round((max(count, 0) * grid[0] / grid[1]) ** 0.5)
        if rows and count % rows == 0 and _is_like(rows, count // rows, grid):
            return tokens[:, prefix:].mT.unflatten(2, (rows, count // rows))
    return None


def _channels_last(tokens: Tensor, grid: Grid) -> bool | None:
    """Of (B, D, H, W) or (B, H, W, D); None where both or neither may be."""
    _, first, second, third = tokens.shape
    last = _is_like(first, second, grid)
    return None if last == _is_like(second, third, grid) else last


def _is_like(rows: int, columns: int, grid: Grid) -> bool:
    return rows * grid[1] == columns * grid[0]
