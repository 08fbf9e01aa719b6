"""The loss landscape: of a quadratic, whose surface and curvature are known; of tasks, what is measured there."""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fd_kernels.dispatch
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fd_scale import api, distributed
from fd_scale.config import Recipe
from fd_scale.data import open_source
from fd_scale.diagnose import landscape
from fd_scale.diagnose.landscape import (
    Grid,
    draw,
    filter_normalised,
    measured,
    read_places,
    top_eigenvalue,
    write_places,
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
    weights = [
        torch.randn(4, 3, 2, 2),
        torch.randn(5),
        torch.zeros(2, 3),
        torch.ones(2, 1, 1),
        torch.tensor(2.0),
    ]
    convolution, vector, dead, scales, number = filter_normalised(weights, torch.Generator().manual_seed(0))
    torch.testing.assert_close(convolution.flatten(1).norm(dim=1), weights[0].flatten(1).norm(dim=1))
    assert not vector.any()
    assert not number.any()
    assert not scales.any(), "a temperature for each head: a filter of one number would go from itself to 0"
    assert not dead.any()
    again, *_ = filter_normalised(weights, torch.Generator().manual_seed(0))
    assert torch.equal(convolution, again)


@pytest.mark.parametrize("directions", [1, 2])
def test_places_around_a_quadratic_and_their_second_half(directions: int) -> None:
    weights, matrix, loss = quadratic()
    before = [weight.detach().clone() for weight in weights]
    grid = Grid(directions=directions, points=5, span=0.5, seed=3)
    written: list[int] = []
    found = measured(
        weights, lambda: {"loss": float(loss())}, grid, [], lambda found: written.append(len(found))
    )
    assert written == list(range(1, 5**directions + 1))
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.cat([d.flatten() for d in filter_normalised(before, generator)]) for _ in range(2))
    start = torch.cat([weight.flatten() for weight in before])
    along = (-0.5, -0.25, 0.0, 0.25, 0.5)
    places = [(x, y) for y in (along if directions == 2 else [0.0]) for x in along]
    for (x, y), place in zip(places, found, strict=True):
        at = start + x * first + y * second
        assert place["loss"] == pytest.approx(float(0.5 * at @ matrix @ at), rel=1e-4, abs=1e-4)
    resumed = measured(weights, lambda: {"loss": float(loss())}, grid, found[:3], lambda found: None)
    assert resumed == found


@pytest.mark.parametrize("directions", [1, 2])
def test_loss_and_accuracy_are_drawn(directions: int, tmp_path: Path) -> None:
    grid = Grid(directions=directions, points=3)
    draw([{"loss": x**2 + y**2, "top1": 1 - x**2} for x, y in grid.places], grid, tmp_path)
    words = (tmp_path / f"{grid.name}.svg").read_text()
    assert all(f"<!-- {word} -->" in words for word in ("loss", "top1", "in lengths of the weights"))
    assert ("<!-- first direction -->" in words) == (directions == 2)


def test_the_weights_come_back_after_an_error() -> None:
    weights, _, _ = quadratic()
    before = [weight.detach().clone() for weight in weights]
    with pytest.raises(ZeroDivisionError):
        measured(weights, lambda: {"loss": 1 / 0}, Grid(points=3), [], lambda rows: None)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_largest_eigenvalue() -> None:
    weights, _, loss = quadratic()
    unused = nn.Parameter(torch.ones(2))
    value, error = top_eigenvalue(loss, [*weights, unused])
    assert value == pytest.approx(5.0, rel=1e-3)
    assert error < 5e-3


def between(low: float, high: float, count: int) -> list[float]:
    return (low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(1))).tolist()


def diagonal(spectrum: list[float], dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, Any]:
    """A parameter, and the loss whose Hessian is a diagonal matrix."""
    weight, spectrum_N = nn.Parameter(torch.ones(len(spectrum), dtype=dtype)), torch.tensor(spectrum)
    return weight, lambda: 0.5 * (spectrum_N * weight * weight).sum()


