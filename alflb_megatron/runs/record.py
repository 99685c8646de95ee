"""The run folder of `alflb train`: what is written where, and how its summary figures are defined.

    config.json      settings, versions, git revision, the parts in use, the number of parameters
    metrics.jsonl    one JSON object a step, appended as the run goes; keys in `STEP_KEYS`
    summary.json     the figures of a finished run; keys in `SUMMARY_KEYS`
    checkpoints/     written by the trainer

All files are strict JSON: a number that is not finite (a diverged loss) is written as null. Whole files are
replaced at once, so that a reader never meets half of one; only the last line of metrics.jsonl can be half
written, by a run that was killed. One process writes a folder (rank 0); nothing here imports torch.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import stat
import statistics
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from alflb_megatron.settings import SettingError

CONFIG_KEYS = ("settings", "alflb", "versions", "git_revision", "parts", "parameters")
STEP_KEYS = (
    "step",  # int, 1-based
    "loss",  # language-model loss in nats a token, mean over the global batch
    "lr",
    "grad_norm",  # or null
    "seconds",
    "tokens",  # int, of the global batch
    "tokens_per_second",
    "maxvio_mean",  # over the MoE layers, of this global batch
    "maxvio_max",
    "bias_spread",  # largest over layers of (max - min) of the expert bias
    "layers",  # numbers of the MoE layers
    "loads",  # one row of int counts a MoE layer
)  # and, where there are such things: aux_loss; bias, one row of floats a MoE layer
FIGURE_KEYS = (
    "steps",
    "final_loss",
    "maxvio_last50",
    "steps_to_maxvio_0.2",
    "seconds_per_step",
    "tokens_per_second",
)
SUMMARY_KEYS = (
    "rule",
    *FIGURE_KEYS,
    "validation_loss",
    "maxvio_global_mean",
    "maxvio_global_max",
    "validation_loads",
    "checkpoint",
    "run",
)


LARGEST_JSON = 2**26
"""Bytes of the largest JSON file that is read: a config.json has some thousand, a summary.json more."""

LONGEST_LINE = 2**26
"""Bytes of the longest line of a metrics.jsonl that is read."""


class HalfWrittenLine(UserWarning):
    """The last line of a metrics.jsonl is cut off: its run was killed, or is writing it now."""


def _finite(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _dumps(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`, all of it or nothing."""
    replace(path, [(_dumps(value, indent=2) + "\n").encode("utf-8")])


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
    return _loads(text.decode("utf-8"))


def _loads(text: str) -> Any:
    """Strict JSON; ValueError for all else: also for NaN, and for what is nested too deeply to be read."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file, all of it or nothing: beside its place first, then onto the disk, then into its place."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _require(record: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"a {what} lacks {', '.join(missing)}")


def _scan(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line of `path` with its record; None stands for the record of a half-written last line."""
    regular(path)
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), 1):
            if len(line) == LONGEST_LINE:
                raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE} characters")
            try:
                record = _loads(line)
            except ValueError as error:
                if not line.endswith("\n"):  # only the last line can lack its end
                    yield line, None
                    return
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError(f"{path}, line {number}: not a record of a step")
            yield line if line.endswith("\n") else line + "\n", record


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the records of a metrics.jsonl, or of the run folder that holds one, in the order of the file.

    A half-written last line is left out with a `HalfWrittenLine` warning that says so; damage anywhere else
    is a ValueError with the line's number. OSError where there is no such regular file.
    """
    path = Path(path)
    if path.is_dir():
        path /= "metrics.jsonl"
    for before, (line, record) in enumerate(_scan(path)):
        if record is None:
            text = f"{path}: the last line is half written ({len(line)} characters); {before} whole records precede it"
            warnings.warn(text, HalfWrittenLine, stacklevel=2)
        else:
            yield record


def is_run(path: Path) -> bool:
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


def _hold(path: Path) -> int:
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
        self._held = _hold(self.path)
        try:
            self._open(found, resume_step)
        except BaseException:
            os.close(self._held)
            raise

    def _open(self, found: Sequence[Path], resume_step: int | None) -> None:
        path = self.path
        if found and not is_run(self.path):
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
            for line, record in _scan(self.metrics):
                if record is not None and record["step"] <= self.last_step:
                    if record["step"] <= kept:
                        raise ValueError(f"step {record['step']} after step {kept} in {self.metrics.name}")
                    _require(record, STEP_KEYS, f"record of step {record['step']}")
                    _numbers([record], *_SUMMARISED)
                    kept = record["step"]
                    yield line

        replace(self.metrics, (line.encode("utf-8") for line in lines()))
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
        _require(record, STEP_KEYS, "record of a step")
        if record["step"] <= self.last_step:
            raise ValueError(f"step {record['step']} after step {self.last_step}")
        if len(record["loads"]) != len(record["layers"]):
            raise ValueError(f"{len(record['loads'])} rows of loads for {len(record['layers'])} layers")
        self._file.write(_dumps(record) + "\n")
        self._file.flush()
        self.last_step = record["step"]

    def records(self) -> list[dict[str, Any]]:
        """All records so far, those from before a resumption included."""
        self._file.flush()
        return list(read_metrics(self.metrics))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json; ValueError if a key of `SUMMARY_KEYS` is missing."""
        _require(summary, SUMMARY_KEYS, "summary")
        write_json(self.summary, summary)

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            os.close(self._held)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


