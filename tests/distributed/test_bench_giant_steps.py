"""Cells of `bench giant` at toy size, on the CPU."""

from pathlib import Path

import bench_cases
import pytest
import torch
from ranks import run_ranks

from fd_scale.benchmarks.cells import Cell
from fd_scale.benchmarks.giant import bench_giant
from fd_scale.benchmarks.peers import twin
from fd_scale.benchmarks.records import Records
from fd_scale.config import ModelConfig
from fd_scale.models import build_model

pytestmark = pytest.mark.slow

SHAPE = {"patch_size": 4, "embed_dim": 32, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
TOY = tuple(
    f"{place}.{setting}"
    for place in ("model", "distill.teachers.0.model")
    for setting in (
        "name=swin_v2_tiny",
        "img_size=24",
        *(f"overrides.{name}={value}" for name, value in SHAPE.items()),
    )
)


def toy(way: str, *settings: str) -> Cell:
    return Cell(model="B", policy="block", micro_batch=2, way=way, settings=(*TOY, *settings))


def test_a_cell_of_each_kind_takes_steps(tmp_path: Path) -> None:
    broken = toy("zero0", "distill.teachers.0.model.weights=/nowhere")
    given = [toy("zero3-reference"), broken, toy("timm-compiled"), toy("fsdp2-compiled"), toy("zero1")]
    [found] = run_ranks(bench_cases.cells, 1, str(tmp_path), given)
    ours, failed, timm, fsdp, zero1 = found
    assert failed["error"].startswith("UserError:"), failed
    for cell in (ours, timm, fsdp, zero1):
        assert "error" not in cell, cell
        assert 0 < cell["p10_ms"] <= cell["median_ms"] <= cell["p90_ms"]
        assert cell["images_per_s"] == pytest.approx(2e3 / cell["median_ms"])
    for cell in (ours, zero1):
        spent = sum(cell["phases_s"][name] for name in ("forward", "backward", "optimizer"))
        assert 0 < spent < 1.5e-3 * cell["p90_ms"], "seconds of one step"
    assert [cell["compiled"] for cell in found] == [0, 0, 2, 3, 0], "timm: student and teacher; FSDP2: blocks"


def test_timm_twin_has_as_many_parameters() -> None:
    config = ModelConfig(name="swin_v2_tiny", img_size=24, overrides=SHAPE | {"shared_bias": False})
    with torch.device("meta"):
        ours = build_model(config)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, twin(config))]
    assert counts[0] == counts[1]


def test_a_process_for_a_cell(tmp_path: Path) -> None:
    bench_giant(tmp_path, device="cpu", cells=[toy("zero3")])
    records = Records.newest(tmp_path)
    assert records is not None
    assert records.by_cell["B block 2 zero3"].error is None


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["zero3", "zero1", "zero3-reference", "timm"])
def test_cells_on_a_gpu(tmp_path: Path, way: str) -> None:
    served = ["train.kernels=triton"] if way in ("zero3", "zero1") else []
    bench_giant(tmp_path, cells=[toy(way, *served)])
    records = Records.newest(tmp_path)
    assert records is not None
    [record] = records.by_cell.values()
    assert record.error is None
    assert record.peak_gib is not None
    assert 0 < record.peak_gib <= (record.reserved_gib or 0)
