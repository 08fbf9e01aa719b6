"""Verbs for a cluster: what a run will cost, and its submission."""

from __future__ import annotations

import argparse
import math
import os

from fd_scale.cli.parts import Verbs, add_recipe, add_verb
from fd_scale.config import Recipe, load_recipe
from fd_scale.errors import UserError
from fd_scale.hardware import GPUS, find_gpu
from fd_scale.log import results

_OF_A_PLAN = ("utilisation", "launch_us")
"""Assumptions that count without --scaling."""


def add_planning(verbs: Verbs) -> None:
    """Adds `plan` and `submit`."""
    _add_plan(verbs)
    _add_submit(verbs)


def _add_plan(verbs: Verbs) -> None:
    plan = add_verb(
        verbs, "plan", "memory a GPU, step time and cost, before a job is queued",
        "Counts a recipe's FLOPs and activations on the models' shapes (no GPU, no weights), predicts what a GPU\n"
        "holds at each ZeRO stage and checkpointing policy, and names the quickest that fits. With --measure it takes\n"
        "a few steps on this machine and prints predicted beside measured. With --scaling it models the step on more\n"
        "and more GPUs, and says what bounds it.",
        "  fd-scale plan imagenet/swin_v2_giant --gpus 64 --gpu h100 --images 1281167 --plot plan.png\n"
        "  fd-scale plan imagenet/swin_v2_giant --scaling 8..4096 --gpu h100 --assume jitter=0.05\n"
        "  torchrun --nproc-per-node 2 -m fd_scale plan digits/distill --measure train.ds_config=zero3",
    )  # fmt: skip
    add_recipe(plan)
    plan.add_argument("--gpus", type=int, help="GPUs of the job, 8 in a node")
    plan.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}")
    plan.add_argument(
        "--images",
        type=int,
        help="training images of an epoch (default: those of the data, where it is here)",
    )
    plan.add_argument(
        "--images-per-core",
        type=float,
        metavar="N",
        help="crops that a core decodes and cuts in a second, by `bench data` (default: 350, of ImageNet's photos)",
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
        help="another value of utilisation or launch_us, with --scaling of any assumption; may be repeated",
    )  # fmt: skip
    plan.add_argument("--json", metavar="FILE", help="write all numbers there too")
    plan.add_argument(
        "--plot",
        metavar="FILE",
        help="write a PNG: memory of each stage and policy, or the curves of --scaling",
    )
    plan.set_defaults(run=_plan)


def _add_submit(verbs: Verbs) -> None:
    submit = add_verb(
        verbs, "submit", "a recipe as a SLURM job, or as a chain or an array of them",
        "Copies code, recipe and slurm/cluster.env beside the run, so that a job in the queue stays as it is, shows\n"
        "the sbatch command and runs it. The job saves before its time limit and is requeued until it is done.\n"
        "In a chain, each run starts from the weights of the run before, whatever its recipe says;\n"
        "name model.weights here for others.",
        "  fd-scale submit my.yaml --nodes 8 --gpu h100 --dry-run\n"
        "  fd-scale submit digits/teacher --nodes 1 --then digits/distill --then digits/finetune optim.lr=1e-3\n"
        "  fd-scale submit my.yaml --nodes 2 --array optim.lr=1e-3,5e-4,2e-4",
    )  # fmt: skip
    add_recipe(submit)
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


def _plan(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    if options.measure:
        _refuse(
            options,
            "--measure prints what this machine holds",
            "gpus gpu images images_per_core scaling assume json plot",
        )
        from fd_scale import api
        from fd_scale.plan.measure import measured_table

        predicted, measured = api.measure(recipe)
        if os.environ.get("RANK", "0") == "0":
            results().print(measured_table(predicted, measured))
        return
    if options.scaling is not None:
        _scaling(options, recipe)
        return
    assumed = options.assume or []
    if others := [each for each in assumed if each.partition("=")[0] not in _OF_A_PLAN]:
        raise UserError(
            f"plan: without --scaling --assume takes {' and '.join(_OF_A_PLAN)}; remove {', '.join(others)}"
        )
    if options.gpus is None or options.gpu is None:
        raise UserError(
            f"plan: --gpus N and --gpu NAME are needed, for what to plan (one of {', '.join(GPUS)}), or --measure"
        )
    if options.images is not None and options.images < 1:
        raise UserError(f"--images: got {options.images}, expected at least 1")
    if options.images_per_core is not None and not 0 < options.images_per_core < math.inf:
        raise UserError(f"--images-per-core: got {options.images_per_core}, expected a number above 0")
    gpu = find_gpu(options.gpu)
    from fd_scale.plan import IMAGES_PER_CORE, plan, plot, scaling, show, to_json, write_json

    given = scaling.Assumptions.given(assumed)
    found = plan(
        options.recipe, recipe, gpu, options.gpus, images=options.images, utilisation=given.utilisation,
        launch_us=given.launch_us, images_per_core=options.images_per_core or IMAGES_PER_CORE,
    )  # fmt: skip
    show(found, results(uncut=True))
    if options.json is not None:
        write_json(to_json(found), options.json)
    if options.plot is not None:
        plot(found, options.plot)


def _scaling(options: argparse.Namespace, recipe: Recipe) -> None:
    _refuse(options, "--scaling has numbers of GPUs, and no end of a run", "gpus images images_per_core")
    if options.gpu is None:
        raise UserError(f"plan: --gpu NAME says on what to scale, one of {', '.join(GPUS)}")
    gpu = find_gpu(options.gpu)
    from fd_scale.plan import scaling, scaling_report, write_json

    sizes, assumed = scaling.parse_sizes(options.scaling), scaling.Assumptions.given(options.assume or [])
    found = scaling.scaling(options.recipe, recipe, gpu, sizes, assumed)
    scaling_report.show(found, results(uncut=True))
    if options.json is not None:
        write_json(scaling_report.to_json(found), options.json)
    if options.plot is not None:
        scaling_report.plot(found, options.plot)


def _refuse(options: argparse.Namespace, reason: str, names: str) -> None:
    """Raises where an option of `names` is given."""
    if given := [f"--{name}" for name in names.split() if getattr(options, name) is not None]:
        raise UserError(f"plan: {reason}; remove {', '.join(given)}".replace("_", "-"))


def _submit(options: argparse.Namespace) -> None:
    from fd_scale.cluster.submit import Wanted, submit

    wanted = Wanted(
        nodes=options.nodes, gpu=options.gpu, time=options.time, check=options.check, sbatch=tuple(options.sbatch)
    )  # fmt: skip
    stages = [[options.recipe, *options.overrides], *options.then]
    for line in submit(stages, wanted, options.array, dry_run=options.dry_run):
        print(line, flush=True)
