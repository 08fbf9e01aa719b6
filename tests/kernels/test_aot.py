"""Ahead-of-time compilation: real machine code without a GPU, and the rules that it is held to."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")

import triton
import triton.language as tl
from fd_kernels.aot import Configuration, Resources, compile_kernel, configurations, faults, triton_dtype


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee")
    tl.store(out_ptr + at, product)


def matmul(dtype: torch.dtype) -> Configuration:
    side = f"*{triton_dtype(dtype)}"
    return Configuration(
        name="matmul", kernel=matmul_kernel, dtype=dtype, uses_dot=True, constants={"N": 64},
        signature={"a_ptr": side, "b_ptr": side, "out_ptr": "*fp32"},
    )  # fmt: skip


def run_aot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fd_kernels.aot", *arguments],
        env=kept | environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_feature_loss_compiles_within_registers(tmp_path: Path) -> None:
    out = tmp_path / "resources.md"
    # A cache of its own: what is read is what this triton compiles now.
    result = run_aot(
        "--arch", "90", "--match", "^feature_loss .* D=(768|1024|1536|2048|4096) bf16", "--out", str(out),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| feature_loss (\w+) D=(\d+) \| bf16 \| sm_90 \| .*$", result.stdout, re.MULTILINE)
    widths = ("768", "1024", "1536", "2048", "4096")
    assert rows == [(way, width) for width in widths for way in ("forward", "backward")]
    for row in result.stdout.splitlines()[2:]:
        registers, spills, stack = (int(cell) for cell in row.split("|")[5:8])
        assert 16 <= registers <= 128  # 128: four programs of four warps stay on a multiprocessor
        assert (spills, stack) == (0, 0)
        assert row in out.read_text()


@pytest.mark.slow
def test_window_attention_compiles_as_declared(tmp_path: Path) -> None:
    """The windows and tokens of the packaged recipes, a padded and a large window, in bf16; spills where allowed."""
    windows = "window_attention .* ((12x12|14x14) d32|(7x7|8x8|12x12|14x14|40x40) d32 shifted( padded)?)"
    result = run_aot(
        "--arch", "90", "--match", f"({windows}|biased_attention .* (197|257|577) d64) bf16",
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = re.findall(
        r"^\| \w+_attention (\w+) (\d+)[x ].* \| bf16 \| sm_90 \| .*$", result.stdout, re.MULTILINE
    )
    assert {kernel for kernel, _ in rows} == {"forward", "window", "queries", "keys", "bias"}
    assert {side for _, side in rows} == {"7", "8", "12", "14", "40", "197", "257", "577"}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTC.*MMA")])
def test_tensor_cores_are_found(
    architecture: int, instruction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    resources = compile_kernel(matmul(torch.bfloat16), architecture)
    assert re.fullmatch(instruction, resources.tensor_core)
    assert faults(matmul(torch.bfloat16), resources) == []
    # In fp32 at full precision there is no such instruction: the same code in 16 bits would be a fault.
    resources = compile_kernel(matmul(torch.float32), architecture)
    assert resources.tensor_core == ""
    assert "no tensor-core instruction" in faults(matmul(torch.bfloat16), resources)


@pytest.mark.slow
def test_spills_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wide = next(c for c in configurations(90) if c.name == "feature_loss backward D=8192")
    resources = compile_kernel(dataclasses.replace(wide, num_warps=1), 90)  # 256 channels a thread
    assert resources.spills > 0
    assert resources.stack_bytes > 0
    assert len(faults(wide, resources)) == 2


@pytest.mark.slow
def test_wrong_calls_are_named() -> None:
    result = run_aot("--match", "no such kernel")
    assert result.returncode == 2
    assert "fits no kernel; an example is 'feature_loss" in result.stderr
    result = run_aot(TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "expected it to be unset" in result.stderr


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_argument_of_a_kernel_is_declared(architecture: int) -> None:
    for configuration in configurations(architecture):
        declared = [*configuration.signature, *configuration.constants]
        assert sorted(declared) == sorted(configuration.kernel.arg_names), configuration.name
        assert configuration.divisible_by_16 <= {*configuration.signature}, configuration.name


@pytest.mark.parametrize(
    ("changes", "uses_dot", "expected"),
    [
        ({}, False, []),
        ({"spills": 3}, False, ["3 spill instructions"]),
        ({"stack_bytes": 8}, False, ["8 bytes of stack"]),
        ({}, True, ["no tensor-core instruction"]),
        ({"tensor_core": "HGMMA"}, True, []),
        ({"shared_bytes": 163 * 1024}, False, []),
    ],
)
def test_faults(changes: dict[str, int], uses_dot: bool, expected: list[str]) -> None:
    resources = Resources(
        **{"registers": 64, "spills": 0, "stack_bytes": 0, "shared_bytes": 0, "tensor_core": "", **changes}
    )

    def configuration(dtype: torch.dtype) -> Configuration:
        return Configuration(
            name="kernel", kernel=None, dtype=dtype, signature={}, constants={}, uses_dot=uses_dot
        )

    assert faults(configuration(torch.bfloat16), resources) == expected
    assert faults(configuration(torch.float16), resources) == expected
    assert faults(configuration(torch.float32), resources) == []
    allowed = dataclasses.replace(configuration(torch.bfloat16), may_spill=True)
    assert faults(allowed, resources) == [fault for fault in expected if "tensor-core" in fault]


def test_shared_memory_is_limited_in_every_dtype() -> None:
    resources = Resources(registers=64, spills=0, stack_bytes=0, shared_bytes=166_913, tensor_core="")
    for dtype in (torch.bfloat16, torch.float32):
        configuration = Configuration(name="kernel", kernel=None, dtype=dtype, signature={}, constants={})
        assert faults(configuration, resources) == ["166913 bytes of shared memory"]
