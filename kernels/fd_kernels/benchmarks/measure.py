"""Measures variants on a GPU: results against the reference first, then memory, then time."""

import gc
import logging
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fd_kernels.benchmarks.peers import Variant, reference, variants
from fd_kernels.benchmarks.records import PASSES, Environment, Record, Records, source_digest
from fd_kernels.benchmarks.roofline import EXP_PER_CLOCK, Rates
from fd_kernels.benchmarks.shapes import DTYPE, Inputs, Shape, make_inputs

logger = logging.getLogger(__name__)

BOUND = 0.05
"""Largest relative error. On a CPU, bf16 eager has 0.01 at stage 3 of SwinV2-B; a wrong mask or tile is of order 1."""
COMPILE_S = 60.0
"""Time that a variant under torch.compile may need: it is not started later than that before the end."""
REPEATS = (20, 200)
MEASURED_S = 0.5
MIB = 2**20
# What a variant that does not work raises, in torch, its compiler or Triton.
FAILURES = (
    RuntimeError, ValueError, TypeError, AssertionError, ImportError, LookupError, AttributeError, OSError,
    subprocess.SubprocessError, triton.TritonError,
)  # fmt: skip


class DeviceLostError(RuntimeError):
    """The process cannot use its device any more."""


class Gpu:
    """The current CUDA device, its clock and its allocator. Tests put a CPU in its place."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = self.properties.L2_cache_size

    def mark(self) -> Any:
        """A point in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, start: Any, end: Any) -> float:
        """Between two points that have been reached."""
        return float(1e3 * start.elapsed_time(end))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def keep_busy(self, seconds: float) -> None:
        """Lets the stream wait, so that what follows is launched before its turn: no gaps between kernels."""
        torch.cuda._sleep(int(2e9 * seconds))  # cycles: no clock runs faster

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Most bytes allocated since the last call."""
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def clear(self) -> None:
        """Forgets what the last variant left: compiled graphs, garbage, cached blocks."""
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()

    def environment(self) -> Environment:
        """Measures the rates of the device too, in a second."""
        smi = _first_line(
            "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader,nounits"
        )
        found = re.fullmatch(r"(\S+), (\d+)", smi or "")
        driver, clock_mhz = found.groups() if found else (None, None)
        exps_a_cycle = EXP_PER_CLOCK * self.properties.multi_processor_count
        return Environment(
            gpu=self.properties.name, driver=driver, torch=torch.__version__, triton=triton.__version__,
            commit=_first_line(
                "git", "-C", str(Path(__file__).parent),
                "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*",
            ),
            source=source_digest("**/*.py"), peer_source=source_digest("benchmarks/*.py", "**/reference.py"),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            rates=Rates(
                copy=self._copy_rate(), matmul=self._matmul_rate(),
                exp=exps_a_cycle * float(clock_mhz) * 1e6 if clock_mhz else None,
            ),
        )  # fmt: skip

    def _copy_rate(self, num_bytes: int = 2**30) -> float:
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._seconds(lambda: target.copy_(source))

    def _matmul_rate(self, side: int = 8192) -> float:
        a, b = torch.randn(2, side, side, device=self.device, dtype=torch.bfloat16)
        return 2 * side**3 / self._seconds(lambda: a @ b)

    def _seconds(self, work: Callable[[], Tensor]) -> float:
        marks = [self.mark()]
        for _ in range(REPEATS[0]):
            work()
            marks.append(self.mark())
        self.synchronize()
        return 1e-6 * statistics.median(self.microseconds(*pair) for pair in pairwise(marks))


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def run(
    shapes: Sequence[Shape], records: Records, gpu: Gpu, environment: Environment, *, match: str, end: float
) -> int:
    """Measures what has no record of this code yet, and writes each record at once.

    Args:
        shapes: in their order.
        records: read and added to.
        gpu: the device.
        environment: of the new records.
        match: regular expression on "shape pass variant".
        end: `time.monotonic()` after which nothing new is started.

    Returns:
        How many records are left for a next call.

    Raises:
        DeviceLostError: a variant broke the device; its record says so, and a next call goes on after it.
    """
    left = 0
    for shape in shapes:
        bench = _Bench(shape, gpu)
        for name, variant in variants(shape, gpu.device).items():
            keys = [(shape.name, pass_name, name) for pass_name in PASSES]
            keys = [key for key in keys if re.search(match, " ".join(key))]
            keys = [key for key in keys if not records.has(key, environment)]
            if not keys:
                continue
            if time.monotonic() + (COMPILE_S if variant.compiled else 0) > end:
                left += len(keys)
                continue
            try:
                measured = bench.measure(variant)
            except FAILURES as error:
                measured = {each: {"error": _one_line(error)} for each in PASSES}
            for _, pass_name, _ in keys:
                records.add(
                    Record(
                        shape=shape.name, pass_name=pass_name, variant=name, dtype=str(DTYPE).removeprefix("torch."),
                        environment=environment, **measured[pass_name],
                    )
                )  # fmt: skip
            logger.info("%s %s: %s", shape.name, name, measured["both"].get("error") or "measured")
            try:
                gpu.synchronize()
            except RuntimeError as error:  # an illegal access: whatever comes after it fails too
                raise DeviceLostError(f"{shape.name} {name} broke the device: {_one_line(error)}") from error
            gpu.clear()
    return left


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class _Bench:
    """The inputs of a shape and what should come out, made when they are first needed."""

    def __init__(self, shape: Shape, gpu: Gpu) -> None:
        self.shape = shape
        self.gpu = gpu
        self.sets: list[Inputs] = []
        self.exact: list[Tensor] = []

    def measure(self, variant: Variant) -> dict[str, dict[str, Any]]:
        """Fields of the record of each pass.

        Raises:
            ValueError: the results are too far from the reference's.
            RuntimeError, ...: what the variant raises.
        """
        gpu = self.gpu
        if not self.exact:
            self._prepare()
        function = torch.compile(variant.function, dynamic=False) if variant.compiled else variant.function
        gpu.synchronize()
        began = time.perf_counter()
        results = _results(function, self.sets[0])
        gpu.synchronize()
        common = {"compile_s": time.perf_counter() - began}
        if variant.checked:
            errors = list(map(_relative_error, results, self.exact))
            common["relative_error"] = max(errors)
            if not all(error <= BOUND for error in errors):  # also where one is NaN
                found = ", ".join(f"{error:.3g}" for error in errors)
                raise ValueError(f"relative errors of output and gradients {found}; expected {BOUND} at most")
        del results
        memory = self._memory(function)
        times = self._times(function)
        return {pass_name: common | memory[pass_name] | _statistics(times[pass_name]) for pass_name in PASSES}

    def _prepare(self) -> None:
        first = make_inputs(self.shape, self.gpu.device, seed=0)
        # Each call finds inputs that the last ones have pushed out of the L2 cache.
        num_sets = 2 + 2 * self.gpu.l2_bytes // first.num_bytes
        self.sets = [first, *(make_inputs(self.shape, self.gpu.device, seed) for seed in range(1, num_sets))]
        self.exact = _exact_results(self.shape, first)

    def _memory(self, function: Callable[..., Tensor]) -> dict[str, dict[str, float]]:
        gpu, inputs = self.gpu, self.sets[0]
        before = gpu.allocated()
        gpu.peak()
        out = function(*inputs.tensors)
        kept = gpu.allocated() - before
        forward = gpu.peak() - before
        gradients = torch.autograd.grad(out, inputs.leaves, inputs.upstream)
        backward = gpu.peak() - before
        del gradients
        peaks = {"forward": forward, "backward": backward, "both": max(forward, backward)}
        return {name: {"peak_mib": peak / MIB, "kept_mib": kept / MIB} for name, peak in peaks.items()}

    def _times(self, function: Callable[..., Tensor]) -> dict[str, list[float]]:
        """Microseconds of each pass of each repeat: the three come from the same runs."""
        gpu = self.gpu
        lead = 0.0
        marks: list[tuple[Any, Any, Any]] = []

        def once(inputs: Inputs) -> None:
            gpu.keep_busy(lead)
            start = gpu.mark()
            out = function(*inputs.tensors)
            middle = gpu.mark()
            torch.autograd.grad(out, inputs.leaves, inputs.upstream)
            marks.append((start, middle, gpu.mark()))

        once(self.sets[-1])
        gpu.synchronize()
        began = time.perf_counter()
        once(self.sets[0])
        lead = 2 * (time.perf_counter() - began)
        gpu.synchronize()
        seconds = lead + 1e-6 * gpu.microseconds(marks[-1][0], marks[-1][2])
        repeats = int(min(max(MEASURED_S / seconds, REPEATS[0]), REPEATS[1]))
        marks.clear()
        for repeat in range(repeats):
            once(self.sets[(repeat + 1) % len(self.sets)])
        gpu.synchronize()
        return {
            "forward": [gpu.microseconds(start, middle) for start, middle, _ in marks],
            "backward": [gpu.microseconds(middle, end) for _, middle, end in marks],
            "both": [gpu.microseconds(start, end) for start, _, end in marks],
        }


def _statistics(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {
        "median_us": statistics.median(times), "p10_us": deciles[0], "p90_us": deciles[-1], "repeats": len(times),
    }  # fmt: skip


def _results(function: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """The output and the gradient of each leaf."""
    out = function(*inputs.tensors)
    return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.upstream)]


def _exact_results(shape: Shape, inputs: Inputs, images: int = 4) -> list[Tensor]:
    """As `_results`, of the reference in fp32, a few images at a time: eager attention of all would not fit."""
    chunks = []
    for start in range(0, shape.images, images):
        chunks.append(_results(reference(shape), inputs.images(start, start + images)))
    batched = sum(tensor.requires_grad for tensor in inputs.batched)
    exact = []
    for place, parts in enumerate(zip(*chunks, strict=True)):
        joined = parts[0].dim() > 0 and place <= batched
        exact.append(torch.cat(parts) if joined else torch.stack(parts).sum(0))
    return exact


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())
