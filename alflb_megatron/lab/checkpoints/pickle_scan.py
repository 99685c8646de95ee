"""Reads what a pickle says without doing it: no import, no call, no object built.

`look` follows a pickle opcode by opcode. Only the opcodes that pickles of plain data have are known to it, and only
names that the caller allows. What the pickle would build comes back as plain values where it is plain, and as `Made`,
the name of the maker with what it would be given, where it is not.

A pickle that passes can do no more than this when it is loaded: import the allowed names, call the allowed functions
and classes, and set attributes (none with two leading underscores) of what the allowed classes made.
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass
from typing import Any

INDEX = "torch.distributed.checkpoint.metadata MetadataIndex"
"""The one class whose objects are keys of a dict."""

PROPERTIES = "torch.distributed.checkpoint.metadata TensorProperties"
"""The one class whose state is a tuple."""


@dataclass(frozen=True)
class Allowed:
    """The names that a pickle may hold, as "module name"."""

    classes: frozenset[str]  # built, and given state
    functions: frozenset[str]  # called
    values: frozenset[str]  # data by themselves
    storages: frozenset[str] = frozenset()  # in references to the storages of an archive

    def names(self) -> frozenset[str]:
        return self.classes | self.functions | self.values | self.storages


class Refused(ValueError):
    """A pickle holds what no checkpoint of ours does, or is damaged. Its text is one line and says what."""


@dataclass(frozen=True)
class Name:
    """A global that a pickle would import, "module name"."""

    text: str


@dataclass(eq=False)
class Made:
    """What a pickle would make by a class or function: nothing is made, its name and what it was given are kept."""

    by: str
    arguments: tuple[Any, ...]
    state: Any = None


class _Mark:
    """Where a group of values begins on the stack."""


_PLAIN = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "NONE", "NEWTRUE", "NEWFALSE",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def look(data: bytes, allowed: Allowed) -> Any:
    """What the pickle `data` would build: plain values as they are, `Made` for the rest; nothing of it is executed.

    Raises `Refused` for an opcode, a name or a way of using it that is not allowed, and for a damaged pickle.
    """
    try:
        return _Reader(data, allowed).read()
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise Refused(f"a damaged pickle ({' '.join(f'{type(error).__name__}: {error}'.split())[:120]})") from None


class _Reader:
    """A pickle machine that keeps names instead of importing them. Opcodes: pickletools in Python's library."""

    def __init__(self, data: bytes, allowed: Allowed) -> None:
        self.data, self.allowed = data, allowed
        self.names = allowed.names()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        for opcode, argument, position in pickletools.genops(self.data):
            name = opcode.name
            if name in _PLAIN:
                self.stack.append(_CONSTANTS.get(name, argument))
            elif name in ("PROTO", "FRAME"):
                continue
            elif name == "STOP":
                value = self._pop()
                if self.stack:
                    raise Refused("a pickle that leaves something on its stack")
                return value
            else:
                self._step(name, argument, position or 0)
        raise Refused("a pickle without an end")

    def _step(self, name: str, argument: Any, position: int) -> None:
        stack = self.stack
        match name:
            case "MARK":
                stack.append(_Mark)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE":
                stack.append(self._tuple(self._group()))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._tuple([self._pop() for _ in range(_TUPLES[name])][::-1]))
            case "BINPUT" | "LONG_BINPUT":
                if argument > len(self.data):  # the real machine makes a table of that size
                    raise Refused("a pickle that asks for more memory than its content can need")
                self.memo[argument] = self._top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "APPEND":
                value = self._value()
                self._list().append(value)
            case "APPENDS":
                values = [self._stored(value) for value in self._group()]
                self._list().extend(values)
            case "SETITEM":
                self._set_items([self._pop(), self._pop()][::-1])
            case "SETITEMS":
                self._set_items(self._group())
            case "GLOBAL":
                # pickletools undoes backslashes that the real machine takes as they are
                written = argument.replace(" ", "\n", 1).encode() + b"\n"
                if self.data[position + 1 : position + 1 + len(written)] != written:
                    raise Refused("a name with a backslash")
                self._name(argument)
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                self._name(f"{module} {attribute}" if isinstance(module, str) and isinstance(attribute, str) else "?")
            case "REDUCE":
                self._make(self.allowed.functions)
            case "NEWOBJ":
                self._make(self.allowed.classes)
            case "BUILD":
                self._build()
            case "BINPERSID":
                self._persistent(self._pop())
            case _:
                raise Refused(f"the opcode {name}, which no checkpoint needs")

    def _top(self) -> Any:
        if self.stack[-1] is _Mark:
            raise Refused("a damaged pickle (a group that is taken for a value)")
        return self.stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self.stack.pop()

    def _group(self) -> list[Any]:
        start = len(self.stack) - 1 - self.stack[::-1].index(_Mark)
        group = self.stack[start + 1 :]
        del self.stack[start:]
        return group

    def _list(self) -> list[Any]:
        if type(top := self._top()) is not list:
            raise Refused("a value appended to what is no list")
        return top

    def _stored(self, value: Any) -> Any:
        """A value that goes into a container: data, never a class or function by itself."""
        if isinstance(value, Name) and value.text not in self.allowed.values:
            raise Refused(f"{value.text.replace(' ', '.')} as a value")
        return value

    def _value(self) -> Any:
        return self._stored(self._pop())

    def _tuple(self, values: list[Any]) -> tuple[Any, ...]:
        for value in values:
            if not (isinstance(value, Name) and value.text in self.allowed.storages):
                self._stored(value)
        return tuple(values)

    def _set_items(self, pairs: list[Any]) -> None:
        if type(top := self._top()) is not dict or len(pairs) % 2:
            raise Refused("an item put into what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            top[_key(key)] = self._stored(value)

    def _name(self, text: str) -> None:
        if text not in self.names:
            raise Refused(f"the name {text.replace(' ', '.')[:100]!r}, which no checkpoint needs")
        self.stack.append(Name(text))

    def _make(self, makers: frozenset[str]) -> None:
        arguments, maker = self._pop(), self._pop()
        if not isinstance(maker, Name) or maker.text not in makers or type(arguments) is not tuple:
            raise Refused(f"a call of {maker.text.replace(' ', '.') if isinstance(maker, Name) else 'what is no name'}")
        if maker.text == "collections OrderedDict":
            if arguments:
                raise Refused("an OrderedDict made of something")
            self.stack.append({})
        else:
            self.stack.append(Made(maker.text, arguments))

    def _build(self) -> None:
        state, made = self._pop(), self._top()
        if not isinstance(made, Made) or made.by not in self.allowed.classes or made.state is not None:
            raise Refused("state given to what has none, or twice")
        # As a dict it becomes the attributes; a pair could also set __class__.
        named = type(state) is dict and all(type(key) is str and not key.startswith("__") for key in state)
        if not named and not (made.by == PROPERTIES and type(state) is tuple):
            raise Refused(f"state of {made.by.replace(' ', '.')} that are no attributes")
        made.state = state

    def _persistent(self, at: Any) -> None:
        """A reference to a storage of the archive: ("storage", type, key, place, number of elements)."""
        sound = (
            type(at) is tuple
            and len(at) == 5
            and at[0] == "storage"
            and isinstance(at[1], Name)
            and at[1].text in self.allowed.storages
            and isinstance(at[2], str)
            and at[2].isdecimal()
            and isinstance(at[3], str)
            and re.fullmatch(r"cpu|cuda(:\d+)?", at[3])
            and type(at[4]) is int
        )
        if not sound:
            raise Refused("a persistent object that is no storage of a tensor")
        self.stack.append(Made(at[1].text, at[2:]))


def _key(key: Any) -> Any:
    """A key of a dict that is hashed at once: nested tuples that share their parts would take exponential time."""
    if isinstance(key, Made):
        fields = key.state if key.by == INDEX and isinstance(key.state, dict) else {"fqn": None}
        offset = fields.get("offset")
        flat = isinstance(offset, Made) and offset.by == "torch Size" and len(offset.arguments) == 1
        size = offset.arguments[0] if flat and isinstance(offset, Made) else ()
        if (
            type(fields.get("fqn")) is str
            and (offset is None or flat)
            and isinstance(size, list | tuple)
            and all(type(entry) is int for entry in size)
            and isinstance(fields.get("index"), int | None)
        ):
            return key
    elif isinstance(key, str | int | float | None) or (
        type(key) is tuple and all(isinstance(part, str | int | float | Name | None) for part in key)
    ):
        return key
    raise Refused("a key of a dict that is neither a text nor a number")
