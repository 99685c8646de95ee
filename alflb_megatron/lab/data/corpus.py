"""The documents of a source, and one's own files as one: all through the `datasets` library."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alflb_megatron.lab.data.digests import fingerprint
from alflb_megatron.lab.data.errors import cause, one_line
from alflb_megatron.lab.records.files import regular
from alflb_megatron.settings import SettingError

PLAIN = (".txt", ".md", ".py")
UNITS = {"file": "document", "paragraph": "paragraph", "line": "line"}
"""Values of `--document`, and what the `datasets` library calls them (`sample_by` of its text reader)."""

SOURCES = "wikitext-103, fineweb-edu, a text, .jsonl or .parquet file, or a folder of .txt, .md, .py and these"
ROWS = 64
"""Rows that are read at a time: a row can be a whole file."""


@dataclass(frozen=True)
class Source:
    """A source that was found and is not loaded yet."""

    identity: dict[str, Any]
    """What it is, whatever its place: equal identities give equal documents."""
    notes: list[str]
    """What was left out, in words."""
    open: Callable[[int, Path], Corpus]
    """Loads it: the first documents, 0 for all, and a folder to keep copies in. SettingError where it cannot be."""


@dataclass(frozen=True)
class Corpus:
    """Documents by number, in a fixed order. Picklable: the rows stay in the Arrow files that `datasets` maps."""

    rows: Any  # datasets.Dataset
    column: str = "text"
    json_from: int | None = None
    """The first row that is a line of a .jsonl file; None where there is none."""
    json_field: str = "text"
    bounds: np.ndarray[Any, Any] | None = None
    """int64 [documents + 1]: document i is rows bounds[i] to bounds[i + 1] in one. None: every row is a document."""

    def __len__(self) -> int:
        return len(self.rows) if self.bounds is None else len(self.bounds) - 1

    def documents(self, start: int, stop: int) -> Iterator[str]:
        """The texts of documents `start` to `stop`, "" for one without text. ValueError for a row that has no text."""
        if self.bounds is not None:
            for first, end in zip(self.bounds[start:stop], self.bounds[start + 1 : stop + 1], strict=True):
                yield "".join(row or "\n" for row in self.rows[int(first) : int(end)][self.column])
            return
        for first in range(start, stop, ROWS):
            for row, text in enumerate(self.rows[first : min(first + ROWS, stop)][self.column], first):
                yield (text or "") if self.json_from is None or row < self.json_from else self._of_json(text)

    def _of_json(self, line: str) -> str:
        if not line or line.isspace():
            return ""
        try:
            text = json.loads(line)[self.json_field]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = 0
        if text is not None and not isinstance(text, str):
            raise ValueError(f'a line of .jsonl is no object with a text as "{self.json_field}": {line[:80]!r}')
        return text or ""

    def first(self, limit: int) -> Corpus:
        """The first `limit` documents; all of them where that is 0 or more than there are."""
        if not 0 < limit < len(self):
            return self
        if self.bounds is not None:
            return replace(self, bounds=self.bounds[: limit + 1])
        return replace(self, rows=self.rows.select(range(limit)))


# -- one's own files ---------------------------------------------------------------------------------------------------


def find_local(source: str, unit: str, text_field: str) -> Source:
    """A local file or folder: plain text in the order of the paths, then .parquet, then .jsonl.

    Of a folder, hidden files and folders and other endings
    are passed over; plain text that is not UTF-8, or holds a zero byte, is left out and counted in `notes`.
    """
    root = Path(source).expanduser()
    if not source or not root.exists():
        raise SettingError("SOURCE", source, f"no such file or folder; must be {SOURCES}")
    try:
        names, passed_over = _names(root)
        kinds: dict[str, list[Path]] = {"text": [], "parquet": [], "jsonl": []}
        digests, left_out = [], []
        for name in names:
            path = root / name if name else root
            kind = {".parquet": "parquet", ".jsonl": "jsonl"}.get(path.suffix, "text")
            digest = _digest(path, is_text=kind != "parquet")
            if digest is not None:
                kinds[kind].append(path)
                digests.append([name, digest])
            elif name and kind == "text":
                left_out.append(name)
            else:
                raise SettingError("SOURCE", path, "is not UTF-8 text (undecodable, or with a zero byte)")
    except OSError as error:
        raise SettingError("SOURCE", source, f"cannot be read: {one_line(error)}") from error
    if not digests:
        others = f"; {passed_over} with another ending, {len(left_out)} not UTF-8 text"
        raise SettingError("SOURCE", source, f"holds no file to read{others}; must be {SOURCES}")
    identity = {"files": len(digests), "sha256": fingerprint({"files": digests}), "document": unit}
    notes = [f"{passed_over} files with another ending were passed over"] if passed_over else []
    if left_out:
        notes.append(f"{len(left_out)} files were left out as not UTF-8 text, the first of them {left_out[0]}")

    def load(limit: int, scratch: Path) -> Corpus:
        rows, json_from = _load(source, kinds, unit, text_field, scratch)
        return Corpus(rows, "text", json_from, text_field).first(limit)

    return Source({**identity, "text_field": text_field}, notes, load)


def _load(
    source: str, kinds: dict[str, list[Path]], unit: str, text_field: str, scratch: Path
) -> tuple[Any, int | None]:
    """All rows as one data set with the column "text", and the first row that is JSON."""
    import datasets

    try:
        parts = []
        if kinds["text"]:
            parts.append(open_text(kinds["text"], UNITS[unit], scratch))
        if kinds["parquet"]:
            parts.append(open_parquet(kinds["parquet"], text_field, scratch).rename_columns({text_field: "text"}))
        json_from = sum(map(len, parts)) if kinds["jsonl"] else None
        if kinds["jsonl"]:
            # As lines: the JSON reader of `datasets` wants the same fields and types in all lines, and we want one.
            parts.append(open_text(kinds["jsonl"], "line", scratch))
        return datasets.concatenate_datasets(parts), json_from
    except SettingError:
        raise
    except Exception as error:
        raise SettingError("SOURCE", source, f"the datasets library cannot read it: {cause(error)}") from error


def open_text(paths: list[Path], sample_by: str, scratch: Path) -> Any:
    """Plain text as one data set with the column "text"."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string")})
    if sample_by != "document" and not any(path.stat().st_size for path in paths):
        return datasets.Dataset.from_dict({"text": []}, features)  # no row at all would be an error
    return datasets.Dataset.from_text(
        [glob.escape(str(path.absolute())) for path in paths],  # it takes names for patterns
        features=features,
        cache_dir=str(scratch),
        sample_by=sample_by,
    )


