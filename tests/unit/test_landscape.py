"""The loss landscape: of a quadratic, whose surface and curvature are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fd_scale.diagnose.landscape import (
    Plane,
    filter_normalised,
    read_rows,
    surface,
    top_eigenvalue,
    write_rows,
)
from fd_scale.errors import UserError


def quadratic() -> tuple[list[nn.Parameter], Tensor, Any]:
    """A loss 0.5 x^T A x of one 4 x 3 weight and one vector, and its eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((4, 3), (5,))]
    basis, _ = torch.linalg.qr(torch.randn(17, 17, generator=generator))
    eigenvalues = torch.linspace(-3.0, 5.0, 17)
    matrix = basis @ eigenvalues.diag() @ basis.T

    def loss() -> Tensor:
        x = torch.cat([weight.flatten() for weight in weights])
        return 0.5 * x @ matrix @ x

    return weights, matrix, loss


def test_directions_are_as_long_as_the_filters() -> None:
    weights = [torch.randn(4, 3, 2, 2), torch.randn(5), torch.zeros(2, 3)]
    convolution, vector, dead = filter_normalised(weights, torch.Generator().manual_seed(0))
    torch.testing.assert_close(convolution.flatten(1).norm(dim=1), weights[0].flatten(1).norm(dim=1))
    assert not vector.any()
    assert not dead.any()
    again, *_ = filter_normalised(weights, torch.Generator().manual_seed(0))
    assert torch.equal(convolution, again)


def test_surface_of_a_quadratic_and_its_second_half() -> None:
    weights, matrix, loss = quadratic()
    before = [weight.detach().clone() for weight in weights]
    plane = Plane(points=5, span=0.5, seed=3)
    written: list[int] = []
    rows = surface(
        weights, lambda: {"loss": float(loss())}, plane, [], lambda rows: written.append(len(rows))
    )
    assert written == [1, 2, 3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.cat([d.flatten() for d in filter_normalised(before, generator)]) for _ in range(2))
    start = torch.cat([weight.flatten() for weight in before])
    for y, row in zip((-0.5, -0.25, 0.0, 0.25, 0.5), rows, strict=True):
        for x, point in zip((-0.5, -0.25, 0.0, 0.25, 0.5), row, strict=True):
            at = start + x * first + y * second
            assert point["loss"] == pytest.approx(float(0.5 * at @ matrix @ at), rel=1e-4, abs=1e-4)
    resumed = surface(weights, lambda: {"loss": float(loss())}, plane, rows[:3], lambda rows: None)
    assert resumed == rows


def test_the_weights_come_back_after_an_error() -> None:
    weights, _, _ = quadratic()
    before = [weight.detach().clone() for weight in weights]
    with pytest.raises(ZeroDivisionError):
        surface(weights, lambda: {"loss": 1 / 0}, Plane(points=3), [], lambda rows: None)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_largest_eigenvalue() -> None:
    weights, _, loss = quadratic()
    unused = nn.Parameter(torch.ones(2))
    assert top_eigenvalue(loss, [*weights, unused], num_steps=100) == pytest.approx(5.0, rel=1e-3)


def test_rows_of_another_plane_are_not_taken(tmp_path: Path) -> None:
    file, rows = tmp_path / "landscape.json", [[{"loss": 1.0}]]
    assert read_rows(file, {"points": 3}) == []
    write_rows(file, {"points": 3}, rows, {"top_eigenvalue": 2.0})
    assert read_rows(file, {"points": 3}) == rows
    assert read_rows(file, {"points": 5}) == []


@pytest.mark.parametrize("changes", [{"points": 4}, {"points": 1}, {"span": 0.0}, {"span": float("nan")}])
def test_bad_planes(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected"):
        Plane(**changes)
