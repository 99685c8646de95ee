"""Settings as dataclass fields: one declaration gives the default, the check, the flag and the docs row.

A setting is declared with `knob(default, "what it does", ...)`. `add_flags` puts the fields of a dataclass
on an argparse parser, a host's own too, `given_flags` reads back those that were given, `given_environment` does the
same for environment variables, `check` holds every value against what is allowed, and `markdown_table` prints the
reference table that `docs/` carries. Nothing here imports torch or a host. Why no library does this: docs/design.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


LONGEST_VALUE = 300
"""Characters of a value that an error shows."""


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text)} characters)"


def _escape_unprintable(text: str) -> str:
    """`text` on one line that a terminal can show: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class SettingError(ValueError):
    """A setting has a value that cannot work. Its text is one line: the flag, the value, what is allowed."""

    def __init__(self, flag: str, value: object, allowed: str) -> None:
        super().__init__(_escape_unprintable(f"{flag}={_shortened(value)}: {allowed}"))
        self.flag, self.value, self.allowed = flag, value, allowed
        self.seen_by_one_rank = False  # so that it is printed once where every rank finds it, and at all where one does


LARGEST_INT = 2**63 - 1
"""The largest whole number a setting may be: tensors and Megatron-Core hold them as int64."""


def _as_float(value: float) -> float:
    """`value` as a float, infinite where it is a whole number beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


@dataclasses.dataclass(frozen=True)
class Knob:
    """What a field's metadata holds beside its type and default."""

    help: str
    choices: Callable[[], Sequence[str]] | Sequence[str] | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    metavar: str | None = None

    def allowed_choices(self) -> Sequence[str] | None:
        return self.choices() if callable(self.choices) else self.choices

    def holds(self, value: float) -> bool:
        """Whether a number is finite and within the limits."""
        return (
            math.isfinite(_as_float(value))
            and (self.above is None or value > self.above)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
        )

    def bounds(self) -> str:
        """The allowed range in words, empty where there is none."""
        parts = []
        if self.above is not None:
            parts.append(f"above {self.above:g}")
        if self.minimum is not None:
            parts.append(f"at least {self.minimum:g}")
        if self.maximum is not None:
            parts.append(f"at most {self.maximum:g}")
        return " and ".join(parts)


