"""Files that are read and written whole: strict JSON, regular files only, all of a file or nothing of it.

A number that is not finite (a diverged loss) is written as null. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LARGEST_JSON = 2**26
"""Bytes of the largest JSON file that is read: a config.json has some thousand, a summary.json more."""


def _finite(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def dump_json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`, all of it or nothing."""
    write_atomically(path, [(dump_json(value, indent=2) + "\n").encode("utf-8")])


def regular(path: Path) -> None:
    """OSError unless `path` is a regular file or a link to one: to open a FIFO would wait, a device may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))


def read_json(path: Path) -> Any:
    """The content of a JSON file. OSError where there is no such regular file, ValueError (one line) where no JSON."""
    regular(path)
    with path.open("rb") as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON} bytes")
    return parse_json(text.decode("utf-8"))


def parse_json(text: str) -> Any:
    """Strict JSON; ValueError for all else: also for NaN, and for what is nested too deeply to be read."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_atomically(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file, all of it or nothing: beside its place first, then onto the disk, then into its place."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