_SUMMARISED = ("maxvio_mean", "seconds", "tokens")
"""What the summary rests on: numbers in every record."""


def _numbers(records: Sequence[Mapping[str, Any]], *names: str) -> None:
    """ValueError unless every record has a finite number under each of `names`."""
    for record in records:
        for name in names:
            value = record.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
                raise ValueError(f"the record of step {record.get('step')} has no number as {name}")


def maxvio_last(records: Sequence[Mapping[str, Any]], count: int = 50) -> float:
    """Mean of `maxvio_mean` over the last `count` steps, or over all of them if there are fewer."""
    return statistics.fmean(record["maxvio_mean"] for record in records[-count:])


def steps_to_maxvio(records: Sequence[Mapping[str, Any]], level: float = 0.2, following: int = 4) -> int | None:
    """The first step whose `maxvio_mean` is at most `level` while its mean over the next `following` steps is too.

    None if there is none. A step with fewer than `following` steps after it does not count.
    """
    values = [record["maxvio_mean"] for record in records]
    for i in range(len(values) - following):
        if values[i] <= level and statistics.fmean(values[i + 1 : i + 1 + following]) <= level:
            return int(records[i]["step"])
    return None


def seconds_per_step(records: Sequence[Mapping[str, Any]]) -> float:
    """Median of `seconds`; the first 5 steps, which hold warm-up, are left out if there are more than 10."""
    return statistics.median(record["seconds"] for record in _after_warm_up(records))


def _after_warm_up(records: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return records[5:] if len(records) > 10 else records


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of summary.json that follow from the records of the steps, under the names in `FIGURE_KEYS`.

    steps: the number of the last step; final_loss: its loss; maxvio_last50: `maxvio_last(records, 50)`;
    steps_to_maxvio_0.2: `steps_to_maxvio(records, 0.2)`; seconds_per_step: `seconds_per_step(records)`;
    tokens_per_second: the median of `tokens` over the same steps, divided by seconds_per_step.
    ValueError if there is no record, or one of them lacks what a figure is made of.
    """
    records = list(records)
    if not records:
        raise ValueError("a run without a step has no summary")
    _numbers(records, *_SUMMARISED)
    if not all(record["seconds"] > 0 for record in records):
        raise ValueError("a step that took no time has no tokens per second")
    seconds = seconds_per_step(records)
    tokens = statistics.median(record["tokens"] for record in _after_warm_up(records))
    return {
        "steps": records[-1]["step"],
        "final_loss": records[-1]["loss"],
        "maxvio_last50": maxvio_last(records, 50),
        "steps_to_maxvio_0.2": steps_to_maxvio(records, 0.2),
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
    }


def maxvio_text(value: float) -> str:
    """A MaxVio for people: two decimals, or two digits where the loads are so even that those would say nothing."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a run rests on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "megatron-core", "alflb_megatron"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_revision(file: Path = Path(__file__)) -> str | None:
    """The commit of the checkout that tracks `file`, by default this package's, with `-dirty` if it was changed.

    None where there is no git, no commit, or where git does not track the file: an installed package may
    lie inside somebody else's checkout.
    """
    # Inside a git hook these would point every call at the hook's repository.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.resolve().parent), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
