"""What ranks do in the tests: top-level functions, so that a fork server can find them."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fd_scale import api, distributed, log
from fd_scale.checkpoint import TrainState
from fd_scale.config import Recipe, build_recipe, load_recipe, to_dict
from fd_scale.data import Batch, open_source
from fd_scale.engine import Engine
from fd_scale.errors import UserError
from fd_scale.metrics import read_metrics
from fd_scale.trainer import Trainer


def losses(run_dir: str | Path, kind: str = "train") -> list[float]:
    """Returns the loss of every line of a run's metrics."""
    return [line["loss"] for line in read_metrics(Path(run_dir), kind)]


def curve(run_dir: str | Path) -> list[tuple[float, float]]:
    """Returns loss and gradient norm of every step: AdamW alone would hide a wrongly scaled gradient."""
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(Path(run_dir), "train")]


def train(values: dict[str, Any]) -> TrainState:
    """Trains a recipe to its end."""
    return api.train(build_recipe(values))


def train_or_error(values: dict[str, Any]) -> str:
    """Trains; returns the sentence of a UserError, empty where there was none."""
    try:
        train(values)
    except UserError as error:
        return str(error)
    return ""


def train_then_die(values: dict[str, Any], step: int, where: str, victim: int) -> None:
    """Trains; SIGKILL ends rank `victim` after `step` steps, between steps or inside a save."""

    def die() -> None:
        if int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "between steps":
        original = Trainer.train_step

        def train_step(self: Trainer, micro_batches: list[Batch]) -> None:
            if self.state.step == step:
                die()
            original(self, micro_batches)

        Trainer.train_step = train_step  # type: ignore[method-assign]
    elif where == "before the evaluation":
        evaluate = Trainer.evaluate

        def die_then_evaluate(self: Trainer) -> None:
            if self.state.step == step:
                die()
            evaluate(self)

        Trainer.evaluate = die_then_evaluate  # type: ignore[method-assign]
    else:
        save = Engine.save

        def save_then_die(self: Engine, folder: Path) -> None:
            if where == "before the files" and folder.name == f"step_{step:08d}":
                die()
            save(self, folder)
            if where == "before the manifest" and folder.name == f"step_{step:08d}":
                die()

        Engine.save = save_then_die  # type: ignore[method-assign]
    train(values)


def train_with_nan(values: dict[str, Any], poisoned: list[int]) -> tuple[list[bool], str]:
    """Trains with a NaN in the loss of the last rank at some steps; returns which were skipped, and the error."""
    skipped = []
    original = Engine.backward_and_step

    def backward_and_step(self: Engine, loss: Tensor) -> None:
        bad = len(skipped) in poisoned and self.world.rank == self.world.size - 1
        original(self, loss * float("nan") if bad else loss)
        skipped.append(self.skipped)

    Engine.backward_and_step = backward_and_step  # type: ignore[method-assign]
    return skipped, train_or_error(values)


