"""What a run folder tells about its run, read by `alflb report` and `alflb watch` alike.

Files are those of `run_folder.py`, of this or an older version, of a run that has ended, goes on or was killed. Memory
does not grow with the loads: they are kept as means over bins of steps that double in width when there are too many.
"""

from __future__ import annotations

import os
import warnings
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alflb_megatron.lab.records.metrics_file import HalfWrittenLine, read_metrics
from alflb_megatron.lab.records.step_record import (
    Array,
    LayerRecord,
    StepRecord,
    as_object,
    clean_text,
    nan,
    read_object,
    sampling_floor_of,
)
from alflb_megatron.settings import SettingError

BINS = 200
"""Bins of steps at the most; a picture is not wider than twice as many pixels."""
KEPT_EVENTS = 200
"""Alarms and the like that are kept: the latest."""


class LayerHistory:
    """Means over bins of steps of what one layer did: loads, bias [BINS, E], MaxVio, gain [BINS]."""

    def __init__(self, layer: int, experts: int) -> None:
        self.layer, self.experts = layer, experts
        self._sums = {
            name: np.zeros((BINS, width)) for name, width in (("loads", experts), ("bias", experts), ("gain", 1))
        }
        self._seen = {name: np.zeros((BINS, 1)) for name in self._sums}

    def add(self, at: int, layer: LayerRecord) -> None:
        for name, row in (("loads", layer.loads_E), ("bias", layer.bias_E), ("gain", np.array([layer.gain]))):
            if len(row) and np.isfinite(row).all():
                self._sums[name][at] += row
                self._seen[name][at] += 1

    def halve(self) -> None:
        """Makes every two bins one."""
        for table in (self._sums, self._seen):
            for rows in table.values():
                rows[: BINS // 2] = rows[0::2] + rows[1::2]
                rows[BINS // 2 :] = 0

    def has(self, name: str) -> bool:
        return bool(self._seen[name].any())

    def mean(self, name: str, bins: int) -> Array:
        """The means of the first `bins` bins of loads, bias or gain; nan where a bin has seen none."""
        seen = self._seen[name][:bins]
        means: Array = np.where(seen > 0, self._sums[name][:bins] / np.maximum(seen, 1), nan)
        return means

    def relative_loads(self, bins: int) -> Array:
        """Loads over their mean over the experts [bins, E]; nan where the layer saw no token."""
        loads = self.mean("loads", bins)
        mean = loads.mean(axis=1, keepdims=True)
        relative: Array = np.where(mean > 0, loads / np.where(mean > 0, mean, 1), nan)
        return relative


@dataclass
class Event:
    """Something that the records of the steps `first` to `last` all say; kind: alarm, rejected, skipped, loss."""

    first: int
    last: int
    kind: str
    text: str

    @property
    def steps(self) -> str:
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,} - {self.last:,}"


SERIES = ("step", "loss", "maxvio_mean", "maxvio_max", "maxvio_micro_mean", "bias_spread", "seconds", "tokens")


@dataclass
class History:
    """One run: its config and summary as they are ({} where missing), and what its records tell."""

    path: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    cut_off: str = ""
    """What was said of a half-written last line; empty where the file is whole."""
    last: StepRecord | None = None
    keep_layers: bool = True
    """Whether loads, biases and gains are kept at all."""
    layer_histories: dict[tuple[int, int], LayerHistory] = field(default_factory=dict)
    """By layer and number of experts, in the order of appearance."""
    certificates: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    """The latest `KEPT_EVENTS`, in the order of their first steps."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many times each kind of event was in a step, the forgotten ones included."""
    _series: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in SERIES})
    _going_on: dict[tuple[str, str], Event] = field(default_factory=dict)
    _edges: list[int] = field(default_factory=list)
    _width: int = 1

    def add(self, step: StepRecord) -> None:
        """Takes in the next record."""
        records = len(self._series["step"])
        if records == BINS * self._width:
            self._width *= 2
            self._edges = self._edges[0::2]
            for layer_history in self.layer_histories.values():
                layer_history.halve()
        at = records // self._width
        if at == len(self._edges):
            self._edges.append(step.step)
        for name, values in self._series.items():
            values.append(getattr(step, name))
        for layer in step.layers if self.keep_layers else []:
            if not len(layer.loads_E):
                continue
            key = (layer.number, len(layer.loads_E))
            if key not in self.layer_histories:
                self.layer_histories[key] = LayerHistory(*key)
            self.layer_histories[key].add(at, layer)
        self.certificates += [(step.step, row) for row in step.certificates]
        self._note_events(step)
        self.last = step

    def _note_events(self, step: StepRecord) -> None:
        going_on: dict[tuple[str, str], Event] = {}
        found = [("alarm", text) for text in dict.fromkeys(step.alarms)]
        if step.rejected:
            layers = ", ".join(step.rejected)
            found.append(("rejected", f"scores that are NaN or infinite: the bias of layer {layers} stayed"))
        if step.skipped:
            found.append(("skipped", "the optimizer skipped the step"))
        if step.diverged:
            found.append(("loss", "the loss is not finite"))
        for kind, text in found:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            event = self._going_on.get((kind, text))
            if event is not None:
                event.last = step.step
            else:
                event = Event(step.step, step.step, kind, text)
                self.events.append(event)
            going_on[kind, text] = event
        self._going_on = going_on

    def series(self, name: str) -> Array:
        """One of `SERIES`, a value a record, float64 [records]."""
        return np.frombuffer(self._series[name], dtype=np.float64)

    @property
    def width(self) -> int:
        """Steps in a bin."""
        return self._width

    @property
    def bins(self) -> int:
        return len(self._edges)

    def edges(self) -> Array:
        """Where each bin begins and the last ends, half a step before its first and after its last: [bins + 1]."""
        last = self.last.step if self.last else 0
        return np.array([*self._edges, max(last, self._edges[-1]) + 1], dtype=np.float64) - 0.5

    def middles(self) -> Array:
        """The middle of each bin, a number of a step: float64 [bins]."""
        edges = self.edges()
        middles: Array = (edges[:-1] + edges[1:]) / 2
        return middles

    def setting(self, name: str) -> Any:
        """A setting by name, in whatever group it was written; None where there is none."""
        for group in (self.settings(), *self.settings().values()):
            if isinstance(group, Mapping) and name in group and not isinstance(group[name], Mapping):
                return group[name]
        return None

    def settings(self) -> dict[str, Any]:
        return as_object(self.config.get("settings"))

    @property
    def topk(self) -> int | None:
        value = self.setting("topk")
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def floor(self) -> float:
        """The sampling floor of MaxVio, of the last step's sizes; nan where they are not known."""
        return sampling_floor_of(self.last, self.topk) if self.last else nan

    def ended(self) -> bool:
        return bool(self.summary)


