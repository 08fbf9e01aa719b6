"""AdamW, its parameter groups, the learning rate of every step, and the moving average of the weights."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fd_scale.config import OptimConfig
from fd_scale.errors import UserError
from fd_scale.shards import AVERAGE


def learning_rates(
    config: OptimConfig, num_steps: int, steps_per_epoch: int, scales: Sequence[float] = (1.0,)
) -> np.ndarray:
    """Returns the learning rates of every step: linear warm-up, then half a cosine or a straight line.

    Args:
        config: peak, first and last value; length of the warm-up; how it falls.
        num_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of an epoch.
        scales: factor of the peak for each parameter group; the first and last values are the same in all.

    Returns:
        fp64 array of shape (num_steps, len(scales)).
    """
    warmup = min(config.warmup_steps + round(config.warmup_epochs * steps_per_epoch), num_steps)
    peaks = config.lr * np.array(scales)
    rising = np.linspace(np.full_like(peaks, config.warmup_lr), peaks, warmup, endpoint=False)
    progress = np.arange(num_steps - warmup)[:, None] / max(num_steps - warmup, 1)
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + np.cos(np.pi * progress))
    falling = config.min_lr + (peaks - config.min_lr) * left
    return np.concatenate([rising, falling])


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    undecayed: set[str],
    num_dims: Callable[[nn.Parameter], int] = torch.Tensor.dim,
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Splits parameters by the factor of their learning rate, and into those that decay and those that do not.

    Args:
        module: trained module.
        weight_decay: decay of the first group.
        undecayed: names (as in `named_parameters`) spared besides biases and other 1-D parameters.
        num_dims: dimensions of a parameter; of one that ZeRO-3 holds in parts, those of the whole.
        lr_scales: name -> factor of the peak learning rate; those that are missing have 1.

    Returns:
        Parameter groups for a torch optimizer, with their factor as `lr_scale`, the largest first.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = num_dims(parameter) <= 1 or name.endswith(".bias") or name in undecayed
            groups[(lr_scales or {}).get(name, 1.0), not spared].append(parameter)
    return [
        {"params": groups[scale, decays], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for scale, decays in sorted(groups, reverse=True)
    ]


def apex_is_importable() -> bool:
    """True where NVIDIA's Apex with its fused kernels is installed (PyPI's `apex` is another thing)."""
    return importlib.util.find_spec("amp_C") is not None


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig, with_apex: bool) -> torch.optim.Optimizer:
    """Returns AdamW: Apex's fused one where it is wanted and importable, else torch's fused one.

    Its learning rate is 0 until the engine sets that of a step: DeepSpeed steps some optimizers once
    on zero gradients while it builds its buffers, and weight decay must not act then.
    """
    settings: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if with_apex and apex_is_importable():
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips and refuses a non-finite gradient, as DeepSpeed's own wrappers do.

    DeepSpeed wraps no optimizer at stage 0 in fp32: there it reads `overflow` and
    `_global_grad_norm` of the optimizer it was given, which are the same as its wrappers'.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.max_norm = config.grad_clip or float("inf")
        self.overflow = False
        self._global_grad_norm: float | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clips, then steps; a gradient that is not finite leaves weights and moments as they are."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self._global_grad_norm = float(norm)
        self.overflow = not np.isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step(closure)


def refuse_average_of_statistics(module: nn.Module, config: OptimConfig) -> None:
    """Looks whether weights that are to be averaged have running statistics beside them.

    Raises:
        UserError: they do: BatchNorm's, which would be those of the weights and not of their average.
    """
    if config.ema_decay and any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()
    ):
        raise UserError(
            f"optim.ema_decay: got {config.ema_decay}, and the model has BatchNorm layers, whose running statistics "
            "are those of the weights, not of their average; set it to 0"
        )


class WeightAverage:
    """An exponential moving average of the weights, kept beside the moments: cut, saved and loaded as they are.

    Args:
        optimizer: torch's, which has the states of `masters`.
        masters: this rank's part of the weights, in fp32, as the optimizer steps them.
        decay: of the average in a step, below 1; 0: there is none.

    Source: as timm's `ModelEmaV3` without its warm-up; the first value is that of the initial weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Sequence[Tensor], decay: float) -> None:
        self.optimizer, self.masters, self.decay = optimizer, masters, decay
        self.initial = [master.detach().clone() for master in masters] if decay else []
        if decay and any(self._states()):  # DeepSpeed has stepped it: what is loaded needs a place
            self._begin()

    @property
    def begun(self) -> bool:
        """Whether there is an average: from the first step on."""
        return any(AVERAGE in state for state in self._states())

    def update(self) -> None:
        """Takes in the weights after a step."""
        if self.decay:
            self._begin()
            for master, state in zip(self.masters, self._states(), strict=True):
                if state:
                    state[AVERAGE].lerp_(master.detach(), 1 - self.decay)

    def swap(self) -> None:
        """Exchanges the weights and their average."""
        for master, state in zip(self.masters, self._states(), strict=True):
            if state:
                kept = master.detach().clone()
                master.detach().copy_(state[AVERAGE])
                state[AVERAGE].copy_(kept)

    def _states(self) -> list[dict[str, Tensor]]:
        """Of each master; empty for one that never had a gradient, and is its own average.

        torch makes moments where a state is empty, and takes it for whole where it is not.
        """
        return [self.optimizer.state.get(master, {}) for master in self.masters]

    def _begin(self) -> None:
        """Gives an average to what has none, the first time that of the initial weights."""
        # What has its first gradient later starts from what it is then, and weights that were loaded have a past.
        starts = self.initial if self.initial and not self.begun else self.masters
        for start, state in zip(starts, self._states(), strict=True):
            if state and AVERAGE not in state:
                state[AVERAGE] = start.detach().clone()
        self.initial = []
