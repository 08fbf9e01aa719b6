"""`python -m fd_kernels.benchmarks`: measures on a GPU, or writes the table of what was measured."""

import argparse
import logging
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fd_kernels.benchmarks import report
from fd_kernels.benchmarks.records import Records
from fd_kernels.benchmarks.shapes import SHAPES
from fd_kernels.dispatch import implementation

PROGRAM = "python -m fd_kernels.benchmarks"
RESULTS = Path("kernels/benchmarks/results")

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command: 0, 1 where the device was lost, 2 and one sentence where the call is wrong."""
    given = sys.argv[1:] if arguments is None else arguments
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Measure the ops on a GPU beside their peers.")
    parser.add_argument(
        "--match", default="", metavar="REGEX", help='on "shape pass variant", as "swin_g_w12 both"'
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help=f"JSON files (default: {RESULTS})"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.5,
        help="start nothing new after them, nor what compiles in the last one (default: 8.5)",
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const="-",
        metavar="FILE",
        help="measure nothing; print the page, or write it to FILE",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw what was measured, as .png, .svg or .pdf"
    )
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        re.compile(options.match)
    except re.error as error:
        parser.error(f"--match {options.match!r} is no regular expression: {error}")

    status = 0
    if options.report is None:
        if not torch.cuda.is_available():
            logger.error(
                "%s: torch sees no CUDA device, so nothing is measured and the tables say %r; --report prints them",
                PROGRAM, report.NOT_MEASURED,
            )  # fmt: skip
            return 2
        status = _measure(options, began + 60 * options.minutes)
    records = Records.newest(options.out)
    text = report.page(records, shlex.join(["python", "-m", "fd_kernels.benchmarks", *given]), options.plot)
    if options.report in (None, "-"):
        sys.stdout.write(text)
    else:
        try:
            Path(options.report).write_text(text)
        except OSError as error:
            parser.error(f"--report: {options.report} cannot be written ({error.strerror})")
    if options.plot:
        if records is None:
            parser.error(
                f"--plot: {options.out} holds no measurements; measure, or name their folder with --out"
            )
        try:
            report.plot(records, options.plot)
        except ValueError as error:
            parser.error(str(error))
    return status


def _measure(options: argparse.Namespace, end: float) -> int:
    from fd_kernels.benchmarks.measure import DeviceLostError, Gpu, run  # the report needs no triton

    gpu = Gpu()
    environment = gpu.environment()
    records = Records.read(options.out / environment.file_name)
    try:
        with implementation("triton"):
            left = run(SHAPES, records, gpu, environment, match=options.match, end=end)
    except DeviceLostError as error:
        logger.error("%s; the same command goes on after it", error)
        return 1
    logger.info("%d measurements left for the next call; results: %s", left, records.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
