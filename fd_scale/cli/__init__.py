"""The command line: verbs to functions, nothing else. Heavy imports wait for their verb."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fd_scale import __version__
from fd_scale.cli.bench import add_bench
from fd_scale.cli.look import add_looking
from fd_scale.cli.parts import add_verb
from fd_scale.cli.planning import add_planning
from fd_scale.cli.studies import add_studies
from fd_scale.cli.train import TRAINING_VERBS, add_training
from fd_scale.cli.weights import add_weights
from fd_scale.config import describe_keys, packaged_recipes
from fd_scale.errors import CommonError, UserError
from fd_scale.log import results

__all__ = ["TRAINING_VERBS", "main", "parsed"]

_EXAMPLES = """\
examples:
  fd-scale demo                                              the whole story on this machine, in minutes
  fd-scale recipes                                           packaged recipes and all settings
  fd-scale check digits/distill                              what would fail, before it is queued
  fd-scale plan my.yaml --gpus 64 --gpu h100                 memory a GPU, step time
  fd-scale fetch my.yaml                                     its data and weights on the hub, into the cache
  fd-scale distill digits/distill train.epochs=2             on one device
  torchrun --nproc-per-node 8 -m fd_scale distill my.yaml    on eight
  fd-scale evaluate runs/digits/finetune                     metrics of a checkpoint, by class too
  fd-scale submit my.yaml --nodes 8 --gpu h100               as a SLURM job
  fd-scale export runs/digits/distill out                    weights as safetensors, with a model card
  fd-scale convert in.pth out --model swin_v2_base --format timm    from any layout of names to another
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb; exits with 2 and one sentence where the user's input is wrong, with 130 after Ctrl-C."""
    options = parsed(arguments)
    try:
        options.run(options)
    except UserError as error:
        if isinstance(error, CommonError) and os.environ.get("WORLD_SIZE", "1") != "1":
            # Every rank ends now. torchrun, once it has seen the first, would end the others before they say why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, CommonError):
            print(f"fd-scale: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        _tell_batch_script(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("fd-scale: interrupted; of a run, what was checkpointed is kept, and the same command goes on from "
                  "there", file=sys.stderr)  # fmt: skip
        raise SystemExit(128 + signal.SIGINT) from None


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

    for add in (add_training, add_planning, add_weights, add_bench, add_studies, add_looking):
        add(verbs)
    recipes = add_verb(
        verbs, "recipes", "packaged recipes and every setting, with its meaning",
        "Lists the packaged recipes and every setting of a recipe.", "  fd-scale recipes",
    )  # fmt: skip
    recipes.set_defaults(run=_recipes)
    return parser


def _recipes(options: argparse.Namespace) -> None:
    console = results()
    table = Table("recipe", "first line", title="Packaged recipes")
    for name, path in packaged_recipes().items():
        table.add_row(name, path.read_text(encoding="utf-8").split("\n")[0].lstrip("# "))
    console.print(table)
    settings = Table("setting", "default", "meaning", title="Settings")
    rows = describe_keys()
    settings.columns[0].min_width = max(len(name) for name, *_ in rows)  # whole on any terminal
    for row in rows:
        settings.add_row(*row)
    console.print(settings)
