"""When a recorded module replays; that what it replays is right is seen on a GPU (tests/distributed/test_gpu.py)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fd_scale import ds_config
from fd_scale.config import Recipe
from fd_scale.cuda_graphs import record
from fd_scale.errors import UserError


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return x if scale is None else x * scale


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Scaled:
    """A module whose replay gives -1: the CPU records nothing."""

    def stand_in(module: nn.Module, samples: tuple[Tensor, ...], allow_unused_input: bool) -> None:
        def forward(*inputs: Tensor) -> Tensor:
            assert len(inputs) == len(samples)
            return torch.tensor(-1.0)

        module.forward = forward

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    module = Scaled()
    record(module, torch.zeros(4, 3), torch.zeros(4, 1))
    return module


def test_inputs_like_the_samples_are_replayed(recorded: Scaled) -> None:
    assert recorded(torch.ones(4, 3), torch.ones(4, 1)) == -1


@pytest.mark.parametrize(
    ("rows", "scale"), [(3, torch.full((3, 1), 2.0)), (4, None), (4, torch.full((4, 3), 2.0))], ids=str
)
def test_other_inputs_are_not(recorded: Scaled, rows: int, scale: Tensor | None) -> None:
    expected = torch.ones(rows, 3) * (1 if scale is None else 2)
    assert torch.equal(recorded(torch.ones(rows, 3), scale), expected)


def test_the_other_mode_is_not(recorded: Scaled) -> None:
    recorded.eval()
    assert torch.equal(recorded(torch.ones(4, 3), torch.ones(4, 1)), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("stage", "micro_batch", "partitioned", "sentence"),
    [
        (1, 4, False, "a step is 2 micro-batches"),
        (3, 8, True, "no teacher is whole"),
        (1, 8, True, None),
        (2, 4, True, None),
        (3, 8, False, None),
    ],
)
def test_graphs_are_refused_where_they_would_be_wrong(
    make_recipe: Callable[..., Recipe], stage: int, micro_batch: int, partitioned: bool, sentence: str | None
) -> None:
    changes: dict[str, Any] = {"train__cuda_graphs": True, "train__micro_batch": micro_batch}
    recipe = make_recipe(train__global_batch=8, train__ds_config=f"zero{stage}", **changes)
    assert recipe.distill is not None
    object.__setattr__(recipe.distill.teachers[0], "partitioned", partitioned)
    if sentence is None:
        ds_config.resolve(ds_config.read(recipe.train.ds_config), recipe, 1, "cuda")
        return
    with pytest.raises(UserError, match=f"train.cuda_graphs: .*{sentence}"):
        ds_config.resolve(ds_config.read(recipe.train.ds_config), recipe, 1, "cuda")
