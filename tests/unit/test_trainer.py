"""The loop's surroundings; what it computes is proved in tests/distributed."""

import contextlib
import gc
import logging
import multiprocessing
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fd_scale import api, log
from fd_scale.config import Recipe
from fd_scale.distill import DistillationTask
from fd_scale.errors import UserError
from fd_scale.metrics import read_metrics
from fd_scale.trainer import Trainer


@pytest.mark.slow
def test_collections_pass_over_what_is_built(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, pauses = [], []
    take_step = Trainer.train_step

    def train_step(trainer: Trainer, *arguments: Any) -> None:
        take_step(trainer, *arguments)
        frozen.append(gc.get_freeze_count())
        pauses.append(len(gc.get_objects()))  # what a full collection looks at

    monkeypatch.setattr(Trainer, "train_step", train_step)
    gc.collect()
    before = len(gc.get_objects())
    api.train(make_recipe(train__steps=2))
    assert min(frozen) >= before
    assert max(pauses) < before / 2
    assert gc.get_freeze_count() == 0, "what a run leaves can be collected"


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_run_leaves_no_model_in_memory(make_recipe: Callable[..., Recipe], stage: str) -> None:
    """A notebook trains one recipe after the other."""
    recipe = make_recipe(train__steps=1, train__ds_config=stage)
    [teacher] = recipe.distill.teachers  # type: ignore[union-attr]
    recipe = replace(recipe, distill=replace(recipe.distill, teachers=[replace(teacher, partitioned=True)]))
    trainer = api.start(recipe)
    trainer.train()
    assert isinstance(trainer.task, DistillationTask)
    models = [trainer.task.module, trainer.task.teachers[0].model, trainer.engine.optimizer]
    left = [weakref.ref(model) for model in models]
    del trainer, models
    gc.collect()
    assert [reference() for reference in left] == [None] * 3


def test_after_a_run_in_parts_torch_is_as_before(make_recipe: Callable[..., Recipe]) -> None:
    """DeepSpeed's linear layer stays in torch's place; of others' models it has no part."""
    api.train(make_recipe("classification", train__steps=1, train__ds_config="zero3"))
    layer, x_BC = nn.Linear(3, 2), torch.randn(4, 3)
    assert torch.allclose(torch.func.vmap(layer)(x_BC), x_BC @ layer.weight.T + layer.bias)
    assert "Addmm" in str(layer(x_BC).grad_fn)


def test_the_callers_logging_stays_as_it_is(
    make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    mine = logging.StreamHandler(sys.stderr)
    root.addHandler(mine)
    try:
        log.set_up()  # takes away what a test before this one has left
        before = list(root.handlers), root.level
        assert mine in root.handlers
        recipe = make_recipe(train__steps=1)
        api.train(recipe)
        assert (list(root.handlers), root.level) == before
    finally:
        root.removeHandler(mine)
    assert capsys.readouterr().err.count("1 steps of 16 images") == 1
    assert "1 steps of 16 images" in (Path(recipe.run_dir) / "logs/rank_0.log").read_text()


@pytest.mark.parametrize(("rank", "shown"), [(0, "so it is\nbad\n"), (1, "bad\n")])
def test_where_nobody_has_set_up_logging_the_console_shows_ours(
    capsys: pytest.CaptureFixture[str], rank: int, shown: str
) -> None:
    for _ in range(2):
        log.set_up(rank)
    logging.getLogger("fd_scale.any").info("so it is")
    logging.getLogger("somebody.else").info("not ours")
    logging.getLogger("fd_kernels.any").error("bad")
    assert re.sub(r"\d\d:\d\d:\d\d [A-Z]+ ", "", capsys.readouterr().err) == shown


def test_a_start_that_fails_gives_the_folder_back(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a notebook would keep it from all others for as long as it stays open."""

    def interrupted(*_: Any) -> None:
        assert lock.exists()
        raise KeyboardInterrupt

    recipe = make_recipe(train__steps=1)
    lock = Path(recipe.run_dir) / "lock"
    monkeypatch.setattr(api, "Engine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        api.start(recipe)
    assert not lock.exists()
    assert str(lock.parent) not in str(logging.getLogger().handlers)


SETTINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("setting", [*SETTINGS, "dtype"])
def test_what_a_caller_has_set_in_torch_stays_with_the_caller(
    make_recipe: Callable[..., Recipe], tmp_path: Path, setting: str
) -> None:
    def losses(name: str) -> list[float]:
        run = str(tmp_path / name)
        api.train(make_recipe("classification", run_dir=run, train__steps=2))
        evaluated: float = api.evaluate(run, ["data.evaluation=digits:test"])["loss"]
        return [line["loss"] for line in read_metrics(Path(run), "train")] + [evaluated]

    plain = losses("plain")
    dtype = torch.float64 if setting == "dtype" else torch.float32
    torch.manual_seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    try:
        with SETTINGS.get(setting, contextlib.nullcontext)():
            torch.set_default_dtype(dtype)
            assert losses("set") == plain
            assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(3), drawn)


def test_a_worker_that_imports_a_script_starts_no_run(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    recipe = make_recipe()
    with pytest.raises(UserError, match=r'put what that script runs below `if __name__ == "__main__":`'):
        api.train(recipe)
    assert not Path(recipe.run_dir).exists()
