"""A run as it is seen from outside while it goes on: what was appended to its files since the last look.

A file that is replaced or cut (a resumed run) is noticed and read anew; of a long file only the end is read at first.
"""

from __future__ import annotations

import json
import math
import os
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from alflb_megatron.lab.records.history import History
from alflb_megatron.lab.records.step_record import StepRecord, clean_text, read_object
from alflb_megatron.settings import SettingError

TAIL = 2**24
"""Bytes at the end of a file that are read when it is first opened."""
PIECE = 2**22
"""Bytes read at once."""
LONGEST = 2**28
"""Bytes of the longest line that is waited for."""


class MetricsTail:
    """Reads the records that are appended to a metrics.jsonl, by `read_new`; to be closed, or used in `with`.

    The file is kept open: as long as it is, no other file can have its number, so a file that was replaced is
    recognised without doubt.
    """

    def __init__(self, path: Path, tail: int = TAIL) -> None:
        self.path, self.tail = path, tail
        self.bytes_read = 0
        """Of all looks together."""
        self.broken = 0
        """Whole lines that were no records of a step."""
        self._file: int | None = None
        self._offset = 0
        self._rest = b""
        self._skip = False  # the first line, whose beginning lies before where reading began

    def read_new(self) -> tuple[list[StepRecord], bool]:
        """The steps that were appended since the last look, and whether they are the first ones of a (new) file.

        A file that is not there has no steps. SettingError (RUN) where the name belongs to something else than a file.
        """
        try:
            here = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            self.close()
            return [], False
        except OSError as error:
            raise SettingError("RUN", clean_text(self.path), f"cannot be read ({error.strerror})") from None
        fresh = self._file is None
        if self._file is not None:
            held = os.fstat(self._file)
            fresh = (held.st_dev, held.st_ino) != (here.st_dev, here.st_ino) or here.st_size < self._offset
        if fresh and not self._open(here):
            return [], False
        return self._read(), fresh

    def _open(self, here: os.stat_result) -> bool:
        self.close()
        if not stat.S_ISREG(here.st_mode):
            raise SettingError("RUN", clean_text(self.path), "must be a file that a run writes")
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False  # between the two calls
        except OSError as error:
            raise SettingError("RUN", clean_text(self.path), f"cannot be read ({error.strerror})") from None
        self._offset = max(0, os.fstat(self._file).st_size - self.tail)
        self._skip = self._offset > 0
        return True

    def _read(self) -> list[StepRecord]:
        assert self._file is not None
        steps = []
        while piece := os.pread(self._file, PIECE, self._offset):
            self._offset += len(piece)
            self.bytes_read += len(piece)
            *lines, self._rest = (self._rest + piece).split(b"\n")
            if len(self._rest) > LONGEST:
                self._rest, self._skip = b"", True
            for line in lines:
                if self._skip:
                    self._skip = False
                elif (step := self._step(line)) is not None:
                    steps.append(step)
        return steps

    def _step(self, line: bytes) -> StepRecord | None:
        try:
            record = json.loads(line)
            if isinstance(record, dict):
                return StepRecord.from_json(record)
        except (ValueError, RecursionError):
            pass
        self.broken += 1
        return None

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file, self._offset, self._rest, self._skip = None, 0, b"", False

    def __enter__(self) -> MetricsTail:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class FollowedRun:
    """A run folder as it is seen from outside, look after look."""

    def __init__(self, path: Path, tail: int = TAIL) -> None:
        if path.exists() and not path.is_dir():
            raise SettingError("RUN", clean_text(path), "must name the folder of a run, and this is a file")
        self.path = path
        self.tail = MetricsTail(path / "metrics.jsonl", tail)
        self.history = self._begin()

    def _begin(self) -> History:
        history = History(self.path, clean_text(self.path), keep_layers=False)
        history.config = _object(self.path / "config.json")
        return history

    def read_new(self) -> list[StepRecord]:
        """Takes in what is new; returns the new steps."""
        # Before the records: it is written after the last of them.
        summary = _object(self.path / "summary.json")
        steps, fresh = self.tail.read_new()
        if fresh or not self.history.config:
            config = _object(self.path / "config.json")
            if fresh:
                self.history = self._begin()
            self.history.config = config
        for step in steps:
            if self.history.last is not None and step.step <= self.history.last.step:
                self.history = self._begin()  # written over in place
            self.history.add(step)
        self.history.summary = summary
        return steps

    def age(self) -> float:
        """Seconds since the file was written to; nan where there is none."""
        try:
            return max(0.0, time.time() - (self.path / "metrics.jsonl").stat().st_mtime)
        except OSError:
            return math.nan


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of a file, {} while there is none that can be read: a run may be starting."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}
