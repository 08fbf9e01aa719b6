"""Where ranks hold a parameter, and a consolidation that holds no more than a tensor."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fd_scale.shards import Shards, layout, write_safetensors

SHAPES = {"a": torch.Size([5, 3]), "b": torch.Size([]), "c": torch.Size([7]), "d": torch.Size([2, 2])}
RANKS = 3
MIB = 2**20

# One tensor of each checkpoint is 8 MiB; the small one is there to load libraries.
MEASURE = """
import sys
from pathlib import Path
from fd_scale.shards import Shards, write_safetensors

def resident(key):
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024

for folder in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    shards = Shards(Path(folder))
    write_safetensors(Path(folder) / "model.safetensors", shards, {name: name for name in shards.shapes})
    grown = resident("VmHWM") - before
print(grown)
"""


def save(folder: Path, tensors: dict[str, Tensor], stage: int, world_size: int) -> None:
    """Writes tensors as the ranks of DeepSpeed would, by its rules and not by `layout`."""
    folder.mkdir()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    flat = [tensor.reshape(-1) for tensor in tensors.values()]
    if stage == 3:
        cut = [
            torch.nn.functional.pad(part, (0, -part.numel() % world_size)).chunk(world_size) for part in flat
        ]
        parts = [torch.cat([of_parameter[rank] for of_parameter in cut]) for rank in range(world_size)]
    else:
        row = torch.cat(flat)
        parts = list(torch.nn.functional.pad(row, (0, -row.numel() % (2 * world_size))).chunk(world_size))
    model = {
        "ds_config": {}, "buffer_names": ["steps"], "module": {"steps": torch.tensor(3)}, "param_shapes": [shapes],
        "frozen_param_shapes": {}, "shared_params": {"e": "a"} if "a" in shapes else {},
    }  # fmt: skip
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank, part in enumerate(parts):
        base = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
        state = {"zero_stage": stage, key: [part], base: {"state": {0: {"exp_avg": part}}}}
        torch.save(
            {"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    torch.save(model, folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("world_size", [1, 2, RANKS, 8])
@pytest.mark.parametrize("stage", [2, 3])
def test_every_element_is_where_deepspeed_put_it(tmp_path: Path, stage: int, world_size: int) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save(tmp_path / "saved", tensors, stage, world_size)
    shards = Shards(tmp_path / "saved")
    assert shards.world_size == world_size
    expected = tensors | {"e": tensors["a"], "steps": torch.tensor(3)}
    assert shards.shapes.keys() == expected.keys()
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in expected.items())
    assert shards.read("steps").dtype == torch.int64
    assert torch.equal(torch.cat(list(shards.chunks("a", start=4, end=11))), tensors["a"].view(-1)[4:11])
    write_safetensors(tmp_path / "model.safetensors", shards, {f"x.{name}": name for name in expected})
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == {f"x.{name}" for name in expected}
    assert all(torch.equal(written[f"x.{name}"], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_part_of_other_ranks_is_what_they_would_hold(tmp_path: Path, stage: int) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save(tmp_path / "two", tensors, stage, 2)
    save(tmp_path / "three", tensors, stage, RANKS)
    two, three = Shards(tmp_path / "two"), Shards(tmp_path / "three")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank in range(RANKS):
        expected = three.optimizer_states(rank)[key][0]
        found = torch.zeros_like(expected)
        two.fill_part(found, rank, 0, layout({0: SHAPES}, RANKS, stage), "fp32")
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_consolidation_holds_less_than_two_tensors(tmp_path: Path, world_size: int) -> None:
    for name, num_tensors, numel in (("small", 2, 1000), ("large", 24, 2 * MIB)):
        tensors = {f"w{index}": torch.full((numel,), float(index)) for index in range(num_tensors)}
        save(tmp_path / name, tensors, 3, world_size)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    written = load_file(tmp_path / "large" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    # The whole is 192 MiB, a tensor 8 MiB.
    assert int(done.stdout) < 2 * 8 * MIB, f"{int(done.stdout) / MIB:.1f} MiB"
