"""What a rank does in the tests of `bench giant`."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from fd_scale.benchmarks import steps
from fd_scale.benchmarks.cells import RECIPE, Cell


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
        steps.main(str(file), RECIPE, cell.way, 2, [*cell.overrides, "train.device=cpu"])
        found.append(json.loads(file.read_text()) | {"compiled": len(compiled)})
        compiled.clear()
    return found
