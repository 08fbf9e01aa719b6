"""Verbs that measure."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from fd_scale.cli.parts import Verbs, add_overrides, add_recipe, add_verb
from fd_scale.config import load_recipe
from fd_scale.errors import UserError
from fd_scale.hardware import GPUS, find_gpu
from fd_scale.log import results


def add_bench(verbs: Verbs) -> None:
    """Adds `bench` and what it measures."""
    bench = add_verb(
        verbs, "bench", "measurements: step, data, finetune, segmentation, detection, kernels, giant, ...",
        "Measures the training step, the kernels, whole steps of SwinV2-G on a GPU, or a recipe's on many.",
        "  fd-scale bench step --json step.json\n"
        "  fd-scale bench finetune miniature/finetune model.weights=null\n"
        "  fd-scale bench kernels --match swin_g_w12\n"
        "  fd-scale bench giant --match '^G'\n"
        "  torchrun --nproc-per-node 8 -m fd_scale bench scale imagenet/swin_v2_giant",
    )  # fmt: skip
    subjects = bench.add_subparsers(metavar="WHAT", required=True)

    step = add_verb(
        subjects, "step", "one optimizer step, ZeRO 0 on one process, ZeRO 3 on two",
        "Measures, in one run, our training step against a bare PyTorch loop of the same models, and the loader.",
        "  fd-scale bench step --json step.json",
    )  # fmt: skip
    step.add_argument(
        "recipe", metavar="RECIPE", nargs="?", default="digits/distill", help="default: digits/distill"
    )
    add_overrides(step)
    _run_steps(step, "step.bench_step")

    finetune = add_verb(
        subjects, "finetune", "one fine-tuning step, images and all, beside timm's loader, Mixup and optimizer",
        "Measures in turns whole steps of a classification: images decoded, augmented, mixed, trained on.",
        "  fd-scale bench finetune digits/finetune model.weights=null",
    )  # fmt: skip
    add_recipe(finetune)
    _run_steps(finetune, "finetune.bench_finetune")

    _add_bench_features(subjects)

    segmentation = add_verb(
        subjects, "segmentation", "one step of a segmentation, beside Transformers' UPerNet on the same backbone",
        "Measures in turns steps on the same batches in memory: our trainer with our head, and a bare loop with\n"
        "Transformers' (extra [hf]), both with BatchNorm.",
        "  fd-scale bench segmentation ade20k/tiny data.train=ade20k_val:ADEChallengeData2016",
    )  # fmt: skip
    add_recipe(segmentation)
    _run_steps(segmentation, "segmentation.bench_segmentation")

    _add_bench_prediction(subjects)
    _add_bench_detection(subjects)
    _add_bench_data(subjects)
    _add_bench_index(subjects)

    _add_bench_kernels(subjects)
    _add_bench_giant(subjects)
    _add_bench_scale(subjects)


def _run_steps(bench: argparse.ArgumentParser, function: str) -> None:
    """Adds a number of steps; the function is given it behind the recipe."""
    bench.add_argument("--steps", type=int, default=30, help="measured ones of each loop (default: 30)")
    _run(bench, function, "recipe", "overrides", "steps")


def _run(bench: argparse.ArgumentParser, function: str, *options: str) -> None:
    """Lets a function of `fd_scale.benchmarks` run with these options; what it returns is written to --json."""
    bench.add_argument("--json", metavar="FILE", help="write the measurements there too")
    bench.set_defaults(run=_bench, function=function, given=options)


def _add_bench_features(subjects: Verbs) -> None:
    features = add_verb(
        subjects, "features", "a distillation's step with its teachers, and with their features read from disk",
        "Computes one view of all images of data.train, so name few; then steps of both kinds take turns, images and\n"
        "all. Says what the features take on disk, and what is lost of them.",
        "  fd-scale bench features imagenet/dino_vit_base data.train=tar:imagenet-sample --steps 20",
    )  # fmt: skip
    add_recipe(features)
    _run_steps(features, "features.bench_features")


def _add_bench_kernels(subjects: Verbs) -> None:
    kernels = add_verb(
        subjects, "kernels", "the Triton kernels beside their peers, on a GPU",
        "Measures the kernels beside eager, compiled, SDPA and FlexAttention; goes on where the last call stopped.\n"
        "As `python -m fd_kernels.benchmarks`, whose --help lists the options.",
        "  fd-scale bench kernels --match swin_g_w12\n"
        "  fd-scale bench kernels --report",
    )  # fmt: skip
    kernels.add_argument("--match", metavar="REGEX", help='on "shape pass variant"')
    kernels.add_argument("--out", metavar="DIR", help="folder of the JSON files")
    kernels.add_argument("--minutes", help="start nothing new after them")
    kernels.add_argument("--report", metavar="FILE", nargs="?", const="-", help="measure nothing; the table")
    kernels.add_argument("--plot", metavar="FILE", help="draw what was measured")
    kernels.set_defaults(run=_bench_kernels)


def _add_bench_prediction(subjects: Verbs) -> None:
    prediction = add_verb(
        subjects, "prediction", "images a second and peak memory of a segmentation's prediction, by size",
        "Predicts square images of noise at their own size with random weights, as the recipe says: by windows, in\n"
        "several sizes, mirrored. Reads no data.",
        "  fd-scale bench prediction ade20k/swin_v2_giant --sides 640 896 4096\n"
        "  fd-scale bench prediction ade20k/tiny segmentation.flip_too=true --sides 640",
    )  # fmt: skip
    add_recipe(prediction)
    prediction.add_argument(
        "--sides", type=int, nargs="+", default=[640, 896, 4096], help="in pixels (default: 640 896 4096)"
    )
    prediction.add_argument("--repeats", type=int, default=3, help="measured images of each (default: 3)")
    _run(prediction, "prediction.bench_prediction", "recipe", "overrides", "sides", "repeats")


def _add_bench_detection(subjects: Verbs) -> None:
    detection = add_verb(
        subjects, "detection", "one step and one detection, beside torchvision's Mask R-CNN on the same backbone",
        "Measures in turns, on the same images in memory: our trainer and our heads, and a bare loop with\n"
        "torchvision's proposals and heads; then what each takes to detect with the same weights.",
        "  fd-scale bench detection coco/tiny data.train=coco_val:coco",
    )  # fmt: skip
    add_recipe(detection)
    _run_steps(detection, "detection.bench_detection")

    annotations = add_verb(
        subjects, "annotations", "COCO's annotations to the index that a detection reads: time and memory",
        "Writes annotations of the size of COCO's training part, converts and opens them; takes 1 GiB of disk.",
        "  fd-scale bench annotations",
    )  # fmt: skip
    annotations.add_argument("--images", type=int, default=118_287, help="how many (default: 118287, COCO's)")
    annotations.add_argument(
        "--objects", type=int, default=860_001, help="how many (default: 860001, COCO's)"
    )
    _run(annotations, "annotations.bench_annotations", "images", "objects")


def _add_bench_data(subjects: Verbs) -> None:
    data = add_verb(
        subjects, "data", "images a second and core: libjpeg-turbo alone, our loader, other loaders",
        "Measures in turns, on the JPEG files of a source: decoding alone, which is the limit; decoding and cropping;\n"
        "our loader with one worker process, as of 100 million images too; torchvision's, timm's and webdataset's.",
        "  fd-scale bench data imagefolder:PATH\n"
        "  fd-scale bench data \"tar:PATH/train-*.tar\" --crops 4 --json data.json\n"
        "  fd-scale bench data imagefolder:PATH --recipe imagenet/swin_v2_giant --gpus 64 --gpu h100",
    )  # fmt: skip
    data.add_argument("source", metavar="SOURCE", help="as of data.train")
    data.add_argument("--images", type=int, default=2000, help="crops in a round (default: 2000)")
    data.add_argument("--rounds", type=int, default=5, help="of each way (default: 5)")
    data.add_argument("--size", type=int, default=224, help="side of the crops, in pixels (default: 224)")
    data.add_argument("--crops", type=int, default=1, help="measures so many of each image too")
    data.add_argument(
        "--recipe", metavar="RECIPE", help="tells what its GPUs need: cores of a node, workers of a rank"
    )
    data.add_argument("--gpus", type=int, help="with --recipe: GPUs of the job, 8 in a node")
    data.add_argument("--gpu", metavar="NAME", help=f"with --recipe: one of {', '.join(GPUS)}")
    data.add_argument("--json", metavar="FILE", help="write the measurements there too")
    data.set_defaults(run=_bench_data)


def _add_bench_index(subjects: Verbs) -> None:
    index = add_verb(
        subjects, "index", "the start of a run on tar shards: an index of 100 million images, and small shards",
        "Generates an index as that of so many images would be, opens it in a process of its own and finds 10,000\n"
        "images: seconds and resident bytes an image. Then writes small shards, reads their headers, opens their\n"
        "index. Takes 4.4 GiB of disk, and 2 GiB of memory.",
        "  fd-scale bench index --json index.json",
    )  # fmt: skip
    index.add_argument("--images", type=int, default=100_000_000, help="of the index (default: 100000000)")
    index.add_argument("--shards", type=int, default=10_000, help="that it has (default: 10000)")
    index.add_argument("--tars", type=int, default=200, help="real shards of 500 images (default: 200)")
    _run(index, "tar_index.bench_index", "images", "shards", "tars")

    order = add_verb(
        subjects, "order", "how well an order by shards (data.shard_window) shuffles, and what it reads at a time",
        "Measures one epoch of orders by shards and of the order over all samples. Classes are mixed in every shard,\n"
        "or sorted: each in shards of its own. Neighbours apart: 0.333 of an epoch in a random order.",
        "  fd-scale bench order --window 8 32 128",
    )  # fmt: skip
    order.add_argument("--shards", type=int, default=1000, help="of the data set (default: 1000)")
    order.add_argument("--shard-size", type=int, default=1000, help="images in a shard (default: 1000)")
    order.add_argument("--batch", type=int, default=4096, help="images of a step (default: 4096)")
    order.add_argument("--window", type=int, nargs="+", default=[8, 32, 128], help="(default: 8 32 128)")
    _run(order, "order.bench_order", "shards", "shard_size", "batch", "window")


def _add_bench_giant(subjects: Verbs) -> None:
    giant = add_verb(
        subjects, "giant", "whole steps of SwinV2-G and -B on one GPU, beside timm and FSDP2",
        "Measures whole distillation steps on one GPU: time, MFU, memory beside the plan's; random weights, no data.\n"
        "Each cell (model, checkpointing, micro-batch, way) runs in a process of its own and is recorded at once; a\n"
        "second call goes on where the first one stopped.",
        "  fd-scale bench giant --match '^G block'\n"
        "  fd-scale bench giant --report",
    )  # fmt: skip
    giant.add_argument(
        "--match", metavar="REGEX", default="", help='on "model policy micro-batch way", as "G none 64 zero3"'
    )
    giant.add_argument(
        "--out", metavar="DIR", default="docs/measurements", help="JSON files (default: docs/measurements)"
    )
    giant.add_argument(
        "--minutes", type=float, default=8.5, help="start nothing new after them (default: 8.5)"
    )
    giant.add_argument("--report", action="store_true", help="measure nothing; print the newest file's table")
    giant.set_defaults(run=_bench_giant)


def _add_bench_scale(subjects: Verbs) -> None:
    scale = add_verb(
        subjects, "scale", "a recipe's step on more and more of the ranks of one job, beside `plan --scaling`",
        "Run under torchrun on all nodes of a job: measures whole steps on the first rank or node, on twice as many,\n"
        "and so on, each in processes of its own while the other ranks wait; images are noise, weights random. Each\n"
        "size is recorded at once; a second call goes on where the first one stopped. Predictions stand beside them.",
        "  srun torchrun --nnodes 8 --nproc-per-node 8 ... -m fd_scale bench scale imagenet/swin_v2_giant\n"
        "  torchrun --nproc-per-node 2 -m fd_scale bench scale digits/distill\n"
        "  fd-scale bench scale digits/distill --report",
    )  # fmt: skip
    add_recipe(scale)
    scale.add_argument(
        "--sizes",
        metavar="N,N,...",
        help="numbers of ranks (default: a rank or a node, twice as many, up to all)",
    )
    scale.add_argument(
        "--weak",
        action="store_true",
        help="the recipe's micro-batch on each rank, not its global batch on all",
    )
    scale.add_argument("--steps", type=int, default=10, help="measured steps of each size (default: 10)")
    scale.add_argument(
        "--out", metavar="DIR", default="runs/bench_scale", help="JSON files (default: runs/bench_scale)"
    )
    scale.add_argument(
        "--assume",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="as of `plan --scaling`; may be repeated",
    )
    scale.add_argument("--report", action="store_true", help="measure nothing; print the newest file's table")
    scale.set_defaults(run=_bench_scale)


def _bench(options: argparse.Namespace) -> None:
    from fd_scale.benchmarks.records import write_json

    module, function = options.function.split(".")
    bench = getattr(import_module(f"fd_scale.benchmarks.{module}"), function)
    write_json(options.json, bench(*(getattr(options, name) for name in options.given)))


def _bench_data(options: argparse.Namespace) -> None:
    named = [options.recipe, options.gpus, options.gpu]
    if None in named and any(named):
        raise UserError(
            "bench data: --recipe, --gpus and --gpu say together what is to be fed; give all or none"
        )
    from fd_scale.benchmarks.data import bench_data
    from fd_scale.plan import input_needed, plan

    crops = options.crops
    recipe = None if options.recipe is None else load_recipe(options.recipe, [f"data.crops={crops}"])
    gpu = None if options.gpu is None else find_gpu(options.gpu)
    rate = bench_data(options.source, options.images, options.rounds, options.size, crops, options.json)
    if recipe is not None and gpu is not None:
        for line in input_needed(plan(options.recipe, recipe, gpu, options.gpus, images_per_core=rate)):
            results().print(line, soft_wrap=True, highlight=False)


def _bench_kernels(options: argparse.Namespace) -> None:
    from fd_kernels.benchmarks.__main__ import main as bench_kernels

    given = {name: getattr(options, name) for name in ("match", "out", "minutes", "report", "plot")}
    raise SystemExit(
        bench_kernels([f"--{name}={value}" for name, value in given.items() if value is not None])
    )


def _bench_giant(options: argparse.Namespace) -> None:
    from fd_scale.benchmarks import bench_giant

    bench_giant(Path(options.out), options.match, options.minutes, report=options.report)


def _bench_scale(options: argparse.Namespace) -> None:
    from fd_scale.benchmarks.scale import Job, bench_scale
    from fd_scale.plan.scaling import Assumptions

    job = Job(
        recipe=options.recipe, overrides=tuple(options.overrides), weak=options.weak, num_steps=options.steps
    )
    assumed = Assumptions.given(options.assume)
    bench_scale(job, Path(options.out), options.sizes, assumed, report=options.report)
