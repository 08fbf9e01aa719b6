"""Verbs that chain runs and tell what came of it."""

from __future__ import annotations

import argparse

from fd_scale.cli.parts import Verbs, add_overrides, add_recipe, add_verb
from fd_scale.errors import PREEMPTED, UserError
from fd_scale.log import console, results


def add_studies(verbs: Verbs) -> None:
    """Adds `compare`, `miniature` and `demo`."""
    compare = add_verb(
        verbs, "compare", "one fine-tuning from several starting points, over seeds",
        "Runs `finetune RECIPE` from each starting point with seeds 0, 1, ..., into RUN_DIR/NAME-SEED; what is\n"
        "complete is not repeated. Prints mean, spread and paired differences; writes RUN_DIR/compare.json and\n"
        "compare.png.",
        "  fd-scale compare digits/finetune --run-dir runs/compare --seeds 3 \\\n"
        "      --start teacher model.weights=runs/digits/teacher-export \\\n"
        "      --start student model.weights=runs/digits/distill-export --start scratch model.weights=null",
    )  # fmt: skip
    add_recipe(compare)
    compare.add_argument(
        "--start", metavar=("NAME", "key=value"), nargs="+", action="append", required=True,
        help="a name and the settings that make a starting point; twice or more; the first is compared with",
    )  # fmt: skip
    compare.add_argument("--run-dir", required=True, help="folder of the runs")
    compare.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    compare.add_argument("--ranks", type=int, default=1, help="processes of each run (default: 1)")
    compare.add_argument("--side-by-side", type=int, default=1, help="runs at a time (default: 1)")
    compare.set_defaults(run=_compare)

    miniature = add_verb(
        verbs, "miniature", "the paper's experiment on CIFAR-10, on two cores or a GPU",
        "Trains teachers, distils each with and without whitening, probes and fine-tunes before and after (recipes\n"
        "miniature/...). `cpu`: a Swin V2, contrastive and supervised teachers, 2 seeds, within an hour on two cores.\n"
        "`ablations`: of target, loss, position bias and drop path, on the contrastive teacher; an hour more.\n"
        "`gpu`: both of a ViT too, masked images as a teacher, 3 seeds.\n"
        "What is complete is not repeated.",
        "  fd-scale miniature --data data/cifar10 --run-dir runs/miniature\n"
        "  fd-scale miniature --study gpu --minutes 9 --data data/cifar10 --run-dir runs/miniature_gpu",
    )  # fmt: skip
    miniature.add_argument(
        "--data", required=True, help="folder of the hub's parquet files of uoft-cs/cifar10"
    )
    miniature.add_argument(
        "--run-dir", default="runs/miniature", help="folder of the runs (default: runs/miniature)"
    )
    miniature.add_argument(
        "--study", choices=("cpu", "ablations", "gpu"), default="cpu", help="which one (default: cpu)"
    )
    miniature.add_argument(
        "--minutes",
        type=float,
        help="stop after them, with code 75; the same command goes on (default: never)",
    )
    add_overrides(miniature, "settings of all runs")
    miniature.set_defaults(run=_miniature)

    demo = add_verb(
        verbs, "demo", "the whole story on embedded data, in minutes, on a CPU",
        "Pre-trains a teacher on scikit-learn's digits, distils it with ZeRO-3 on two processes, fine-tunes\n"
        "teacher, student and a student from scratch, and prints what came of it.",
        "  fd-scale demo --run-dir runs/demo",
    )  # fmt: skip
    demo.add_argument("--run-dir", default="runs/demo", help="folder of the runs (default: runs/demo)")
    demo.add_argument("--seeds", type=int, default=3, help="fine-tunings of each starting point (default: 3)")
    demo.set_defaults(run=_demo)


def _compare(options: argparse.Namespace) -> None:
    from fd_scale.launch import Launcher
    from fd_scale.verbs.compare import compare

    starts = {name: settings for name, *settings in options.start}
    if len(starts) < len(options.start):
        raise UserError("--start: two have one name; choose others")
    found = compare(
        options.recipe, starts, options.run_dir, options.seeds, options.overrides,
        launcher=Launcher(num_ranks=options.ranks), side_by_side=options.side_by_side,
    )  # fmt: skip
    results().print(found.table())


def _miniature(options: argparse.Namespace) -> None:
    from fd_scale.launch import OutOfTimeError
    from fd_scale.miniature import miniature

    try:
        miniature(options.study, options.data, options.run_dir, options.overrides, options.minutes)
    except OutOfTimeError as error:
        console.print(str(error), soft_wrap=True, highlight=False)
        raise SystemExit(PREEMPTED) from None


def _demo(options: argparse.Namespace) -> None:
    from fd_scale.verbs.demo import demo

    demo(options.run_dir, options.seeds)
