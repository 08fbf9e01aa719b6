"""GPUs by their datasheets, and what model FLOPs utilisation (MFU) means here.

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from fd_scale.errors import UserError

GPUS_PER_NODE = 8
"""GPUs that NVLink joins, as in NVIDIA's DGX machines, with a network card for each."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and the links of the machine that it is usually sold in."""

    name: str
    memory: int
    """Bytes that a program can take."""
    peak_flops: float
    """Dense bf16 FLOP/s on tensor cores."""
    nvlink: float
    """Bytes/s to the other GPUs of its node, one direction."""
    infiniband: float
    """Bytes/s to other nodes, its own share, one direction."""


def _gpu(name: str, memory_gib: int, peak_flops: float, nvlink: float, infiniband: float) -> Gpu:
    # A program gets about 1 GiB less than is on the board: the driver, and the CUDA context of each process.
    memory = (memory_gib - 1) * 2**30
    return Gpu(name=name, memory=memory, peak_flops=peak_flops, nvlink=nvlink, infiniband=infiniband)


# Sources, SXM boards, dense rates (datasheets print twice as much "with sparsity"):
#   A100: NVIDIA A100 Tensor Core GPU datasheet: 312 TFLOPS bf16, NVLink 600 GB/s both directions together.
#   H100: NVIDIA H100 Tensor Core GPU datasheet: 989 TFLOPS bf16, NVLink 900 GB/s both directions together.
#   H200: NVIDIA H200 Tensor Core GPU datasheet: 989 TFLOPS bf16, NVLink 900 GB/s, 141 GB.
#   InfiniBand: DGX A100 datasheet, 8 x 200 Gb/s; DGX H100 and H200 datasheets, 8 x 400 Gb/s; one card a GPU.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", 40, 312e12, 300e9, 25e9),
        _gpu("a100-80g", 80, 312e12, 300e9, 25e9),
        _gpu("h100", 80, 989e12, 450e9, 50e9),
        _gpu("h200", 140, 989e12, 450e9, 50e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """Returns a GPU by its name.

    Raises:
        UserError: it is not in the table.
    """
    if name not in GPUS:
        kinds = [known for known in GPUS if known.split("-")[0] == name.lower()]  # of several sizes of memory
        nearest = kinds or difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0)
        raise UserError(
            f"--gpu: got {name}, expected one of {', '.join(GPUS)}; did you mean {' or '.join(nearest)}"
        )
    return GPUS[name]


def named_like(device_name: str) -> list[Gpu]:
    """Returns the GPUs of the table that a device's own name ("NVIDIA H100 80GB HBM3") may mean."""
    return [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in device_name.lower()]


def model_flops(student_forward: float, teacher_forward: float) -> float:
    """Returns the FLOPs that training needs: the student's forward pass three times, the teacher's once.

    A backward pass counts as two forward passes; what is recomputed to save memory does not count.

    Args:
        student_forward: FLOPs of a forward pass of the trained module.
        teacher_forward: FLOPs of a forward pass of all teachers.

    Source: Chowdhery et al. 2022 (arXiv:2204.02311), appendix B.
    """
    return 3 * student_forward + teacher_forward


def mfu(flops: float, seconds: float, num_gpus: int, peak_flops: float) -> float:
    """Returns the model FLOPs utilisation: the share of the GPUs' peak that `model_flops` took, in 0..1.

    Args:
        flops: `model_flops` of what was computed in the time.
        seconds: the time.
        num_gpus: GPUs that computed it.
        peak_flops: dense bf16 FLOP/s of one of them, as its datasheet says.
    """
    return flops / (seconds * num_gpus * peak_flops)