def open_parquet(paths: list[Path], column: str, scratch: Path) -> Any:
    """One column of texts of .parquet files as one data set."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    for path in paths:
        try:
            schema = parquet.read_schema(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise SettingError("SOURCE", path, f"is no parquet file: {one_line(error)}") from error
        if column not in schema.names or schema.field(column).type not in (pyarrow.string(), pyarrow.large_string()):
            raise SettingError("--text-field", column, f"is no column of texts in {path}: {', '.join(schema.names)}")
    return datasets.Dataset.from_parquet(
        [glob.escape(str(path.absolute())) for path in paths],
        features=datasets.Features({column: datasets.Value("string")}),
        cache_dir=str(scratch),
        columns=[column],
    )


def _names(root: Path) -> tuple[list[str], int]:
    """The files of `root` to be read, relative and sorted ("" for a file itself), and how many were passed over."""
    if not root.is_dir():
        regular(root)
        return [""], 0

    def stop(error: OSError) -> None:
        raise error

    names, passed_over = [], 0
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if name.startswith(".") or not path.is_file():
                continue
            if path.suffix in (*PLAIN, ".jsonl", ".parquet"):
                names.append(path.relative_to(root).as_posix())
            else:
                passed_over += 1
    return sorted(names), passed_over


def _digest(path: Path, is_text: bool) -> str | None:
    """SHA-256 of a file; None for text that is not UTF-8 or holds a zero byte."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as stream:
        try:
            while piece := stream.read(2**20):
                if is_text and b"\0" in piece:
                    return None
                digest.update(piece)
                if is_text:
                    decoder.decode(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return None
    return digest.hexdigest()
