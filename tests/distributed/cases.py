"""What ranks do in the tests: top-level functions, so that a fork server can find them."""

import errno
import functools
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_graphs import STAND_INS
from torch import Tensor, nn

from fd_scale import api, checkpoint, distributed, ds_config, log
from fd_scale.checkpoint import Checkpoints, TrainState
from fd_scale.cluster import check as cluster_check
from fd_scale.config import Recipe, build_recipe, load_recipe, to_dict
from fd_scale.data import Batch, open_source
from fd_scale.diagnose.landscape import Grid
from fd_scale.engine import Engine, traffic
from fd_scale.errors import UserError
from fd_scale.finetune.linear_probe import probed_backbone
from fd_scale.metrics import read_metrics
from fd_scale.models import resolved
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


def train_all(runs: list[dict[str, Any]]) -> None:
    """Trains several recipes, one after the other, on the same ranks."""
    for values in runs:
        train(values)


def train_all_compiled(runs: list[dict[str, Any]], backend: str) -> None:
    """Trains several recipes in turn, their blocks compiled by a backend of `torch.compile`."""
    torch.compile = functools.partial(torch.compile, backend=backend)
    train_all(runs)


def train_all_with_stand_ins(runs: list[dict[str, Any]]) -> None:
    """As `train_all`, on a CPU, with what stands in for CUDA graphs there."""
    for name, value in STAND_INS.items():
        setattr(torch.cuda, name, value)
    refused = ds_config.resolve
    ds_config.resolve = lambda config, recipe, world_size, _: refused(config, recipe, world_size, "cuda")
    train_all(runs)


