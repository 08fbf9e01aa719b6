"""What tests of several tasks do with ranks."""

from typing import Any

import cases
import numpy as np
from ranks import run_ranks


def curves_of_two_and_one(together: dict[str, Any], alone: dict[str, Any]) -> list[np.ndarray]:
    """Trains one recipe on two ranks and one alone; returns loss and gradient norm of every step of each."""
    run_ranks(cases.train, 1, alone)
    run_ranks(cases.train, 2, together)
    return [np.array(cases.curve(run["run_dir"])) for run in (together, alone)]


def assert_resumes_exactly(whole: dict[str, Any], killed: dict[str, Any], step: int) -> None:
    """Trains on two ranks, a second time killed between two steps and resumed: the same losses."""
    run_ranks(cases.train, 2, whole)
    results = run_ranks(cases.train_then_die, 2, killed, step, "between steps", 1)
    assert results[1] == -9, "the victim was killed in the middle of the run"
    run_ranks(cases.train, 2, killed)
    found, expected = (cases.curve(run["run_dir"]) for run in (killed, whole))
    assert found == expected, (found, expected)
