"""`fd-scale evaluate`: a checkpoint's metrics, as a table and as JSON."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fd_scale import log, run_folder
from fd_scale.checkpoint import newest_checkpoint, read_manifest, verify, write_atomically
from fd_scale.config import Recipe, to_dict
from fd_scale.data import object_source
from fd_scale.data.store import is_remote
from fd_scale.distributed import ALONE, World
from fd_scale.engine import saved_weights
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet, Progress, reassessed_labels, write_results
from fd_scale.finetune import ClassificationTask, DetectionTask, SegmentationTask, require_trained_classes
from fd_scale.models import at_trained_scale, dtype_of
from fd_scale.trainer import Task
from fd_scale.verbs.fetch import data_paths

logger = logging.getLogger(__name__)

NUM_WORST = 10
# Whole images may be measured at another size than was trained at: Swin V2 has the same weights for any window.
_OTHER_SIZE = ("model.img_size", "model.overrides.window_size")
# Of tasks with classes, by head: the weight with a row for each of them, and how many more rows it has.
_CLASSIFIERS = {
    "classification": {"head.weight": 0},
    "segmentation": {"head.classifier.weight": 0, "head.class_predictor.weight": 1},
    "detection": {"heads.box_heads.0.classes.weight": 1},
}


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Returns a run's folder and the checkpoint that is meant, whole: the newest, or `path` itself.

    Raises:
        UserError: there is none.
    """
    path = path.resolve()
    if path.parent.name == "checkpoints" and not path.exists():
        kept = ", ".join(sorted(folder.name for folder in path.parent.glob("step_*"))) or "none"
        raise UserError(
            f"{path}: there is no such checkpoint, kept are {kept}; name one, or the run's folder"
        )
    if not (path / "manifest.json").is_file():
        return path, newest_checkpoint(path)
    if problems := verify(path, ALONE):
        raise UserError(
            f"{path}: this checkpoint is not whole: {'; '.join(problems)}; name another, or the run's folder"
        )
    return path.parent.parent, path


def recipe_of(run: Path, checkpoint: Path, overrides: Sequence[str], images_needed: bool = True) -> Recipe:
    """Returns a run's recipe with other settings, without the weights that it started from.

    Raises:
        UserError: as `run_folder.read_recipe`, or there is nothing to evaluate on.
    """
    fixed = ("model.", "distill.teachers", "segmentation.", "detection.", "task=")
    own = run_folder.read_recipe(run)
    free: tuple[str, ...] = run_folder.PREDICTION_SETTINGS
    if own.targets != "labels" and own.model.name.startswith("swin_v2_"):
        free += _OTHER_SIZE
    other = [
        setting
        for setting in overrides
        if setting.startswith(fixed) and setting.partition("=")[0] not in free
    ]
    if other:
        raise UserError(f"{run}: its model is what it was trained as; leave out {' '.join(other)}")
    recipe = run_folder.read_recipe(run, overrides)
    if recipe.contrastive is not None:
        raise UserError(
            f"{run}: a contrastive loss is no metric of a source; evaluate what was fine-tuned from it"
        )
    if recipe.linear_probe is not None:
        raise UserError(
            f"{run}: a linear probe's checkpoint holds no backbone; its metrics are in metrics.jsonl"
        )
    if recipe.data.evaluation is None and images_needed:
        raise UserError(f"{run}: its recipe names no images to evaluate on; add data.evaluation=SOURCE")
    if recipe.distill is not None and recipe.distill.loss == "phi_s":
        raise UserError(
            f"{run}: loss phi_s standardises by statistics that a checkpoint does not hold; its metrics are in "
            "metrics.jsonl"
        )
    model = at_trained_scale(own.model, recipe.model)
    recipe = replace(recipe, model=replace(model, weights=None))
    if recipe.distill is not None:  # other images may be meant than those whose features are kept
        recipe = replace(recipe, distill=replace(recipe.distill, features=None))
    if recipe.task in _CLASSIFIERS:
        shapes = saved_weights(checkpoint).shapes
        [num_classes] = [
            shapes[weight][0] - more for weight, more in _CLASSIFIERS[recipe.task].items() if weight in shapes
        ]
        section = replace(getattr(recipe, recipe.task), num_classes=num_classes)
        recipe = replace(recipe, **{recipe.task: section})
    return recipe


