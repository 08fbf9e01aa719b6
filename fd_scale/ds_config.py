"""DeepSpeed JSON: read as it is, `"auto"` filled from the recipe, refused where it disagrees with it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fd_scale.config import Recipe, TrainConfig
from fd_scale.distributed import micro_batch_of_a_rank
from fd_scale.errors import UserError

# Keys of the JSON's optimizer section, and of the recipe's.
_OPTIMIZER_KEYS = ("lr", "betas", "eps", "weight_decay")

_COMMON_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "activation_checkpointing", "data_types",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "steps_per_print",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "flops_profiler",
)  # fmt: skip
ZERO_KEYS = (
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights",
    "elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload_param",
    "cpu_offload_use_pin_memory", "cpu_offload", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "stage3_gather_fp16_weights_on_model_save",
    "ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "parameter_alignment",
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply",
    "log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "leaf_module",
)  # fmt: skip
"""Of the JSON's section `zero_optimization`."""
_SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "data_types")
_SUMS = ("fp32", "bf16", "fp16")

_REMOVED = "DeepSpeed has it no more"
_PRECISION = "train.precision says what is computed in which dtype"
UNSERVED = {
    **dict.fromkeys((
        "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
        "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
        "zero_optimization.mics_hierarchical_params_gather", "zero_optimization.zeropp_loco_param",
    ), _REMOVED),
    "amp": _REMOVED, "torch_autocast": _PRECISION,
    "activation_checkpointing": "train.activation_checkpointing says what is recomputed",
    **dict.fromkeys(("comms_logger", "dump_state"), "its lines are for a log that this program keeps quiet"),
    "zero_force_ds_cpu_optimizer": "the optimizer on the host is torch's fused AdamW",
    "hybrid_engine": "there is no inference between steps",
    "autotuning": "fd-scale plan chooses, and micro-batches are the recipe's",
    "data_efficiency": "the recipe's data section says what is shown and when",
    "compile": "train.compile says whether blocks are compiled, by torch",
    **dict.fromkeys(
        ("pipeline", "sequence_parallel_size", "tensor_parallel"), "models are partitioned by ZeRO alone"
    ),
    "zero_optimization.legacy_stage1": "DeepSpeed has the newer ZeRO-1 alone",
    "zero_optimization.zenflow": "its optimizer takes matrices alone, and trains apart from the recipe's",
    "zero_optimization.elastic_checkpoint": "it lays checkpoints out in a way that this version does not read, and "
    "a run resumes on another number of ranks without it",
}  # fmt: skip
"""Keys of a JSON that are refused, unless they are off, and why."""
_OF_STAGE_3 = (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)  # fmt: skip
"""Keys of `zero_optimization` that DeepSpeed passes over at other stages."""
_ONE_REPLICA = {
    "offload_optimizer": "gradients are on the host by the time that replicas exchange them",
    "zero_quantized_gradients": "DeepSpeed's groups for it are of all ranks",
    "zero_hpz_partition_size": "replicas gather nothing from each other",
}
"""Keys of `zero_optimization` that are refused where there are replicas, and why."""


def read(name: str) -> dict[str, Any]:
    """Reads a DeepSpeed JSON.

    Args:
        name: a path, or the name of a shipped file without its ending, e.g. `zero3`.

    Raises:
        UserError: there is no such file, or it is not a JSON object.
    """
    path = Path(name)
    if not path.is_file():
        shipped = Path(str(resources.files("fd_ds_configs")))
        path = shipped / f"{name}.json"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in shipped.glob("*.json")))
            raise UserError(
                f"train.ds_config: {name} is neither a file nor one of the shipped configs: {names}"
            )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"train.ds_config: {path} is not JSON, which has no comments and no comma behind the last value: {error}"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"train.ds_config: {path} holds a {type(values).__name__}, expected an object")
    if "bfloat16" in values and "bf16" not in values:
        values["bf16"] = values.pop("bfloat16")  # its name in older versions
    _require_readable(values, path)
    return values