def knob(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its documentation and limits (`choices`, `minimum`, `above`, `maximum`)."""
    return dataclasses.field(default=default, metadata={"knob": Knob(help, **limits)})


def knobs(cls: type) -> list[tuple[dataclasses.Field[Any], Knob, type, bool]]:
    """The declared knobs of `cls`: field, knob, plain type, and whether None is a value of it."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if "knob" not in field.metadata:
            continue
        kind, optional = hints[field.name], False
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            optional = type(None) in typing.get_args(kind)
            (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
        found.append((field, field.metadata["knob"], kind, optional))
    return found


def flag_of(name: str, prefix: str = "") -> str:
    """`step_size` with prefix `alflb-` is `--alflb-step-size`."""
    return f"--{prefix}{name.replace('_', '-')}"


def check(config: Any, prefix: str = "", flag_for: Callable[[str], str] | None = None) -> None:
    """Holds every knob of `config` against its type and limits; raises `SettingError` at the first that fails."""
    for field, knob_, kind, optional in knobs(type(config)):
        value = getattr(config, field.name)
        flag = flag_for(field.name) if flag_for else flag_of(field.name, prefix)
        if value is None:
            if not optional:
                raise SettingError(flag, value, f"a value is needed ({kind.__name__})")
            continue
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = _as_float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise SettingError(flag, repr(value), f"must be of type {kind.__name__}")
        choices = knob_.allowed_choices()
        if choices is not None and value not in choices:
            raise SettingError(flag, value, f"must be one of {', '.join(choices)}")
        if kind is int and abs(typing.cast(int, value)) > LARGEST_INT:
            raise SettingError(flag, value, f"must be at most {LARGEST_INT}")
        if kind in (int, float) and not knob_.holds(typing.cast(float, value)):
            finite = "" if math.isfinite(_as_float(typing.cast(float, value))) else "a finite number"
            raise SettingError(flag, value, f"must be {', '.join(filter(None, (finite, knob_.bounds())))}")


def _parse(text: str, kind: type, flag: str, optional: bool) -> Any:
    """The value that `text` stands for; SettingError naming `flag` where it is none of type `kind`."""
    if optional and text.lower() == "none":
        return None
    if kind is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise SettingError(flag, text, "must be true or false")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise SettingError(flag, text, f"must be of type {kind.__name__}") from None


def add_flags(parser: Any, cls: type, prefix: str = "", skip: Sequence[str] = ()) -> None:
    """Adds a flag for each knob of `cls` but those in `skip` to `parser` (a parser or an argument group).

    A flag that is not given leaves no trace in the namespace, so presets and overrides can be told apart. Texts are
    turned into values by `given_flags`, whose errors are `SettingError`s.
    """
    for field, knob_, kind, _ in knobs(cls):
        flag = flag_of(field.name, prefix)
        if field.name in skip:
            continue
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        options: dict[str, Any] = {
            "dest": flag[2:].replace("-", "_"),
            "default": argparse.SUPPRESS,
            "help": (knob_.help + default).replace("%", "%%"),
        }
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        choices = knob_.allowed_choices()
        metavar = knob_.metavar or (f"{{{','.join(choices)}}}" if choices else kind.__name__.upper())
        parser.add_argument(flag, metavar=metavar, **options)


def given_flags(namespace: argparse.Namespace, cls: type, prefix: str = "") -> dict[str, Any]:
    """The knobs of `cls` that were given on the command line, by field name; `SettingError` on a bad text."""
    values, given = vars(namespace), {}
    for field, _, kind, optional in knobs(cls):
        flag = flag_of(field.name, prefix)
        if (dest := flag[2:].replace("-", "_")) in values:
            value = values[dest]
            given[field.name] = _parse(value, kind, flag, optional) if isinstance(value, str) else value
    return given


def given_environment(environment: Mapping[str, str], cls: type, prefix: str) -> dict[str, Any]:
    """The knobs of `cls` that are set in `environment` as `PREFIX_NAME`, by field name; an empty text is not a value.

    Raises `SettingError` on a bad text and on a name that begins with the prefix and is no knob: it would be ignored.
    """
    names = {variable_of(field.name, prefix): (field.name, kind, optional) for field, _, kind, optional in knobs(cls)}
    given = {}
    for variable, text in environment.items():
        if not variable.startswith(variable_of("", prefix)):
            continue
        if variable not in names:
            raise SettingError(variable, text, f"no such setting; there are {', '.join(names)}")
        if text:
            name, kind, optional = names[variable]
            given[name] = _parse(text, kind, variable, optional)
    return given


def variable_of(name: str, prefix: str = "") -> str:
    """`step_size` with prefix `alflb-` is the environment variable `ALFLB_STEP_SIZE`."""
    return (prefix + name).replace("-", "_").upper()


def from_mapping(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Builds `cls` from plain values; an unknown name is a `SettingError` that lists the known ones."""
    known = [field.name for field, *_ in knobs(cls)]
    for name, value in values.items():
        if name not in known:
            raise SettingError(flag_of(name, prefix), value, f"no such setting; there are {', '.join(known)}")
    return cls(**values)


def markdown_table(cls: type, prefix: str = "") -> str:
    """The reference table of `cls`: flag, default, allowed values, meaning."""
    rows = ["| flag | default | allowed | meaning |", "|---|---|---|---|"]
    for field, knob_, kind, optional in knobs(cls):
        choices = knob_.allowed_choices()
        allowed = (
            ", ".join(f"`{c}`" for c in choices) if choices else " ".join(filter(None, (kind.__name__, knob_.bounds())))
        )
        default = "none" if field.default is None else f"`{field.default}`" if field.default != "" else "empty"
        rows.append(
            f"| `{flag_of(field.name, prefix)}` | {default} | {allowed}{' or none' * optional} | {knob_.help} |"
        )
    return "\n".join(rows)
