"""Compiles the Triton kernels ahead of time, with no GPU, and reports what the machine code uses.

`python -m fd_kernels.aot` (or `make aot`) compiles the configurations that the kernel modules declare. It fails
where a 16-bit kernel spills registers or needs a stack, or where its matrix products miss the tensor cores.
"""

import argparse
import importlib
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

logger = logging.getLogger(__name__)

ARCHITECTURES = {80: "A100", 90: "H100, H200", 100: "B200"}
KERNEL_MODULES = ("fd_kernels.feature_loss.launch", "fd_kernels.window_attention.launch")
"""Modules with a function `aot_configurations(architecture: int) -> Iterator[Configuration]`, 90 for sm_90."""

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = 163 * 1024
"""What a program may have on the smallest of these GPUs, an A100; tiles are the same on all."""
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
SPILL = re.compile(r"\b(?:STL|LDL)\b")  # stores to and loads from a thread's local memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """One kernel as one call would compile it."""

    name: str
    kernel: Any
    """The function under `triton.jit`."""
    dtype: torch.dtype
    """Of the features; 16-bit ones are held to the rules."""
    signature: dict[str, str]
    """Triton's type of each argument that is not a constant: "*bf16", "i32", "fp32"."""
    constants: dict[str, Any]
    """Arguments fixed at compile time, and pointers that are None."""
    divisible_by_16: frozenset[str] = frozenset()
    """Integer arguments that are multiples of 16 in the calls meant; pointers are always taken as aligned."""
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    """Registers of a thread at most."""
    may_spill: bool = False
    """Whether it measured faster with what it spills than without."""
    uses_dot: bool = False
    """Whether the kernel multiplies matrices, in the dtype of the features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What the machine code of one configuration uses."""

    registers: int
    spills: int
    """Instructions that store to or load from local memory."""
    stack_bytes: int
    shared_bytes: int
    tensor_core: str
    """Name of the tensor-core instruction, or nothing."""


def triton_dtype(dtype: torch.dtype) -> str:
    """Triton's name of a floating point dtype: "bf16", "fp16" or "fp32"."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def configurations(architecture: int) -> Iterator[Configuration]:
    """All configurations that the kernel modules declare for an architecture, as 90 for sm_90."""
    for module in KERNEL_MODULES:
        yield from importlib.import_module(module).aot_configurations(architecture)


def compile_kernel(configuration: Configuration, architecture: int) -> Resources:
    """Compile for an architecture, as 90 for sm_90, and read the resources from the machine code."""
    signature, attributes = {}, {}
    for place, name in enumerate(configuration.kernel.arg_names):
        signature[name] = "constexpr" if name in configuration.constants else configuration.signature[name]
        if signature[name].startswith("*") or name in configuration.divisible_by_16:
            attributes[place,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(configuration.kernel, signature, configuration.constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": configuration.num_warps,
            "num_stages": configuration.num_stages,
            "maxnreg": configuration.maxnreg,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    counts = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    found = TENSOR_CORE.search(code)
    return Resources(
        registers=counts["REG"],
        spills=len(SPILL.findall(code)),
        stack_bytes=counts["STACK"],
        shared_bytes=compiled.metadata.shared,
        tensor_core=found[1] if found else "",
    )


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, option, path], check=True, capture_output=True, text=True).stdout


def faults(configuration: Configuration, resources: Resources) -> list[str]:
    """What must not be: too much shared memory; in a 16-bit kernel spills, a stack, products outside tensor cores.

    Spills are allowed where the kernel's table of tiles says that they measured faster.
    """
    found = []
    if resources.shared_bytes > SHARED_BYTES:
        found.append(f"{resources.shared_bytes} bytes of shared memory")
    if configuration.dtype not in (torch.bfloat16, torch.float16):
        return found
    if resources.spills and not configuration.may_spill:
        found.append(f"{resources.spills} spill instructions")
    if resources.stack_bytes and not configuration.may_spill:
        found.append(f"{resources.stack_bytes} bytes of stack")
    if configuration.uses_dot and not resources.tensor_core:
        found.append("no tensor-core instruction")
    return found


HEADER = (
    "| kernel | dtype | GPU | warps | registers | spills | stack, B | shared, B | tensor core |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def table_row(configuration: Configuration, architecture: int, resources: Resources) -> str:
    """One line of the Markdown table."""
    cells = (
        configuration.name,
        triton_dtype(configuration.dtype),
        f"sm_{architecture}",
        configuration.num_warps,
        resources.registers,
        resources.spills,
        resources.stack_bytes,
        resources.shared_bytes,
        resources.tensor_core or "-",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, and return 1 where a kernel breaks the rules, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fd_kernels.aot", description="Compile the Triton kernels."
    )
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES])
    parser.add_argument("--match", default="", help="regular expression on name and dtype, as 'D=1024 bf16'")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1, which turns kernels into Python; expected it to be unset")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    rows, broken = [], 0
    sys.stdout.write(HEADER)
    for architecture in options.arch:
        for configuration in configurations(architecture):
            if not re.search(options.match, f"{configuration.name} {triton_dtype(configuration.dtype)}"):
                continue
            resources = compile_kernel(configuration, architecture)
            rows.append(table_row(configuration, architecture, resources))
            sys.stdout.write(rows[-1])
            sys.stdout.flush()
            if found := faults(configuration, resources):
                broken += 1
                logger.error("%s, sm_%d: %s", configuration.name, architecture, ", ".join(found))
    if not rows:
        example = next(configurations(options.arch[0])).name
        parser.error(f"--match {options.match!r} fits no kernel; an example is {example!r}")
    if options.out:
        command = shlex.join(
            ["python", "-m", "fd_kernels.aot", *(sys.argv[1:] if arguments is None else arguments)]
        )
        versions = f"triton {triton.__version__}, torch {torch.__version__}"
        options.out.write_text(
            f"# Resources of the kernels\n\n`{command}`, {versions}.\n\n{HEADER}{''.join(rows)}"
        )
    logger.info("%d kernels compiled, %d break the rules", len(rows), broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
