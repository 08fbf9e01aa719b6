"""Jobs of the tests, and what they leave."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurm_cluster import Cluster


@dataclass
class Job:
    """A job of a test, and the run folder that it works in."""

    cluster: Cluster
    number: str
    run_dir: Path
    output: Path

    def wait_held(self, start: int, ranks: int = 2) -> None:
        """Waits until all ranks wait at a step, as `hold` says of this start of the job."""
        held = [self.run_dir / f"held_{rank}_{start}" for rank in range(ranks)]
        self.cluster.wait(
            f"start {start} of job {self.number} at its step",
            lambda: self.restarts() == start and all(file.exists() for file in held),
        )

    def wait_restart(self, start: int) -> None:
        """Waits until SLURM has counted so many restarts."""
        self.cluster.wait(f"restart {start} of job {self.number}", lambda: self.restarts() >= start)

    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def failed_starts(self) -> list[str]:
        """What the batch script says of starts that ended with an error."""
        return [line for line in self.said().splitlines() if "failed with exit code" in line]

    def completed(self) -> None:
        """Waits for a good end."""
        state = self.cluster.ended(self.number)
        assert state["JobState"] == "COMPLETED", f"{state['JobState']}\n{self.said()}"

    def rank_processes(self, node: str) -> list[int]:
        """Ranks on a node, without torchrun above them."""
        found = []
        for number in self.cluster.processes_of(node):
            variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
            if b"SLURM_JOB_ID=" + self.number.encode() in variables and any(
                variable.startswith(b"LOCAL_RANK=") for variable in variables
            ):
                found.append(number)
        return found


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of each line of a run's metrics."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


Submit = Callable[..., Job]
