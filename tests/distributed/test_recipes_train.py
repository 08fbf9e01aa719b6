"""Every packaged ImageNet recipe takes real steps, with its own precision and ZeRO stage."""

import math
from pathlib import Path

import cases
import pytest
from ranks import run_ranks

from fd_scale.config import packaged_recipes

pytestmark = pytest.mark.slow


def test_every_recipe_takes_steps(tmp_path: Path) -> None:
    names = [name for name in packaged_recipes() if name.startswith("imagenet")]
    [found] = run_ranks(cases.train_recipes, 1, names, str(tmp_path))
    assert len(found) >= 19
    for name, losses in found.items():
        assert len(losses) == 2, name
        assert all(math.isfinite(loss) and loss > 0 for loss in losses), name
