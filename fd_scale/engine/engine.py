"""DeepSpeed behind five verbs: forward, backward, step, snapshot, load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fd_scale.config import OptimConfig
from fd_scale.distributed import World
from fd_scale.ds_config import offload_device, zero_stage
from fd_scale.engine.in_parts import (
    choose_accelerator,
    gather_by_block,
    let_go_with,
    move_buffers,
    whole_shape,
)
from fd_scale.engine.quicker_deepspeed import look_at_gradients_together, remember_modules
from fd_scale.engine.refusals import naming_refusals
from fd_scale.engine.replicas import average_over, replicas_of
from fd_scale.engine.traffic import traffic_of
from fd_scale.optim import (
    ClippedAdamW,
    WeightAverage,
    build_adamw,
    parameter_groups,
    refuse_average_of_statistics,
)
from fd_scale.shards import BASE_OPTIMIZER, FLAT_MASTERS, MASTERS, Shards, layout


class _HostCopies(CheckpointEngine):  # type: ignore[misc]
    """Takes from DeepSpeed what it would write, as copies in host memory.

    Args:
        wanted: whether anything is taken; replicas would all write the same.
    """

    def __init__(self, wanted: bool) -> None:
        super().__init__()
        self.wanted = wanted
        self.files: dict[str, Any] = {}

    def create(self, info: Any) -> None:
        self.files = {}

    def save(self, state_dict: Any, path: str) -> None:
        if not self.wanted:
            return
        # The non-tensors change too: the loss scaler counts on while the copy is written.
        self.files[Path(path).name] = tree_map(
            lambda leaf: _to_host(leaf) if isinstance(leaf, Tensor) else copy.deepcopy(leaf),
            state_dict,
            is_leaf=lambda value: isinstance(value, torch.Size),
        )

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: Any) -> bool:
        return True


class _Statistics:
    """Running statistics of BatchNorm layers: those of a step that is skipped may be NaN, and would stay so."""

    def __init__(self, module: nn.Module) -> None:
        norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        self.running = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept = [buffer.clone() for buffer in self.running]

    def keep(self) -> None:
        """Takes them as they are for good."""
        if self.running:
            torch._foreach_copy_(self.kept, self.running)

    def restore(self) -> None:
        """Sets them to what was kept last."""
        if self.running:
            torch._foreach_copy_(self.running, self.kept)


class Engine:
    """A module, its optimizer and its partition over ranks.

    Args:
        module: trained module; DeepSpeed moves it to the device, casts it and (stage 3) partitions it.
        undecayed: names of parameters without weight decay, besides 1-D ones.
        lr_scales: factor of the peak learning rate of some parameters, by name; the others have 1.
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
        lr_scales: Mapping[str, float],
        ds_config: dict[str, Any],
        optim: OptimConfig,
        world: World,
    ) -> None:
        self.world = world
        self.after_backward: Callable[[], None] | None = None
        choose_accelerator(world)
        ds_config, self.replicas = replicas_of(ds_config, world)
        refuse_average_of_statistics(module, optim)
        self.num_parameters = sum(whole_shape(parameter).numel() for parameter in module.parameters())
        groups = parameter_groups(
            module, optim.weight_decay, undecayed, lambda parameter: len(whole_shape(parameter)), lr_scales
        )
        self.lr_scales = [group["lr_scale"] for group in groups]
        move_buffers(module, world.device)
        gather_by_block(module)
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
            on_host = world.device.type == "cpu" or offload_device(ds_config, "offload_optimizer") == "cpu"
            optimizer = build_adamw(groups, optim, with_apex=stage > 0 and not on_host)
        self.optimizer_name = type(optimizer).__name__
        with naming_refusals(), _one_optimizer_of_zero1():
            self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=ds_config,
                mpu=self.replicas,
                dist_init_required=False,
            )
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
            look_at_gradients_together(self.optimizer)
        if stage == 3:
            remember_modules(module)
        if self.replicas is not None:
            average_over(self.replicas, self.optimizer)
        if stage == 0 and not precise:
            # DeepSpeed has stepped it once on zero gradients, which leaves AdamW's bias correction a step ahead.
            self.deepspeed.basic_optimizer.state.clear()
        if stage == 0 and precise and world.size == 1:
            # Else all gradients are copied into a buffer and back, to be averaged over one rank.
            self.deepspeed.enable_backward_allreduce = False
        self.host_copies = _HostCopies(wanted=self.replicas is None or self.replicas.writes)
        self.deepspeed.checkpoint_engine = self.host_copies
        self.traffic = traffic_of(deepspeed.comm.comm.cdb)
        self.statistics = _Statistics(module)
        self.average = WeightAverage(self.deepspeed.basic_optimizer, self._masters(), optim.ema_decay)
        let_go_with(self, self.deepspeed)

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """Runs the module's forward: the one entry at which ZeRO-3 gathers parameters."""
        return self.deepspeed(**inputs)

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank has sent through DeepSpeed's collectives, taken as rings, since the process began."""
        return self.traffic.sent_bytes

    def set_learning_rates(self, learning_rates: Sequence[float]) -> None:
        """Sets the learning rate of each of `lr_scales` that the next optimizer step takes."""
        for group, learning_rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of a micro-batch.

        Args:
            loss: this rank's share of the loss, scalar; the shares of all ranks and micro-batches sum to it.
        """
        # DeepSpeed averages gradients over ranks, and the shares are to be summed.
        self.deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)
        if self.after_backward is not None:
            self.after_backward()

    def step(self) -> None:
        """Ends a micro-batch; after the last one of a step, steps the optimizer."""
        ends_step = self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.step()
        if ends_step and self.skipped:
            self.statistics.restore()
            self._forget_gradients()
        elif ends_step:
            self.statistics.keep()
            self.average.update()

    def _forget_gradients(self) -> None:
        """Drops sums that are not finite: those in fp32 DeepSpeed keeps behind a skipped step, where it offloads."""
        if isinstance(self.optimizer, DeepSpeedZeroOptimizer):
            self.optimizer.averaged_gradients.update(dict.fromkeys(self.optimizer.averaged_gradients))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, weights are their moving averages, where those are kept; all ranks enter and leave it.

        An error passes through it, and leaves the averages: ranks that have failed cannot exchange weights.
        """
        exchanges = self.average.begun
        if exchanges:
            self._exchange()
        yield
        if exchanges:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swaps masters and averages, and gives the module what are its masters now, as DeepSpeed does after a step."""
        self.average.swap()
        optimizer = self.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer.checkpoint_event_prologue()  # those that stay whole are cut, and are gathered again below
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            optimizer.update_lp_params()
        elif isinstance(optimizer, FP16_UnfusedOptimizer):
            for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
                torch._foreach_copy_([weight.data for weight in weights], masters)

    def _masters(self) -> list[Tensor]:
        """This rank's part of the weights in fp32, as the optimizer steps them."""
        optimizer = self.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            return list(optimizer.fp32_partitioned_groups_flat)
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            return list(optimizer.single_partition_of_fp32_groups)
        if isinstance(optimizer, FP16_UnfusedOptimizer):
            return [master for group in optimizer.fp32_groups for master in group]
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @property
    def skipped(self) -> bool:
        """True where DeepSpeed skipped the last step because a gradient was not finite on some rank."""
        return bool(self.optimizer.overflow)

    @property
    def grad_norm(self) -> float:
        """L2 norm of the last step's whole gradient before clipping (reads it from the device)."""
        return float(self.deepspeed.get_global_grad_norm())

    def state_bytes(self) -> dict[str, int]:
        """Returns the bytes of this rank's trained `parameters`, `gradients` and `optimizer` states as they are now.

        Communication buffers are not among them. Gradients live between the backward pass and the step:
        `after_backward`, where it is set, is called there.
        """
        parameters = [each for each in self.deepspeed.module.parameters() if each.requires_grad]
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        optimizer = self.optimizer
        held: list[Any] = list(parameters)
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            held += [parameter.ds_tensor for parameter in parameters]
            gradients.append(optimizer.grad_partitions_flat_buffer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            parts = [*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values()]
            gradients += [list(part) for part in parts if part is not None]
            of_parameters = [optimizer.get_param_gradient_attribute(parameter) for parameter in parameters]
            # Those that were reduced lie in a bucket.
            gradients += [
                each
                for each in of_parameters
                if each is not None and each.nbytes == each.untyped_storage().nbytes()
            ]
        seen: set[int] = set()
        return {
            "parameters": _new_bytes(tree_leaves(held), seen),
            "gradients": _new_bytes(tree_leaves(gradients), seen),
            "optimizer": _new_bytes(
                tree_leaves([self._masters(), list(self.deepspeed.basic_optimizer.state.values())]), seen
            ),
        }

    def train(self, training: bool = True) -> None:
        """Sets the module's mode."""
        self.deepspeed.train(training)

    def snapshot(self, folder: Path) -> dict[str, Any]:
        """Copies this rank's part of weights and optimizer state to host memory; all ranks call it.

        Args:
            folder: where the checkpoint will stand.

        Returns:
            File name in `folder` -> what `torch.save` is to write there; training does not touch it.
        """
        self.deepspeed.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state={"group_names": self.group_names},
            save_latest=False,
        )
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # the copies are queued
        files, self.host_copies.files = self.host_copies.files, {}
        return files

    def load(self, folder: Path) -> None:
        """Reads what `snapshot` gave on any number of ranks, with the same ZeRO stage."""
        shards = Shards(folder)
        num_ranks = self.replicas.size if self.replicas is not None else self.world.size
        # Where DeepSpeed keeps a parameter also depends on its settings, and it reads by position.
        if shards.world_size and (
            shards.world_size != num_ranks or shards.zero != self.deepspeed.config["zero_optimization"]
        ):
            self._load_from_other_ranks(shards, self.world.rank % num_ranks, num_ranks)
        else:
            path, _ = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
            if path is None:
                raise RuntimeError(f"DeepSpeed found nothing to load in {folder}, which passed its checksums")
        self.statistics.keep()
        self._forget_gradients()

    def _load_from_other_ranks(self, shards: Shards, rank: int, num_ranks: int) -> None:
        """Gives DeepSpeed what it would have written here, had the checkpoint's ranks been as many as ours."""
        engine, optimizer, stage = self.deepspeed, self.optimizer, shards.stage
        if stage == 3:
            optimizer.checkpoint_event_prologue()
        model, saved = shards.model_states(rank), shards.optimizer_states(0)
        state = optimizer.state_dict()
        groups = dict(enumerate(engine._get_zero_param_shapes()))
        pieces = layout(groups, num_ranks, stage, state.get("param_alignment_paddings"))
        masters = self._masters()

        def part(group: int | str, numel: int, kind: str = MASTERS) -> Tensor:
            flat = torch.zeros(numel)
            shards.fill_part(flat, rank, group, pieces, kind)
            return flat

        if stage == 3:
            frozen = engine._get_zero_frozen_param_attributes(engine._get_param_shape_func)
            pieces |= layout({name: {name: shape} for name, shape in frozen.items()}, num_ranks, stage)
            sizes = {name: -(-shape.numel() // num_ranks) for name, shape in frozen.items()}
            fragments = {name: part(name, size) for name, size in sizes.items()}
            model = model | {"frozen_param_fragments": fragments}
        state |= {key: saved[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow")}
        state[FLAT_MASTERS[stage]] = [part(group, flat.numel()) for group, flat in enumerate(masters)]
        base, saved_base = state[BASE_OPTIMIZER[stage]], saved[BASE_OPTIMIZER[stage]]
        base["state"] = {
            group: {
                kind: part(group, flat.numel(), kind)
                if isinstance(value, Tensor) and value.ndim
                else copy.deepcopy(value)
                for kind, value in saved_base["state"][0].items()
            }
            for group, flat in enumerate(masters)
        }
        for ours, theirs in zip(base["param_groups"], saved_base["param_groups"], strict=True):
            ours |= theirs | {"params": ours["params"]}  # Apex counts steps there
        engine.load_module_state_dict(model)
        optimizer.load_state_dict([state] * num_ranks, load_from_fp32_weights=True)
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, counter, model[counter])
        if stage == 3:
            optimizer.checkpoint_event_epilogue()


@contextmanager
def _one_optimizer_of_zero1() -> Iterator[None]:
    """Keeps DeepSpeed from its other optimizer of ZeRO-1, which it takes where bf16 gradients are summed in fp32."""
    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def chosen(*given: Any) -> Any:
        found = choose(*given)
        return ZERO_OPTIMIZATION if found == BFLOAT16 else found

    DeepSpeedEngine._do_optimizer_sanity_check = chosen
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


def _new_bytes(leaves: Iterable[Any], seen: set[int]) -> int:
    """Bytes of the storages of `leaves` that are not in `seen`, and notes them there."""
    total = 0
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in seen:
            seen.add(leaf.untyped_storage().data_ptr())
            total += leaf.untyped_storage().nbytes()
    return total


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that shares nothing; from the GPU into pinned memory, queued on its stream."""
    pinned = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return host.copy_(tensor.detach(), non_blocking=pinned)


def saved_weights(folder: Path) -> Shards:
    """Returns the module's whole weights, read one by one, from a folder that holds what `Engine.snapshot` gave."""
    return Shards(folder)
