"""Text read byte by byte: the standard library, an installed package, a file, a folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from alflb_megatron.lab.data.digests import fingerprint
from alflb_megatron.lab.data.errors import one_line
from alflb_megatron.lab.data.indexed import check_tokenizer_name
from alflb_megatron.lab.data.samples import (
    VALIDATION_SHARE,
    Sample,
    TextData,
    check_vocabulary,
)
from alflb_megatron.settings import SettingError

BYTE_VOCABULARY = 256
PACKAGE = "package:"
SOURCES = (
    "must be stdlib, package:NAME==VERSION, a UTF-8 text file, a folder of such files, "
    "or the PREFIX of PREFIX.bin and PREFIX.idx"
)

# Tests are left out because several distributions package them apart, and because they hold malformed sources and
# generated tables; `config-*` and `_sysconfigdata*` because they record how one machine built its Python.
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_STDLIB_LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")


class ByteText(TextData):
    """Bytes as tokens, held in memory."""

    def __init__(self, text: bytes, seq_length: int, seed: int, shuffled_from: int | None) -> None:
        super().__init__(seed, shuffled_from)
        self._text, self._seq_length = np.frombuffer(text, dtype=np.uint8), seq_length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._seq_length

    def _window(self, index: int) -> Sample:
        start = index * self._seq_length
        window = torch.from_numpy(self._text[start : start + self._seq_length + 1].astype(np.int64))
        return Sample(window[:-1], window[1:], torch.ones(self._seq_length))


def open_text(source: str, tokenizer: str, vocab_size: int, seq_length: int, seed: int) -> tuple[TextData, TextData]:
    """`data.open_data` for every source but an indexed dataset."""
    check_tokenizer_name(tokenizer)
    texts, title = _read(source)
    if tokenizer != "byte":
        raise SettingError("--tokenizer", tokenizer, f"must be byte with --data={source}, which is read byte by byte")
    check_vocabulary(tokenizer, BYTE_VOCABULARY, vocab_size)
    splits = []
    for name, text in zip(("training", "validation"), texts, strict=True):
        if len(text) <= seq_length:
            need = f"--seq-length={seq_length} needs {seq_length + 1} or more"
            raise SettingError("--data", source, f"its {name} part has {len(text)} bytes; {need}")
        shuffled = name == "training"
        data = ByteText(text, seq_length, seed, 0 if shuffled else None)
        data.description = f"{name} text of {title}, {len(text)} bytes"
        order = {"kind": "bytes", "split": name, "seq_length": seq_length, "seed": seed if shuffled else None}
        data.fingerprint = fingerprint(order, text)
        splits.append(data)
    return splits[0], splits[1]


def _read(source: str) -> tuple[tuple[bytes, bytes], str]:
    """The training and the validation bytes of a source, and what it is in words."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return _read_folder(source, root, _left_out_of_stdlib, ".py", f"Python {platform.python_version()}'s library")
    if source.startswith(PACKAGE):
        root, title = _package(source)
        return _read_folder(source, root, _left_out_of_stdlib, ".py", title)
    path = Path(source).expanduser()
    if not source or not path.exists():
        raise SettingError("--data", source, f"no such file or folder; {SOURCES}")
    if path.is_dir():
        return _read_folder(source, path, lambda name: name.startswith("."), "", source)
    text = _utf8(source, path) if path.is_file() else None
    if text is None:
        raise SettingError("--data", source, f"not UTF-8 text (undecodable, or with a zero byte); {SOURCES}")
    return _by_position(text), source


def _package(source: str) -> tuple[Path, str]:
    """The folder of an installed package, which is imported under its distribution's name, and what it is in words.

    A source without a version takes the one that is installed.
    """
    name, _, version = source.removeprefix(PACKAGE).partition("==")
    try:
        found = importlib.util.find_spec(name) if name.isidentifier() else None
        installed = importlib.metadata.version(name) if found else ""
    except (ImportError, ValueError):
        found, installed = None, ""
    if found is None or not found.submodule_search_locations:
        raise SettingError("--data", source, "no such package is installed: " + SOURCES)
    if version not in ("", installed):
        raise SettingError("--data", source, f"{name} {installed} is installed, which is another text")
    return Path(found.submodule_search_locations[0]), f"{name} {installed}"


def _by_position(text: bytes) -> tuple[bytes, bytes]:
    cut = len(text) - round(len(text) * VALIDATION_SHARE)
    return text[:cut], text[cut:]


def _left_out_of_stdlib(name: str) -> bool:
    return name in _STDLIB_LEFT_OUT or name.startswith(_STDLIB_LEFT_OUT_PREFIXES)


def _read_folder(
    source: str, root: Path, left_out: Callable[[str], bool], suffix: str, title: str
) -> tuple[tuple[bytes, bytes], str]:
    """All text files below `root` in the order of their paths, but those whose name or folder is `left_out`."""

    def stop(error: OSError) -> None:
        raise SettingError("--data", source, f"cannot be read: {one_line(error)}") from error

    names = []
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if not left_out(name)]
        paths = [Path(folder, name) for name in files if name.endswith(suffix) and not left_out(name)]
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    texts = {name: _utf8(source, root / name) for name in sorted(names)}
    kept = {name: text for name, text in texts.items() if text}
    skipped = sum(text is None for text in texts.values())
    others = f", {skipped} left out as not UTF-8 text" if skipped else ""
    if not kept:
        raise SettingError("--data", source, f"no UTF-8 text file with anything in it{others}; {SOURCES}")
    if len(kept) == 1:
        return _by_position(*kept.values()), f"{title} (1 file{others})"

    # The files whose hash is below the share; at least the lowest one, and never all, so that few files split too.
    hashes = {name: hashlib.sha256(os.fsencode(name)).digest() for name in kept}
    below = sum(int.from_bytes(digest) < VALIDATION_SHARE * 2**256 for digest in hashes.values())
    held_out = set(sorted(kept, key=hashes.__getitem__)[: min(max(below, 1), len(kept) - 1)])
    train = b"\0".join(text for name, text in kept.items() if name not in held_out)
    validation = b"\0".join(text for name, text in kept.items() if name in held_out)
    return (train, validation), f"{title} ({len(kept)} files, {len(held_out)} of them for validation{others})"


def _utf8(source: str, path: Path) -> bytes | None:
    """The bytes of a text file; None where they are not UTF-8 or hold a zero byte (which separates files here)."""
    try:
        with path.open("rb") as stream:
            text = stream.read(4096)
            if b"\0" in text:  # decided without reading what may be a large binary file
                return None
            text += stream.read()
        text.decode()
    except UnicodeDecodeError:
        return None
    except (OSError, MemoryError) as error:
        raise SettingError("--data", source, f"cannot be read: {one_line(error)}") from error
    return None if b"\0" in text else text
