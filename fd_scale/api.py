"""The verbs as functions: what the command line does, from Python.

from fd_scale import api
api.train(api.load_recipe("digits/distill", ["train.epochs=2"]))
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fd_scale import distributed, ds_config, log, run_folder
from fd_scale.checkpoint import Checkpoints, TrainState, refuse_other_identity
from fd_scale.config import DistillConfig, Recipe, load_recipe
from fd_scale.cuda_graphs import record
from fd_scale.data import (
    Source,
    TrainLoader,
    measuring_transform,
    open_source,
    require_targets,
    spread,
    training_transform,
)
from fd_scale.distill import DistillationTask
from fd_scale.distributed import Preemption, World
from fd_scale.engine import Engine, Partition
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet
from fd_scale.finetune import (
    ClassificationTask,
    DetectionTask,
    LinearProbeTask,
    SegmentationTask,
    features_of,
    fine_tuning_task,
)
from fd_scale.hardware import find_gpu
from fd_scale.lock import RunLock
from fd_scale.log import console
from fd_scale.metrics import Recorder
from fd_scale.models import Backbone, choose_kernels, dtype_of, resolved
from fd_scale.optim import learning_rates
from fd_scale.placement import WHOLE, Placement
from fd_scale.plan import Choice, NotCountedError, Plan, memory_table, present_gpu, require_fit
from fd_scale.plan import plan as plan_recipe
from fd_scale.plan.measure import Measured
from fd_scale.plan.measure import measure as measure_trainer
from fd_scale.pretrain import ContrastiveTask, MaskedTask
from fd_scale.randomness import initial_seed
from fd_scale.torch_state import as_in_a_new_process
from fd_scale.trainer import Task, Trainer
from fd_scale.verbs import features as teacher_features
from fd_scale.verbs import fetch as fetching
from fd_scale.verbs import index as indexing
from fd_scale.verbs.evaluate import (
    evaluate_task,
    find_checkpoint,
    recipe_of,
    restore,
    saying_where_it_started,
)
from fd_scale.verbs.export import convert, export, interpolate
from fd_scale.verbs.predict import class_names_of, mask_values_of, predict_classes, predict_images

if TYPE_CHECKING:
    from fd_scale.diagnose.landscape import Grid

__all__ = [
    "build_task", "build_trainer", "convert", "evaluate", "export", "features", "fetch", "index", "interpolate",
    "landscape", "load_recipe", "measure", "plan", "predict", "start", "train",
]  # fmt: skip

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> TrainState:
    """Runs a recipe from its newest whole checkpoint, or from step 0, to its end.

    On many ranks, every rank calls it (torchrun starts them).

    Args:
        recipe: a recipe of any task.

    Returns:
        The state after the last step, or after the step at which the run was preempted.

    Raises:
        UserError: the recipe, its data or its checkpoints do not allow it.
    """
    return start(recipe).train()


@as_in_a_new_process()
def start(recipe: Recipe) -> Trainer:
    """Builds what runs a recipe on the ranks that a launcher started, or on this process alone.

    Until its `train` or its `close` it holds the run folder and, in a process alone, SIGTERM and SIGUSR1.

    Raises:
        UserError: as `train`.
    """
    return build_trainer(recipe, join(recipe))


def join(recipe: Recipe) -> World:
    """Joins the ranks that a launcher started, and sets up what they say.

    Raises:
        UserError: a loader's worker calls it, as it imports the script that started it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "a loader's worker imports the script that started its run, which would start there again; put what that "
            'script runs below `if __name__ == "__main__":`'
        )
    world = distributed.start(recipe.train.device, recipe.train.timeout_s)
    log.set_up(world.rank)
    return world


@as_in_a_new_process()
def evaluate(
    path: str | Path, overrides: Sequence[str] = (), real: str | None = None, out: str | Path | None = None
) -> dict[str, Any]:
    """Measures a run's newest checkpoint, or the one that is named; all ranks call it and share the images.

    Args:
        path: folder of a run, or one of its checkpoints.
        overrides: `key=value` settings that replace the recipe's, e.g. `data.evaluation=imagefolder:PATH`.
        real: file of ImageNet's reassessed labels (`evaluation.reassessed_labels`); none: without.
        out: folder of the results; none: RUN/evaluations.

    Returns:
        What is in OUT/CHECKPOINT.json too: `step`, `source`, the metrics, and `classes` of a classifier.

    Raises:
        UserError: there is no whole checkpoint, or the images do not fit it.
    """
    run, checkpoint = find_checkpoint(Path(path))
    recipe = recipe_of(run, checkpoint, overrides)
    if real is not None and recipe.classification is None:
        raise UserError(f"--real: labels are for a classifier, {run} is of task {recipe.task}; leave it out")
    with saying_where_it_started(run, recipe):
        task, recipe, world = _to_evaluate(recipe)
    return evaluate_task(task, recipe, run, checkpoint, world, real, None if out is None else Path(out))


