"""In every Python of a test's job: a run waits before a step, as the file `hold` in its folder says for this start.

A list of {"start", "step", "until_preempt"}: so a test can disturb a run of milliseconds at a step that it names.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

START = int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def waits(run_dir: Path, step: int) -> bool:
    try:
        holds = json.loads((run_dir / "hold").read_text())
    except FileNotFoundError:
        return False
    preempted = (run_dir / "preempt").exists()
    return any(
        hold["start"] == START and step >= hold["step"] and not (hold.get("until_preempt") and preempted)
        for hold in holds
    )


def add_hold(trainer: ModuleType) -> None:
    train_step = trainer.Trainer.train_step

    def held(self: Any, *arguments: Any) -> None:
        run_dir = Path(self.recipe.run_dir)
        if waits(run_dir, self.state.step):
            held = run_dir / f"held_{self.world.rank}_{START}"
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