def _require_readable(values: dict[str, Any], path: Path) -> None:
    """Refuses what the code that reads a JSON would stumble over, and names that are nearly right."""
    for section in _SECTIONS:
        if not isinstance(values.get(section, {}), dict):
            raise UserError(
                f"train.ds_config: {section} is {json.dumps(values[section])} in {path}, expected an object"
            )
    # DeepSpeed itself passes over keys that it does not know; those of ZeRO it refuses, when a run has begun.
    for prefix, given, known in (
        ("", values, _COMMON_KEYS),
        ("zero_optimization.", values.get("zero_optimization", {}), (*ZERO_KEYS, "mics_shard_size")),
    ):
        for key in given:
            if prefix + key in UNSERVED:
                continue  # `resolve` says why
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if nearest and key not in known:
                raise UserError(
                    f"train.ds_config: {path} has {prefix}{key}; did you mean {prefix}{nearest[0]}"
                )
    for key in ("offload_optimizer", "offload_param"):
        offload = values.get("zero_optimization", {}).get(key) or {}
        if not isinstance(offload, dict):
            raise UserError(
                f"train.ds_config: zero_optimization.{key} is {json.dumps(offload)} in {path}, expected an object, "
                'as {"device": "cpu"}'
            )
    sums = values.get("data_types", {}).get("grad_accum_dtype", "auto")
    if sums not in ("auto", *_SUMS):
        raise UserError(
            f"train.ds_config: data_types.grad_accum_dtype is {json.dumps(sums)} in {path}, expected one of "
            f"{', '.join(_SUMS)}"
        )
    near = values.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if type(near) is not int or near < 1:
        raise UserError(
            f"train.ds_config: zero_optimization.zero_hpz_partition_size is {json.dumps(near)} in {path}, expected a "
            "whole number, 1 or more"
        )
    if zero_stage(values) not in range(4) or isinstance(zero_stage(values), bool):
        raise UserError(
            f"train.ds_config: zero_optimization.stage is {json.dumps(zero_stage(values))} in {path}, "
            "expected 0, 1, 2 or 3"
        )


def zero_stage(ds_config: dict[str, Any]) -> int:
    """Returns the ZeRO stage of a DeepSpeed configuration, 0..3."""
    stage: int = ds_config.get("zero_optimization", {}).get("stage", 0)
    return stage


def zero_name(resolved: dict[str, Any]) -> str:
    """Returns how a resolved configuration partitions, in words."""
    size = resolved["zero_optimization"].get("mics_shard_size")
    return f"ZeRO-{zero_stage(resolved)}" + (f" in replicas of {size} ranks" if size is not None else "")


def offload_device(ds_config: dict[str, Any], key: str) -> str:
    """Returns where a DeepSpeed configuration keeps optimizer states or parameters: `none` is the rank's own device.

    Args:
        ds_config: as `read` or `resolve` returned it.
        key: `offload_optimizer` or `offload_param`.
    """
    device: str = (ds_config.get("zero_optimization", {}).get(key) or {}).get("device", "none")
    return device


def grad_accum_dtype(ds_config: dict[str, Any], precision: str, accumulation: int) -> str | None:
    """Returns in what gradients of several micro-batches are summed: what a JSON says, or fp32 for those in bf16.

    In bf16, as DeepSpeed sums where nothing is said, the error grows with each micro-batch. Where it has the optimizer
    on the host at ZeRO-1 and -2, sums in fp32 would stay on the device: what offloading is against.

    Args:
        ds_config: with the section `zero_optimization` that counts.
        precision: of the recipe.
        accumulation: micro-batches of a step.

    Returns:
        One of `_SUMS`; none: DeepSpeed's own choice, the dtype of the weights.
    """
    given: str = ds_config.get("data_types", {}).get("grad_accum_dtype", "auto")
    if given != "auto":
        return given
    stage = zero_stage(ds_config)
    offloads = stage in (1, 2) and offload_device(ds_config, "offload_optimizer") != "none"
    return "fp32" if precision == "bf16" and accumulation > 1 and stage > 0 and not offloads else None


