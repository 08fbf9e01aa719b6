"""As a user runs it: torchrun, a recipe file, and what stands in the run folder afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fd_scale.config import load_recipe
from fd_scale.errors import PREEMPTED
from fd_scale.models import resolved
from fd_scale.run_folder import read_recipe


def written(values: dict[str, Any]) -> str:
    """Writes a recipe beside its run folder."""
    file = Path(values["run_dir"]).with_suffix(".yaml")
    file.write_text(json.dumps(values))  # JSON is YAML
    return str(file)


def torchrun_distill(values: dict[str, Any], *settings: str, code: int = 0, **environment: str) -> str:
    """Runs a recipe on two ranks, to an end with a code; returns what was said."""
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 -m fd_scale distill"
    done = subprocess.run(
        [sys.executable, *command.split(), written(values), *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.mark.slow
def test_two_ranks_from_the_command_line(recipe_values: Callable[..., dict[str, Any]]) -> None:
    values = recipe_values(
        train__ds_config="zero3",
        data__num_workers=1,
        log__images_every_steps=2,
        data__evaluation="digits:test",
    )
    said = torchrun_distill(values, "train.steps=5", "--profile")
    run = Path(values["run_dir"])
    assert "distill step 5/5" in said, "plain lines where there is no terminal"
    assert said.count("distill step 5/5  loss") == 1, "rank 0 alone speaks"

    assert read_recipe(run) == resolved(
        load_recipe(run.with_suffix(".yaml"), ["train.steps=5", "log.profile=true"])
    )
    start = json.loads((run / "environment.json").read_text())[0]
    assert "distill" in start["command"]
    assert start["versions"]["deepspeed"]
    assert {path.name for path in (run / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [kind for kind in kinds if kind != "checkpoint"] == ["train"] * 5 + ["evaluation"]
    assert kinds.count("checkpoint") == 3, "steps 2, 4 and 5"

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("loss", "learning_rate", "grad_norm", "images_per_s", "memory_peak_gib", "forward_s"):
        assert f"train/{name}" in scalars
        assert np.isfinite([event.value for event in events.Scalars(f"train/{name}")]).all()
    pictures = events.Images("features")
    assert [picture.step for picture in pictures] == [2, 4]
    size = (pictures[0].width, pictures[0].height)
    assert size == (3 * 24, 8 * 24), "eight rows: image, teacher and student side by side"

    traces = sorted((run / "profile").glob("rank_*.pt.trace.json"))
    assert [trace.name[:6] for trace in traces] == ["rank_0", "rank_1"]
    names = [event.get("name") for event in json.loads(traces[0].read_text())["traceEvents"]]
    for phase in ("data", "agree", "forward", "backward", "optimizer"):
        assert names.count(phase) == 3, "of three steps"


@pytest.mark.slow
def test_triton_kernels_under_zero3(recipe_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Partitioned, recomputed, on two ranks: the same losses and gradients as with plain PyTorch."""
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    values = recipe_values(train__ds_config="zero3", train__activation_checkpointing="block")
    values["train"] |= {"global_batch": 4, "micro_batch": 2, "steps": 2}
    values["model"]["overrides"] |= {"embed_dim": 32, "depths": [2, 1]}
    found = {}
    for name, interpreted in (("reference", "0"), ("kernels", "1")):
        values["run_dir"] = str(tmp_path / name)
        said = torchrun_distill(values, TRITON_INTERPRET=interpreted)
        assert f"window_attention runs the {'Triton kernel' if interpreted == '1' else 'PyTorch'}" in said
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps = [line for line in map(json.loads, lines) if line["kind"] == "train"]
        found[name] = np.array([[line["loss"], line["grad_norm"]] for line in steps])
    assert found["reference"].shape == (2, 2)
    # fp32 sums in another order, one step of AdamW between the lines.
    np.testing.assert_allclose(found["kernels"], found["reference"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "every", "sentence"),
    [
        ("train", 8, "samples cannot be decoded, allowed are 1.00%"),
        ("evaluation", 48, "00.png cannot be decoded: "),
    ],
)
def test_what_cannot_be_decoded_ends_all_ranks_with_one_sentence(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path, images: str, every: int, sentence: str
) -> None:
    folder = tmp_path / "images/class"
    folder.mkdir(parents=True)
    for index in range(48):
        Image.new("RGB", (24, 24), (index, 0, 0)).save(folder / f"{index:02}.png")
    for index in range(0, 48, every):
        (folder / f"{index:02}.png").write_bytes(b"")
    values = recipe_values(**{f"data__{images}": f"imagefolder:{tmp_path}/images"}, train__steps=4)
    said = torchrun_distill(values, code=1)  # torchrun's, whatever the ranks' own
    assert said.count(sentence) == 1
    assert "[rank" not in said, "no rank has a traceback"
    assert said.count("exitcode  : 2") == 2


def test_a_rank_that_ends_by_a_common_error_keeps_its_exit_code() -> None:
    """Torchrun signals it as soon as it has seen another rank end, which on a busy machine is too early."""
    program = """
import atexit, time
from fd_scale import cli
from fd_scale.errors import CommonError
def run(options):
    raise CommonError("all ranks")
def parsed(arguments):
    return type("Options", (), {"run": staticmethod(run)})
def end():
    print("ending", flush=True)
    time.sleep(2)
atexit.register(end)
cli.parsed = parsed
cli.main([])
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"},
        stdout=subprocess.PIPE,
    ) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == b"ending\n"
        rank.terminate()
    assert rank.returncode == 2


@pytest.mark.slow
def test_a_signal_to_the_whole_group_stops_the_run_and_not_its_workers(
    recipe_values: Callable[..., dict[str, Any]],
) -> None:
    """As `timeout` and shells send it."""
    values = recipe_values(data__num_workers=1, train__steps=100_000, checkpoint__save_every_steps=100_000)
    run = Path(values["run_dir"])
    with subprocess.Popen(
        [sys.executable, "-m", "fd_scale", "distill", written(values)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as started:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(started.pid, signal.SIGTERM)
        _, said = started.communicate(timeout=60)
    assert started.returncode == PREEMPTED, said
    assert "the same command resumes" in said
    assert list((run / "checkpoints").glob("step_*"))
