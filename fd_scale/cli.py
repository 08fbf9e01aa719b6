"""The command line: verbs to functions, nothing else. Heavy imports wait for their verb."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from fd_scale import __version__
from fd_scale.config import ModelConfig, Recipe, describe_keys, load_recipe, packaged_recipes
from fd_scale.errors import UserError
from fd_scale.hardware import GPUS, find_gpu

_EXAMPLES = """\
examples:
  fd-scale demo                                              the whole story on this machine, in minutes
  fd-scale recipes                                           packaged recipes and all settings
  fd-scale check digits/distill                              what would fail, before it is queued
  fd-scale plan my.yaml --gpus 64 --gpu h100                 memory a GPU, step time, cost
  fd-scale fetch my.yaml                                     its data and weights on the hub, into the cache
  fd-scale distill digits/distill train.steps=100            on one device
  torchrun --nproc-per-node 8 -m fd_scale distill my.yaml    on eight
  fd-scale evaluate runs/digits/finetune                     metrics of a checkpoint, by class too
  fd-scale submit my.yaml --nodes 8 --gpu h100               as a SLURM job
  fd-scale export runs/digits/distill out                    weights as safetensors, with a model card
  fd-scale convert in.pth out --model swin_v2_base --format timm    from any layout of names to another
"""

PREEMPTED = os.EX_TEMPFAIL
"""Exit code 75 of a run that was preempted: the same command resumes it."""

_LAYOUTS = ("ours", "timm", "hf", "official", "fd")

TRAINING_VERBS = {
    "distill": (("distill",), "feature distillation of a teacher into a student"),
    "pretrain": (("contrastive",), "contrastive pre-training of a teacher, without labels"),
    "finetune": (("classification", "linear_probe"), "fine-tuning on labels, or a linear probe"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb; exits with 2 and one sentence where the user's input is wrong."""
    options = parsed(arguments)
    try:
        options.run(options)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"fd-scale: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        _tell_batch_script(error)
        raise SystemExit(2) from None


def _tell_batch_script(error: UserError) -> None:
    """Writes the sentence where slurm/common.sh looks for it: torchrun makes 1 of the exit code 2."""
    if "FD_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ["FD_ERROR_FILE"]).write_text(f"{error}\n", encoding="utf-8")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of a verb; `key=value` may also stand behind them, where argparse no longer looks for it."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(item.startswith("-") or "=" not in item or "overrides" not in options for item in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fd-scale",
        description="Feature distillation of vision backbones, up to 3 billion parameters.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fd-scale {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    for verb, (tasks, summary) in TRAINING_VERBS.items():
        wanted = " or ".join(f"`{task}`" for task in tasks)
        training = _add_verb(
            verbs, verb, summary,
            f"{summary[0].upper()}{summary[1:]}. A run folder that holds a checkpoint is resumed.\n"
            f"The recipe's task must be {wanted}; `fd-scale recipes` lists every setting.",
            f"  fd-scale {verb} RECIPE optim.lr=1e-3 run_dir=runs/mine\n"
            f"  torchrun --nproc-per-node 8 -m fd_scale {verb} RECIPE",
        )  # fmt: skip
        _add_recipe(training)
        training.add_argument(
            "--profile", action="store_true", help="trace three steps into RUN/profile (log.profile=true)"
        )
        training.set_defaults(run=_train, tasks=tasks)

    _add_evaluate(verbs)
    _add_check(verbs)
    _add_plan(verbs)
    _add_submit(verbs)

    fetch = _add_verb(
        verbs, "fetch", "data and weights of a recipe from the Hugging Face hub, ahead of the run",
        "Downloads what the recipe names on the hub into the cache (HF_HOME). No other verb uses the network.",
        "  fd-scale fetch my.yaml\n"
        "  fd-scale fetch my.yaml 'data.train=tar:hf://datasets/timm/imagenet-1k-wds/imagenet1k-train-*.tar'",
    )  # fmt: skip
    _add_recipe(fetch)
    fetch.set_defaults(run=_fetch)

    _add_tools(verbs)
    return parser


def _add_evaluate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = _add_verb(
        verbs, "evaluate", "metrics of a run's checkpoint, as a table and as JSON",
        "Measures the newest checkpoint of a run, or the one named, on data.evaluation: accuracy, by class too, and\n"
        "calibration of a classifier; the loss of a distillation. Writes RUN/evaluations/CHECKPOINT.json.",
        "  fd-scale evaluate runs/digits/finetune\n"
        "  fd-scale evaluate runs/mine/checkpoints/step_00005000 data.evaluation=imagefolder:imagenet-v2\n"
        "  torchrun --nproc-per-node 8 -m fd_scale evaluate runs/mine --real real.json",
    )  # fmt: skip
    evaluate.add_argument("run_dir", metavar="RUN", help="folder of a run, or one of its checkpoints")
    evaluate.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's"
    )
    evaluate.add_argument(
        "--real", metavar="FILE", help="reassessed labels of ImageNet's validation images (real.json)"
    )
    evaluate.set_defaults(run=_evaluate)


