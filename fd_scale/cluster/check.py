"""`fd-scale check --cluster`: the nodes of an allocation, before the expensive job starts on them.

Every rank looks at its own node, rank 0 compares and prints a table and a verdict.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text

from fd_scale import ds_config, hub, log
from fd_scale.cluster import pinned
from fd_scale.config import Recipe
from fd_scale.data import TrainLoader, open_source, training_transform
from fd_scale.distributed import World, start
from fd_scale.errors import UserError
from fd_scale.hardware import named_like
from fd_scale.log import results
from fd_scale.models import resolved, weights_path
from fd_scale.plan import plan, present_gpu
from fd_scale.run_folder import environment
from fd_scale.verbs.check import driver_cuda_version
from fd_scale.verbs.fetch import named_files

T = TypeVar("T")

READ_S = 4.0
"""Seconds for which every rank loads images."""
REPEATS = 5
GPU_BYTES, CPU_BYTES = 2**28, 2**24
"""What a rank brings into a collective."""
MOST_GATHERED = 2**33
"""Bytes that a rank takes out of one: a job of 4,096 ranks is checked too."""
SLOW = 0.5
"""A network or a loader below this share of what is expected is worth a warning."""


@dataclass(frozen=True)
class _Node:
    """What a rank sees of its node."""

    rank: int
    host: str
    local_rank: int
    gpus: tuple[str, ...]
    cuda: tuple[str | None, tuple[int, int] | None]
    """What torch is built for, and up to what the driver serves."""
    versions: tuple[tuple[str, str | None], ...]
    weights: str
    """What is wrong with them; empty where nothing is."""


@dataclass(frozen=True)
class _Row:
    name: str
    verdict: str
    detail: str


def check_cluster(recipe: Recipe, arguments: list[str]) -> None:
    """Prints a table and a verdict; every rank of the job calls it.

    Args:
        recipe: what will be trained.
        arguments: recipe and settings as they were given, for the ranks that are started where none are yet.

    Raises:
        SystemExit: with code 2 on every rank, where the job would fail.
        UserError: the recipe does not allow it.
    """
    if "WORLD_SIZE" not in os.environ and "SLURM_JOB_ID" in os.environ:
        script = str(pinned.scripts() / "check.sh")
        code = subprocess.run(["bash", script, *arguments], check=False).returncode
        raise SystemExit(2 if code else 0)  # srun and torchrun make codes of their own
    recipe = resolved(recipe)
    log.set_up(int(os.environ.get("RANK", "0")))
    world = start("cpu", recipe.train.timeout_s)  # a rank without a GPU is to be found, not to stop the check
    nodes: list[_Node] = world.gather(_look(recipe, world))
    rows = [_gpus(recipe, nodes), _driver(recipe, nodes), _versions(nodes), _weights(nodes)]
    bad = any(row.verdict == "fails" for row in rows)
    rows.append(_run_folder(Path(recipe.run_dir), world))
    if not bad:  # ranks that differ would wait for each other
        world = replace(world, device=_device(recipe, world))
        rows += [_network(world), _data(recipe, world)]
    _print(recipe, nodes, rows, world)
    if any(row.verdict == "fails" for row in rows):
        raise SystemExit(2)


def _look(recipe: Recipe, world: World) -> _Node:
    problem = ""
    try:
        for files in named_files(recipe):
            hub.cached(files)
        teachers = recipe.distill.teachers if recipe.distill is not None else []
        for model in (recipe.model, *(teacher.model for teacher in teachers)):
            path = weights_path(model)
            if path is not None and not Path(path).exists():
                problem = f"{path} does not exist"
    except UserError as error:
        problem = str(error)
    versions = {"python": platform.python_version(), "commit": pinned.commit()} | environment()["versions"]
    return _Node(
        rank=world.rank, host=_host(), local_rank=world.local_rank,
        gpus=tuple(map(_gpu_name, range(torch.cuda.device_count()))),
        cuda=(torch.version.cuda, driver_cuda_version()), versions=tuple(versions.items()), weights=problem,
    )  # fmt: skip


def _gpu_name(index: int) -> str:
    try:
        return torch.cuda.get_device_name(index)
    except RuntimeError as error:  # it is there, and cannot be used
        return f"GPU {index}: {str(error).splitlines()[0]}"


def _device(recipe: Recipe, world: World) -> torch.device:
    if recipe.train.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank)


def _differing(nodes: list[_Node], what: Callable[[_Node], object]) -> str:
    """Names the hosts that are not as most are; empty where all are alike."""
    counted = Counter(what(node) for node in nodes)
    if len(counted) == 1:
        return ""
    usual = counted.most_common(1)[0][0]
    others = {node.host: what(node) for node in nodes if what(node) != usual}
    return "; ".join(f"{host} has {value}, most have {usual}" for host, value in others.items())


def _gpus(recipe: Recipe, nodes: list[_Node]) -> _Row:
    if recipe.train.device == "cpu" or not any(node.gpus for node in nodes):
        verdict = "fails" if recipe.train.device == "cuda" else "ok"
        return _Row(
            "GPUs", verdict, f"train.device={recipe.train.device}: no GPU is used on {len(nodes)} ranks"
        )
    without = [f"rank {node.rank} on {node.host}" for node in nodes if node.local_rank >= len(node.gpus)]
    if without:
        return _Row(
            "GPUs",
            "fails",
            f"no GPU of its own: {', '.join(without)}; start as many ranks as a node has GPUs",
        )
    differing = _differing(nodes, lambda node: tuple(Counter(node.gpus).most_common()))
    if differing:
        return _Row("GPUs", "fails", f"{differing}; exclude them: sbatch --exclude=HOST")
    return _Row("GPUs", "ok", f"{len(nodes)} x {nodes[0].gpus[0]}, {len(nodes[0].gpus)} visible on each rank")


def _driver(recipe: Recipe, nodes: list[_Node]) -> _Row:
    built, driver = nodes[0].cuda
    if recipe.train.device == "cpu" or built is None or driver is None:
        return _Row("driver", "ok", f"torch is built for CUDA {built}; no NVIDIA driver is used")
    old = [node for node in nodes if node.cuda[1] is None or node.cuda[1][0] < int(built.split(".")[0])]
    if old:
        hosts = ", ".join(sorted({node.host for node in old}))
        return _Row("driver", "fails", f"torch is built for CUDA {built}, too new for the driver on {hosts}")
    return _Row("driver", "ok", f"torch is built for CUDA {built}, all drivers serve it")


def _versions(nodes: list[_Node]) -> _Row:
    differing = []
    for index, (name, _) in enumerate(nodes[0].versions):
        found = _differing(nodes, lambda node, index=index: node.versions[index][1])  # type: ignore[misc]
        if found:
            differing.append(f"{name}: {found}")
    if differing:
        return _Row(
            "versions", "fails", f"{'; '.join(differing)}; all nodes must have one environment (FD_PYTHON)"
        )
    shown = ", ".join(
        f"{name} {value}" for name, value in nodes[0].versions if name in ("python", "torch", "deepspeed")
    )
    return _Row("versions", "ok", f"equal on all ranks: {shown}")


def _weights(nodes: list[_Node]) -> _Row:
    missing = {node.host: node.weights for node in nodes if node.weights}
    if missing:
        return _Row(
            "weights", "fails", "; ".join(f"on {host}: {problem}" for host, problem in missing.items())
        )
    return _Row("weights", "ok", "all that the recipe names is there, on every node")


def _run_folder(run_dir: Path, world: World) -> _Row:
    """Every rank writes a file and looks for all the others': a folder that is not shared shows."""
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()] if world.is_main else []
    problem = ""
    own = run_dir / f"check_{world.rank}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        own.write_text(str(world.rank), encoding="utf-8")
    except OSError as error:
        problem = f"{error.strerror}"
    world.barrier()
    present = set(os.listdir(run_dir)) if run_dir.is_dir() else set()
    unseen = [rank for rank in range(world.size) if f"check_{rank}" not in present]
    world.barrier()
    with contextlib.suppress(OSError):  # said above
        own.unlink()
    found = world.gather((_host(), problem, unseen))
    for folder in new:
        with contextlib.suppress(OSError):
            folder.rmdir()
    for host, failed, _ in found:
        if failed:
            return _Row("run folder", "fails", f"{run_dir} cannot be written on {host} ({failed})")
    for host, _, missing in found:
        if missing:
            others = ", ".join(found[rank][0] for rank in missing)
            return _Row(
                "run folder",
                "fails",
                f"{run_dir}: {host} does not see what {others} writes; it must be shared",
            )
    return _Row("run folder", "ok", f"{run_dir}: every rank writes there and sees the others")


