"""Scans a pickle opcode by opcode: nothing is imported, called or built.

`scan_pickle` knows the opcodes that pickles of plain data have, and no other, and lets through only the globals that
the caller allows. What the pickle would build comes back as plain values where it is plain, and as `PickledObject`,
the name of a class or function with what it would be given, where it is not.

A pickle that passes can do no more than this when it is loaded: import the allowed globals, call the allowed functions
and classes, and set attributes (none with two leading underscores) of what the allowed classes made. It also asks for
no more memory or time than its length explains.
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass
from typing import Any

METADATA_INDEX = "torch.distributed.checkpoint.metadata MetadataIndex"
"""The one class whose objects are keys of a dict."""

TENSOR_PROPERTIES = "torch.distributed.checkpoint.metadata TensorProperties"
"""The one class whose state is a tuple."""


@dataclass(frozen=True)
class AllowedGlobals:
    """The globals that a pickle may hold, as "module name", by what it may do with them."""

    classes: frozenset[str]  # built, and given state
    functions: frozenset[str]  # called
    values: frozenset[str]  # data by themselves
    storages: frozenset[str] = frozenset()  # in references to the storages of an archive

    def names(self) -> frozenset[str]:
        return self.classes | self.functions | self.values | self.storages


class UnsafePickleError(ValueError):
    """A pickle holds what no checkpoint of ours does, or is damaged. Its text is one line and says what."""


@dataclass(frozen=True)
class Global:
    """A class, function or value that a pickle would import, "module name"."""

    name: str


@dataclass(eq=False)
class PickledObject:
    """An object that a pickle would build, and that is not built: its class or function, and what it would be given."""

    factory: str
    arguments: tuple[Any, ...]
    state: Any = None


class _Mark:
    """Where a group of values begins on the stack."""


_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "NONE", "NEWTRUE", "NEWFALSE",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLE_SIZES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def scan_pickle(data: bytes, allowed: AllowedGlobals) -> Any:
    """What `data` would build: plain values as they are, `PickledObject` for the rest; nothing of it is executed.

    Raises `UnsafePickleError` for an opcode, a global or a way of using it that is not allowed, and for a damaged
    pickle.
    """
    try:
        return _PickleScanner(data, allowed).scan()
    except UnsafePickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UnsafePickleError(f"a damaged pickle ({text})") from None


class _PickleScanner:
    """A pickle machine that keeps globals instead of importing them. Opcodes: pickletools in Python's library."""

    def __init__(self, data: bytes, allowed: AllowedGlobals) -> None:
        self.data, self.allowed = data, allowed
        self.names = allowed.names()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def scan(self) -> Any:
        for opcode, argument, position in pickletools.genops(self.data):
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(_CONSTANTS.get(name, argument))
            elif name in ("PROTO", "FRAME"):
                continue
            elif name == "STOP":
                value = self._pop()
                if self.stack:
                    raise UnsafePickleError("a pickle that leaves something on its stack")
                return value
            else:
                self._step(name, argument, position or 0)
        raise UnsafePickleError("a pickle without an end")

    def _step(self, name: str, argument: Any, position: int) -> None:
        stack = self.stack
        match name:  # the most frequent first
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                if argument > len(self.data):  # the real machine makes a table of that size
                    raise UnsafePickleError("a pickle that asks for more memory than its content can need")
                self.memo[argument] = self._top()
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._tuple([self._pop() for _ in range(_TUPLE_SIZES[name])][::-1]))
            case "MARK":
                stack.append(_Mark)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "NEWOBJ":
                self._call(self.allowed.classes)
            case "REDUCE":
                self._call(self.allowed.functions)
            case "BUILD":
                self._build()
            case "SETITEMS":
                self._set_items(self._pop_mark())
            case "SETITEM":
                self._set_items([self._pop(), self._pop()][::-1])
            case "APPENDS":
                values = [self._require_data(value) for value in self._pop_mark()]
                self._top_list().extend(values)
            case "APPEND":
                value = self._require_data(self._pop())
                self._top_list().append(value)
            case "TUPLE":
                stack.append(self._tuple(self._pop_mark()))
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                texts = isinstance(module, str) and isinstance(attribute, str)
                self._push_global(f"{module} {attribute}" if texts else "?")
            case "GLOBAL":
                # pickletools undoes backslashes that the real machine takes as they are
                written = argument.replace(" ", "\n", 1).encode() + b"\n"
                if self.data[position + 1 : position + 1 + len(written)] != written:
                    raise UnsafePickleError("a name with a backslash")
                self._push_global(argument)
            case "BINPERSID":
                self._push_storage(self._pop())
            case _:
                raise UnsafePickleError(f"the opcode {name}, which no checkpoint needs")

    def _top(self) -> Any:
        if self.stack[-1] is _Mark:
            raise UnsafePickleError("a damaged pickle (a group that is taken for a value)")
        return self.stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self.stack.pop()

    def _pop_mark(self) -> list[Any]:
        """The values above the last mark, in their order."""
        start = len(self.stack) - 1 - self.stack[::-1].index(_Mark)
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values

    def _top_list(self) -> list[Any]:
        if type(top := self._top()) is not list:
            raise UnsafePickleError("a value appended to what is no list")
        return top

    def _require_data(self, value: Any) -> Any:
        """A value that goes into a container: data, never a class or function by itself."""
        if isinstance(value, Global) and value.name not in self.allowed.values:
            raise UnsafePickleError(f"{_dotted(value.name)} as a value")
        return value

    def _tuple(self, values: list[Any]) -> tuple[Any, ...]:
        for value in values:
            if not (isinstance(value, Global) and value.name in self.allowed.storages):
                self._require_data(value)
        return tuple(values)

    def _set_items(self, pairs: list[Any]) -> None:
        if type(top := self._top()) is not dict or len(pairs) % 2:
            raise UnsafePickleError("an item put into what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            top[_require_key(key)] = self._require_data(value)

    def _push_global(self, name: str) -> None:
        if name not in self.names:
            raise UnsafePickleError(f"the name {_dotted(name)[:100]!r}, which no checkpoint needs")
        self.stack.append(Global(name))

    def _call(self, factories: frozenset[str]) -> None:
        """A class or function called with a tuple of arguments."""
        arguments, factory = self._pop(), self._pop()
        if not isinstance(factory, Global) or factory.name not in factories or type(arguments) is not tuple:
            called = _dotted(factory.name) if isinstance(factory, Global) else "what is no name"
            raise UnsafePickleError(f"a call of {called}")
        if factory.name == "collections OrderedDict":
            if arguments:
                raise UnsafePickleError("an OrderedDict made of something")
            self.stack.append({})
        else:
            self.stack.append(PickledObject(factory.name, arguments))

    def _build(self) -> None:
        """State given to the object on top of the stack."""
        state, target = self._pop(), self._top()
        known = isinstance(target, PickledObject) and target.factory in self.allowed.classes
        if not known or target.state is not None:
            raise UnsafePickleError("state given to what has none, or twice")
        # As a dict it becomes the attributes; a pair could also set __class__.
        attributes = type(state) is dict and all(type(key) is str and not key.startswith("__") for key in state)
        if not attributes and not (target.factory == TENSOR_PROPERTIES and type(state) is tuple):
            raise UnsafePickleError(f"state of {_dotted(target.factory)} that are no attributes")
        target.state = state

    def _push_storage(self, reference: Any) -> None:
        """A persistent id of torch.save: ("storage", type, key, location, number of elements)."""
        sound = (
            type(reference) is tuple
            and len(reference) == 5
            and reference[0] == "storage"
            and isinstance(reference[1], Global)
            and reference[1].name in self.allowed.storages
            and isinstance(reference[2], str)
            and reference[2].isdecimal()
            and isinstance(reference[3], str)
            and re.fullmatch(r"cpu|cuda(:\d+)?", reference[3])
            and type(reference[4]) is int
        )
        if not sound:
            raise UnsafePickleError("a persistent object that is no storage of a tensor")
        self.stack.append(PickledObject(reference[1].name, reference[2:]))


def _dotted(name: str) -> str:
    return name.replace(" ", ".")


def _require_key(key: Any) -> Any:
    """A key of a dict that is hashed at once: nested tuples that share their parts would take exponential time."""
    if isinstance(key, PickledObject):
        fields = key.state if key.factory == METADATA_INDEX and isinstance(key.state, dict) else {"fqn": None}
        offset = fields.get("offset")
        flat = isinstance(offset, PickledObject) and offset.factory == "torch Size" and len(offset.arguments) == 1
        sizes = offset.arguments[0] if flat and isinstance(offset, PickledObject) else ()
        if (
            type(fields.get("fqn")) is str
            and (offset is None or flat)
            and isinstance(sizes, list | tuple)
            and all(type(size) is int for size in sizes)
            and isinstance(fields.get("index"), int | None)
        ):
            return key
    elif isinstance(key, str | int | float | None) or (
        type(key) is tuple and all(isinstance(part, str | int | float | Global | None) for part in key)
    ):
        return key
    raise UnsafePickleError("a key of a dict that is neither a text nor a number")
