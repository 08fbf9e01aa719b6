"""Tests of the Triton kernels on a CPU, under Triton's interpreter; `test_interpreted.py` runs them.

The variable has to be set before triton is imported, hence a process of their own. By hand:
TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # what these tests share with those on a GPU

if os.environ.get("TRITON_INTERPRET") == "1":
    from fd_kernels.testing import install_bf16_rounding

    install_bf16_rounding()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _nan_in_unwritten_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so that an element that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