def read_history(path: Path, label: str, flag: str = "RUN") -> History:
    """Reads a run folder from the first record to the last.

    SettingError naming `flag` where there is no run, no whole record, or a file that is damaged elsewhere than in the
    last line of a metrics.jsonl, which a running job is just writing.
    """
    try:
        if not path.is_dir():
            raise SettingError(flag, clean_text(path), "must name the folder of a run (--out of alflb train)")
        history = History(path, label, read_object(path / "config.json"), read_object(path / "summary.json"))
        with warnings.catch_warnings(record=True) as caught, np.errstate(all="ignore"):
            warnings.simplefilter("always", HalfWrittenLine)
            for record in read_metrics(path):
                history.add(StepRecord.from_json(record))
    except FileNotFoundError:
        raise SettingError(flag, clean_text(path), "holds no metrics.jsonl: no run has begun there") from None
    except OSError as error:
        raise SettingError(flag, clean_text(path), f"cannot be read ({error.strerror})") from None
    except SettingError:
        raise
    except (ValueError, RecursionError) as error:
        reason = clean_text(str(error) or type(error).__name__, 300)
        raise SettingError(flag, clean_text(path), f"holds a file that cannot be read ({reason})") from None
    history.cut_off = next((str(w.message) for w in caught if issubclass(w.category, HalfWrittenLine)), "")
    if history.last is None:
        raise SettingError(flag, clean_text(path), "holds no whole record of a step yet")
    return history


def labels(paths: Sequence[Path]) -> list[str]:
    """A short name for each run: the last parts of its path, as many as tell all of them apart."""
    parts = [
        [clean_text(os.fsencode(part).decode("utf-8", "replace")) for part in path.absolute().parts] for path in paths
    ]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {'/'.join(part[-1:])}" for number, part in enumerate(parts, 1)]
