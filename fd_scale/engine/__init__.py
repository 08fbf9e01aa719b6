"""What DeepSpeed does for a run. Only this room imports it."""

import os

import torch

from fd_scale import log

log.quiet_libraries()
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would choose, without its warning

import deepspeed.ops  # noqa: E402

# DeepSpeed would compile a shared-memory all-reduce for the CPU at first use (70 s) that leaves
# files in /dev/shm when a rank is killed; gloo gives the same sums.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from fd_scale.engine.engine import Engine, saved_weights  # noqa: E402
from fd_scale.engine.in_parts import Partition  # noqa: E402

__all__ = ["Engine", "Partition", "saved_weights"]
