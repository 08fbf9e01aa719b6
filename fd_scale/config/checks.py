"""How a setting is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from fd_scale.errors import UserError


def require(holds: bool, key: str, got: object, expected: str) -> None:
    """Refuses a value of a setting with what was expected."""
    if not holds:
        raise UserError(f"{key}: got {got}, expected {expected}")


def checks_of(section: object, key: str) -> Callable[[str, bool, str], None]:
    """Returns what refuses a value of a section: name of its field, whether it holds, and what was expected."""

    def check(name: str, holds: bool, expected: str) -> None:
        require(holds, f"{key}.{name}", getattr(section, name), expected)

    return check


def are_positive(numbers: Sequence[float]) -> bool:
    """Whether they are finite and above 0, and there is one."""
    return len(numbers) > 0 and all(0 < number < inf for number in numbers)


def first_line(error: BaseException) -> str:
    """Returns what an error says before its explanations."""
    return str(error).strip().split("\n")[0]