@contextmanager
def saying_where_it_started(run: Path, recipe: Recipe) -> Iterator[None]:
    """Within it, an error tells of images and weights that are not here, their paths relative to another folder."""
    try:
        yield
    except UserError as error:
        started = run_folder.last_start(run).get("folder", str(Path.cwd()))
        teachers = recipe.distill.teachers if recipe.distill is not None else []
        weights = [str(teacher.model.weights) for teacher in teachers]
        missing = [
            path
            for path in (*data_paths(recipe), *weights)
            if path in str(error)
            and not (is_remote(path) or Path(path).is_absolute() or glob.glob(path))
            and glob.glob(path, root_dir=started)
        ]
        if missing:
            raise UserError(
                f"{error}; {missing[0]} is relative, and the run was started in {started}"
            ) from None
        raise


def restore(task: Task, recipe: Recipe, checkpoint: Path, world: World) -> None:
    """Gives a task's module a checkpoint's weights, whole on each rank, in eval mode."""
    saved_weights(checkpoint).copy_into(task.module)
    task.module.to(world.device, dtype_of(recipe.train.precision)).eval()


def evaluate_task(
    task: Task, recipe: Recipe, run: Path, checkpoint: Path, world: World, real: str | None, out: Path | None
) -> dict[str, Any]:
    """Reads a checkpoint's weights into a task, measures it, prints a table and writes a file.

    Args:
        task: built without weights, on the host.
        recipe: what it was built from.
        run: folder of the run.
        checkpoint: a whole one.
        world: ranks, which share the images; each holds the model whole.
        real: as `reassessed_labels` takes it; none: without.
        out: folder of the file; none: RUN/evaluations.

    Returns:
        The metrics, with `step`, `source` and, of what knows classes, `classes`.

    Raises:
        UserError: the images do not fit the task.
    """
    names, _ = run_folder.classes(run)
    if isinstance(task, ClassificationTask | SegmentationTask | DetectionTask):
        assert task.evaluation is not None, "the recipe names images"
        require_trained_classes(recipe, task.evaluation.source, names)
        names = names or task.evaluation.source.class_names
    restore(task, recipe, checkpoint, world)
    step = read_manifest(checkpoint)["state"]["step"]
    logger.info("%s: step %d on %s", checkpoint, step, recipe.data.evaluation)
    found: dict[str, Any] = {"step": step, "source": str(recipe.data.evaluation)}
    file = (out or run / "evaluations") / _file_name(checkpoint, recipe, run)
    world.on_main(partial(run_folder.make_for_results, file.parent))
    with torch.no_grad():
        if isinstance(task, ClassificationTask):
            more, table = _measured_classifier(task, world, real, names)
        elif isinstance(task, SegmentationTask | DetectionTask):
            more, table = _measured_images(task, recipe, checkpoint, file, world)
        else:
            more = task.evaluate(task.module, world)
            table = _table("", {name: f"{value:.5g}" for name, value in more.items()})
    found |= more
    if world.is_main:
        try:
            write_atomically(file, json.dumps(found, indent=1))
            file.with_suffix(".progress").unlink(missing_ok=True)
        except OSError as error:
            raise run_folder.not_writable(file.parent, error, "--out") from None
        log.results().print(table)
        log.results().print(f"written to {file}", soft_wrap=True)
    return found


def _measured_classifier(
    task: ClassificationTask, world: World, real: str | None, names: list[str] | None
) -> tuple[dict[str, Any], Table]:
    assert task.evaluation is not None, "the recipe names images"
    source = task.evaluation.source
    reassessed = reassessed_labels(real, source, task.module.head.out_features) if real else None
    accuracy = task.accuracy(task.evaluation, task.module, world, reassessed)
    shown = {
        name: f"{value:.4f}" if name in ("loss", "calibration_error") else f"{value:.2%}"
        for name, value in accuracy.metrics.items()
    }
    worst = {
        label: f"{accuracy.class_top1[label]:.2%} of {accuracy.class_images[label]}"
        for label in accuracy.worst_classes(NUM_WORST)
    }
    table = _table(f"{accuracy.num_images} images", shown, worst, names)
    return accuracy.to_json(names), table