def initial_backbone(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights that a linear probe without given weights computes its features with."""
    log.set_up()
    recipe = resolved(build_recipe(values))
    return {name: tensor.numpy() for name, tensor in probed_backbone(recipe).state_dict().items()}


def landscape(run_dir: str, points: int) -> dict[str, Any]:
    """The loss around a run's weights, over all of its evaluation images."""
    return api.landscape(run_dir, Grid(points=points, span=0.5), num_images=10**6)


def landscape_error(run_dir: str, points: int) -> str:
    """The sentence by which a landscape is refused; empty where it is not."""
    try:
        landscape(run_dir, points)
    except UserError as error:
        return str(error)
    return ""


def evaluate(path: str, overrides: list[str]) -> dict[str, Any]:
    """Evaluates a run or a checkpoint."""
    return api.evaluate(path, overrides)


def measured_state(values: dict[str, Any]) -> list[tuple[float, float]]:
    """Returns predicted and measured bytes of parameters, gradients and optimizer states."""
    predicted, found = api.measure(build_recipe(values))
    state = predicted.memory.state
    return [
        (state.parameters, found.parameters),
        (state.gradients, found.gradients),
        (state.optimizer, found.optimizer),
    ]


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

        def train_step(self: Trainer, *arguments: Any) -> None:
            if self.state.step == step:
                self.complete_checkpoint()  # which a slow disk may still be writing
                self.world.barrier()
                die()
            original(self, *arguments)

        Trainer.train_step = train_step  # type: ignore[method-assign]
    elif where == "before the evaluation":
        evaluate = Trainer.evaluate

        def die_then_evaluate(self: Trainer) -> None:
            if self.state.step == step:
                self.complete_checkpoint()
                self.world.barrier()  # the manifest stands
                die()
            evaluate(self)

        Trainer.evaluate = die_then_evaluate  # type: ignore[method-assign]
    else:
        snapshot, write, complete = Engine.snapshot, checkpoint._write, Checkpoints.complete
        saved = f"step_{step:08d}"

        def die_then_snapshot(self: Engine, folder: Path) -> dict[str, Any]:
            if where == "before the files" and folder.name == saved:
                die()
            return snapshot(self, folder)

        def die_while_writing(folder: Path, objects: dict[str, Any], probes: bool) -> Any:
            if where == "while writing" and folder.name == saved:
                write(folder, dict(list(objects.items())[:1]), probes)
                die()
            return write(folder, objects, probes)

        def write_then_die(self: Checkpoints, *arguments: Any) -> dict[str, float]:
            if (
                where == "before the manifest"
                and self.pending is not None
                and self.pending.folder.name == saved
            ):
                self.pending.written.result()
                die()
            return complete(self, *arguments)

        Engine.snapshot = die_then_snapshot  # type: ignore[method-assign]
        checkpoint._write = die_while_writing
        Checkpoints.complete = write_then_die  # type: ignore[method-assign]
    train(values)


def train_with_bad_losses(
    values: dict[str, Any], poisoned: list[int], factor: float
) -> tuple[list[bool], str]:
    """Trains with the last rank's loss multiplied at some steps; returns which were skipped, and the error.

    Steps are counted from the start of the process, also after a rollback.
    """
    skipped: list[bool] = []
    forward, step = Engine.forward, Engine.step

    def bad_forward(self: Engine, **inputs: Any) -> dict[str, Tensor]:
        outputs = forward(self, **inputs)
        bad = len(skipped) in poisoned and self.world.rank == self.world.size - 1
        # The loss sums are scalars.
        return {name: out * factor if bad and out.dim() == 0 else out for name, out in outputs.items()}

    def noted(self: Engine) -> None:
        step(self)
        skipped.append(self.skipped)

    Engine.forward, Engine.step = bad_forward, noted  # type: ignore[method-assign]
    return skipped, train_or_error(values)


def train_with_bad_activations(
    values: dict[str, Any], poisoned: list[int]
) -> tuple[list[bool], dict[str, np.ndarray]]:
    """Trains with NaN before the first BatchNorm at some steps; returns which were skipped, and its statistics."""
    skipped: list[bool] = []
    norms: list[nn.Module] = []
    init, step = Engine.__init__, Engine.step

    def hooked(self: Engine, module: nn.Module, *args: Any) -> None:
        init(self, module, *args)
        norms.extend(part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
        norms[0].register_forward_pre_hook(
            lambda norm, inputs: (
                (inputs[0] * float("nan"),) if len(skipped) in poisoned and norm.training else None
            )
        )

    def noted(self: Engine) -> None:
        step(self)
        skipped.append(self.skipped)

    Engine.__init__, Engine.step = hooked, noted  # type: ignore[method-assign]
    train(values)
    return skipped, {name: value.numpy() for name, value in norms[0].named_buffers()}


def train_until_preempted(values: dict[str, Any], step: int) -> TrainState:
    """Trains; writes the run folder's `preempt` file before step number `step`."""
    original = Trainer.agree

    def agree(self: Trainer, micro_batches: list[Batch]) -> dict[str, float]:
        if self.state.step == step - 1 and self.world.is_main:
            (Path(values["run_dir"]) / "preempt").touch()
        return original(self, micro_batches)

    Trainer.agree = agree  # type: ignore[method-assign]
    return train(values)


# Of the tiny Swin, two stages of one and two blocks; all else is layer 4.
LAYERS = {
    "patch_embed": 0, "layers.0": 1, "layers.1.downsample": 1, "layers.1.blocks.0": 2, "layers.1.blocks.1": 3,
    "layers.1.position_bias": 3,
}  # fmt: skip


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
    groups = []
    for name, parameter in module.named_parameters():
        decays = parameter.ndim > 1 and not any(part in name for part in spared)
        layer = next((layer for start, layer in LAYERS.items() if name.startswith(f"backbone.{start}")), 4)
        groups.append({
            "params": [parameter], "weight_decay": recipe.optim.weight_decay if decays else 0.0,
            "scale": recipe.optim.layer_decay ** (4 - layer),
        })  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=recipe.optim.lr, betas=recipe.optim.betas, eps=recipe.optim.eps)
    rates = cosine(recipe)
    found = []
    for step, micro_batches in zip(range(trainer.num_steps), trainer.loader.iterate(0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rates[step] * group["scale"]
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

    original = checkpoint._write

    def write(folder: Path, objects: dict[str, Any], probes: bool) -> Any:
        if folder.name >= f"step_{from_step:08d}":
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        return original(folder, objects, probes)

    checkpoint._write = write
    return train_or_error(values)


def train_with_a_slow_disk(values: dict[str, Any], saved: int, until: int) -> TrainState:
    """Trains; the checkpoint of step `saved` is not written before step `until` is taken."""
    taken, write, train_step = threading.Event(), checkpoint._write, Trainer.train_step

    def write_late(folder: Path, objects: dict[str, Any], probes: bool) -> Any:
        if folder.name == f"step_{saved:08d}":
            assert taken.wait(60), "training waits for the disk"
        return write(folder, objects, probes)

    def step_and_tell(self: Trainer, *arguments: Any) -> None:
        train_step(self, *arguments)
        if self.state.step == until:
            taken.set()

    checkpoint._write = write_late
    Trainer.train_step = step_and_tell  # type: ignore[method-assign]
    return train(values)


def train_and_watch_a_checkpoint(values: dict[str, Any]) -> list[bool]:
    """Trains; returns before each step whether a checkpoint is in hand. The disk is done by the end of step 4."""
    seen: list[bool] = []
    train_step = Trainer.train_step

    def look_then_step(self: Trainer, *arguments: Any) -> None:
        pending = self.checkpoints.pending
        seen.append(pending is not None)
        train_step(self, *arguments)
        if pending is not None and self.state.step == 4:
            pending.written.result()

    Trainer.train_step = look_then_step  # type: ignore[method-assign]
    train(values)
    return seen


def train_on_a_full_disk(values: dict[str, Any], step: int, victim: int) -> str:
    """Trains; rank `victim` finds no space for the checkpoint of `step`."""
    write = checkpoint._write

    def write_or_not(folder: Path, objects: dict[str, Any], probes: bool) -> Any:
        if folder.name == f"step_{step:08d}" and int(os.environ["RANK"]) == victim:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, objects, probes)

    checkpoint._write = write_or_not
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
        teachers = values["distill"]["teachers"] if values["distill"] else []
        if values["classification"]:
            values["classification"]["num_classes"] = 10
        for model in (values["model"], *(teacher["model"] for teacher in teachers)):
            model["weights"] = None
            if model["img_size"] == 640:
                model["img_size"] = 320
            model["overrides"] |= swin if "swin" in model["name"] else vit
        values["run_dir"] = f"{folder}/{name}"
        values["data"] |= {"train": "digits:train", "evaluation": None, "num_workers": 0}
        values["optim"]["warmup_epochs"] = 0.0
        values["train"] |= {"device": "cpu", "global_batch": 4, "micro_batch": 2, "epochs": None, "steps": 2}
        values["log"]["every_steps"] = 1
        train(values)
        found[name] = losses(values["run_dir"])
    return found


def sent_bytes(values: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Trains; returns what this rank sends in each step, and the elements of each trained parameter."""
    sent: list[float] = []
    original = Trainer.train_step

    def train_step(self: Trainer, *arguments: Any) -> None:
        before = self.engine.sent_bytes
        original(self, *arguments)
        sent.append(self.engine.sent_bytes - before)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    recipe = build_recipe(values)
    world = distributed.start("cpu", 60)
    trainer = api.build_trainer(recipe, world)
    sizes = [getattr(p, "ds_numel", p.numel()) for p in trainer.task.module.parameters()]
    trainer.train()
    return sent, sizes


def collectives(values: dict[str, Any]) -> tuple[int, int]:
    """Trains; returns the gathers and the other collectives of the last step, as DeepSpeed calls them."""
    called: list[str] = []
    counting = traffic.Traffic._counting

    def noting(self: traffic.Traffic, name: str, collective: Any) -> Any:
        counted = counting(self, name, collective)

        def noted(*args: Any, **kwargs: Any) -> Any:
            if not self._inside:
                called.append(name)
            return counted(*args, **kwargs)

        return noted

    train_step = Trainer.train_step
    found: list[str] = []

    def note_step(self: Trainer, *arguments: Any) -> None:
        called.clear()
        train_step(self, *arguments)
        found[:] = called

    traffic.Traffic._counting = noting  # type: ignore[method-assign]
    Trainer.train_step = note_step  # type: ignore[method-assign]
    sent_bytes(values)
    gathers = sum("gather" in name for name in found)
    return gathers, len(found) - gathers


def network_row(failing: int | None) -> tuple[str, str]:
    """What `check --cluster` says of the network; a rank may lack the memory for it."""
    world = distributed.start("cpu", 60)
    if world.rank == failing:
        os.environ["SLURMD_NODENAME"] = "n7"
        cluster_check.CPU_BYTES = 2**50
    row = cluster_check._network(world)
    return row.verdict, row.detail


def train_without_saving(values: dict[str, Any]) -> TrainState:
    """Trains; a snapshot for a checkpoint is an error."""

    def refuse(self: Engine, folder: Path) -> dict[str, Any]:
        raise AssertionError(f"{folder} is saved")

    Engine.snapshot = refuse  # type: ignore[method-assign]
    return train(values)
