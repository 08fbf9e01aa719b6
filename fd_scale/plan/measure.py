"""What a run really holds, beside what was predicted."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from rich.table import Table

from fd_scale.plan.estimate import Choice
from fd_scale.trainer import Trainer

NUM_STEPS = 2
"""The optimizer's states exist after the first."""


@dataclass(frozen=True)
class Measured:
    """Bytes of the rank that holds most, at the fullest moment between a backward pass and a step."""

    parameters: int
    gradients: int
    optimizer: int
    total: int | None
    """Peak of all that torch allocated on CUDA; none on the CPU."""

    @property
    def steady(self) -> int:
        """Parameters, gradients and optimizer states."""
        return self.parameters + self.gradients + self.optimizer


def measure(trainer: Trainer) -> Measured:
    """Takes a few steps and looks at what the engine holds; all ranks call it.

    Args:
        trainer: a fresh one; it is of no use afterwards.
    """
    engine, world = trainer.engine, trainer.world
    found: list[dict[str, int]] = []
    engine.after_backward = lambda: found.append(engine.state_bytes())
    engine.train()
    with contextlib.closing(trainer.loader.iterate(0)) as batches:
        for _ in range(NUM_STEPS):
            micro_batches = next(batches)
            trainer.train_step(micro_batches, trainer.agree(micro_batches))
    most = max(found, key=lambda held: sum(held.values()))
    on_cuda = world.device.type == "cuda"
    most |= {"total": torch.cuda.max_memory_allocated(world.device)} if on_cuda else {}
    ranks = world.gather(most)
    held = {name: max(rank[name] for rank in ranks) for name in most}
    return Measured(held["parameters"], held["gradients"], held["optimizer"], held.get("total"))


def measured_table(predicted: Choice, measured: Measured) -> Table:
    """Predicted beside measured."""
    table = Table("MiB a rank", "predicted", "measured", "off by", title=f"{NUM_STEPS} steps on this machine")
    state = predicted.memory.state
    rows: list[tuple[str, float, float]] = [
        ("parameters", state.parameters, measured.parameters),
        ("gradients", state.gradients, measured.gradients),
        ("optimizer", state.optimizer, measured.optimizer),
        ("sum of these", state.steady, measured.steady),
    ]
    if measured.total is not None:
        rows.append(("all, on CUDA", predicted.memory.total, measured.total))
    for name, expected, got in rows:
        table.add_row(
            name, f"{expected / 2**20:.2f}", f"{got / 2**20:.2f}", f"{expected / got - 1:+.1%}" if got else ""
        )
    return table
