"""What a caller has set in torch for work of its own: kept out of a run, and there again after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def as_in_a_new_process() -> Iterator[None]:
    """Within it torch computes as in a new process: the numbers of a run are its recipe's, whoever calls it.

    That is about gradients (`no_grad`, `inference_mode`), autocast, the default dtype and device, and the generators,
    which a run seeds and from which its caller goes on to draw. Also a decorator.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # else torch would look at each of its calls in Python
            stack.enter_context(torch.device("cpu"))
        gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