@pytest.mark.parametrize(
    "spectrum",
    [
        [1.0, -0.98, *[0.0] * 50],
        [1.0, -0.9, *between(-0.5, 0.5, 500)],
        [-1.0, 0.95, *between(-0.5, 0.5, 500)],
        [1.0, *between(0.0, 0.9, 5000)],
        [100.0, *[0.0] * 1000],
        [-3.0],
        [5.0] * 4,
        [0.0] * 5,
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_ends_of_a_spectrum_the_larger_and_through_a_bulk(spectrum: list[float], seed: int) -> None:
    weight, loss = diagonal(spectrum)
    value, error = top_eigenvalue(loss, [weight], seed=seed)
    assert value == pytest.approx(max(spectrum, key=abs), rel=1e-3)
    assert error <= 1e-3 * abs(value)


def test_of_found_eigenvalues_come_copies_and_none_is_larger() -> None:
    """Steps go on long after it has settled, where vectors are orthogonal no more."""
    weight, loss = diagonal([7.0, 3.0, *between(0.0, 1.0, 200)])
    assert top_eigenvalue(loss, [weight], num_steps=100, tolerance=0.0)[0] == pytest.approx(7.0, rel=1e-5)


def test_the_error_says_how_near_an_eigenvalue_is() -> None:
    spectrum = between(-1.0, 1.0, 3000)
    weight, loss = diagonal(spectrum)
    errors = []
    for num_steps in (2, 5, 10, 20):
        value, error = top_eigenvalue(loss, [weight], num_steps)
        assert min(abs(value - each) for each in spectrum) <= error + 1e-6
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1


def test_eigenvalue_of_bf16_weights_and_of_a_loss_that_is_not_finite() -> None:
    weight, loss = diagonal([2.0, *between(0.0, 1.0, 300)], torch.bfloat16)
    assert top_eigenvalue(loss, [weight])[0] == pytest.approx(2.0, rel=2e-2)
    assert all(np.isnan(top_eigenvalue(lambda: loss() * torch.nan, [weight])))


TIMM_VIT = {
    "name": "vit_tiny_patch16_224",
    "img_size": 32,
    "overrides": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
}


@pytest.fixture
def built(make_recipe: Callable[..., Recipe]) -> Callable[..., Any]:
    def build(task: str, **changes: Any) -> Any:
        recipe = make_recipe(task, data__evaluation="digits:test", train__micro_batch=4, **changes)
        found = api.build_task(recipe, open_source("digits:train"))
        found.module.eval()
        torch.manual_seed(0)
        with (
            torch.no_grad()
        ):  # as after some steps: at first the query of a blank patch is zero, and has no direction
            for parameter in found.module.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return found

    return build


def curvature(task: Any) -> dict[str, Any]:
    parameters = [each for each in task.module.parameters() if each.requires_grad]
    return landscape._curvature(task, task.evaluation, parameters, distributed.ALONE)


def test_what_is_computed_again_has_second_derivatives_too(
    built: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block is recomputed in the backward pass, by another thread on a GPU: the kernels have none."""
    seen = []

    def noting(op: str, *tensors: Tensor, served: str | None) -> bool:
        seen.append(fd_kernels.dispatch._implementation)
        return False

    monkeypatch.setattr(sys.modules["fd_kernels.window_attention.op"], "use_triton", noting)
    plain = curvature(built("classification"))
    count = len(seen)
    assert curvature(built("classification", train__activation_checkpointing="block")) == plain
    assert abs(plain["top_eigenvalue"]) > 0.1
    assert plain["eigenvalue_images"] == 4
    assert len(seen) > 2 * count, "blocks are computed again"
    assert set(seen) == {"reference"}
    assert fd_kernels.dispatch._implementation == "auto"


def test_a_timm_model_has_a_hessian(built: Callable[..., Any]) -> None:
    """Its attention is torch's fused one, which has no second derivative."""
    assert abs(curvature(built("classification", model=TIMM_VIT))["top_eigenvalue"]) > 0.1


def test_the_loss_is_that_of_an_evaluation(built: Callable[..., Any], make_recipe: Any) -> None:
    """Also of a teacher that sees a share of the images in training: here it sees all."""
    recipe = make_recipe("distill")
    teacher = replace(recipe.distill.teachers[0], share=0.3)
    task: Any = built("distill", distill=replace(recipe.distill, teachers=[teacher]))
    batch = landscape._first_batch(task.evaluation, 300, distributed.ALONE)
    assert len(batch.labels) == 300
    with torch.no_grad():
        loss = float(landscape._loss(task, batch))
        assert loss == pytest.approx(task.evaluate(task.module, distributed.ALONE)["loss"], rel=1e-5)


@pytest.mark.parametrize(("most", "expected"), [(1, (7.0, 1)), (0, (None, 0))])
def test_fewer_images_where_memory_ends(
    built: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, most: int, expected: tuple[Any, int]
) -> None:
    def bounded(loss: Any, parameters: Any) -> tuple[float, float]:
        if len(loss.args[1].positions) > most:
            raise torch.OutOfMemoryError
        return 7.0, 0.0

    monkeypatch.setattr(landscape, "top_eigenvalue", bounded)
    found = curvature(built("classification"))
    assert (found["top_eigenvalue"], found["eigenvalue_images"]) == expected


def test_an_eigenvalue_that_did_not_settle_is_warned_of(
    built: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = built("classification")
    found = curvature(task)
    assert found["eigenvalue_error"] <= 1e-3 * abs(found["top_eigenvalue"])
    assert "settle" not in caplog.text
    monkeypatch.setattr(landscape, "top_eigenvalue", functools.partial(top_eigenvalue, num_steps=2))
    found = curvature(task)
    assert f"{found['top_eigenvalue']:.4g} may be off by {found['eigenvalue_error']:.2g}" in caplog.text


def test_places_are_taken_up_again(tmp_path: Path) -> None:
    file, found = tmp_path / "landscape.json", [{"loss": float(place)} for place in range(5)]
    assert read_places(file, {"points": 3}) == []
    write_places(file, {"points": 3}, found, {"top_eigenvalue": 2.0})
    assert [len(row) for row in json.loads(file.read_text())["rows"]] == [3, 2]
    assert read_places(file, {"points": 3}) == found
    file.write_text(file.read_text()[:20])
    assert read_places(file, {"points": 3}) == [], "somebody cut it"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": 5}, "(points 3, here 5)"),
        ({"step": 9, "checkpoint": "b" * 64}, "(step 7, here 9; checkpoint aaaaaaaa..., here bbbbbbbb...)"),
        ({"later": True}, "(later null, here true)"),
        ({"step": None}, "(step 7, here null)"),
    ],
)
def test_another_landscape_is_not_replaced(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Neither a whole one nor one that was stopped."""
    key = {"points": 3, "step": 7, "checkpoint": "a" * 64}
    file = tmp_path / "landscape.json"
    write_places(file, key, [{"loss": 1.0}], {})
    with pytest.raises(UserError, match="--out") as error:
        read_places(file, key | changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"points": 4}, {"points": 1}, {"span": 0.0}, {"span": float("nan")}, {"directions": 3}]
)
def test_bad_grids(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected"):
        Grid(**changes)
