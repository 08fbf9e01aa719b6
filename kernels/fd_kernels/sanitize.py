"""Runs small calls of all ops under NVIDIA's compute-sanitizer: reads and writes out of bounds, and races.

`python -m fd_kernels.sanitize` fails where a tool finds something; where the sanitizer is not installed it says so.
"""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fd_kernels import biased_attention, whitened_smooth_l1, window_attention
from fd_kernels.dispatch import implementation

logger = logging.getLogger(__name__)

TOOLS = ("memcheck", "racecheck")
TIMEOUT_S = 75  # for each tool: with the tests before it, `make gpu-check` stays within 4 minutes


def run_calls(device: torch.device) -> None:
    """Forward and backward of each op: several tiles, shifted and padded windows, a table of biases, odd widths."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        # Drawn on the CPU: the sanitizer should see our kernels, and few others.
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
    for grid, window, table in ((16, 8, False), (24, 12, False), (15, 8, False), (20, 10, True)):
        positions = ((2 * window - 1) ** 2,) if table else (window**2,) * 2
        attention = partial(
            window_attention, window_size=(window, window), shift_size=(window // 2, window // 2)
        )
        if grid % window:
            attention = partial(attention, pad_qkv_E=normal(3 * 64))
        bias, scale_h = normal(2, *positions, dtype=torch.float32), normal(2, dtype=torch.float32)
        calls.append((attention, [normal(2, grid, grid, 3 * 64), bias, scale_h]))
    calls.append((biased_attention, [normal(2, 50, 3 * 128), normal(2, 50, 50, dtype=torch.float32)]))
    for width in (100, 1024):
        calls.append((whitened_smooth_l1, [normal(2, 9, width), normal(2, 9, width).detach()]))

    for function, tensors in calls:
        out = function(*tensors)
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        torch.autograd.grad(out, leaves, torch.ones_like(out))


def _sanitizer() -> str | None:
    """The executable: on PATH, or in the toolkit at CUDA_HOME."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)


def _run_under(sanitizer: str, tool: str) -> str | None:
    """What is wrong, or None."""
    options = ["--tool", tool, "--error-exitcode", "9"]
    process = subprocess.Popen(
        [sanitizer, *options, sys.executable, "-m", "fd_kernels.sanitize", "--calls"],
        # Tensors side by side in one cached block would hide what runs over the end of one.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        start_new_session=True,
    )
    try:
        code = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the sanitizer and what it runs
        process.wait()
        return f"not done after {TIMEOUT_S} s"
    return f"exit code {code}, its words are above" if code else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command: 0, 1 where a tool finds something, 2 where there is no CUDA device for the calls."""
    parser = argparse.ArgumentParser(
        prog="python -m fd_kernels.sanitize", description="Run the ops under compute-sanitizer."
    )
    parser.add_argument(
        "--calls", action="store_true", help="only the calls themselves, without the sanitizer"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.calls:
        if not torch.cuda.is_available():
            logger.error("--calls needs a CUDA device, and torch sees none")
            return 2
        with implementation("triton"):
            run_calls(torch.device("cuda"))
        torch.cuda.synchronize()
        return 0
    sanitizer = _sanitizer()
    if sanitizer is None:
        logger.warning(
            "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin: races and bounds not checked"
        )
        return 0
    found = {tool: _run_under(sanitizer, tool) for tool in TOOLS}
    for tool, fault in found.items():
        logger.info("compute-sanitizer %s: %s", tool, fault or "nothing found")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
