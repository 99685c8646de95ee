"""metrics.jsonl: one JSON object a step, appended as the run goes; keys in `STEP_KEYS`.

Only the last line can be half written, by a run that was killed or is writing it now.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alflb_megatron.lab.records.files import parse_json, regular

LONGEST_LINE = 2**26
"""Bytes of the longest line of a metrics.jsonl that is read."""

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
)  # and, where there are such things: aux_loss; bias, one row of floats a MoE layer; and where the
# micro-batches of this global batch move the bias, maxvio_micro_mean and maxvio_micro_worst, their MaxVio, and
# overload_micro_worst, the load of the fullest expert-parallel rank over the mean rank's in the worst of them; and at
# the steps that are evaluated, validation, with summary.json's figures of the validation set


class HalfWrittenLine(UserWarning):
    """The last line of a metrics.jsonl is cut off: its run was killed, or is writing it now."""


def require_keys(record: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"a {what} lacks {', '.join(missing)}")


def scan_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line of `path` with its record; None stands for the record of a half-written last line."""
    regular(path)
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), 1):
            if len(line) == LONGEST_LINE:
                raise ValueError(f"{path}, line {number}: longer than {LONGEST_LINE} characters")
            try:
                record = parse_json(line)
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
    for before, (line, record) in enumerate(scan_lines(path)):
        if record is None:
            text = f"{path}: the last line is half written ({len(line)} characters); {before} whole records precede it"
            warnings.warn(text, HalfWrittenLine, stacklevel=2)
        else:
            yield record