def _add_check(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = _add_verb(
        verbs, "check", "what would fail, before a job is queued",
        "Checks recipe, DeepSpeed JSON, data, weights, run folder, devices and driver; a table and a verdict.",
        "  fd-scale check digits/distill --ranks 2\n"
        "  salloc --nodes 2 fd-scale check my.yaml --cluster\n"
        "  fd-scale check imagenet/swin_v2_giant --gpus 64 --gpu h100",
    )  # fmt: skip
    _add_recipe(check)
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


def _add_plan(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = _add_verb(
        verbs, "plan", "memory a GPU, step time and cost, before a job is queued",
        "Counts a recipe's FLOPs and activations on the models' shapes (no GPU, no weights), predicts what a GPU\n"
        "holds at each ZeRO stage and checkpointing policy, and names the quickest that fits. With --measure it takes\n"
        "a few steps on this machine and prints predicted beside measured. With --scaling it models the step on more\n"
        "and more GPUs, and says what bounds it.",
        "  fd-scale plan imagenet/swin_v2_giant --gpus 64 --gpu h100 --images 1281167 --plot plan.png\n"
        "  fd-scale plan imagenet/swin_v2_giant --scaling 8..4096 --gpu h100 --assume jitter=0.05\n"
        "  torchrun --nproc-per-node 2 -m fd_scale plan digits/distill --measure train.ds_config=zero3",
    )  # fmt: skip
    _add_recipe(plan)
    plan.add_argument("--gpus", type=int, help="GPUs of the job, 8 in a node")
    plan.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}")
    plan.add_argument(
        "--images",
        type=int,
        help="training images of an epoch (default: those of the data, where it is here)",
    )
    plan.add_argument(
        "--measure", action="store_true", help="take a few steps on this machine, on the ranks that are"
    )
    plan.add_argument(
        "--scaling",
        metavar="FIRST..LAST",
        help="step time on FIRST GPUs, twice as many, and so on, as 8..4096",
    )
    plan.add_argument(
        "--assume", metavar="NAME=VALUE", action="append", default=None,
        help="with --scaling: another value of an assumption, of those that it prints; may be repeated",
    )  # fmt: skip
    plan.add_argument("--json", metavar="FILE", help="write all numbers there too")
    plan.add_argument(
        "--plot",
        metavar="FILE",
        help="write a PNG: memory of each stage and policy, or the curves of --scaling",
    )
    plan.set_defaults(run=_plan)


def _add_submit(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = _add_verb(
        verbs, "submit", "a recipe as a SLURM job, or as a chain or an array of them",
        "Copies code, recipe and slurm/cluster.env beside the run, so that a job in the queue stays as it is, shows\n"
        "the sbatch command and runs it. The job saves before its time limit and is requeued until it is done.\n"
        "In a chain, each run starts from the weights of the run before.",
        "  fd-scale submit my.yaml --nodes 8 --gpu h100 --dry-run\n"
        "  fd-scale submit digits/teacher --nodes 1 --then digits/distill --then digits/finetune optim.lr=1e-3\n"
        "  fd-scale submit my.yaml --nodes 2 --array optim.lr=1e-3,5e-4,2e-4",
    )  # fmt: skip
    _add_recipe(submit)
    submit.add_argument("--nodes", type=int, required=True, help="nodes of each job")
    submit.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"cluster.env is asked for this kind: {', '.join(GPUS)} (default: its own)",
    )
    submit.add_argument(
        "--time", metavar="LIMIT", help="time limit of each job, as of sbatch (default: cluster.env's)"
    )
    submit.add_argument(
        "--then", metavar=("RECIPE", "key=value"), nargs="+", action="append", default=[],
        help="a job that starts when the one before is done: a recipe, or `evaluate`, `diagnose` of that run",
    )  # fmt: skip
    submit.add_argument(
        "--array", metavar="key=a,b,c", help="a job for each value, in a run folder of its own"
    )
    submit.add_argument(
        "--check", action="store_true", help="check the cluster from inside the job before it trains"
    )
    submit.add_argument(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="a further option of sbatch: --sbatch=--qos=high",
    )
    submit.add_argument(
        "--dry-run", action="store_true", help="show commands and scripts; submit and write nothing"
    )
    submit.set_defaults(run=_submit)


def _add_tools(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = _add_verb(
        verbs, "export", "the trained backbone alone, as safetensors with a model card",
        "Writes model.safetensors (fp32; formats official and fd: model.pth), config.json and README.md.\n"
        "Recipes take the folder, in any format, as model.weights.",
        "  fd-scale export runs/digits/distill out\n"
        "  fd-scale export runs/digits/distill out --format hf",
    )  # fmt: skip
    export.add_argument("run_dir", metavar="RUN", help="folder of a run")
    export.add_argument("out", metavar="OUT", help="folder to write")
    _add_format(export)
    export.set_defaults(run=_export)
    _add_weights_tools(verbs)

    _add_bench(verbs)

    compare = _add_verb(
        verbs, "compare", "one fine-tuning from several starting points, over seeds",
        "Runs `finetune RECIPE` from each starting point with seeds 0, 1, ..., into RUN_DIR/NAME-SEED; what is\n"
        "complete is not repeated. Prints mean, spread and paired differences; writes RUN_DIR/compare.json and\n"
        "compare.png.",
        "  fd-scale compare digits/finetune --run-dir runs/compare --seeds 3 \\\n"
        "      --start teacher model.weights=runs/digits/teacher-export \\\n"
        "      --start student model.weights=runs/digits/distill-export --start scratch model.weights=null",
    )  # fmt: skip
    _add_recipe(compare)
    compare.add_argument(
        "--start", metavar=("NAME", "key=value"), nargs="+", action="append", required=True,
        help="a name and the settings that make a starting point; twice or more; the first is compared with",
    )  # fmt: skip
    compare.add_argument("--run-dir", required=True, help="folder of the runs")
    compare.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    compare.add_argument("--ranks", type=int, default=1, help="processes of each run (default: 1)")
    compare.add_argument("--side-by-side", type=int, default=1, help="runs at a time (default: 1)")
    compare.set_defaults(run=_compare)

    _add_diagnose(verbs)

    miniature = _add_verb(
        verbs, "miniature", "the paper's experiment on CIFAR-10, within an hour on two cores",
        "Trains a contrastive and a supervised teacher, distils each with and without whitening, probes and\n"
        "fine-tunes before and after (recipes miniature/...). What is complete is not repeated.",
        "  fd-scale miniature --data data/cifar10 --run-dir runs/miniature",
    )  # fmt: skip
    miniature.add_argument(
        "--data", required=True, help="folder of the hub's parquet files of uoft-cs/cifar10"
    )
    miniature.add_argument(
        "--run-dir", default="runs/miniature", help="folder of the runs (default: runs/miniature)"
    )
    miniature.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    miniature.set_defaults(run=_miniature)

    demo = _add_verb(
        verbs, "demo", "the whole story on embedded data, in minutes, on a CPU",
        "Pre-trains a teacher on scikit-learn's digits, distils it with ZeRO-3 on two processes, fine-tunes\n"
        "teacher, student and a student from scratch, and prints what came of it.",
        "  fd-scale demo --run-dir runs/demo",
    )  # fmt: skip
    demo.add_argument("--run-dir", default="runs/demo", help="folder of the runs (default: runs/demo)")
    demo.add_argument("--seeds", type=int, default=3, help="fine-tunings of each starting point (default: 3)")
    demo.set_defaults(run=_demo)

    recipes = _add_verb(
        verbs, "recipes", "packaged recipes and every setting, with its meaning",
        "Lists the packaged recipes and every setting of a recipe.", "  fd-scale recipes",
    )  # fmt: skip
    recipes.set_defaults(run=_recipes)


def _add_diagnose(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    diagnose = _add_verb(
        verbs, "diagnose", "attention and features of models, side by side: numbers and plots",
        "Attention distance, diversity of heads, average maps, share of the position bias, spectrum and CKA, over\n"
        "images of a source. MODEL is a run's folder, an exported one, teacher:RUN, or NAME@pretrained (@PATH,\n"
        "@none) of any ViT or Swin. Writes diagnosis.json, PNG and SVG.",
        "  fd-scale diagnose runs/digits/distill teacher:runs/digits/distill\n"
        "  fd-scale diagnose vit_base_patch16_clip_224.openai@pretrained --images imagefolder:photos --out diagnosis",
    )  # fmt: skip
    diagnose.add_argument(
        "models", metavar="MODEL", nargs="+", help="what to look at; CKA is with the first one"
    )
    diagnose.add_argument(
        "--images", metavar="SOURCE", help="imagefolder:PATH, tar:PATH, ... (default: those of the first run)"
    )
    diagnose.add_argument("--out", metavar="DIR", help="folder of the results (default: RUN/diagnosis)")
    diagnose.add_argument("--num-images", type=int, default=64, help="evenly spread ones (default: 64)")
    diagnose.add_argument("--batch-size", type=int, default=16, help="images at a time (default: 16)")
    diagnose.add_argument("--img-size", type=int, help="side in pixels (default: each model's own)")
    diagnose.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    diagnose.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    diagnose.set_defaults(run=_diagnose)

    landscape = _add_verb(
        verbs, "landscape", "the loss around a run's trained weights, and its largest curvature",
        "Measures the loss (and accuracy) on a plane of two filter-normalised directions, and the Hessian's largest\n"
        "eigenvalue, into RUN/diagnosis; under torchrun ranks share the images. The same command goes on.",
        "  fd-scale landscape runs/digits/finetune --points 21\n"
        "  fd-scale landscape runs/mine/checkpoints/step_00005000 data.evaluation=imagefolder:photos",
    )  # fmt: skip
    landscape.add_argument("run_dir", metavar="RUN", help="folder of a run, or one of its checkpoints")
    landscape.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    landscape.add_argument("--points", type=int, default=11, help="along each direction, odd (default: 11)")
    landscape.add_argument(
        "--span", type=float, default=1.0, help="to the edge, in weights' lengths (default: 1)"
    )
    landscape.add_argument("--seed", type=int, default=0, help="of the directions (default: 0)")
    landscape.add_argument("--num-images", type=int, default=256, help="evenly spread ones (default: 256)")
    landscape.set_defaults(run=_landscape)

    report = _add_verb(
        verbs, "report", "one page of a run, or of several side by side: curves, pictures, settings",
        "Writes a self-contained HTML page and its numbers as JSON; several runs share their curves, and the table of\n"
        "settings shows where they differ.",
        "  fd-scale report runs/digits/distill\n"
        "  fd-scale report runs/a runs/b --out compared.html",
    )  # fmt: skip
    report.add_argument("run_dirs", metavar="RUN", nargs="+", help="folder of a run")
    report.add_argument(
        "--out", metavar="FILE", help="the page (default: report.html in the first run's folder)"
    )
    report.set_defaults(run=_report)


def _add_bench(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = _add_verb(
        verbs, "bench", "measurements: step, finetune, kernels, giant, scale",
        "Measures the training step, the kernels, whole steps of SwinV2-G on a GPU, or a recipe's on many.",
        "  fd-scale bench step --json step.json\n"
        "  fd-scale bench finetune miniature/finetune model.weights=null\n"
        "  fd-scale bench kernels --match swin_g_w12\n"
        "  fd-scale bench giant --match '^G'\n"
        "  torchrun --nproc-per-node 8 -m fd_scale bench scale imagenet/swin_v2_giant",
    )  # fmt: skip
    subjects = bench.add_subparsers(metavar="WHAT", required=True)

    step = _add_verb(
        subjects, "step", "one optimizer step, ZeRO 0 on one process, ZeRO 3 on two",
        "Measures, in one run, our training step against a bare PyTorch loop of the same models, and the loader.",
        "  fd-scale bench step --json step.json",
    )  # fmt: skip
    step.add_argument(
        "recipe", metavar="RECIPE", nargs="?", default="digits/distill", help="default: digits/distill"
    )
    step.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    step.add_argument("--steps", type=int, default=30, help="measured steps of each loop (default: 30)")
    step.add_argument("--json", metavar="FILE", help="write the measurements there too")
    step.set_defaults(run=_bench)

    finetune = _add_verb(
        subjects, "finetune", "one fine-tuning step, images and all, beside timm's loader, Mixup and optimizer",
        "Measures in turns whole steps of a classification: images decoded, augmented, mixed, trained on.",
        "  fd-scale bench finetune digits/finetune model.weights=null",
    )  # fmt: skip
    _add_recipe(finetune)
    finetune.add_argument("--steps", type=int, default=30, help="measured steps of each loop (default: 30)")
    finetune.add_argument("--json", metavar="FILE", help="write the measurements there too")
    finetune.set_defaults(run=_bench_finetune)

    kernels = _add_verb(
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

    giant = _add_verb(
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
    _add_bench_scale(subjects)


def _add_bench_scale(subjects: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    scale = _add_verb(
        subjects, "scale", "a recipe's step on more and more of the ranks of one job, beside `plan --scaling`",
        "Run under torchrun on all nodes of a job: measures whole steps on the first rank or node, on twice as many,\n"
        "and so on, each in processes of its own while the other ranks wait; images are noise, weights random. Each\n"
        "size is recorded at once; a second call goes on where the first one stopped. Predictions stand beside them.",
        "  srun torchrun --nnodes 8 --nproc-per-node 8 ... -m fd_scale bench scale imagenet/swin_v2_giant\n"
        "  torchrun --nproc-per-node 2 -m fd_scale bench scale digits/distill\n"
        "  fd-scale bench scale digits/distill --report",
    )  # fmt: skip
    _add_recipe(scale)
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


def _add_weights_tools(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = _add_verb(
        verbs, "convert", "weights in another layout of names",
        "Reads a file or folder in any layout that the model knows, writes a folder as `export` does.",
        "  fd-scale convert swinv2.pth out --model swin_v2_base --set shared_bias=false --format timm",
    )  # fmt: skip
    convert.add_argument("source", metavar="IN", help=".safetensors or .pth file, or a folder")
    convert.add_argument("out", metavar="OUT", help="folder to write")
    convert.add_argument("--model", required=True, help="name of the model that the weights are of")
    convert.add_argument(
        "--img-size", type=int, help="side of its input in pixels (default: the model's own)"
    )
    convert.add_argument(
        "--set", metavar="key=value", nargs="+", action="extend", default=[],
        help="arguments of the model, as model.overrides",
    )  # fmt: skip
    _add_format(convert)
    convert.set_defaults(run=_convert)

    interpolate = _add_verb(
        verbs, "interpolate", "a mean of two models' weights (WiSE-FT)",
        "Writes (1 - alpha) * A + alpha * B in fp32, tensor by tensor (arXiv 2109.01903).",
        "  fd-scale interpolate runs/distilled-export runs/finetuned-export out --alpha 0.5",
    )  # fmt: skip
    interpolate.add_argument("first", metavar="A", help="weights: a file or a folder")
    interpolate.add_argument("second", metavar="B", help="weights with the same names and shapes")
    interpolate.add_argument("out", metavar="OUT", help="folder to write")
    interpolate.add_argument("--alpha", type=float, default=0.5, help="share of B, 0..1 (default: 0.5)")
    interpolate.set_defaults(run=_interpolate)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=_LAYOUTS, default="ours", help="whose names the tensors get (default: ours)"
    )


def _add_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    text: str,
    examples: str,
) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=text,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or name of a packaged recipe")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's"
    )


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

    api.evaluate(options.run_dir, options.overrides, options.real)


def _check(options: argparse.Namespace) -> None:
    if options.cluster:
        from fd_scale.cluster.check import check_cluster

        check_cluster(load_recipe(options.recipe, options.overrides), [options.recipe, *options.overrides])
        return
    from fd_scale.check import check

    check(options.recipe, options.overrides, options.ranks, options.gpu)


def _submit(options: argparse.Namespace) -> None:
    from fd_scale.cluster.submit import Wanted, submit

    wanted = Wanted(
        nodes=options.nodes, gpu=options.gpu, time=options.time, check=options.check, sbatch=tuple(options.sbatch)
    )  # fmt: skip
    stages = [[options.recipe, *options.overrides], *options.then]
    for line in submit(stages, wanted, options.array, dry_run=options.dry_run):
        print(line, flush=True)


def _plan(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    if options.measure:
        _refuse(
            options, "--measure prints what this machine holds", "gpus gpu images scaling assume json plot"
        )
        from fd_scale import api
        from fd_scale.plan.measure import measured_table

        predicted, measured = api.measure(recipe)
        if os.environ.get("RANK", "0") == "0":
            Console().print(measured_table(predicted, measured))
        return
    if options.scaling is not None:
        _scaling(options, recipe)
        return
    _refuse(options, "without --scaling nothing is assumed that can be set", "assume")
    if options.gpus is None or options.gpu is None:
        raise UserError(
            f"plan: --gpus N and --gpu NAME say for what to plan (one of {', '.join(GPUS)}), or --measure"
        )
    if options.images is not None and options.images < 1:
        raise UserError(f"--images: got {options.images}, expected at least 1")
    gpu = find_gpu(options.gpu)
    from fd_scale.plan import plan, plot, show, to_json, write_json

    found = plan(options.recipe, recipe, gpu, options.gpus, images=options.images)
    show(found, _console())
    if options.json is not None:
        write_json(to_json(found), options.json)
    if options.plot is not None:
        plot(found, options.plot)


def _scaling(options: argparse.Namespace, recipe: Recipe) -> None:
    _refuse(options, "--scaling has numbers of GPUs, and no end of a run", "gpus images")
    if options.gpu is None:
        raise UserError(f"plan: --gpu NAME says on what to scale, one of {', '.join(GPUS)}")
    gpu = find_gpu(options.gpu)
    from fd_scale.plan import scaling, scaling_report, write_json

    sizes, assumed = scaling.parse_sizes(options.scaling), scaling.Assumptions.given(options.assume or [])
    found = scaling.scaling(options.recipe, recipe, gpu, sizes, assumed)
    scaling_report.show(found, _console())
    if options.json is not None:
        write_json(scaling_report.to_json(found), options.json)
    if options.plot is not None:
        scaling_report.plot(found, options.plot)


def _refuse(options: argparse.Namespace, reason: str, names: str) -> None:
    """Raises where an option of `names` is given."""
    if given := [f"--{name}" for name in names.split() if getattr(options, name) is not None]:
        raise UserError(f"plan: {reason}; remove {', '.join(given)}")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150)  # a log file has no width of its own


def _fetch(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    from fd_scale.fetch import fetch

    for line in fetch(recipe):
        print(line)


def _export(options: argparse.Namespace) -> None:
    from fd_scale import api

    print(api.export(options.run_dir, options.out, options.format))


def _convert(options: argparse.Namespace) -> None:
    from fd_scale.export import convert

    config = ModelConfig(name=options.model, img_size=options.img_size, overrides=_values(options.set))
    print(convert(options.source, options.out, config, options.format))


def _values(items: list[str]) -> dict[str, Any]:
    """Arguments of a model from `key=value`, values as in YAML."""
    for item in items:
        if "=" not in item:
            raise UserError(f"--set {item}: an argument is written key=value, e.g. depth=12")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(items))
    except YAMLError as error:
        raise UserError(f"--set {' '.join(items)}: not YAML: {' '.join(str(error).split())}") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _interpolate(options: argparse.Namespace) -> None:
    from fd_scale.export import interpolate

    print(interpolate(options.first, options.second, options.out, options.alpha))


def _bench(options: argparse.Namespace) -> None:
    from fd_scale.bench import bench_step

    bench_step(options.recipe, options.overrides, options.steps, options.json)


def _bench_finetune(options: argparse.Namespace) -> None:
    from fd_scale.benchmarks.finetune import bench_finetune

    bench_finetune(options.recipe, options.overrides, options.steps, options.json)


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


def _compare(options: argparse.Namespace) -> None:
    from fd_scale.compare import compare

    starts = {name: settings for name, *settings in options.start}
    if len(starts) < len(options.start):
        raise UserError("--start: two have one name; choose others")
    found = compare(
        options.recipe, starts, options.run_dir, options.seeds, options.overrides,
        num_ranks=options.ranks, side_by_side=options.side_by_side,
    )  # fmt: skip
    Console().print(found.table())


def _miniature(options: argparse.Namespace) -> None:
    from fd_scale.miniature import miniature

    miniature(options.data, options.run_dir, options.overrides)


def _diagnose(options: argparse.Namespace) -> None:
    from fd_scale import log
    from fd_scale.diagnose.run import Options, diagnose, show

    names = ("images", "num_images", "batch_size", "device", "precision", "img_size")
    log.set_up()
    show(diagnose(options.models, options.out, Options(**{name: getattr(options, name) for name in names})))


def _landscape(options: argparse.Namespace) -> None:
    from fd_scale import api
    from fd_scale.diagnose.landscape import Plane

    plane = Plane(points=options.points, span=options.span, seed=options.seed)
    found = api.landscape(options.run_dir, plane, options.overrides, options.num_images)
    middle = found["rows"][plane.points // 2][plane.points // 2]
    print(f"loss {middle['loss']:.5g}; largest eigenvalue of the Hessian {found['top_eigenvalue']:.5g}")


def _report(options: argparse.Namespace) -> None:
    from fd_scale.report import report

    print(report(options.run_dirs, options.out))


def _demo(options: argparse.Namespace) -> None:
    from fd_scale.demo import demo

    demo(options.run_dir, options.seeds)


def _recipes(options: argparse.Namespace) -> None:
    console = Console()
    table = Table("recipe", "first line", title="Packaged recipes")
    for name, path in packaged_recipes().items():
        table.add_row(name, path.read_text(encoding="utf-8").split("\n")[0].lstrip("# "))
    console.print(table)
    settings = Table("setting", "default", "meaning", title="Settings")
    for row in describe_keys():
        settings.add_row(*row)
    console.print(settings)
