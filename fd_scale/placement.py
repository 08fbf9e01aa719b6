"""Where a module's parameters are: whole on every rank, or, behind the same two verbs, in parts (`fd_scale.engine`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn


class Placement(Protocol):
    """What builds and runs a module without saying where its parameters are."""

    def building(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Returns a context: modules that are built in it, by all ranks alike, are placed as soon as they are made.

        Args:
            dtype: what their parameters are cast to at its end, where it casts.
        """

    def frozen(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        """Returns what calls the forward of a module that is not trained, on a device."""


class Whole:
    """All parameters on every rank."""

    def building(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """See `Placement`; nothing is done here."""
        return nullcontext()

    def frozen(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        """See `Placement`."""
        return module.to(device)


WHOLE = Whole()