def train_until_preempted(values: dict[str, Any], step: int) -> TrainState:
    """Trains; writes the run folder's `preempt` file before step number `step`."""
    original = Trainer.train_step

    def train_step(self: Trainer, micro_batches: list[Batch]) -> None:
        if self.state.step == step - 1 and self.world.is_main:
            (Path(values["run_dir"]) / "preempt").touch()
        original(self, micro_batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    return train(values)


def plain_curve(recipe: Recipe) -> list[tuple[float, float]]:
    """The same training in a bare PyTorch loop: one process, whole batches, torch's AdamW, no engine.

    Only data, module and drop path masks are the project's: what is compared is everything between them.
    """
    log.set_up()
    world = distributed.start("cpu", 60)
    trainer = api.build_trainer(recipe, world)  # for its task and loader; its engine is not used
    task, module = trainer.task, trainer.task.module
    task.prepare(world, trainer.loader)
    spared = ("cpb", "logit_scale", "cls_token", "pos_embed")
    decayed = [
        p for n, p in module.named_parameters() if p.ndim > 1 and not any(part in n for part in spared)
    ]
    others = [p for p in module.parameters() if all(p is not d for d in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.optim.lr, betas=recipe.optim.betas, eps=recipe.optim.eps, weight_decay=recipe.optim.weight_decay,
    )  # fmt: skip
    rates = cosine(recipe)
    found = []
    for step, micro_batches in zip(range(trainer.num_steps), trainer.loader.iterate(0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.zero_grad()
        [batch] = micro_batches
        outputs = module(**task.inputs(batch))
        loss = torch.stack([outputs[name] / count for name, count in task.counts(batch).items()]).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.optim.grad_clip)
        optimizer.step()
        found.append((float(loss), float(norm)))
    return found


def cosine(recipe: Recipe) -> list[float]:
    """Half a cosine from lr to 0, written out."""
    steps = recipe.train.steps
    assert steps is not None
    return [float(recipe.optim.lr * (1 + np.cos(np.pi * step / steps)) / 2) for step in range(steps)]


def probe_images() -> Tensor:
    """Two images of 24 px, the same everywhere."""
    return torch.linspace(-1, 1, 2 * 3 * 24 * 24).view(2, 3, 24, 24)


def train_and_look(values: dict[str, Any]) -> np.ndarray:
    """Trains; returns the backbone's tokens for `probe_images`, under ZeRO-3 too."""
    found = []
    original = Trainer.train

    def train_then_look(self: Trainer) -> TrainState:
        state = original(self)
        found.append(_backbone_tokens(self, probe_images()).numpy())
        return state

    Trainer.train = train_then_look  # type: ignore[method-assign]
    train(values)
    return found[0]


def _backbone_tokens(trainer: Trainer, images_BCHW: Tensor) -> Tensor:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    module = trainer.task.module
    with torch.no_grad(), GatheredParameters(list(module.parameters())):
        weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fresh = api.build_task(trainer.recipe, open_source(trainer.recipe.data.train)).module
    fresh.load_state_dict(weights)
    with torch.no_grad():
        return fresh.get_submodule("backbone")(images_BCHW)


def train_with_small_files(values: dict[str, Any], largest_file: int, from_step: int) -> str:
    """Trains; from `from_step` on no file can grow beyond `largest_file` bytes, as on a full disk."""
    import resource

    original = Engine.save

    def save(self: Engine, folder: Path) -> None:
        if folder.name >= f"step_{from_step:08d}":
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        original(self, folder)

    Engine.save = save  # type: ignore[method-assign]
    return train_or_error(values)


def train_partly_labelled(values: dict[str, Any]) -> TrainState:
    """Trains on digits of which all that look like a 0, 1, 2 or 3 lost their label."""
    original = api.open_source

    def open_source_partly(spec: str) -> Any:
        source: Any = original(spec)
        source.labels_N = np.where(source.labels_N < 4, -1, source.labels_N)
        return source

    api.open_source = open_source_partly  # type: ignore[attr-defined]
    return train(values)


def train_recipes(names: list[str], folder: str) -> dict[str, list[float]]:
    """Takes two real steps of each recipe, with its own precision and ZeRO stage, on models made small."""
    vit = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    swin = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    found = {}
    for name in names:
        values = to_dict(load_recipe(name))
        for model in (values["model"], *(teacher["model"] for teacher in values["distill"]["teachers"])):
            model["weights"] = None
            model["overrides"] |= swin if "swin" in model["name"] else vit
        values["run_dir"] = f"{folder}/{name}"
        values["data"] |= {"train": "digits:train", "evaluation": None, "num_workers": 0}
        values["optim"]["warmup_epochs"] = 0.0
        values["train"] |= {"device": "cpu", "global_batch": 4, "micro_batch": 2, "epochs": None, "steps": 2}
        values["log"]["every_steps"] = 1
        train(values)
        found[name] = losses(values["run_dir"])
    return found