def _measured_images(
    task: SegmentationTask | DetectionTask, recipe: Recipe, checkpoint: Path, file: Path, world: World
) -> tuple[dict[str, Any], Table]:
    """Measures whole images, one at a time; what is known on the way lies beside `file`."""
    assert task.evaluation is not None, "the recipe names images"
    source = task.evaluation.source
    manifest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    of = json.dumps([manifest, source.fingerprint, _evaluated_as(recipe)])
    progress = Progress(file=file.with_suffix(".progress"), of=of)
    if isinstance(task, DetectionTask):
        return _measured_objects(task, task.evaluation, file, world, progress)
    overlap = task.measure(task.evaluation, task.module, world, progress)
    worst = {label: f"{overlap.class_iou[label]:.2%}" for label in overlap.worst_classes(NUM_WORST)}
    shown = {name: f"{value:.2%}" for name, value in overlap.metrics.items()}
    names = source.class_names or [str(label) for label in range(source.num_classes)]
    if absent := [name for name, pixels in zip(names, overlap.matrix.sum(1), strict=True) if not pixels]:
        shown["classes without a pixel"] = (
            f"{len(absent)} of {len(names)}: {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}"
        )
    title = f"{overlap.matrix.sum() / 1e6:.1f} M pixels"
    return overlap.to_json(source.class_names), _table(title, shown, worst, source.class_names)


def _measured_objects(
    task: DetectionTask, evaluation: EvaluationSet, file: Path, world: World, progress: Progress
) -> tuple[dict[str, Any], Table]:
    """Measures detections, where the images have annotations, and writes them beside `file`."""
    source = object_source(evaluation.source)
    results: dict[str, Any] = {"images": len(source)}
    shown, worst = {}, {}
    if source.is_annotated:
        detection = task.measure(evaluation, task.module, world, progress)
        found, results = detection.found, detection.to_json(source.class_names)
        shown = {name: f"{value:.2%}" for name, value in detection.metrics.items()}
        key = "mask_ap" if "mask_ap" in detection.metrics else "box_ap"
        labels = detection.worst_classes(NUM_WORST)
        worst = {label: f"{detection.classes[label][key]:.2%}" for label in labels}
    else:
        found = task.find(evaluation, task.module, world, progress)
    if world.is_main:
        target = file.with_suffix(".detections.json")
        try:
            write_results(target, source, found)
        except OSError as error:
            raise run_folder.not_writable(file.parent, error, "--out") from None
        log.results().print(f"detections in COCO's format: {target}", soft_wrap=True)
    return results, _table(f"{len(source)} images", shown, worst, source.class_names)


def _evaluated_as(recipe: Recipe) -> dict[str, Any]:
    """Images, size, and how they are predicted."""
    shown = ("data.evaluation", "train.precision", *_OTHER_SIZE, *run_folder.PREDICTION_SETTINGS)
    return {key: value for key, value in run_folder.flat(to_dict(recipe)).items() if key.startswith(shown)}


def _changes(recipe: Recipe, run: Path) -> dict[str, Any]:
    """What of an evaluation is other than the run's own."""
    own, now = _evaluated_as(run_folder.read_recipe(run)), _evaluated_as(recipe)
    return {key: now.get(key) for key in {**own, **now} if now.get(key) != own.get(key)}


def _file_name(checkpoint: Path, recipe: Recipe, run: Path) -> str:
    """A file for each checkpoint, and one for each other way to evaluate it."""
    changes = _changes(recipe, run)
    words = [
        str(value) if key.startswith("data.") else f"{key.split('.')[-1]} {value}"
        for key, value in changes.items()
    ]
    if not changes:
        return f"{checkpoint.name}.json"
    suffix = re.sub(r"[^A-Za-z0-9]+", "_", " ".join(words))[-60:].strip("_")
    # Words are cut and lose letters: what they stand for tells two files apart.
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
    return f"{checkpoint.name}-{suffix}-{digest}.json"


def _table(
    title: str,
    metrics: Mapping[str, str],
    worst: Mapping[int, str] | None = None,
    class_names: list[str] | None = None,
) -> Table:
    """Shows metrics, then the classes that fare worst."""
    table = Table("metric", "value", title=title)
    for name, value in metrics.items():
        table.add_row(name, value)
    table.add_section()
    for label, value in (worst or {}).items():
        name = str(label) if class_names is None else class_names[label]
        table.add_row(f"class {label}" if name == str(label) else f"class {label} {name}", value)
    return table
