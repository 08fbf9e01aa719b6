"""PHI-S: one rotation and one scale that give all channels of a teacher the same variance.

Shape legend: N = tokens, D = channels of a teacher.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fd_scale.distributed import World
from fd_scale.errors import UserError


class PhiS:
    """Statistics of a teacher's tokens, and the standardisation that follows from them.

    Args:
        num_features: D.

    Raises:
        UserError: no Hadamard matrix of this size is known here.

    Source: Ranzinger et al. 2024 (arXiv:2410.01680), "PCA-Hadamard isotropic standardization".
    """

    def __init__(self, num_features: int) -> None:
        self.hadamard_DD = hadamard(num_features)
        self.sum_D = torch.zeros(num_features, dtype=torch.float64)
        self.products_DD = torch.zeros(num_features, num_features, dtype=torch.float64)
        self.count = torch.zeros(1, dtype=torch.float64)
        self.mean_D = self.rotation_DD = torch.empty(0)

    def to(self, device: torch.device) -> None:
        """Moves the statistics to a device."""
        self.hadamard_DD = self.hadamard_DD.to(device)
        self.sum_D, self.products_DD = self.sum_D.to(device), self.products_DD.to(device)
        self.count = self.count.to(device)

    def add(self, tokens_BLD: Tensor) -> None:
        """Counts tokens in."""
        tokens_ND = tokens_BLD.flatten(0, 1).double()
        self.sum_D += tokens_ND.sum(0)
        self.products_DD += tokens_ND.T @ tokens_ND
        self.count += len(tokens_ND)

    def finish(self, world: World) -> None:
        """Sums over ranks and computes the transform; the same on any number of ranks, but for rounding."""
        if world.size > 1:
            for part in (self.sum_D, self.products_DD, self.count):
                dist.all_reduce(part)
        mean_D = self.sum_D / self.count
        covariance_DD = self.products_DD / self.count - mean_D[:, None] * mean_D
        variances_D, vectors_DD = torch.linalg.eigh(covariance_DD)
        if not float(variances_D.sum()) > 0:
            raise UserError(
                "distill.loss: phi_s: the teacher gives the same feature everywhere; check its weights"
            )
        # The sign of an eigenvector is the solver's whim: the largest entry decides it.
        signs_D = vectors_DD.gather(0, vectors_DD.abs().argmax(0, keepdim=True)).sign()
        rotation_DD = self.hadamard_DD @ (vectors_DD * signs_D).T / variances_D.mean().sqrt()
        self.mean_D, self.rotation_DD = mean_D.float(), rotation_DD.float()

    def standardise(self, tokens_BLD: Tensor) -> Tensor:
        """Returns tokens with mean 0 and variance 1 in every channel, in fp32."""
        return (tokens_BLD.float() - self.mean_D) @ self.rotation_DD.T


def hadamard(size: int) -> Tensor:
    """Returns an orthogonal matrix whose entries all have the same magnitude, (size, size), fp64.

    Raises:
        UserError: size is not 2^k (q + 1) with q = 0, 1 or a prime that leaves 3 modulo 4.

    Source: Sylvester 1867 (doubling); Paley 1933, construction I.
    """
    core, doublings = size, 0
    while core % 2 == 0 and not _has_paley_matrix(core):
        core, doublings = core // 2, doublings + 1
    if core != 1 and not _has_paley_matrix(core):
        raise UserError(
            f"distill.loss: phi_s needs a Hadamard matrix, and none of {size} channels is known here; "
            "choose another loss"
        )
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core - 1)
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _has_paley_matrix(size: int) -> bool:
    q = size - 1
    return q % 4 == 3 and all(q % divisor for divisor in range(3, int(q**0.5) + 1, 2))


def _paley(q: int) -> Tensor:
    residues = {i * i % q for i in range(1, q)}
    character = torch.tensor(
        [0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)], dtype=torch.float64
    )
    index = torch.arange(q)
    matrix = torch.eye(q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] += character[(index[:, None] - index) % q]
    return matrix
