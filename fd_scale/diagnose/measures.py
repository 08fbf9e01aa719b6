"""Numbers of attention maps and of features; each is a definition that a test knows the answer of.

Shape legend: B = images, M = windows of an image, h = heads, N = tokens that see each other, P = patches among them,
R = rows (tokens of several images), D, E = channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.diagnose.capture import AttentionMap

NUM_RANKED = 4
"""Windows, of the first images, whose maps' rank is taken: singular values are dear. Where they are of more tokens than
`FEW_TOKENS` it is one, and so many of its heads."""
FEW_TOKENS = 24 * 24

FEW_ROWS = 2048
"""Of so many rows the products with each other take 16 MiB a layer."""


def patch_distances(shape: tuple[int, int], stride_px: tuple[float, float]) -> Tensor:
    """Euclidean distances between the centres of patches.

    Args:
        shape: rows and columns of the patches.
        stride_px: pixels from one to the next, down and across.

    Returns:
        distance_PP, pixels, fp32.
    """
    rows, columns = (torch.arange(size) * stride for size, stride in zip(shape, stride_px, strict=True))
    places_P2 = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1).float()
    return torch.cdist(places_P2, places_P2)


def patches_only(probs_BMhNN: Tensor, num_prefix_tokens: int) -> Tensor:
    """Drops prefix tokens as queries and as keys; the rest of each row sums to 1 again."""
    if not num_prefix_tokens:
        return probs_BMhNN
    kept = probs_BMhNN[..., num_prefix_tokens:, num_prefix_tokens:]
    return kept / kept.sum(-1, keepdim=True).clamp_min(1e-12)


def head_similarity(probs_BMhNN: Tensor) -> Tensor:
    """Cosine similarity of the maps of every pair of heads, the mean over pairs, images and windows: a scalar.

    One head has no pair: NaN.
    """
    heads = probs_BMhNN.shape[2]
    unit_BMhX = F.normalize(probs_BMhNN.flatten(3), dim=-1)
    total = (unit_BMhX @ unit_BMhX.mT).sum((-2, -1)) - unit_BMhX.square().sum((-2, -1))
    return (total / (heads * (heads - 1))).mean() if heads > 1 else torch.tensor(float("nan"))


def effective_rank(values: Tensor) -> Tensor:
    """The exponential of the entropy of non-negative values taken as shares, over the last dimension.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    shares = values / values.sum(-1, keepdim=True)
    return torch.exp(-torch.special.xlogy(shares, shares).sum(-1))


def bias_share(logits_BMhNN: Tensor, bias_hNN: Tensor, unmasked_MNN: Tensor | None = None) -> Tensor:
    """How much of what varies over the keys of a query is the bias: var(bias) / (var(bias) + var(the rest)).

    Keys that a shift's mask hides are left out; without `unmasked_MNN` there are none. A scalar, the mean over queries.
    """
    rest = logits_BMhNN - bias_hNN
    seen = torch.ones_like(rest, dtype=torch.bool) if unmasked_MNN is None else unmasked_MNN[:, None]

    def variance(x: Tensor) -> Tensor:
        count = seen.sum(-1).clamp_min(1)
        mean = (x * seen).sum(-1, keepdim=True) / count[..., None]
        return ((x - mean).square() * seen).sum(-1) / count

    of_bias, of_rest = variance(bias_hNN.expand_as(rest)), variance(rest)
    return (of_bias / (of_bias + of_rest).clamp_min(1e-12)).mean()


def linear_cka(xs_RD: Sequence[Tensor], ys_RE: Sequence[Tensor]) -> list[list[float]]:
    """Similarity of each of some sets of features to each of others, of the same rows; 0..1.

    Rotations and one scale leave it as it is. Of few rows the products with each other are compared, once for each set;
    of many, which would fill the memory, the products of channels, for each pair: the result is the same.

    Source: Kornblith et al. 2019 (arXiv:1905.00414), section 3, the linear kernel.
    """
    xs, ys = ([each - each.mean(0) for each in side] for side in (xs_RD, ys_RE))
    by_rows = len(xs[0]) <= FEW_ROWS
    if by_rows:
        xs, ys = ([each @ each.T for each in side] for side in (xs, ys))
    own_x, own_y = ([_inner(each, each, by_rows) ** 0.5 for each in side] for side in (xs, ys))
    return [
        [_inner(x, y, by_rows) / (own_x[i] * own_y[j]) for j, y in enumerate(ys)] for i, x in enumerate(xs)
    ]


