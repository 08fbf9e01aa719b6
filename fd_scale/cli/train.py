"""Verbs that train, evaluate, and say beforehand what would fail."""

from __future__ import annotations

import argparse
import os

from fd_scale.cli.parts import Verbs, add_overrides, add_recipe, add_verb
from fd_scale.config import load_recipe
from fd_scale.errors import PREEMPTED, UserError
from fd_scale.hardware import GPUS

TRAINING_VERBS = {
    "distill": (("distill",), "feature distillation of a teacher into a student"),
    "pretrain": (
        ("contrastive", "masked"),
        "pre-training of a teacher without labels: contrastive, or masked images",
    ),
    "finetune": (
        ("classification", "linear_probe", "segmentation", "detection"),
        "fine-tuning on labels, masks or objects, or a linear probe",
    ),
}


def add_training(verbs: Verbs) -> None:
    """Adds `distill`, `pretrain`, `finetune`, `evaluate`, `check`, `fetch`, `features`, `index` and `shard`."""
    for verb, (tasks, summary) in TRAINING_VERBS.items():
        wanted = " or ".join(f"`{task}`" for task in tasks)
        training = add_verb(
            verbs, verb, summary,
            f"{summary[0].upper()}{summary[1:]}. A run folder that holds a checkpoint is resumed.\n"
            f"The recipe's task must be {wanted}; `fd-scale recipes` lists every setting.",
            f"  fd-scale {verb} RECIPE optim.lr=1e-3 run_dir=runs/mine\n"
            f"  torchrun --nproc-per-node 8 -m fd_scale {verb} RECIPE",
        )  # fmt: skip
        add_recipe(training)
        training.add_argument(
            "--profile", action="store_true", help="trace three steps into RUN/profile (log.profile=true)"
        )
        training.set_defaults(run=_train, tasks=tasks)

    _add_evaluate(verbs)
    _add_check(verbs)
    _add_data(verbs)


def _add_data(verbs: Verbs) -> None:
    """Adds what prepares data and weights ahead of a run."""
    fetch = add_verb(
        verbs, "fetch", "data and weights of a recipe from the Hugging Face hub, ahead of the run",
        "Downloads what the recipe names on the hub into the cache (HF_HOME), or a model's weights, or images. No\n"
        "other verb asks the hub.",
        "  fd-scale fetch my.yaml\n"
        "  fd-scale fetch vit_base_patch16_224.dino@pretrained\n"
        "  fd-scale fetch 'tar:hf://datasets/timm/imagenet-1k-wds/imagenet1k-validation-*.tar'\n"
        "  fd-scale fetch my.yaml 'data.train=tar:hf://datasets/timm/imagenet-1k-wds/imagenet1k-train-*.tar'",
    )  # fmt: skip
    add_recipe(fetch, "; or, alone, NAME@pretrained or a source on the hub")
    fetch.set_defaults(run=_fetch)

    features = add_verb(
        verbs, "features", "the teachers' features of all views, computed once for many distillations",
        "Computes what a distillation reads from distill.features.folder in place of running its teachers: of a few\n"
        "views of each image, whatever its number of epochs. A second call goes on where the first one stopped.",
        "  fd-scale features RECIPE distill.features.folder=features/clip distill.features.views=4\n"
        "  torchrun --nproc-per-node 8 -m fd_scale features my.yaml",
    )  # fmt: skip
    add_recipe(features)
    features.set_defaults(run=_features)

    index = add_verb(
        verbs, "index", "where the images of tar shards lie, found out ahead of the run",
        "Reads the headers of all shards into a file of the cache, which all ranks and workers of a node map. A run\n"
        "that finds none makes it. Of shards that were indexed before, those that changed are read alone. Of shards\n"
        "in a store all bytes pass by; a copy of the index beside them, fd-scale.index, spares that to others.",
        "  fd-scale index 'tar:/data/in22k/*.tar' --processes 16\n"
        "  fd-scale index 'tar:s3://bucket/in22k/{0000..1999}.tar' --processes 16 --out fd-scale.index",
    )  # fmt: skip
    index.add_argument("source", metavar="SOURCE", help="tar:PATH, as in data.train")
    index.add_argument(
        "--processes",
        type=int,
        default=0,
        help="that read headers (default: threads of one process, as in a run)",
    )
    index.add_argument("--out", metavar="FILE", help="write a copy of the index there")
    index.set_defaults(run=_index)

    shard = add_verb(
        verbs, "shard", "images of any source as tar shards",
        "Writes the files of images as they are, in a random order, with their labels, into uncompressed tars as\n"
        "webdataset has them; then reads them again. OUT must be empty, or not be there.",
        "  fd-scale shard imagefolder:/data/in22k /data/in22k-shards --size 512MB\n"
        "  fd-scale shard 'parquet:hf://datasets/ILSVRC/imagenet-1k/data/train-*' /data/in1k-shards",
    )  # fmt: skip
    shard.add_argument("source", metavar="SOURCE", help="a source of images, as in data.train")
    shard.add_argument("out", metavar="OUT", help="folder to write")
    shard.add_argument("--size", default="512MB", help="of a shard at most (default: 512MB)")
    shard.add_argument(
        "--decode",
        action="store_true",
        help="decode every image, leave out what fails; else headers alone are read",
    )
    shard.set_defaults(run=_shard)


