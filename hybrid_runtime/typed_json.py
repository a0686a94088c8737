"""JSON values into a frozen dataclass, each checked against its field's type: what is not exactly that is refused.

Knows the types that our own descriptions use: bool, int, float, str, None, Literal, unions, tuple[X, ...] (a JSON list)
and dataclasses in dataclasses. A field too few or too many is another version's, and refused by name.
"""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")


def from_json(kind: type[Kind], values: object, where: str) -> Kind:
    """An instance of the dataclass `kind`. Raise TypeError or ValueError naming the field, or what its checks raise."""
    if not isinstance(values, dict):
        raise TypeError(f"{where} is {type(values).__name__}, expected an object")
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass, by contract
    if set(values) != names:
        missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
        raise ValueError(f"{where} lacks {missing} and has unknown {unknown}; it is of another version")
    return kind(**{name: _checked(hints[name], values[name], f"{where}.{name}") for name in names})


def _checked(hint: Any, value: object, where: str) -> object:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        (only,) = (each for each in get_args(hint) if each is not type(None))
        return _checked(only, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}, expected a list")
        return tuple(_checked(get_args(hint)[0], each, f"{where}[{idx}]") for idx, each in enumerate(value))
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} is {value!r}, expected one of {', '.join(map(str, get_args(hint)))}")
        return value
    if is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]  # a class, since it is a type hint
    if hint is float and type(value) is int:  # JSON writes 1.0 as 1
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is {value!r}, expected {hint.__name__}")
    return value
