"""DeepSpeed behind four verbs: forward, backward_and_step, save, load. The only importer of deepspeed."""

from __future__ import annotations

import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from fd_scale import log

log.quiet_libraries()
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would choose, without its warning

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.accelerator import set_accelerator  # noqa: E402
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # noqa: E402
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator  # noqa: E402
from deepspeed.runtime.zero.utils import ZeRORuntimeException  # noqa: E402
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fd_scale.config import OptimConfig  # noqa: E402
from fd_scale.distributed import World  # noqa: E402
from fd_scale.ds_config import zero_stage  # noqa: E402
from fd_scale.errors import UserError  # noqa: E402
from fd_scale.optim import ClippedAdamW, build_adamw, parameter_groups  # noqa: E402

# DeepSpeed would compile a shared-memory all-reduce for the CPU at first use (70 s) that leaves
# files in /dev/shm when a rank is killed; gloo gives the same sums.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """A module, its optimizer and its partition over ranks.

    Args:
        module: trained module; DeepSpeed moves it to the device, casts it and (stage 3) partitions it.
        undecayed: names of parameters without weight decay, besides 1-D ones.
        ds_config: resolved DeepSpeed configuration (`fd_scale.ds_config.resolve`).
        optim: settings of AdamW.
        world: ranks.

    Raises:
        UserError: DeepSpeed refuses the configuration.
    """

    def __init__(
        self,
        module: nn.Module,
        undecayed: set[str],
        ds_config: dict[str, Any],
        optim: OptimConfig,
        world: World,
    ) -> None:
        self.world = world
        # DeepSpeed would take a GPU wherever there is one; the recipe's device decides.
        set_accelerator(CPU_Accelerator() if world.device.type == "cpu" else CUDA_Accelerator())
        groups = parameter_groups(module, optim.weight_decay, undecayed)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.group_names = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
        stage = zero_stage(ds_config)
        precise = not (ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"])
        optimizer: torch.optim.Optimizer
        if stage == 0 and precise:
            module.to(world.device)
            optimizer = ClippedAdamW(groups, optim)
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        else:
            # DeepSpeed flattens Apex's master weights at stage 0, and `saved_weights` could not tell them apart.
            optimizer = build_adamw(groups, optim, with_apex=stage > 0 and world.device.type == "cuda")
        self.optimizer_name = type(optimizer).__name__
        try:
            self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=ds_config, dist_init_required=False
            )
        except (ValidationError, ZeRORuntimeException) as error:
            raise UserError(
                f"train.ds_config: DeepSpeed refuses it: {' '.join(str(error).split())}"
            ) from None

        if stage == 0 and not precise:
            # DeepSpeed has stepped it once on zero gradients, which leaves AdamW's bias correction a step ahead.
            self.deepspeed.basic_optimizer.state.clear()

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """Runs the module's forward: the one entry at which ZeRO-3 gathers parameters."""
        return self.deepspeed(**inputs)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate that the next optimizer step takes."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def backward_and_step(self, loss: Tensor) -> None:
        """Accumulates the gradients of a micro-batch; after the last one of a step, steps the optimizer.

        Args:
            loss: this rank's share of the loss, scalar; the shares of all ranks and micro-batches sum to it.
        """
        # DeepSpeed averages gradients over ranks, and the shares are to be summed.
        self.deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)
        self.deepspeed.step()

    @property
    def skipped(self) -> bool:
        """True where DeepSpeed skipped the last step because a gradient was not finite on some rank."""
        return bool(self.optimizer.overflow)

    @property
    def grad_norm(self) -> float:
        """L2 norm of the last step's whole gradient before clipping (reads it from the device)."""
        return float(self.deepspeed.get_global_grad_norm())

    def train(self, training: bool = True) -> None:
        """Sets the module's mode."""
        self.deepspeed.train(training)

    def save(self, folder: Path) -> None:
        """Writes this rank's part of weights and optimizer state; all ranks call it."""
        self.deepspeed.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state={"group_names": self.group_names},
            save_latest=False,
        )

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, on as many ranks as wrote it."""
        path, _ = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder}, which passed its checksums")


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the module's whole weights, fp32 on the CPU, from a folder that `Engine.save` wrote."""
    if any(folder.glob("*optim_states.pt")):
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it prints its progress
            return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    states = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    weights = {name: tensor.float() for name, tensor in states["module"].items()}
    if "fp32_groups" in states["optimizer"]:  # the masters of 16-bit weights
        for names, masters in zip(states["group_names"], states["optimizer"]["fp32_groups"], strict=True):
            weights.update(zip(names, (master.detach() for master in masters), strict=True))
    return weights
