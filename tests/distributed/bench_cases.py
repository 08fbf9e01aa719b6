"""What a rank does in the tests of `bench giant` and `bench scale`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from fd_scale import distributed
from fd_scale.benchmarks import one_cell
from fd_scale.benchmarks import scale as scaled
from fd_scale.benchmarks.cells import RECIPE, Cell
from fd_scale.benchmarks.records import Record
from fd_scale.plan.scaling import Assumptions


def scale(
    job: scaled.Job, out: str, program: str, calls: list[str | None], timeout_s: float
) -> list[tuple[int, str | None]]:
    """Calls `bench scale` with each list of sizes; the measuring processes run `program`, and nothing is predicted.

    Returns:
        Ranks and error of each record.
    """
    scaled.PROGRAM, scaled.SIZE_TIMEOUT_S, scaled.POLL_S = (sys.executable, "-c", program), timeout_s, 0.05
    shown: list[tuple[int, str | None]] = []

    def show(name: str, records: list[Record], assumed: Assumptions) -> None:
        shown[:] = [(record.num_ranks, record.error) for record in records]

    scaled.show = show
    distributed.start("cpu", 60)  # as under torchrun; its store is here not that of the variable below
    os.environ |= {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for sizes in calls:
        scaled.bench_scale(job, Path(out), sizes, Assumptions())
    return shown


def cells(folder: str, given: list[Cell]) -> list[dict[str, Any]]:
    """Measures cells one after the other, two steps each, as their processes would; nothing is compiled.

    Returns:
        What each wrote.
    """
    compiled = []
    nn.Module.compile = lambda self, **options: compiled.append(self)  # type: ignore[method-assign]
    found = []
    for number, cell in enumerate(given):
        file = Path(folder) / f"{number}.json"
        one_cell.main(str(file), RECIPE, cell.way, 2, [*cell.overrides, "train.device=cpu"])
        found.append(json.loads(file.read_text()) | {"compiled": len(compiled)})
        compiled.clear()
    return found