def _inner(x: Tensor, y: Tensor, by_rows: bool) -> float:
    """Of two kernels, which x and y are (by rows), or make."""
    return float((x.double() * y).sum() if by_rows else (x.T @ y).double().norm().square())


@dataclass
class FeatureStatistics:
    """Of tokens of several images."""

    spectrum: Tensor
    """(D,), eigenvalues of the covariance, the largest first."""
    effective_rank: float
    channel_std: Tensor
    """(D,), standard deviation of each channel."""
    token_norm: float
    """Mean length of a token."""


def feature_statistics(x_RD: Tensor) -> FeatureStatistics:
    """Returns what the tokens of several images are like."""
    x_RD = x_RD.double()
    centred_RD, (rows, channels) = x_RD - x_RD.mean(0), x_RD.shape
    # Of either side the eigenvalues are the same, but for zeros.
    products = centred_RD @ centred_RD.T if rows < channels else centred_RD.T @ centred_RD
    spectrum_D = torch.zeros(channels).double()
    spectrum_D[: len(products)] = torch.linalg.eigvalsh(products / (rows - 1)).flip(0).clamp_min(0.0)
    return FeatureStatistics(
        spectrum=spectrum_D.float(),
        effective_rank=float(effective_rank(spectrum_D)),
        channel_std=x_RD.std(0).float(),
        token_norm=float(x_RD.norm(dim=1).mean()),
    )


@dataclass
class LayerStatistics:
    """Means over images of what a layer's attention is like, gathered batch by batch."""

    shape: tuple[int, int]
    """Rows and columns of the patches that see each other."""
    num_images: int = 0
    distance_h: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sum over images of the mean attention distance of each head, pixels."""
    similarity: float = 0.0
    """Sum over images of `head_similarity`."""
    bias: float = 0.0
    """Sum over images of `bias_share`."""
    has_bias: bool = False
    map_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sum over images of the mean map over windows and heads."""
    ranks: list[float] = field(default_factory=list)
    """Effective rank of single maps."""

    def add(self, attention: AttentionMap) -> None:
        """Adds a batch."""
        probs = patches_only(attention.probs, attention.num_prefix_tokens)
        count = len(probs)
        distance_PP = patch_distances(attention.shape, attention.stride_px).to(probs.device)
        self.distance_h = self.distance_h + count * (probs * distance_PP).sum(-1).mean((0, 1, 3)).cpu()
        self.similarity += count * float(head_similarity(probs))
        self.map_sum = self.map_sum + count * probs.mean((0, 1, 2)).cpu()
        if attention.bias is not None:
            self.has_bias = True
            self.bias += count * float(bias_share(attention.logits, attention.bias, attention.unmasked))
        few = probs.shape[-1] <= FEW_TOKENS
        if len(self.ranks) < (NUM_RANKED if few else 1):
            # On the host: GPUs take singular values of small matrices one after the other.
            maps = probs.flatten(0, 1)[: NUM_RANKED - len(self.ranks) if few else 1].cpu()
            if not few:
                heads = maps.shape[1]
                maps = maps[:, torch.linspace(0, heads - 1, min(NUM_RANKED, heads)).round().long()]
            self.ranks += effective_rank(torch.linalg.svdvals(maps)).mean(-1).tolist()
        self.num_images += count

    @property
    def average_map(self) -> Tensor:
        """Mean over images, windows and heads."""
        return self.map_sum / self.num_images

    def numbers(self) -> dict[str, object]:
        """Returns what diagnosis.json holds of the layer."""
        average_PP = self.average_map
        near_PP = patch_distances(self.shape, (1.0, 1.0)) < 1.5
        return {
            "patches": list(self.shape),
            "distance_px": (self.distance_h / self.num_images).tolist(),
            "head_similarity": self.similarity / self.num_images if len(self.distance_h) > 1 else None,
            "effective_rank": sum(self.ranks) / len(self.ranks),
            "on_diagonal": float(average_PP.diagonal().mean()),
            "within_one_patch": float((average_PP * near_PP).sum(-1).mean()),
            "bias_share": self.bias / self.num_images if self.has_bias else None,
        }