def resolve(ds_config: dict[str, Any], recipe: Recipe, world_size: int, device_type: str) -> dict[str, Any]:
    """Fills a DeepSpeed configuration from the recipe.

    Absent and `"auto"` values are filled; every other value must be the recipe's.

    Args:
        ds_config: what `read` returned.
        recipe: decides batch, clipping, precision and optimizer.
        world_size: number of ranks; accumulation follows from it.
        device_type: `cpu` or `cuda`.

    Returns:
        A new configuration without `"auto"`.

    Raises:
        UserError: a value disagrees with the recipe, or cannot be served.
    """
    train, optim = recipe.train, recipe.optim
    micro_batch = micro_batch_of_a_rank(
        train.global_batch, train.micro_batch, world_size, recipe.crops_together
    )
    accumulation = train.global_batch // (micro_batch * world_size)
    _refuse_unserved(ds_config, recipe, accumulation, device_type)
    resolved = json.loads(json.dumps(ds_config))
    wanted = {
        "train_batch_size": ("train.global_batch", train.global_batch),
        "train_micro_batch_size_per_gpu": ("train.micro_batch", micro_batch),
        "gradient_accumulation_steps": ("train.global_batch with train.micro_batch", accumulation),
        "gradient_clipping": ("optim.grad_clip", optim.grad_clip),
        "bf16.enabled": (f"train.precision={train.precision}", train.precision == "bf16"),
        "fp16.enabled": (f"train.precision={train.precision}", train.precision == "fp16"),
    }
    problems = list(_unserved(ds_config, train.ds_config))
    for key, (setting, value) in wanted.items():
        *section, last = key.split(".")
        node = resolved.setdefault(section[0], {}) if section else resolved
        if node.get(last, "auto") not in ("auto", value):
            problems.append(
                f"{key} is {json.dumps(node[last])} in {train.ds_config}, but {setting} gives {json.dumps(value)} on "
                f'{world_size} ranks; write "auto" there or change the recipe'
            )
        node[last] = value
    problems += _of_optimizer(resolved.pop("optimizer", {}), recipe)
    problems += _of_replicas(resolved.setdefault("zero_optimization", {}), recipe, world_size)
    if problems:
        raise UserError("train.ds_config: " + ";\n  and ".join(problems))
    if recipe.contrastive is not None and resolved["gradient_accumulation_steps"] > 1:
        raise UserError(
            f"train.micro_batch: contrastive pre-training compares all images of a step at once, and {micro_batch} x "
            f"{world_size} ranks are fewer than train.global_batch={train.global_batch}; raise train.micro_batch "
            "or lower train.global_batch"
        )
    sums = grad_accum_dtype(resolved, train.precision, accumulation)
    resolved.setdefault("data_types", {}).pop("grad_accum_dtype", None)
    if sums is not None:
        resolved["data_types"]["grad_accum_dtype"] = sums
    # torch's fused AdamW steps on the host too; DeepSpeed's own would be compiled at the first run.
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    # The trainer measures without waiting for the device, for which DeepSpeed's timer waits twice a micro-batch.
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    resolved.setdefault("steps_per_print", 10**9)  # the trainer reports; DeepSpeed's line would say it twice
    return resolved


def _refuse_unserved(ds_config: dict[str, Any], recipe: Recipe, accumulation: int, device_type: str) -> None:
    train = recipe.train
    if train.precision == "fp16" and device_type == "cpu":
        raise UserError("train.precision: DeepSpeed has no fp16 on a CPU; set train.precision=bf16 or fp32")
    if train.precision == "fp16" and zero_stage(ds_config) == 0:
        raise UserError(
            "train.ds_config: at ZeRO stage 0 DeepSpeed divides fp16 gradients by a loss scale that it did not apply "
            "to the loss; set train.ds_config=zero1 (on one rank it is the same) or train.precision=bf16"
        )
    if train.cuda_graphs:
        _refuse_graphs(ds_config, recipe, accumulation, device_type)
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = offload_device(ds_config, key)
        if device not in ("none", "cpu"):
            raise UserError(
                f"train.ds_config: zero_optimization.{key}.device is {device} in {train.ds_config}, expected cpu or "
                "none, the ones that this version serves"
            )
        if device == "cpu" and zero_stage(ds_config) < least:
            raise UserError(
                f"train.ds_config: zero_optimization.{key} in {train.ds_config} needs ZeRO stage {least} or above, got "
                f"{zero_stage(ds_config)}; raise the stage or remove it"
            )


def shard_size(train: TrainConfig, world_size: int) -> int:
    """Returns the ranks that hold a model among them at ZeRO-3: all, unless there are replicas."""
    return min(train.mics_shard_size or world_size, world_size)


def _of_replicas(zero: dict[str, Any], recipe: Recipe, world_size: int) -> Iterator[str]:
    """Sets the ranks of a replica, where there are several, for the engine; what is against it, a sentence each."""
    train, wanted = recipe.train, recipe.train.mics_shard_size
    given = zero.pop("mics_shard_size", "auto")
    off = wanted == 0 and given in (-1, 0)
    if given not in ("auto", wanted) and not off:
        yield (
            f"zero_optimization.mics_shard_size is {json.dumps(given)} in {train.ds_config}, but train.mics_shard_size "
            f'is {wanted}; write "auto" there or change the recipe'
        )
    near = zero.get("zero_hpz_partition_size", 1)
    if 1 < near < world_size and world_size % near:
        yield (
            f"zero_optimization.zero_hpz_partition_size is {near} in {train.ds_config} and does not divide "
            f"{world_size} ranks; take a divisor, as the GPUs of a node"
        )
    size = shard_size(train, world_size)
    if size == world_size:
        return
    zero["mics_shard_size"] = size
    if zero.get("stage", 0) != 3:
        yield (
            f"train.mics_shard_size={wanted} needs ZeRO stage 3, {train.ds_config} has stage {zero.get('stage', 0)}; "
            "set it to 0, or train.ds_config=zero3"
        )
    if world_size % size:
        yield (
            f"train.mics_shard_size={wanted} does not divide {world_size} ranks; take a divisor, as the GPUs of a node"
        )
    for key in against_replicas(zero):
        yield (
            f"zero_optimization.{key} in {train.ds_config} does not go with train.mics_shard_size={wanted}: "
            f"{_ONE_REPLICA[key]}; remove one of them"
        )