def _network(world: World) -> _Row:
    """Bytes that cross each rank's link, as nccl-tests counts its bus bandwidth; all ranks call it."""
    if world.size == 1:
        return _Row("network", "ok", "one rank: nothing to measure")
    on_gpu = world.device.type == "cuda"
    size = GPU_BYTES if on_gpu else CPU_BYTES
    part = min(size, MOST_GATHERED // world.size)

    def reduce() -> Callable[[], object]:
        if on_gpu:
            torch.cuda.set_device(world.device)
        share = torch.ones(size // 4, device=world.device)
        return lambda: dist.all_reduce(share)

    def gather() -> Callable[[], object]:
        share = torch.ones(part // 4, device=world.device)
        gathered = torch.empty(part // 4 * world.size, device=world.device)
        return lambda: dist.all_gather_into_tensor(gathered, share)

    try:
        reduced = 2 * (world.size - 1) / world.size * size / _seconds(reduce, world)
        gathered = (world.size - 1) * part / _seconds(gather, world)
    except UserError as error:
        return _Row("network", "fails", str(error))
    detail = (
        f"all-reduce {reduced / 1e9:.2f} GB/s ({size / 2**20:.0f} MiB), all-gather {gathered / 1e9:.2f} GB/s "
        f"({part / 2**20:.0f} MiB a rank) at each of {world.size} ranks, {'nccl' if on_gpu else 'gloo'}"
    )
    if not on_gpu:
        return _Row("network", "ok", detail)
    expected = expected_rate(torch.cuda.get_device_name(world.device), world.gather(platform.node()))
    if expected is None:
        return _Row("network", "ok", f"{detail}; nothing to compare with: the GPU is not in the table")
    detail += f"; the datasheets' links: {expected / 1e9:.0f} GB/s"
    if reduced < SLOW * expected:
        return _Row("network", "warning", f"{detail}; see NCCL_SOCKET_IFNAME, NCCL_IB_HCA")
    return _Row("network", "ok", detail)


def expected_rate(device_name: str, hosts: list[str]) -> float | None:
    """Returns the bytes/s of an all-reduce, counted as nccl-tests does, that the links allow.

    Args:
        device_name: of each rank's GPU.
        hosts: of each rank.

    Returns:
        None where the GPU is not in the table.
    """
    found = named_like(device_name)
    if not found:
        return None
    # A ring crosses a network card of each host; there are as many rings as cards, and the cards share what is sent.
    cards = min(Counter(hosts).values())
    return found[0].nvlink if len(set(hosts)) == 1 else min(found[0].nvlink, found[0].infiniband * cards)


def _seconds(prepare: Callable[[], Callable[[], object]], world: World) -> float:
    """Seconds of one call of what `prepare` returns, the slowest rank's; all ranks call it.

    Raises:
        UserError: a rank cannot; it is named with its host. What fails on one rank alone must do so in `prepare`:
            within a collective the others would wait for it.
    """
    collective, _ = _together(prepare, world)
    _together(collective, world)  # opens connections

    def repeated() -> None:
        for _ in range(REPEATS):
            collective()

    _, seconds = _together(repeated, world)
    return max(world.gather(seconds / REPEATS))


def _together(function: Callable[[], T], world: World) -> tuple[T, float]:
    """Returns what it returns here, once all ranks have called it, and the seconds that it took."""
    value, problem = None, ""
    world.barrier()
    began = time.perf_counter()
    try:
        value = function()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:  # of CUDA and NCCL, too little memory among them
        problem = f"on {_host()}: {str(error).splitlines()[0]}"
    seconds = time.perf_counter() - began
    problems = [each for each in world.gather(problem) if each]
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return cast(T, value), seconds


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME", platform.node())


def _data(recipe: Recipe, world: World) -> _Row:
    """Loads images as the run would, on all ranks at once."""
    mine: tuple[str, float, str]
    host = _host()
    world.barrier()
    try:
        mine = (host, _images_per_s(recipe, world), "")
    except (UserError, OSError) as error:
        mine = (host, 0.0, str(error))
    found = world.gather(mine)
    failed = [f"on {host}: {problem}" for host, _, problem in found if problem]
    if failed:
        return _Row("data", "fails", "; ".join(dict.fromkeys(failed)))
    slowest, rate = min(((host, rate) for host, rate, _ in found), key=lambda item: item[1])
    detail = (
        f"{sum(rate for _, rate, _ in found):.0f} images/s in all, the slowest rank on {slowest} {rate:.0f}"
    )
    needed = world.on_main(lambda: _needed_images_per_s(recipe, world))
    if needed is None:
        return _Row("data", "ok", detail)
    detail += f"; a rank trains on {needed:.0f} by the plan"
    return _Row("data", "ok" if rate >= needed else "warning", detail)


def _images_per_s(recipe: Recipe, world: World) -> float:
    config = ds_config.resolve(ds_config.read(recipe.train.ds_config), recipe, world.size, world.device.type)
    source = open_source(recipe.data.train)
    loader = TrainLoader(
        source, training_transform(recipe, source),
        seed=recipe.seed, global_batch=recipe.train.global_batch,
        micro_batch=config["train_micro_batch_size_per_gpu"], rank=world.rank, world_size=world.size,
        num_workers=recipe.data.num_workers, shard_window=recipe.data.shard_window, crops=recipe.data.crops,
    )  # fmt: skip
    batches = loader.iterate(0)
    try:
        next(batches)  # the workers start
        began, num_images = time.perf_counter(), 0
        while time.perf_counter() - began < READ_S:
            num_images += sum(len(batch.positions) for batch in next(batches))
            if loader.problem:
                raise UserError(loader.problem)
        return num_images / (time.perf_counter() - began)
    finally:
        batches.close()


def _needed_images_per_s(recipe: Recipe, world: World) -> float | None:
    """Images a second of one rank, where the plan knows the GPU and the models."""
    if world.device.type != "cuda":
        return None
    try:
        if not named_like(torch.cuda.get_device_name(world.device)):
            return None
        planned = plan(recipe.run_dir, recipe, present_gpu(world.device), world.size, images=0)
    except (UserError, RuntimeError):  # of a GPU that fails, too: the network's row says so
        return None
    return recipe.train.global_batch / planned.own.step_seconds / world.size


def _print(recipe: Recipe, nodes: list[_Node], rows: list[_Row], world: World) -> None:
    if not world.is_main:
        return
    hosts = list(dict.fromkeys(node.host for node in nodes))
    table = Table(
        "check", "verdict", "detail", title=f"{len(nodes)} ranks on {', '.join(hosts)}, {recipe.run_dir}"
    )
    for row in rows:
        style = {"ok": "green", "warning": "yellow", "fails": "bold red"}[row.verdict]
        table.add_row(row.name, Text(row.verdict, style), Text(row.detail))
    results().print(table)
    count = Counter(row.verdict for row in rows)
    if count["fails"]:
        print(f"would fail: {count['fails']} of {len(rows)} checks fail, {count['warning']} warn", flush=True)
    else:
        print(f"nothing found that would fail: {len(rows)} checks, {count['warning']} warn", flush=True)
