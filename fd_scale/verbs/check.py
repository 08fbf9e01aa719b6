"""`fd-scale check`: what would fail, found in seconds, before a job is queued.

Nothing is trained and nothing stays on disk. Models are built on the meta device, of weights only
the header is read. DeepSpeed is imported for a JSON of the user's own alone, which it reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from fd_scale import ds_config, hub, run_folder
from fd_scale.checkpoint import MANIFEST, newest_checkpoint, read_manifest, refuse_other_identity
from fd_scale.config import TEACHER, ModelConfig, Recipe, SourceConfig, load_recipe
from fd_scale.data import (
    Source,
    TrainLoader,
    evaluation_batches,
    measuring_transform,
    open_source,
    require_targets,
    training_transform,
)
from fd_scale.data.base import IGNORED
from fd_scale.data.decode import DecodeError
from fd_scale.data.store import is_remote
from fd_scale.distill import DistillationTask
from fd_scale.distributed import choose_device
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet
from fd_scale.finetune import FineTuningTask, fine_tuning_task
from fd_scale.finetune.classes import require_same_classes
from fd_scale.finetune.labels import doubts_of_labels
from fd_scale.hardware import find_gpu
from fd_scale.log import results
from fd_scale.models import Backbone, SwinTransformerV2, build_model, create_model, exported_model, resolved
from fd_scale.optim import apex_is_importable, refuse_average_of_statistics
from fd_scale.plan import NotCountedError, memory_table, plan, present_gpu, require_fit
from fd_scale.pretrain import ContrastiveTask, MaskedTask
from fd_scale.teachers import Teacher
from fd_scale.verbs.features import Part, evaluation_part, train_part
from fd_scale.verbs.fetch import data_paths, named_files

NUM_READ = 16
"""Of the training images."""


class _Warning(str):
    """A detail worth reading, though the run would start."""


@dataclass(frozen=True)
class _Subject:
    """What is checked; each part is made once, by the check that is named after it."""

    name: str
    overrides: list[str]
    num_ranks: int
    gpu: str | None

    @cached_property
    def recipe(self) -> Recipe:
        return resolved(load_recipe(self.name, self.overrides))

    @cached_property
    def resolved(self) -> dict[str, Any]:
        wanted = self.recipe.train.device
        on_cuda = wanted == "cuda" or (
            wanted == "auto" and (self.gpu is not None or torch.cuda.is_available())
        )
        config = ds_config.read(self.recipe.train.ds_config)
        return ds_config.resolve(config, self.recipe, self.num_ranks, "cuda" if on_cuda else "cpu")

    @cached_property
    def source(self) -> Source:
        return open_source(self.recipe.data.train)

    @property
    def num_trained(self) -> int:
        """Trained parameters."""
        return self._num_parameters[0]

    @property
    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes; of what is frozen the weights alone."""
        trained, frozen = self._num_parameters
        # The optimizer's states and its fp32 masters, and DeepSpeed's copy of the weights.
        per_parameter = self.recipe.optim.state_bytes + 8
        return trained * per_parameter + frozen * (4 if self.recipe.train.precision == "fp32" else 2)

    @cached_property
    def module(self) -> nn.Module:
        """What is trained, without memory; a linear probe's classifiers."""
        recipe = self.recipe
        task: DistillationTask | ContrastiveTask | MaskedTask | FineTuningTask
        with torch.device("meta"):
            if recipe.task == "distill":
                task = DistillationTask(recipe, None)
            elif recipe.task == "contrastive":
                task = ContrastiveTask(recipe)
            elif recipe.task == "masked":
                task = MaskedTask(recipe, None)
            elif recipe.linear_probe is not None:
                num_features = build_model(replace(recipe.model, weights=None)).num_features
                return nn.Linear(num_features, self.source.num_classes * len(recipe.linear_probe.lr_factors))
            else:
                task = fine_tuning_task(recipe, None, self.source)
        return task.module

    @property
    def _num_parameters(self) -> tuple[int, int]:
        """Trained ones of the module, and frozen ones."""
        parameters = list(self.module.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return trained, sum(parameter.numel() for parameter in parameters) - trained

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def existing_dir(self) -> Path:
        """The run folder, or its nearest parent that exists."""
        folder = self.run_dir.absolute()
        return next(path for path in (folder, *folder.parents) if path.exists())


def check(recipe: str, overrides: list[str], num_ranks: int, gpu: str | None = None) -> None:
    """Prints a table of checks and a verdict.

    Args:
        recipe: a YAML file, or the name of a packaged recipe.
        overrides: `key=value` strings.
        num_ranks: ranks that the job will have.
        gpu: name of the GPU that each of them will have; none: the one that is here, if any.

    Raises:
        UserError: `num_ranks` is below 1, or the GPU is not known.
        SystemExit: with code 2, where the run would fail.
    """
    if num_ranks < 1:
        raise UserError(f"--ranks: got {num_ranks}, expected at least 1")
    if gpu is not None:
        find_gpu(gpu)
    subject = _Subject(recipe, overrides, num_ranks, gpu)
    verdicts: dict[str, str] = {}
    table = Table("check", "verdict", "detail", title=f"{recipe}, ranks: {num_ranks}")
    for name, function, needs in _CHECKS:
        unmet = [need for need in needs if verdicts[need] in ("fails", "skipped")]
        if unmet:
            verdicts[name], detail = "skipped", f"needs: {', '.join(unmet)}"
        else:
            try:
                detail = function(subject)
                verdicts[name] = "warning" if isinstance(detail, _Warning) else "ok"
            except UserError as error:
                verdicts[name], detail = "fails", str(error)
        style = {"ok": "green", "warning": "yellow", "fails": "bold red", "skipped": "dim"}[verdicts[name]]
        table.add_row(name, Text(verdicts[name], style), Text(detail))
    results().print(table)
    found = list(verdicts.values())
    num_failed, num_warnings = found.count("fails"), found.count("warning")
    if num_failed:
        failed = ", ".join(name for name, verdict in verdicts.items() if verdict == "fails")
        print(f"would fail: {num_failed} of {len(found)} checks fail ({failed}), {num_warnings} warn")
        raise SystemExit(2)
    print(f"nothing found that would fail: {len(found)} checks, {num_warnings} warn")


def _recipe(subject: _Subject) -> str:
    recipe = subject.recipe
    length = f"{recipe.train.steps} steps" if recipe.train.steps else f"{recipe.train.epochs:g} epochs"
    return f"task {recipe.task} with its section, {length}, {recipe.train.precision}, seed {recipe.seed}"


def _ds_json(subject: _Subject) -> str:
    resolved, recipe = subject.resolved, subject.recipe
    if Path(recipe.train.ds_config).is_file():  # one of the user's own
        from fd_scale.engine.refusals import require_readable  # seconds, which no other check takes

        require_readable(resolved)
    return (
        f"{recipe.train.ds_config}: {ds_config.zero_name(resolved)}, {recipe.train.global_batch} images a step "
        f"= {subject.num_ranks} ranks x {resolved['gradient_accumulation_steps']} micro-batches x "
        f"{resolved['train_micro_batch_size_per_gpu']}"
    )


def _network(subject: _Subject) -> str:
    named = named_files(subject.recipe)
    for files in named:
        hub.cached(files)
    found = "nothing will be fetched: the recipe names nothing on the hub"
    if named:
        found = f"nothing will be fetched: {len(named)} things are in the cache"
    stores = ", ".join(filter(is_remote, data_paths(subject.recipe)))
    return f"{found}; but shards will, as they are read: {stores}" if stores else found


def _written(sources: str | list[SourceConfig]) -> str:
    if isinstance(sources, str):
        return sources
    return " + ".join(f"{config.weight} x {config.source}" for config in sources)


def _training_data(subject: _Subject) -> str:
    source = subject.source
    require_targets("data.train", subject.recipe.data.train, source, subject.recipe.targets)
    found = f"{_written(subject.recipe.data.train)}: {len(source)} images, {source.num_classes} classes"
    count = min(len(source), NUM_READ)
    bad, sizes, classes = [], [], set()
    # Of a store the first ones, which lie in one shard: each might be downloaded whole.
    last = count - 1 if any(map(is_remote, data_paths(subject.recipe))) else len(source) - 1
    for sample_id in np.linspace(0, last, count).round().astype(int).tolist():
        try:
            picture, target = source.read(sample_id)
            picture.pil()
        except DecodeError as error:
            bad.append(f"{source.name(sample_id)}: {error}")
            continue
        sizes.append(f"{picture.width}x{picture.height}")
        if source.targets == "masks":
            classes |= set(np.unique(np.asarray(target)).tolist()) - {IGNORED}
    if not sizes:
        raise UserError(f"data.train: {found}, and of {count} that were read none is whole: {bad[0]}")
    if bad:
        return _Warning(f"{found}; {len(bad)} of {count} that were read would be replaced: {bad[0]}")
    if source.targets == "masks" and len(classes) < 2:
        names = [(source.class_names or [])[label] for label in classes]
        return _Warning(
            f"{found}; all pixels of {count} masks are {' or '.join([*names, 'ignored'])}: classes count "
            f"from 0, and {IGNORED} is ignored"
        )
    return f"{found}, one of {sizes[0]} px"


def _evaluation_data(subject: _Subject) -> str:
    recipe = subject.recipe
    if recipe.data.evaluation is None:
        return "none: metrics are those of training alone"
    source = open_source(recipe.data.evaluation)
    require_targets("data.evaluation", recipe.data.evaluation, source, recipe.targets)
    batches = evaluation_batches(
        source,
        measuring_transform(recipe),
        # Whole images differ in size; they are shared in another way, over any number of ranks.
        batch_size=recipe.train.micro_batch if recipe.targets == "labels" else 1,
        rank=0,
        world_size=subject.num_ranks if recipe.targets == "labels" else 1,
        num_workers=0,
    )
    with contextlib.closing(batches):
        first = next(batches)
    return (
        f"{_written(recipe.data.evaluation)}: {len(source)} images, {source.num_classes} classes, "
        f"the first {len(first.labels)} decode"
    )


def _length(subject: _Subject) -> str:
    recipe = subject.recipe
    loader = TrainLoader(
        subject.source,
        training_transform(recipe, subject.source),
        seed=recipe.seed,
        global_batch=recipe.train.global_batch,
        micro_batch=subject.resolved["train_micro_batch_size_per_gpu"],
        rank=0,
        world_size=subject.num_ranks,
        num_workers=0,
        shard_window=recipe.data.shard_window,
        crops=recipe.data.crops,
    )
    return f"{loader.steps_per_epoch} steps an epoch"


def _student(subject: _Subject) -> str:
    config = subject.recipe.model
    with torch.device("meta"):
        model = build_model(config)  # of weights, the header is compared
        model(torch.zeros(1, 3, config.size, config.size))
        doubt = _doubt_of_windows(config, model)
    described = _described(config, model)
    return _Warning(f"{described}; {doubt}") if doubt else described


def _doubt_of_windows(config: ModelConfig, model: Backbone) -> str:
    """Says that an export's biases were learned over the distances of other windows; empty: they were not."""
    exported = exported_model(config.weights)
    if not (isinstance(model, SwinTransformerV2) and str(exported.get("name")).startswith("swin_v2_")):
        return ""
    before = create_model(exported["name"], img_size=exported["img_size"], **exported["overrides"])
    assert isinstance(before, SwinTransformerV2), "by its name"
    if before.bias_windows == model.bias_windows:
        return ""
    written = str(before.bias_windows).replace(" ", "")  # one word for a shell
    return (
        f"its position biases were trained over windows of {before.bias_windows} tokens a side, by stage, and are "
        f"stretched over {model.bias_windows}; set model.overrides.pretrained_window_size={written}"
    )


def _teacher(subject: _Subject) -> str:
    if subject.recipe.distill is None:
        return f"none in task {subject.recipe.task}"
    details, random = [], False
    for config in subject.recipe.distill.teachers:
        with torch.device("meta"):
            teacher = Teacher(config, torch.float32)
        details.append(f"{_described(config.model, teacher.model)}; target {config.target}")
        if config.model.weights is None:
            random = True
            details[-1] += ": it teaches noise"
    if subject.recipe.distill.features is not None:
        for part in _feature_parts(subject):
            part.files.open(part.identity, make=False)
            details.append(f"{part.files.num_views} views of features in {part.files.folder}")
    return _Warning("\n".join(details)) if random else "\n".join(details)


def _feature_parts(subject: _Subject) -> Iterator[Part]:
    recipe = subject.recipe
    yield train_part(recipe, subject.source)
    if recipe.data.evaluation is not None:
        images = EvaluationSet(
            source=open_source(recipe.data.evaluation),
            transform=measuring_transform(recipe),
            batch_size=recipe.train.micro_batch,
            num_workers=0,
        )
        yield evaluation_part(recipe, images)


def _described(config: ModelConfig, model: Backbone) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    rows, columns = model.grid_size(config.size, config.size)
    rate = max(model.drop_path_rates, default=0.0)
    weights = {None: "random weights", TEACHER: "the teacher's weights"}.get(
        config.weights, f"{config.weights} fits"
    )
    return (
        f"{config.name}: {millions:.2f} M parameters, {config.size} px make {rows}x{columns} tokens; {weights}"
        + (f"; drop path up to {rate:g}" if rate else "")
    )


def _task(subject: _Subject) -> str | _Warning:
    refuse_average_of_statistics(subject.module, subject.recipe.optim)
    evaluated = subject.recipe.data.evaluation
    if evaluated is not None and subject.recipe.task not in ("distill", "contrastive", "masked"):
        require_same_classes(subject.recipe, subject.source, open_source(evaluated))
    detail = f"{subject.recipe.task}: {subject.num_trained / 1e6:.2f} M trained parameters"
    if subject.recipe.task not in ("classification", "linear_probe"):
        return detail
    doubts = doubts_of_labels("data.train", subject.source)
    if subject.recipe.data.evaluation is not None:
        doubts += doubts_of_labels("data.evaluation", open_source(subject.recipe.data.evaluation))
    return _Warning("\n".join([detail, *doubts])) if doubts else detail


def _memory(subject: _Subject) -> str | _Warning:
    recipe = subject.recipe
    if recipe.linear_probe is not None:
        return "not planned: a few classifiers, and a model that is run once"
    if subject.gpu is not None:
        gpu = find_gpu(subject.gpu)
    elif recipe.train.device != "cpu" and torch.cuda.is_available():
        gpu = present_gpu(choose_device(recipe.train.device))
    else:
        return "not planned: --gpu names none, and the run is not on a GPU of this host"
    try:
        planned = plan(subject.name, recipe, gpu, subject.num_ranks, images=0)
    except NotCountedError as error:
        return _Warning(str(error))
    except UserError as error:  # another check says so too
        return _Warning(f"not planned: {error}")
    try:
        own = require_fit(planned)
    except UserError:
        results().print(memory_table(planned))
        raise
    return (
        f"{own.memory.total / 2**30:.2f} of {gpu.memory / 2**30:.2f} GiB of {gpu.name}, x {subject.num_ranks}"
    )


def _run_folder(subject: _Subject) -> str:
    folder = subject.run_dir
    try:
        with tempfile.TemporaryFile(dir=subject.existing_dir):
            pass
    except OSError as error:
        raise run_folder.not_writable(folder, error) from None
    root = folder / "checkpoints"
    latest = root / "latest"
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
    detail = f"{folder}: can be written, no checkpoint to resume"
    newest = None
    if any(root.glob(f"step_*/{MANIFEST}")):
        newest = newest_checkpoint(folder, contents=False)  # of checksums, the run will say
        detail = f"{folder}: can be written, resumes at step {read_manifest(newest)['state']['step']} ({newest.name})"
    if named is not None and (newest is None or newest.name != named):
        return _Warning(f"{detail}; {latest} names {named}, which is not whole")
    return detail


def _resume(subject: _Subject) -> str:
    stage = ds_config.zero_stage(subject.resolved)
    identity = run_folder.identity(subject.recipe, subject.source.fingerprint, stage, subject.num_ranks)
    refuse_other_identity(subject.run_dir, identity)
    return "no checkpoint there is of another run"


def _disk(subject: _Subject) -> str:
    size = subject.checkpoint_bytes
    free = shutil.disk_usage(subject.existing_dir).free
    # Beside the newest ones: the best, and the one being written.
    held = subject.recipe.checkpoint.keep_last + 2
    found = (
        f"a checkpoint takes about {_gib(size)}, {held} of them {_gib(held * size)}, free are {_gib(free)}"
    )
    if free < size:
        raise UserError(f"run_dir: {found}; free space there or choose another disk with run_dir=PATH")
    return found if free >= held * size else _Warning(found)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _device(subject: _Subject) -> str:
    device = choose_device(subject.recipe.train.device)
    if device.type == "cpu":
        return f"train.device={subject.recipe.train.device}: the CPU"
    return f"{torch.cuda.device_count()} visible, the first {torch.cuda.get_device_name(device)}"


def _driver(subject: _Subject) -> str:
    built, driver, wanted = torch.version.cuda, driver_cuda_version(), subject.recipe.train.device
    if built is None:
        return f"torch {torch.__version__} is built without CUDA"
    if driver is None:
        found = f"torch {torch.__version__} is built for CUDA {built}, but no NVIDIA driver is on this host"
        if wanted == "cuda":
            raise UserError(f"train.device: {found}; check on a GPU host, or set train.device=cpu")
        return _Warning(f"{found}: runs here use the CPU")
    found = f"torch {torch.__version__} is built for CUDA {built}, the driver serves up to {driver[0]}.{driver[1]}"
    if driver[0] >= int(built.split(".")[0]):
        return found
    if wanted == "cpu":
        return _Warning(found)
    raise UserError(
        f"train.device: {found}; update the NVIDIA driver, or install a torch that is built for CUDA {driver[0]}"
    )


def driver_cuda_version() -> tuple[int, int] | None:
    """Returns the newest CUDA version that the NVIDIA driver serves, as (major, minor); none without a driver.

    Source: `cuDriverGetVersion` of the CUDA driver API, which gives 1000 * major + 10 * minor.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _apex(subject: _Subject) -> str:
    if apex_is_importable():
        return "NVIDIA Apex is importable: its FusedAdam steps on CUDA"
    return "not installed: torch's fused AdamW steps (PyPI's `apex` is another thing, do not install it)"


def _versions(subject: _Subject) -> str:
    versions = run_folder.environment()["versions"]
    if versions["deepspeed"] is None:
        raise UserError("deepspeed is not installed; run: pip install deepspeed")
    return ", ".join(f"{name} {versions[name] or 'none'}" for name in ("torch", "deepspeed", "triton"))


# Name, what returns its detail or raises UserError, and the checks that it builds upon.
_CHECKS: tuple[tuple[str, Callable[[_Subject], str], tuple[str, ...]], ...] = (
    ("recipe", _recipe, ()),
    ("DeepSpeed JSON", _ds_json, ("recipe",)),
    ("network", _network, ("recipe",)),
    ("training data", _training_data, ("recipe",)),
    ("evaluation data", _evaluation_data, ("recipe",)),
    ("epoch", _length, ("DeepSpeed JSON", "training data")),
    ("student", _student, ("recipe",)),
    ("teacher", _teacher, ("recipe",)),
    ("task", _task, ("training data", "student", "teacher")),
    ("memory", _memory, ("DeepSpeed JSON",)),
    ("run folder", _run_folder, ("recipe",)),
    ("resume", _resume, ("DeepSpeed JSON", "training data", "student", "teacher", "run folder")),
    ("disk", _disk, ("task", "run folder")),
    ("device", _device, ("recipe",)),
    ("driver", _driver, ("recipe",)),
    ("Apex", _apex, ()),
    ("versions", _versions, ()),
)
