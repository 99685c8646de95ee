"""Deterministic damage: from a seed and a generator, the same bytes every time."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Random = random.Random

NUMBERS = [0, 1, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
TOKENS = [
    b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"null", b"true", b"{}", b"[]", b'""', b"\xff\xfe",
    b"\xed\xa0\x80", b"\0",
    b"\r\n", b"\xe2\x80\xa8", b"'", b'"', b"\\u0000", b"cos\nsystem\n(S'x'\ntR.", b"__reduce__", b"PK\x03\x04",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "3",
    "\ud800", "\0", "a\nb", "../../etc", "x" * 5000, [], {}, [[]], [None], {"": None}, [1, [2, [3]]], {"step": 1},
]  # fmt: skip
"""In place of any node of a JSON file: each is of the wrong type somewhere."""


def _at(random: Random, data: bytes | bytearray) -> int:
    return random.randrange(len(data) + 1)


def flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(random: Random, data: bytes) -> bytes:
    at = _at(random, data)
    piece = random.choice((random.randbytes(random.choice((1, 4, 8, 40))), random.choice(TOKENS)))
    return data[:at] + piece + data[at + len(piece) :]


def insert(random: Random, data: bytes) -> bytes:
    at = _at(random, data)
    return data[:at] + random.choice((random.randbytes(random.randrange(1, 40)), random.choice(TOKENS))) + data[at:]


def cut(random: Random, data: bytes) -> bytes:
    return data[: _at(random, data)]


def remove(random: Random, data: bytes) -> bytes:
    start, end = sorted((_at(random, data), _at(random, data)))
    return data[:start] + data[min(end, start + random.choice((1, 4, 100, 10**6))) :]


def repeat(random: Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    at = random.randrange(len(lines))
    return b"".join(lines[:at] + [lines[at]] * random.choice((2, 3, 50)) + lines[at + 1 :])


def swap(random: Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    random.shuffle(lines)
    return b"".join(lines)


def huge(random: Random, data: bytes) -> bytes:
    """A number of four or eight bytes that no honest header holds."""
    width, form = random.choice(((4, "<I"), (8, "<Q"), (8, ">Q"), (2, "<H")))
    at = random.choice((random.randrange(min(len(data), 64) + 1), _at(random, data)))
    return data[:at] + struct.pack(form, random.choice(NUMBERS) % 2 ** (8 * width)) + data[at + width :]


def nothing(random: Random, data: bytes) -> bytes:
    return random.choice((b"", b"\0", b"\n", random.randbytes(200), b"[" * 100_000, b'{"a":' * 100_000))


BYTES: list[Callable[[Random, bytes], bytes]] = [
    flip, overwrite, insert, cut, remove, repeat, swap, huge, flip, huge, overwrite, nothing,
]  # fmt: skip


def damaged(random: Random, data: bytes) -> bytes:
    """`data` after one to three pieces of damage."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(BYTES)(random, data)
    return data


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += _nodes(child, (*path, key))
    return found


def node(random: Random, value: Any) -> Any:
    """`value`, parsed JSON, with one node replaced, removed, renamed or nested deeply."""
    value = json.loads(json.dumps(value))
    path = random.choice(_nodes(value))
    if not path:
        return random.choice(VALUES)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    what = random.random()
    if what < 0.75:
        parent[path[-1]] = random.choice(VALUES)
    elif what < 0.87:
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent[random.choice(("", "x", "\ud800", "__class__", path[-1] + " "))] = parent.pop(path[-1])
    else:
        parent.insert(0, parent[path[-1]])
    return value


def json_text(random: Random, text: bytes) -> bytes:
    """A JSON file with a wrong node, or damaged as bytes."""
    if random.random() < 0.3:
        return damaged(random, text)
    try:
        return json.dumps(node(random, json.loads(text))).encode("utf-8", "surrogatepass")
    except ValueError:
        return damaged(random, text)


def json_lines(random: Random, text: bytes) -> bytes:
    """A file of JSON lines with one wrong line, or damaged as bytes."""
    lines = text.splitlines(keepends=True)
    if random.random() < 0.4 or not lines:
        return damaged(random, text)
    at = random.randrange(len(lines))
    lines[at] = json_text(random, lines[at].rstrip(b"\n")) + b"\n"
    return b"".join(lines)


def place(random: Random, path: Path) -> bool:
    """Now and then puts something at `path` that is no file with content; whether it did."""
    if random.random() > 0.04:
        return False
    import os

    path.unlink()
    kind = random.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path)  # a loop
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.symlink_to(path.with_name("nowhere"))
    elif kind == 5:
        with path.open("wb") as file:
            file.truncate(2**40)  # sparse: a tebibyte that takes no room
    return True
