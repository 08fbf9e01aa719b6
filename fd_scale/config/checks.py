"""How a setting is refused."""

from __future__ import annotations

from fd_scale.errors import UserError


def require(holds: bool, key: str, got: object, expected: str) -> None:
    """Refuses a value of a setting with what was expected."""
    if not holds:
        raise UserError(f"{key}: got {got}, expected {expected}")


def first_line(error: BaseException) -> str:
    """Returns what an error says before its explanations."""
    return str(error).strip().split("\n")[0]
