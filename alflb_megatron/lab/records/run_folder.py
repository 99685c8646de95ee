"""The run folder of `alflb train`: what is written where.

    config.json      settings, versions, git revision, the parts in use, the number of parameters
    metrics.jsonl    one JSON object a step (`metrics_file.py`)
    summary.json     the figures of a finished run (`summary.py`)
    checkpoints/     written by the trainer

Whole files are replaced at once, so that a reader never meets half of one (`files.py`). One process writes a folder
(rank 0); nothing here imports torch.
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from alflb_megatron.lab.records.files import dump_json, read_json, write_atomically, write_json
from alflb_megatron.lab.records.metrics_file import STEP_KEYS, read_metrics, require_keys, scan_lines
from alflb_megatron.lab.records.summary import SUMMARISED, SUMMARY_KEYS, require_numbers
from alflb_megatron.lab.records.versions import git_revision, versions
from alflb_megatron.settings import SettingError

CONFIG_KEYS = ("settings", "alflb", "versions", "git_revision", "parts", "parameters")


def is_run_folder(path: Path) -> bool:
    """Whether `path` is a folder that `RunFolder` made: it has a config.json with our keys."""
    try:
        config = read_json(path / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and all(key in config for key in CONFIG_KEYS)


def has_checkpoint(path: Path) -> bool:
    """Whether the run folder `path` holds a checkpoint that was written to its end."""
    return any(found.suffix != ".part" for found in (path / "checkpoints").glob("step_*"))


def saved_settings(folder: str | os.PathLike[str], flag: str) -> dict[str, Any]:
    """The settings in a run folder's config.json; SettingError naming `flag` where there is no run that can be read."""
    try:
        settings = read_json(Path(folder) / "config.json")["settings"]
        if not isinstance(settings, dict):
            raise TypeError("settings is no object")
        return settings
    except OSError:
        raise SettingError(flag, folder, "must name the folder of a run (--out)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(flag, folder, f"holds a config.json that cannot be read ({error})") from None


def _lock_folder(path: Path) -> int:
    """A file descriptor that holds the folder until it is closed; SettingError where another process has it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SettingError("--out", path, "is being written by another training") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


class RunFolder:
    """The folder of one run, open for writing; to be created by rank 0 alone, and closed (or used in `with`).

    Without `resume_step` a run starts at step 1: metrics and summary of an earlier run in the folder are
    replaced, but a run that has checkpoints is refused, since they would be taken for the new run's.
    With `resume_step` the records after that step are dropped from metrics.jsonl, and a summary, which
    described the longer run, is removed.

    The folder is held (flock) until it is closed: a job that a scheduler started twice must not write it twice.

    Raises SettingError (`--out`) if `path` is a file, holds something that is no run of ours, or records that cannot be
    read or gone on with, or is held by another training; the folder is then as it was.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.config, self.metrics, self.summary = (
            self.path / name for name in ("config.json", "metrics.jsonl", "summary.json")
        )
        self.checkpoints = self.path / "checkpoints"
        self.last_step = resume_step or 0
        try:
            if self.path.exists() and not self.path.is_dir():
                raise SettingError("--out", path, "must be a folder, and this is a file")
            self.path.mkdir(parents=True, exist_ok=True)
            # An empty metrics.jsonl alone is what a run leaves that was killed before its config.json was written.
            found = [
                p
                for p in self.path.iterdir()
                if not p.name.endswith(".part") and not (p == self.metrics and p.stat().st_size == 0)
            ]
        except OSError as error:
            raise SettingError("--out", path, f"must be a folder that can be written ({error.strerror})") from None
        self._lock = _lock_folder(self.path)
        try:
            self._open(found, resume_step)
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, found: Sequence[Path], resume_step: int | None) -> None:
        path = self.path
        if found and not is_run_folder(self.path):
            raise SettingError("--out", path, "must be a new folder, an empty one or that of an earlier run")
        if resume_step is None and has_checkpoint(self.path):
            raise SettingError("--out", path, "holds a run with checkpoints; give --resume to go on, or another folder")
        try:
            self._truncate()
            self.summary.unlink(missing_ok=True)
            self._file = self.metrics.open("a", encoding="utf-8")
        except OSError as error:
            raise SettingError("--out", path, f"must be a folder that can be written ({error})") from None
        except ValueError as error:
            raise SettingError("--out", path, f"holds records that cannot be gone on with: {error}") from None

    def _truncate(self) -> None:
        if not self.metrics.exists():
            return
        if self.last_step == 0:
            self.metrics.unlink()
            return
        kept = 0

        def lines() -> Iterator[str]:
            nonlocal kept
            for line, record in scan_lines(self.metrics):
                if record is not None and record["step"] <= self.last_step:
                    if record["step"] <= kept:
                        raise ValueError(f"step {record['step']} after step {kept} in {self.metrics.name}")
                    require_keys(record, STEP_KEYS, f"record of step {record['step']}")
                    require_numbers([record], *SUMMARISED)
                    kept = record["step"]
                    yield line

        write_atomically(self.metrics, (line.encode("utf-8") for line in lines()))
        if 0 < kept < self.last_step:
            text = f"{self.metrics} ends at step {kept}, the run goes on after step {self.last_step}"
            warnings.warn(text, UserWarning, stacklevel=3)

    def write_config(
        self,
        settings: Mapping[str, Any],
        alflb: Mapping[str, Any],
        parts: Mapping[str, Any],
        parameters: Mapping[str, int],
    ) -> dict[str, Any]:
        """Writes config.json, to which it adds `versions()` and `git_revision()`, and returns its content.

        `parameters` is {"total": int, "active": int}: all, and those that one token passes through.
        """
        values = (settings, alflb, versions(), git_revision(), parts, parameters)
        config = {
            key: dict(value) if isinstance(value, Mapping) else value
            for key, value in zip(CONFIG_KEYS, values, strict=True)
        }
        write_json(self.config, config)
        return config

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds the record of one step. ValueError if a key of `STEP_KEYS` is missing or the step is not a later one."""
        require_keys(record, STEP_KEYS, "record of a step")
        if record["step"] <= self.last_step:
            raise ValueError(f"step {record['step']} after step {self.last_step}")
        if len(record["loads"]) != len(record["layers"]):
            raise ValueError(f"{len(record['loads'])} rows of loads for {len(record['layers'])} layers")
        self._file.write(dump_json(record) + "\n")
        self._file.flush()
        self.last_step = record["step"]

    def records(self) -> list[dict[str, Any]]:
        """All records so far, those from before a resumption included."""
        self._file.flush()
        return list(read_metrics(self.metrics))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json; ValueError if a key of `SUMMARY_KEYS` is missing."""
        require_keys(summary, SUMMARY_KEYS, "summary")
        write_json(self.summary, summary)

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            os.close(self._lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
