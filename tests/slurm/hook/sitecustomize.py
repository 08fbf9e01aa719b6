"""In every Python of a test's job: a run waits before a step while its folder holds a file `hold`.

The file says `STEP` or `STEP until preempt`: so a test can disturb a run of milliseconds at a step that it names.
"""

import importlib.machinery
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any


def waits(run_dir: Path, step: int) -> bool:
    try:
        first, *until = (run_dir / "hold").read_text().split()
    except (FileNotFoundError, ValueError):
        return False
    return step >= int(first) and not (until and (run_dir / "preempt").exists())


def add_hold(trainer: ModuleType) -> None:
    train_step = trainer.Trainer.train_step

    def held(self: Any, *arguments: Any) -> None:
        run_dir = Path(self.recipe.run_dir)
        if waits(run_dir, self.state.step):
            held = run_dir / f"held_{self.world.rank}_{os.environ.get('SLURM_RESTART_COUNT', 0)}"
            held.touch()
            while waits(run_dir, self.state.step):
                self.watchdog.beat("a test")
                time.sleep(0.05)
            held.unlink()
        train_step(self, *arguments)

    trainer.Trainer.train_step = held


class Finder:
    """Finds fd_scale.trainer once, and changes it when it has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "fd_scale.trainer":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            add_hold(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "FD_TEST_CRASH" in os.environ and "LOCAL_RANK" in os.environ:
    sys.exit("a rank that crashes, as the test wants")
sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
