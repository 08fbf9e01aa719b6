"""Whether mappings, lists and values stand where a recipe has them: OmegaConf does not say where they do not."""

from __future__ import annotations

from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fd_scale.errors import UserError

_MAPPING, _LIST, _VALUE = "a mapping of settings", "a list", "a value"


def require_shape(hint: Any, given: Any, where: str, key: str = "") -> None:
    """Compares plain nested dicts and lists with the type of a field; values are not looked at.

    Args:
        hint: the type: of dataclasses, dicts, lists, tuples and values.
        given: what is there.
        where: the file, for messages.
        key: of the field in it.

    Raises:
        UserError: something is of another kind, or a list of another length; its key is named.
    """
    if given is None or hint is Any:
        return
    kind = _MAPPING if isinstance(given, dict) else _LIST if isinstance(given, list | tuple) else _VALUE
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    fitting = [option for option in options if _kind(option) == kind]
    if not fitting:
        wanted = " or ".join(dict.fromkeys(_kind(option) for option in options if option is not NoneType))
        how = ", each item after a dash" if (wanted, kind) == (_LIST, _MAPPING) else ""
        got = repr(given) if kind == _VALUE else kind
        raise UserError(f"{where}: {key or 'the recipe'}: expected {wanted}{how}, got {got}")
    within = f"{key}." if key else ""
    if is_dataclass(fitting[0]):
        for name, hint_of_field in get_type_hints(fitting[0]).items():
            require_shape(hint_of_field, given.get(name), where, f"{within}{name}")
    elif kind == _LIST:
        items = get_args(fitting[0])
        if get_origin(fitting[0]) is tuple and items[-1] is not ...:
            if len(given) != len(items):
                raise UserError(f"{where}: {key}: expected {len(items)} values, got {len(given)}: {given}")
        else:
            items = (items[0],) * len(given)
        for index, (item, value) in enumerate(zip(items, given, strict=True)):
            require_shape(item, value, where, f"{within}{index}")
            # Of a list OmegaConf does not say which one it is.
            if item in (int, float) and not _is_number(value):
                raise UserError(f"{where}: {key}: expected numbers, got {value!r}")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _kind(hint: Any) -> str:
    if is_dataclass(hint) or get_origin(hint) is dict:
        return _MAPPING
    return _LIST if get_origin(hint) in (list, tuple) else _VALUE
