"""What a configuration file may say: which keys there are, and of which kind and size their values."""

import math
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin

LARGEST, DEEPEST = 65536, 64
"""The largest whole number, and the most layers one after the other, that a network may be given."""


def network_config[Config](kind: type[Config], config: Mapping[str, Any]) -> Config:
    """A dataclass of a network's settings from its config.json, lists as tuples.

    Keys of `kind.FIXED` must have one of the values there; those of `kind.IGNORED` and those that begin with an
    underscore say nothing about the numbers; any other unknown key must be empty (None, False, 0, "", [] or {}).

    Raises:
        ValueError: this network would not compute what is meant.
    """
    known = {field.name for field in fields(kind)}
    for key, value in config.items():
        if key in known or key in kind.IGNORED or key.startswith("_"):
            continue
        if key in kind.FIXED:
            if value not in kind.FIXED[key]:
                allowed = " or ".join(repr(v) for v in kind.FIXED[key])
                raise ValueError(f"{kind.__name__}: {key} must be {allowed}, got {value!r}")
        elif value:
            raise ValueError(f"{kind.__name__}: unknown setting {key} = {value!r}; this network would ignore it")
    return made(kind, {key: value for key, value in config.items() if key in known})


def made[Config](kind: type[Config], values: Mapping[str, Any]) -> Config:
    """`kind(**values)`, lists as tuples, when every value is of the kind its field is annotated with.

    Whole numbers lie between 1 and `LARGEST` (`DEEPEST` where they count layers), those of `kind.FREE` from 0 on;
    other numbers are finite and above 0, those of `kind.FREE` of either sign.

    Raises:
        ValueError: a value is not, or `kind` refuses it.
    """
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for field in fields(kind):
        if field.name in plain and not _fits(plain[field.name], field.type, _range(field.name, kind.FREE)):
            raise ValueError(
                f"{kind.__name__}: {field.name} must be {_wording(field.type, _range(field.name, kind.FREE))}, "
                f"got {plain[field.name]!r}"
            )
    return kind(**plain)


def _range(name: str, free: tuple[str, ...]) -> tuple[int, int]:
    """The least and the most of a whole number under this name; a least of 0 leaves other numbers their sign."""
    return int(name not in free), DEEPEST if "layers" in name or name == "num_decoder_blocks" else LARGEST


def _fits(value: Any, kind: Any, bounds: tuple[int, int]) -> bool:
    if get_origin(kind) is UnionType:
        return any(_fits(value, each, bounds) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(each, get_args(kind)[0], bounds) for each in value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and bounds[0] <= value <= bounds[1]
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < math.inf and (value > 0 or not bounds[0])
    return isinstance(value, kind)


def _wording(kind: Any, bounds: tuple[int, int]) -> str:
    if get_origin(kind) is UnionType:
        return " or ".join(_wording(each, bounds) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each of it {_wording(get_args(kind)[0], bounds)}"
    words = {
        int: f"a whole number between {bounds[0]} and {bounds[1]}", bool: "true or false", str: "a text",
        float: "a finite number above 0" if bounds[0] else "a finite number", type(None): "null",
    }  # fmt: skip
    return words[kind]