def against_replicas(zero: dict[str, Any]) -> list[str]:
    """Returns the keys of a section `zero_optimization` that are on and do not go with replicas."""
    return [key for key in _ONE_REPLICA if _is_on(zero.get(key))]


def _is_on(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("device", "none") != "none")
    return value is True or value not in (None, False, 1)  # hpZ's 1 is off


def require_replicas(ds_config: dict[str, Any], recipe: Recipe, world_size: int) -> None:
    """Looks whether a recipe's replicas can be on so many ranks, as `resolve` does beside all else.

    Raises:
        UserError: they cannot.
    """
    problems = list(_of_replicas(dict(ds_config.get("zero_optimization", {})), recipe, world_size))
    if problems:
        raise UserError("train.ds_config: " + ";\n  and ".join(problems))


def _unserved(ds_config: dict[str, Any], file: str) -> Iterator[str]:
    """What a JSON asks for in vain, a sentence each."""
    for key, why in UNSERVED.items():
        *section, last = key.split(".")
        value = (ds_config.get(section[0], {}) if section else ds_config).get(last)
        off = (  # a section of `zero_optimization` is on as soon as it is there
            not section and (value.get("enabled") is False or not any(value.values()))
            if isinstance(value, dict)
            else value in (False, 1) and value is not True
        )
        if value is not None and (not off or why == _REMOVED):
            yield f"{key} in {file} is not served: {why}; remove it"
    zero, stage = ds_config.get("zero_optimization", {}), zero_stage(ds_config)
    for key in _OF_STAGE_3:
        if stage != 3 and _is_on(zero.get(key)):
            yield (
                f"zero_optimization.{key} in {file} needs ZeRO stage 3, got {stage}; raise the stage or remove it"
            )
    for package, module in (("wandb", "wandb"), ("comet", "comet_ml")):
        monitor = ds_config.get(package)
        if isinstance(monitor, dict) and monitor.get("enabled") and find_spec(module) is None:
            yield f"{package} in {file} needs the package {module}, which is not here; install it, or remove {package}"
    if "scheduler" in ds_config:
        yield (
            f"{file} has a scheduler, but the recipe's optim section holds the schedule; remove the scheduler from the "
            "JSON"
        )


def _refuse_graphs(ds_config: dict[str, Any], recipe: Recipe, accumulation: int, device_type: str) -> None:
    stage = zero_stage(ds_config)
    if device_type != "cuda":
        raise UserError("train.cuda_graphs: there are none on a CPU; set it to false")
    if stage < 2 and accumulation > 1:
        # Autograd would sum the gradients of micro-batches in the memory that the next replay overwrites.
        raise UserError(
            f"train.cuda_graphs: a step is {accumulation} micro-batches, whose gradients ZeRO stage {stage} leaves "
            "where the graphs write; set train.ds_config=zero2, or train.micro_batch so that a step is one"
        )
    if accumulation > 1 and ds_config.get("zero_optimization", {}).get("contiguous_gradients") is False:
        raise UserError(
            f"train.cuda_graphs: a step is {accumulation} micro-batches, whose gradients stay where the graphs write, "
            f"as zero_optimization.contiguous_gradients is false in {recipe.train.ds_config}; set it to true"
        )
    section = recipe.distill
    teachers = [] if section is None or section.features is not None else section.teachers
    if stage == 3 and not any(teacher.is_alike for teacher in teachers):
        raise UserError(
            "train.cuda_graphs: at ZeRO stage 3 parameters move, and no teacher is whole, run here and shown all "
            "images; set it to false, or train.ds_config=zero1"
        )


def _of_optimizer(optimizer: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    """Where a JSON's optimizer is not the recipe's, a sentence each."""
    file = recipe.train.ds_config
    if not optimizer:
        return
    if optimizer.get("type") != "AdamW":
        yield (
            f"optimizer.type is {optimizer.get('type')} in {file}, expected AdamW, the one that recipes use; change it "
            "or remove the optimizer section"
        )
        return
    params = optimizer.get("params", {})
    unknown = sorted(params.keys() - _OPTIMIZER_KEYS) if isinstance(params, dict) else [json.dumps(params)]
    if unknown:
        yield (
            f"optimizer.params has {', '.join(unknown)} in {file}, expected at most {', '.join(_OPTIMIZER_KEYS)}; "
            "remove the optimizer section, recipes set the optimizer"
        )
        return
    for key in _OPTIMIZER_KEYS:
        value, expected = params.get(key, "auto"), getattr(recipe.optim, key)
        expected = list(expected) if isinstance(expected, tuple) else expected
        if value not in ("auto", expected):
            yield (
                f"optimizer.params.{key} is {json.dumps(value)} in {file}, but optim.{key} is "
                f'{json.dumps(expected)}; write "auto" there or change the recipe'
            )
