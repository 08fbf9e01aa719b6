"""Which path an op takes: its Triton kernel or its PyTorch reference."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "triton"]
OLDEST_CAPABILITY = (8, 0)  # Triton's own floor; bf16 begins there too

# A plain global, not a context variable: autograd's threads recompute checkpointed calls and must see it.
_implementation: Implementation = "auto"
_logged: set[tuple[str, str]] = set()


class NotServedError(ValueError):
    """A call that the kernel does not serve, where the kernel is asked for.

    Attributes:
        op: its name.
        obstacle: why, with what it got and expected.
    """

    def __init__(self, op: str, obstacle: str) -> None:
        super().__init__(
            f"{op}: the Triton kernel is asked for and does not serve this call: {obstacle}; change the call "
            "or set_implementation('auto')"
        )
        self.op, self.obstacle = op, obstacle


def set_implementation(name: Implementation) -> None:
    """Choose the path of all ops from here on.

    Args:
        name: "auto": the kernel where it serves the call, the reference elsewhere; "reference"; "triton": the
            kernel, and a call that it does not serve raises `NotServedError`.

    Raises:
        ValueError: the name is not one of the three.
    """
    global _implementation
    if name not in get_args(Implementation):
        raise ValueError(f"implementation is {name!r}; expected one of {', '.join(get_args(Implementation))}")
    _implementation = name


@contextmanager
def implementation(name: Implementation) -> Iterator[None]:
    """Choose the path of all ops inside a `with` block; arguments as of `set_implementation`."""
    before = _implementation
    set_implementation(name)
    try:
        yield
    finally:
        set_implementation(before)


def use_triton(op: str, *tensors: Tensor, served: str | None) -> bool:
    """Whether an op runs its Triton kernel on these tensors; each path is logged the first time it runs.

    The kernel runs where it serves the call and all tensors are on CUDA, or on the CPU under Triton's
    interpreter (TRITON_INTERPRET=1, set before triton is imported). On the meta device, where nothing
    runs, a kernel that is asked for by name gives the shapes and dtypes that it would give on CUDA.

    Args:
        op: name of the op, for messages.
        tensors: the tensors of the call.
        served: why the kernel does not serve this call, with what it got and expected; None where it does.

    Raises:
        NotServedError: the kernel is asked for by `set_implementation` and cannot run.
    """
    devices = {tensor.device for tensor in tensors}
    on_meta = all(device.type == "meta" for device in devices)
    if on_meta and (_implementation != "triton" or served is None):
        return _implementation == "triton"  # nothing runs, and nothing is logged
    if _implementation == "reference":
        _log_once(op, "PyTorch reference", "set_implementation('reference')")
        return False
    obstacle = served or _device_obstacle(*sorted(str(device) for device in devices))
    if obstacle is None:
        _log_once(op, "Triton kernel", None)
        return True
    if _implementation == "triton":
        raise NotServedError(op, obstacle)
    on_cuda = any(device.type == "cuda" for device in devices)
    _log_once(op, "PyTorch reference", obstacle if on_cuda else None)
    return False


# Constant under torch.compile: evaluated while tracing, so that neither import nor log line breaks the graph.
@torch.compiler.assume_constant_result
def _device_obstacle(*devices: str) -> str | None:
    """Why no Triton kernel runs on tensors of these devices, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    types = {torch.device(device).type for device in devices}
    if types != {"cuda"} and not (interpreted and types == {"cpu"}):
        return f"the tensors are on {', '.join(devices)}; expected one CUDA device"
    if len(devices) > 1:
        return f"the tensors are on {', '.join(devices)}; expected one device"
    try:
        import triton  # noqa: F401  # here, so that the reference needs no triton
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # missing, or broken
        return f"triton cannot be imported ({error}); expected the triton that belongs to this torch"
    if types == {"cuda"}:
        if torch.version.hip is not None:
            return (
                "the device is an AMD GPU; expected one of NVIDIA, for which the tiles are chosen and tested"
            )
        capability = torch.cuda.get_device_capability(devices[0])
        if capability < OLDEST_CAPABILITY:
            return f"the device has compute capability {capability}; expected {OLDEST_CAPABILITY} or newer"
    return None


@torch.compiler.assume_constant_result
def _log_once(op: str, path: str, reason: str | None) -> None:
    if (op, path) in _logged:
        return
    _logged.add((op, path))
    logger.info("%s runs the %s%s", op, path, f": {reason}" if reason else "")
