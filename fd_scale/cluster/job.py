"""What a batch script asks before it starts the ranks; `slurm/common.sh` runs it on the first node.

    python -m fd_scale.cluster.job distill RECIPE [key=value ...]

prints the run folder and a free port, in two lines.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from pathlib import Path

from fd_scale.cli import parsed
from fd_scale.config import load_recipe
from fd_scale.errors import UserError

LEAD_S = 300
"""Seconds before the time limit at which a job is told to save, where no save has been measured yet."""
LEAD_SAVES = 3
"""The lead is at least so many times what the last save took: one may be in writing, and disks have bad days."""


def lead_s(run_dir: Path) -> int:
    """Returns the lead that a job of this run folder needs, from what its last save and its last step took."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return LEAD_S
    newest = {entry["kind"]: entry for entry in map(json.loads, lines)}
    save = newest.get("checkpoint")
    if save is None:
        return LEAD_S
    save_s = save["stall_s"] + save["write_s"] + save["checksum_s"]
    step_s = newest.get("train", {}).get("step_time_s", 0.0)  # the flag is looked at once a step
    return max(LEAD_S, math.ceil(LEAD_SAVES * save_s + 2 * step_s))


def free_port() -> int:
    """Returns a port that nothing listens on here now: two jobs on a node do not meet."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def run_dir_of(arguments: list[str]) -> Path:
    """Returns the run folder that a command line of fd-scale works in.

    Raises:
        UserError: its recipe is wrong.
        SystemExit: with code 2, where the command line is.
    """
    options = parsed(arguments)
    if hasattr(options, "recipe"):
        return Path(load_recipe(options.recipe, options.overrides).run_dir).absolute()
    if hasattr(options, "models"):
        folder = Path(options.out or options.models[0].removeprefix("teacher:")).absolute()
        if options.out is None and not folder.is_dir():
            raise UserError(f"{options.models[0]} is no run, so there is no default: give --out DIR")
    else:
        folder = Path(options.run_dir).absolute()
    # A checkpoint is named too.
    return folder.parent.parent if (folder / "manifest.json").is_file() else folder


def main(arguments: list[str]) -> None:
    """Prints the run folder and a free port; says so where the job's lead is too short."""
    try:
        run_dir = run_dir_of(arguments)
    except UserError as error:
        sys.stderr.write(f"fd-scale: {error}\n")
        raise SystemExit(2) from None
    given, needed = int(os.environ.get("FD_LEAD_S", LEAD_S)), lead_s(run_dir)
    if needed > given:
        sys.stderr.write(
            f"fd-scale: the last save took so long that this job should be told {needed} s before its end, and is told "
            f"{given} s before: submit it anew (fd-scale submit), or with sbatch --signal=B:USR1@{needed}\n"
        )
    sys.stdout.write(f"{run_dir}\n{free_port()}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