@as_in_a_new_process()
def landscape(
    path: str | Path,
    grid: Grid,
    overrides: Sequence[str] = (),
    num_images: int = 256,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measures the loss on a line or plane through a checkpoint's weights; all ranks call it and share the images.

    A second call for the same grid around the same weights goes on where the first one stopped; for another it needs
    another folder.

    Args:
        path: folder of a run of distillation, masked images or classification, or one of its checkpoints.
        grid: the places.
        overrides: `key=value` settings that replace the recipe's, e.g. `data.evaluation=imagefolder:PATH`.
        num_images: evenly spread ones of `data.evaluation`.
        out: folder of the results; none: RUN/diagnosis.

    Returns:
        What is in OUT/landscape.json (of a line: landscape_line.json) too: `rows` of the metrics,
        `top_eigenvalue` and its `eigenvalue_error` over `eigenvalue_images` images, or none where not one fits
        in memory.

    Raises:
        UserError: there is no whole checkpoint, the images do not fit it, or the folder has another landscape.
    """
    run, checkpoint = find_checkpoint(Path(path))
    recipe = recipe_of(run, checkpoint, overrides)
    with saying_where_it_started(run, recipe):
        task, recipe, world = _to_evaluate(recipe)
    if not isinstance(task, DistillationTask | ClassificationTask | MaskedTask):
        raise UserError(
            f"{run}: no landscape of task {recipe.task}; expected a distillation, masked images or a classification"
        )
    restore(task, recipe, checkpoint, world)
    from fd_scale.diagnose.landscape import landscape_of  # and plots: half a second of every rank's start

    folder = Path(out) if out is not None else run / "diagnosis"
    return landscape_of(task, recipe, checkpoint, grid, num_images, world, folder)


@as_in_a_new_process()
def features(recipe: Recipe) -> None:
    """Computes the teachers' features that a recipe reads from disk, where they are not there; ranks share the images.

    Args:
        recipe: of a distillation, with `distill.features`.

    Raises:
        UserError: the folder has features of something else, or no room; or the recipe keeps none.
    """
    if recipe.distill is None or recipe.distill.features is None:
        raise UserError(
            "distill.features.folder: names no folder; add distill.features.folder=PATH, and to the runs too"
        )
    world = join(recipe)
    _warn_of_random_teachers(recipe.distill)
    recipe = resolved(recipe)
    choose_kernels(recipe.train.kernels, world.device)
    source = open_source(recipe.data.train)
    teacher_features.compute(recipe, teacher_features.train_part(recipe, source), world)
    if recipe.data.evaluation is not None:
        images = _evaluation_set(recipe, open_source(recipe.data.evaluation))
        teacher_features.compute(recipe, teacher_features.evaluation_part(recipe, images), world)


def fetch(recipe: Recipe | str) -> list[str]:
    """Downloads what a recipe names on the Hugging Face hub into the cache, or `NAME@pretrained` or a source alone.

    Returns:
        A line for each thing: what it is, and where.

    Raises:
        UserError: it cannot be downloaded.
    """
    return list(fetching.fetch(recipe))


def index(source: str, processes: int = 0, out: str | Path | None = None) -> list[str]:
    """Makes the index of tar shards ahead of their runs, or finds it.

    Args:
        source: `tar:PATH`, as in `data.train`.
        processes: that read headers; 0: threads of this one.
        out: file of a copy, which may be put beside the shards in a store.

    Returns:
        Lines that say what is in it, and where it is.

    Raises:
        UserError: it is no source of shards, a shard is refused, or the cache or the copy cannot be written.
    """
    return list(indexing.index(source, processes, None if out is None else str(out)))


def _to_evaluate(recipe: Recipe) -> tuple[Task, Recipe, World]:
    """Joins the ranks and builds a task without weights, its teachers where they run."""
    world = join(recipe)
    recipe = resolved(recipe)
    choose_kernels(recipe.train.kernels, world.device)
    task = build_task(recipe, None)
    for teacher in task.teachers if isinstance(task, DistillationTask) else []:
        teacher.to(world.device)
    return task, recipe, world


@as_in_a_new_process()
def predict(
    path: str | Path, images: str | Path, out: str | Path, overrides: Sequence[str] = (), masks: bool = False
) -> list[Path]:
    """Writes what a checkpoint makes of images: pictures of a segmentation or a detection, a table of a classification.

    Args:
        path: folder of the run, or one of its checkpoints.
        images: an image file, or a folder of them.
        out: folder of the pictures, or of `predictions.csv`.
        overrides: `key=value` settings that replace the recipe's, e.g. `segmentation.flip_too=true`.
        masks: whether a segmentation's masks are wanted in place of pictures, with the values of those it learned from.

    Returns:
        The files; those of a detection end with `detections.json`.

    Raises:
        UserError: the run is of another task, or masks are wanted of one that has none; there is no whole checkpoint,
            or an image cannot be read.
    """
    run, checkpoint = find_checkpoint(Path(path))
    recipe = recipe_of(run, checkpoint, overrides, images_needed=False)
    if recipe.task not in ("classification", "segmentation", "detection"):
        raise UserError(
            f"{run}: predict shows classes of images or pixels, or objects, and its task is {recipe.task}; name a "
            "classification, a segmentation or a detection"
        )
    if masks and recipe.segmentation is None:
        raise UserError(
            f"--masks: a class for each pixel is what a segmentation predicts, {run} is of task {recipe.task}; leave "
            "it out; those of a detection's objects are in its detections.json"
        )
    recipe = replace(recipe, data=replace(recipe.data, evaluation=None))
    task, recipe, world = _to_evaluate(recipe)
    restore(task, recipe, checkpoint, world)
    names, values = run_folder.classes(run)
    names = names or class_names_of(recipe)
    if isinstance(task, ClassificationTask):
        return [predict_classes(task, recipe, names, Path(images), Path(out), world.device)]
    assert isinstance(task, SegmentationTask | DetectionTask), "the recipe's task"
    values = (values or mask_values_of(recipe, task.num_classes)) if masks else None
    return predict_images(task, names, Path(images), Path(out), world.device, values)


@as_in_a_new_process()
def plan(recipe: Recipe, gpu: str, num_gpus: int, images: int | None = None) -> Plan:
    """Plans a run: memory, time and cost on GPUs that need not be here.

    Args:
        recipe: a recipe of any task; its weights are not read.
        gpu: name of a GPU, a key of `fd_scale.hardware.GPUS`.
        num_gpus: how many of them.
        images: training images of an epoch; none: as many as the recipe's source has, where it can be opened here.

    Raises:
        UserError: an unknown GPU, or the recipe does not allow it.
    """
    return plan_recipe(recipe.run_dir, recipe, find_gpu(gpu), num_gpus, images=images)


@as_in_a_new_process()
def measure(recipe: Recipe) -> tuple[Choice, Measured]:
    """Takes a few steps of a recipe on this machine, in a folder that does not stay; all ranks call it.

    Returns:
        What was predicted for this number of ranks, and what the engine really held.

    Raises:
        UserError: the recipe or its data do not allow it.
    """
    world = join(recipe)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = world.from_main(f"{folder}/run")
        bare = replace(recipe, run_dir=run_dir, log=replace(recipe.log, images_every_steps=0))
        trainer = build_trainer(bare, world)
        gpu = present_gpu(world.device) if world.device.type == "cuda" else find_gpu("a100-40g")
        planned = world.on_main(lambda: plan_recipe(recipe.run_dir, bare, gpu, world.size, images=0))
        found = measure_trainer(trainer)
        trainer.close()
        world.barrier()
    return planned.own, found


@as_in_a_new_process()
def build_trainer(
    recipe: Recipe,
    world: World,
    *,
    source: Source | None = None,
    must_fit: bool = True,
    initialise_on: torch.device | None = None,
) -> Trainer:
    """Builds all that a run needs, cheapest checks first.

    Args:
        recipe: a recipe of any task.
        world: ranks.
        source: training images; none: those that the recipe names.
        must_fit: whether a run is refused that the plan does not see fit into the GPUs here.
        initialise_on: device that draws the initial weights, quickly, and other ones than a run would have; none: the
            CPU, with the same values whatever the run's device.

    Raises:
        UserError: the recipe, its data or what is in its run folder do not allow it.
    """
    recipe = resolved(recipe)
    choose_kernels(recipe.train.kernels, world.device)
    engine_config = ds_config.resolve(
        ds_config.read(recipe.train.ds_config), recipe, world.size, world.device.type
    )
    source = open_source(recipe.data.train) if source is None else source
    require_targets("data.train", recipe.data.train, source, recipe.targets)
    loader = _loader(recipe, source, engine_config["train_micro_batch_size_per_gpu"], world)
    num_steps = _num_steps(recipe, loader)
    peak_images_per_s = None
    if must_fit and world.device.type == "cuda" and recipe.linear_probe is None:
        peak_images_per_s = world.on_main(lambda: _refuse_what_does_not_fit(recipe, source, world))
    stage = ds_config.zero_stage(engine_config)
    parts = Partition(engine_config, world)
    with initialise_on or contextlib.nullcontext():
        task = build_task(recipe, source, parts if stage == 3 else WHOLE, parts)
    if recipe.train.compile:
        _compile(task)
    _warn_of_batch_norm(task.module)
    run_dir = Path(recipe.run_dir)
    identity = world.on_main(lambda: run_folder.identity(recipe, source.fingerprint, stage, world.size))
    refuse_other_identity(run_dir, identity)
    lock = RunLock(run_dir)
    with _held(lock, world):
        world.on_main(lambda: run_folder.create(recipe, source))
        log.set_up(world.rank, run_dir)
        task.prepare(world, loader)
        engine = Engine(task.module, task.undecayed, task.lr_scales, engine_config, recipe.optim, world)
        if recipe.train.cuda_graphs:
            _record_graphs(recipe, task, loader.micro_batch, stage, world.device)
        checkpoints = Checkpoints(run_dir, recipe.checkpoint.keep_last, identity, world)
        logger.info(
            "%s: %d steps of %d images (%d ranks x %d micro-batches x %d) on %s, %s, %s, %s; %.1f M parameters",
            recipe.task, num_steps, recipe.train.global_batch, world.size, loader.accumulation,
            engine_config["train_micro_batch_size_per_gpu"], world.device.type, ds_config.zero_name(engine_config),
            recipe.train.precision, engine.optimizer_name, engine.num_parameters / 1e6,
        )  # fmt: skip
        return Trainer(
            recipe=recipe,
            task=task,
            engine=engine,
            loader=loader,
            learning_rates=learning_rates(recipe.optim, num_steps, loader.steps_per_epoch, engine.lr_scales),
            checkpoints=checkpoints,
            recorder=Recorder(run_dir, world, recipe.task, peak_images_per_s),
            preemption=Preemption(run_dir, world),
            lock=lock,
            world=world,
        )


@contextlib.contextmanager
def _held(lock: RunLock, world: World) -> Iterator[None]:
    """Takes the run folder; an error within gives it back."""
    world.on_main(lock.acquire)
    try:
        yield
    except BaseException:
        log.close_file()
        if world.is_main:
            lock.release()
        raise


def _num_steps(recipe: Recipe, loader: TrainLoader) -> int:
    num_steps = recipe.train.steps or round((recipe.train.epochs or 0) * loader.steps_per_epoch)
    if num_steps < 1:
        raise UserError(
            f"train.epochs: {recipe.train.epochs} epochs of {loader.steps_per_epoch} steps are no step; raise it"
        )
    return num_steps


def _warn_of_batch_norm(module: nn.Module) -> None:
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        logger.warning("the model has BatchNorm, whose statistics are those of a micro-batch, of a rank or of all: on "
                       "another number of ranks it trains otherwise")  # fmt: skip


def _loader(recipe: Recipe, source: Source, micro_batch: int, world: World) -> TrainLoader:
    transform, num_workers = training_transform(recipe, source), recipe.data.num_workers
    files = None
    if recipe.distill is not None and recipe.distill.features is not None:
        part = teacher_features.train_part(recipe, source)
        world.on_main(lambda: part.files.open(part.identity, make=False))
        files = part.files
    if recipe.linear_probe is not None:
        features = features_of(_evaluation_set(recipe, source), Path(recipe.run_dir) / "features/train")
        source, transform, num_workers = features.source, features.transform, features.num_workers
    return TrainLoader(
        source,
        transform,
        seed=recipe.seed,
        global_batch=recipe.train.global_batch,
        micro_batch=micro_batch,
        rank=world.rank,
        world_size=world.size,
        num_workers=num_workers,
        shard_window=recipe.data.shard_window,
        crops=recipe.data.crops,
        max_bad_fraction=recipe.data.max_bad_fraction,
        pin_memory=world.device.type == "cuda",
        features=files,
    )


def _refuse_what_does_not_fit(recipe: Recipe, source: Source, world: World) -> float | None:
    """Returns the images a second at the GPUs' peak, where it is known."""
    try:
        planned = plan_recipe(recipe.run_dir, recipe, present_gpu(world.device), world.size, source=source)
    except NotCountedError as error:
        logger.warning("whether the run fits into memory is not known: %s", error)
        return None
    try:
        require_fit(planned)
    except UserError:
        console.print(memory_table(planned))
        raise
    return planned.peak_images_per_s


def _compile(task: Task) -> None:
    backbone = task.module.backbone
    assert isinstance(backbone, Backbone)
    if not backbone.compile_blocks():
        raise UserError(
            f"train.compile: {type(backbone).__name__} has no blocks of ours to compile; set it to false, or take a "
            "model swin_v2_* or fd_vit_*"
        )
    for teacher in task.teachers if isinstance(task, DistillationTask) else []:
        teacher.model.compile_blocks()


def _record_graphs(recipe: Recipe, task: Task, micro_batch: int, stage: int, device: torch.device) -> None:
    assert isinstance(task, DistillationTask | ClassificationTask), "others are refused"
    recorded = []
    for teacher in task.teachers if isinstance(task, DistillationTask) else []:
        if teacher.config.is_alike:
            teacher.record(micro_batch, device)
            recorded.append(f"teacher {teacher.config.model.name}")
    if stage < 3:
        module, size = task.module.train(), recipe.model.size
        pixels_BCHW = torch.zeros(micro_batch, 3, size, size, dtype=module.dtype, device=device)
        scales = [torch.ones(len(task.rates), micro_batch, device=device)]
        record(module.backbone, pixels_BCHW, *(scales if any(task.rates) else []), name=recipe.model.name)
        recorded.append(f"backbone {recipe.model.name}")
    logger.info("CUDA graphs of %s", ", ".join(recorded))


def build_task(
    recipe: Recipe, source: Source | None, placement: Placement = WHOLE, in_parts: Placement = WHOLE
) -> Task:
    """Builds the recipe's task; its initial weights are a function of the recipe's seed, which torch's generator gets.

    Args:
        recipe: a recipe of any task.
        source: its training images; none: a classification says itself how many classes it has.
        placement: where the trained module's parameters are.
        in_parts: where those of teachers are that the recipe wants partitioned.
    """
    recipe = resolved(recipe)
    torch.manual_seed(initial_seed(recipe.seed))
    evaluation = None
    if recipe.data.evaluation is not None:
        images = open_source(recipe.data.evaluation)
        # What is not trained may detect without measuring.
        annotated = source is not None
        require_targets("data.evaluation", recipe.data.evaluation, images, recipe.targets, annotated)
        evaluation = _evaluation_set(recipe, images)
    if recipe.linear_probe is not None:
        assert source is not None, "a trainer builds it"
        return LinearProbeTask(recipe, _evaluation_set(recipe, source), evaluation, placement)
    if recipe.distill is not None:
        _warn_of_random_teachers(recipe.distill)
        bank = None
        if evaluation is not None and recipe.distill.knn_images:
            # Of its own where the training reads few shards at a time: these images are spread over all of them.
            if source is None or recipe.data.shard_window:
                source = open_source(recipe.data.train)
            if 0 in (source.num_classes, evaluation.source.num_classes):
                raise UserError(
                    "distill.knn_images: neighbours need labels, of data.train and of data.evaluation; set it to 0"
                )
            bank = replace(evaluation, source=spread(source, recipe.distill.knn_images))
        if evaluation is not None and recipe.distill.features is not None:
            part = teacher_features.evaluation_part(recipe, evaluation)
            part.files.open(part.identity, make=False)
            evaluation = replace(evaluation, features=part.files)
        return DistillationTask(recipe, evaluation, bank, placement, in_parts)
    with placement.building(dtype_of(recipe.train.precision)):
        if recipe.contrastive is not None:
            return ContrastiveTask(recipe)
        if recipe.masked is not None:
            return MaskedTask(recipe, evaluation)
        return fine_tuning_task(recipe, evaluation, source)


def _warn_of_random_teachers(config: DistillConfig) -> None:
    for number, teacher in enumerate(config.teachers):
        if teacher.model.weights is None:
            logger.warning(
                "teacher %s has random weights: distill.teachers.%d.model.weights names none",
                teacher.model.name, number,
            )  # fmt: skip


def _evaluation_set(recipe: Recipe, source: Source) -> EvaluationSet:
    return EvaluationSet(
        source=source,
        transform=measuring_transform(recipe),
        batch_size=recipe.train.micro_batch,
        num_workers=recipe.data.num_workers,
    )