def _add_evaluate(verbs: Verbs) -> None:
    evaluate = add_verb(
        verbs, "evaluate", "metrics of a run's checkpoint, as a table and as JSON",
        "Measures the newest checkpoint of a run, or the one named, on data.evaluation: accuracy, by class too, and\n"
        "calibration of a classifier; mIoU of a segmentation; AP of a detection; the loss of a distillation.\n"
        "Writes OUT/CHECKPOINT.json, of a detection also its detections beside it.",
        "  fd-scale evaluate runs/digits/finetune\n"
        "  fd-scale evaluate runs/mine/checkpoints/step_00005000 data.evaluation=imagefolder:imagenet-v2\n"
        "  torchrun --nproc-per-node 8 -m fd_scale evaluate runs/mine --real real.json",
    )  # fmt: skip
    evaluate.add_argument("run_dir", metavar="RUN", help="folder of a run, or one of its checkpoints")
    add_overrides(evaluate)
    evaluate.add_argument(
        "--real", metavar="FILE", help="reassessed labels of ImageNet's validation images (real.json)"
    )
    evaluate.add_argument("--out", metavar="DIR", help="folder of the results (default: RUN/evaluations)")
    evaluate.set_defaults(run=_evaluate)


def _add_check(verbs: Verbs) -> None:
    check = add_verb(
        verbs, "check", "what would fail, before a job is queued",
        "Checks recipe, DeepSpeed JSON, data, weights, run folder, devices and driver; a table and a verdict.",
        "  fd-scale check digits/distill --ranks 2\n"
        "  salloc --nodes 2 fd-scale check my.yaml --cluster\n"
        "  fd-scale check imagenet/swin_v2_giant --gpus 64 --gpu h100",
    )  # fmt: skip
    add_recipe(check)
    check.add_argument(
        "--ranks",
        "--gpus",
        dest="ranks",
        type=int,
        default=1,
        help="ranks that the job will have (default: 1)",
    )
    check.add_argument(
        "--gpu", metavar="NAME", help=f"GPU of each: {', '.join(GPUS)} (default: the one here, if any)"
    )
    check.add_argument(
        "--cluster", action="store_true",
        help="look at the nodes of this job: GPUs, driver, network, data, run folder, versions, weights",
    )  # fmt: skip
    check.set_defaults(run=_check)


def _train(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, [*options.overrides, *["log.profile=true"] * options.profile])
    if recipe.task not in options.tasks:
        verb = next(verb for verb, (tasks, _) in TRAINING_VERBS.items() if recipe.task in tasks)
        raise UserError(f"{options.recipe}: its task is {recipe.task}; run it with `fd-scale {verb}`")
    from fd_scale import api

    trainer = api.start(recipe)
    trainer.train()
    # torchrun makes 1 of any code, with a report of a failure: below it, RUN/preempt alone says why the run stopped.
    if trainer.stopped_early and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise SystemExit(PREEMPTED)


def _evaluate(options: argparse.Namespace) -> None:
    from fd_scale import api

    api.evaluate(options.run_dir, options.overrides, options.real, options.out)


def _check(options: argparse.Namespace) -> None:
    if options.cluster:
        from fd_scale.cluster.check import check_cluster

        check_cluster(load_recipe(options.recipe, options.overrides), [options.recipe, *options.overrides])
        return
    from fd_scale.verbs.check import check

    check(options.recipe, options.overrides, options.ranks, options.gpu)


def _fetch(options: argparse.Namespace) -> None:
    from fd_scale.verbs.fetch import fetch, is_alone

    what = options.recipe
    if not is_alone(what):
        what = load_recipe(what, options.overrides)
    elif options.overrides:
        raise UserError(f"{what}: is no recipe, and has no settings; leave out {' '.join(options.overrides)}")
    for line in fetch(what):
        print(line)


def _features(options: argparse.Namespace) -> None:
    from fd_scale import api

    api.features(load_recipe(options.recipe, options.overrides))


def _shard(options: argparse.Namespace) -> None:
    from fd_scale.verbs.shard import shard

    for line in shard(options.source, options.out, options.size, options.decode):
        print(line)


def _index(options: argparse.Namespace) -> None:
    from fd_scale.verbs.index import index

    for line in index(options.source, options.processes, options.out):
        print(line)
