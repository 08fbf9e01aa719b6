"""Relative position biases: the log-spaced continuous one (log-CPB) of Swin V2, and tables for another grid."""

# Shape suffix legend: h = heads, N = tokens of a window, T = relative positions of a window

import math

import numpy as np
import numpy.typing as npt
import torch
from fd_kernels.window_attention.reference import relative_position_index
from torch import Tensor, nn

from fd_scale.models.layers import Linear, at_least_fp32

HIDDEN_DIM = 512
MAX_COORDINATE = 8.0
MAX_BIAS = 16.0
LARGEST_DENSE_WINDOW = 24 * 24
"""Tokens: of a larger window, the blocks read the table itself (at 40 x 40 a dense bias of 64 heads is 0.65 GB)."""


def log_spaced_coordinates(
    window_size: tuple[int, int], pretrained_window_size: int, device: torch.device
) -> Tensor:
    """Coordinates of all relative positions in a window, linear in [-8, 8], then log-spaced.

    Args:
        window_size: rows and columns of the window.
        pretrained_window_size: side of the window that the bias was trained with; positions beyond it get
            coordinates beyond 8, along the same scale. 0 means this window.
        device: where to build them.

    Returns:
        coordinates_T2, ((2 * rows - 1) * (2 * columns - 1), 2), row and column, fp32.

    Source: Liu et al. 2022 (arXiv:2111.09883), section 3.3; normalised to 8 as in the released code.
    """
    axes = []
    for size in window_size:
        steps = torch.arange(1 - size, size, device=device, dtype=torch.float32)
        linear = steps / max((pretrained_window_size or size) - 1, 1) * MAX_COORDINATE
        axes.append(linear.sign() * torch.log2(linear.abs() + 1.0) / math.log2(MAX_COORDINATE))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


class ContinuousPositionBias(nn.Module):
    """A small MLP from log-spaced relative coordinates to one bias for each head.

    Coordinates and indices are computed in each forward: it is cheap, and no buffer can lose its values on
    the meta device or its precision in bf16.

    Args:
        num_heads: heads of the attention.
        window_size: rows and columns of the window.
        pretrained_window_size: side of the window in pre-training; 0 means this window.

    Attributes:
        constant: whether the weights will not change: the first forward's result is kept.

    Source: Liu et al. 2022 (arXiv:2111.09883), equations 3 and 4; 16 * sigmoid as in the released code.
    """

    def __init__(self, num_heads: int, window_size: tuple[int, int], pretrained_window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.pretrained_window_size = pretrained_window_size
        self.constant = False
        self.kept: Tensor | None = None
        self.cpb_mlp = nn.Sequential(
            Linear(2, HIDDEN_DIM), nn.ReLU(), Linear(HIDDEN_DIM, num_heads, bias=False)
        )

    def forward(self) -> Tensor:
        """Returns the bias as `fd_kernels.window_attention` takes it.

        Returns:
            bias_hNN, (heads, N, N), or, for windows above `LARGEST_DENSE_WINDOW`, bias_hT, (heads, T): values in
            (0, 16), fp32 (fp64 where the weights are fp64).
        """
        if self.kept is not None:
            return self.kept
        bias = self._computed()
        if self.constant:
            self.kept = bias
        return bias

    def _computed(self) -> Tensor:
        weight = next(self.parameters())
        coordinates_T2 = log_spaced_coordinates(self.window_size, self.pretrained_window_size, weight.device)
        table_Th = self.cpb_mlp(coordinates_T2.to(weight.dtype))
        bias_hT = MAX_BIAS * torch.sigmoid(at_least_fp32(table_Th)).T.contiguous()
        if self.window_size[0] * self.window_size[1] > LARGEST_DENSE_WINDOW:
            return bias_hT
        return bias_hT[:, relative_position_index(self.window_size, weight.device)]


def resized_table(table_Th: Tensor, num_tokens: int) -> Tensor:
    """Resizes a table of biases between the tokens of a square grid; near distances stay, far ones are stretched.

    The old grid's distances lie at 1, 1 + q, 1 + q + q^2, ... of the new one, with the q that takes the farthest to the
    farthest; between them a bicubic spline. For a smaller grid q is 1: the far ones are cut off.

    Args:
        table_Th: (2 * side - 1)^2 rows for the old grid, side > 2, row difference by column difference; floating point.
        num_tokens: tokens on a side of the new grid.

    Returns:
        The table of the new grid, in the dtype of the old one.

    Source: Bao et al. 2021 (arXiv:2106.08254), the released code, which takes q from 1.01 on.
    """
    from scipy.interpolate import RectBivariateSpline  # a third of a second of every rank's start

    old_side = math.isqrt(len(table_Th))
    assert old_side * old_side == len(table_Th), "a square grid"
    distances = _stretched(old_side // 2, num_tokens - 1)
    places = np.concatenate([-distances[::-1], [0], distances])
    wanted = np.arange(1 - num_tokens, num_tokens)
    columns = [
        RectBivariateSpline(places, places, column.reshape(old_side, old_side), kx=3, ky=3)(
            wanted, wanted
        ).ravel()
        for column in table_Th.double().numpy().T
    ]
    return torch.from_numpy(np.stack(columns, axis=1)).to(table_Th.dtype)


def _stretched(num_old: int, num_new: int) -> npt.NDArray[np.float64]:
    """Where the old distances 1..num_old lie on the new ones."""

    def places(ratio: float) -> npt.NDArray[np.float64]:
        return np.cumsum(ratio ** np.arange(num_old, dtype=np.float64))

    smallest, largest = 1.0, 2.0
    while places(largest)[-1] < num_new:
        largest *= 2
    for _ in range(60):  # the width of a float64
        ratio = (smallest + largest) / 2
        smallest, largest = (smallest, ratio) if places(ratio)[-1] > num_new else (ratio, largest)
    return places(smallest)
