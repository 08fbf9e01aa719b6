"""What DeepSpeed will not take, as a sentence."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from pydantic import ValidationError

from fd_scale.errors import UserError

_REFUSALS = (
    ValidationError, ZeRORuntimeException, DeepSpeedConfigError, AssertionError, ValueError, NotImplementedError,
)  # fmt: skip
_OF_VALUES = (TypeError, AttributeError, KeyError)
"""What a value of a wrong kind makes of a configuration that is read; elsewhere they are errors of ours."""


@contextmanager
def naming_refusals(*more: type[Exception]) -> Iterator[None]:
    """Makes a sentence of DeepSpeed's errors of many kinds, some without a word, where it reads a configuration."""
    try:
        yield
    except (*_REFUSALS, *more) as error:
        if isinstance(error, ValidationError):
            keys = [
                f"{'.'.join(map(str, each['loc']))}={each['input']!r}: {each['msg']}"
                for each in error.errors()
            ]
            reason = f"{error.title.removeprefix('DeepSpeed')}: {'; '.join(keys)}"
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = (
                " ".join(str(error).split()) or f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"
            )
        raise UserError(f"train.ds_config: DeepSpeed refuses it: {reason}") from error


def require_readable(ds_config: dict[str, Any]) -> None:
    """Has DeepSpeed read a configuration, as it does when a run begins.

    Args:
        ds_config: as `fd_scale.ds_config.resolve` returned it.

    Raises:
        UserError: it does not take it.
    """
    zero = {key: value for key, value in ds_config["zero_optimization"].items() if key != "mics_shard_size"}
    here = {key: value for key, value in ds_config.items() if key != "train_batch_size"}  # that of all ranks
    with naming_refusals(*_OF_VALUES):
        DeepSpeedConfig(here | {"zero_optimization": zero})
