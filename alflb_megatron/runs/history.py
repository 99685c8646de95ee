"""What a run folder tells about its run, read by `alflb report` and `alflb watch` alike.

Files are those of `runs/record.py`, of this or an older version, of a run that has ended, goes on or was killed. What
is missing, null or of another kind than it should be is left open (nan, or an empty list), never guessed. Memory does
not grow with the loads: they are kept as means over bins of steps that double in width when there are too many.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alflb_megatron.metrics import sampling_floor
from alflb_megatron.runs.record import HalfWrittenLine, read_metrics
from alflb_megatron.settings import SettingError

Array = NDArray[np.float64]
nan = math.nan
EXACT = 2**53  # whole numbers up to it are exact as float64

BINS = 200
"""Bins of steps at the most; a picture is not wider than twice as many pixels."""
KEPT_EVENTS = 200
"""Alarms and the like that are kept: the latest."""
SIMULATED = 1 << 16
"""Tokens of a simulated draw at the most. The floor falls with the root of the tokens where loads are large."""


def number(value: Any) -> float:
    """`value` as a float; nan where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return nan
    try:
        return float(value)
    except OverflowError:
        return nan


def clean(text: Any, length: int = 500) -> str:
    """`text` on one line, of `length` characters at the most; what cannot be printed (a terminal's codes) becomes ?."""
    line = "".join(c if c.isprintable() else " " if c in "\n\t" else "?" for c in str(text))
    return line if len(line) <= length else line[: length - 1] + "…"


def _row(value: Any) -> Array:
    """A list of numbers as float64 [n], nan for what is no number; [0] where it is no list."""
    return np.array([number(item) for item in value] if isinstance(value, list) else [], dtype=np.float64)


def _rows(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [clean(item) for item in _rows(value)]


@dataclass(frozen=True)
class Layer:
    """What one MoE layer did in one step. Loads and bias are float64 [E], the bias [0] where there is none."""

    number: int
    loads_E: Array
    bias_E: Array
    gain: float

    @property
    def maxvio(self) -> float:
        """(largest load - mean load) / mean load; nan where a load is missing, 0 where there is none at all."""
        if not len(self.loads_E) or not np.isfinite(self.loads_E).all():
            return nan
        mean = float(self.loads_E.mean())
        return float(self.loads_E.max()) / mean - 1 if mean > 0 else 0.0

    @property
    def spread(self) -> float:
        """max - min of the bias; nan where there is none."""
        return float(np.ptp(self.bias_E)) if len(self.bias_E) else nan


@dataclass(frozen=True)
class Step:
    """One record of metrics.jsonl; see `record.STEP_KEYS` for units. A figure that it lacks is nan."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    tokens: float
    maxvio_mean: float
    maxvio_max: float
    bias_spread: float
    floor: float
    layers: list[Layer]
    alarms: list[str]
    rejected: list[str]
    skipped: bool
    certificates: list[dict[str, Any]]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Step:
        """Reads a record; what `maxvio_mean`, `maxvio_max` and `bias_spread` lack follows from loads and biases.

        ValueError where its step is no number of a step.
        """
        if not 0 <= (at := number(record.get("step"))) <= EXACT:
            raise ValueError(f"a record of step {clean(record.get('step'), 40)}")
        loads, bias, gain = (_rows(record.get(key)) for key in ("loads", "bias", "gain"))
        names = _rows(record.get("layers"))
        layers = []
        for i, row in enumerate(loads):
            name = number(names[i]) if i < len(names) else nan
            bias_E = _row(bias[i]) if i < len(bias) else _row(None)
            layers.append(
                Layer(
                    number=int(name) if abs(name) <= EXACT else i + 1,
                    loads_E=(loads_E := _row(row)),
                    bias_E=bias_E if len(bias_E) == len(loads_E) else _row(None),
                    gain=number(gain[i]) if i < len(gain) else nan,
                )
            )
        figures = {key: number(record.get(key)) for key in ("loss", "lr", "grad_norm", "seconds", "tokens")}
        measured = {key: number(record.get(key)) for key in ("maxvio_mean", "maxvio_max", "bias_spread")}
        vios = [layer.maxvio for layer in layers]
        if vios and math.isnan(measured["maxvio_mean"]):
            measured["maxvio_mean"] = float(np.mean(vios))
        if vios and math.isnan(measured["maxvio_max"]):
            measured["maxvio_max"] = float(np.max(vios))
        if layers and math.isnan(measured["bias_spread"]):
            measured["bias_spread"] = float(np.max([layer.spread for layer in layers]))
        return cls(
            step=int(at),
            floor=number(record.get("maxvio_floor")),
            layers=layers,
            alarms=_texts(record.get("alarms")),
            rejected=_texts(record.get("rejected")),
            skipped=record.get("skipped") is True,
            certificates=[row for row in _rows(record.get("certificates")) if isinstance(row, dict)],
            **figures,
            **measured,
        )


@functools.cache
def _scaled_floor(tokens: int, topk: int, experts: int) -> float:
    drawn = min(tokens, SIMULATED)
    draws = max(20, min(200, 10_000_000 // (drawn * topk)))
    return sampling_floor(drawn, topk, experts, draws=draws) * math.sqrt(drawn / tokens)


def floor_of(step: Step, topk: int | None) -> float:
    """The sampling floor of MaxVio of a step, mean over its layers: what it records, or a simulation of its sizes.

    `topk` (experts a token) is found from loads and tokens where it is None. nan where the sizes are not known.
    """
    if math.isfinite(step.floor):
        return step.floor
    floors = []
    for layer in step.layers:
        experts, total = len(layer.loads_E), float(layer.loads_E.sum())
        chosen = topk or (round(total / step.tokens) if step.tokens > 0 and math.isfinite(total) else 0)
        if not (1 <= chosen <= experts <= 100_000 and 1 <= total / chosen < 1e15):
            return nan
        floors.append(_scaled_floor(round(total / chosen), chosen, experts))
    return sum(floors) / len(floors) if floors else nan


class Track:
    """Means over bins of steps of what one layer did: loads, bias [BINS, E], MaxVio, gain [BINS]."""

    def __init__(self, layer: int, experts: int) -> None:
        self.layer, self.experts = layer, experts
        self._sums = {
            name: np.zeros((BINS, width)) for name, width in (("loads", experts), ("bias", experts), ("gain", 1))
        }
        self._seen = {name: np.zeros((BINS, 1)) for name in self._sums}

    def add(self, at: int, layer: Layer) -> None:
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


SERIES = ("step", "loss", "maxvio_mean", "maxvio_max", "bias_spread", "seconds", "tokens")


@dataclass
class History:
    """One run: its config and summary as they are ({} where missing), and what its records tell."""

    path: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    cut_off: str = ""
    """What was said of a half-written last line; empty where the file is whole."""
    last: Step | None = None
    tracks: dict[tuple[int, int], Track] = field(default_factory=dict)
    """By layer and number of experts, in the order of appearance."""
    certificates: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    events: deque[tuple[int, str, str]] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    """Step, kind (alarm, rejected, skipped, loss), text; the latest `KEPT_EVENTS` of them."""
    counts: dict[str, int] = field(default_factory=dict)
    """How often each kind of event was, the forgotten ones included."""
    _series: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in SERIES})
    _edges: list[int] = field(default_factory=list)
    _width: int = 1

    def add(self, step: Step) -> None:
        """Takes in the next record."""
        records = len(self._series["step"])
        if records == BINS * self._width:
            self._width *= 2
            self._edges = self._edges[0::2]
            for track in self.tracks.values():
                track.halve()
        at = records // self._width
        if at == len(self._edges):
            self._edges.append(step.step)
        for name, values in self._series.items():
            values.append(getattr(step, name))
        for layer in step.layers:
            key = (layer.number, len(layer.loads_E))
            if key not in self.tracks:
                self.tracks[key] = Track(*key)
            self.tracks[key].add(at, layer)
        self.certificates += [(step.step, row) for row in step.certificates]
        self._note_events(step)
        self.last = step

    def _note_events(self, step: Step) -> None:
        found = [("alarm", text) for text in step.alarms]
        if step.rejected:
            layers = ", ".join(step.rejected)
            found.append(("rejected", f"scores that are NaN or infinite: the bias of layer {layers} stayed"))
        if step.skipped:
            found.append(("skipped", "the optimizer skipped the step"))
        if not math.isfinite(step.loss):
            found.append(("loss", "the loss is not finite"))
        for kind, text in found:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            self.events.append((step.step, kind, text))

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
        """The first step of each bin, and the step after the last: float64 [bins + 1]."""
        last = self.last.step if self.last else 0
        return np.array([*self._edges, max(last, self._edges[-1]) + 1], dtype=np.float64)

    def setting(self, name: str) -> Any:
        """A setting by name, in whatever group it was written; None where there is none."""
        for group in (self.settings(), *self.settings().values()):
            if isinstance(group, Mapping) and name in group and not isinstance(group[name], Mapping):
                return group[name]
        return None

    def settings(self) -> dict[str, Any]:
        return mapping(self.config.get("settings"))

    @property
    def topk(self) -> int | None:
        value = self.setting("topk")
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def floor(self) -> float:
        """The sampling floor of MaxVio, of the last step's sizes; nan where they are not known."""
        return floor_of(self.last, self.topk) if self.last else nan

    def ended(self) -> bool:
        return bool(self.summary)


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, {} otherwise."""
    return value if isinstance(value, dict) else {}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none; ValueError where it is something else."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({clean(error, 200)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def read_history(path: Path, label: str, flag: str = "RUN") -> History:
    """Reads a run folder from the first record to the last.

    SettingError naming `flag` where there is no run, no whole record, or a file that is damaged elsewhere than in the
    last line of a metrics.jsonl, which a running job is just writing.
    """
    try:
        if not path.is_dir():
            raise SettingError(flag, clean(path), "must name the folder of a run (--out of alflb train)")
        history = History(path, label, read_object(path / "config.json"), read_object(path / "summary.json"))
        with warnings.catch_warnings(record=True) as caught, np.errstate(all="ignore"):
            warnings.simplefilter("always", HalfWrittenLine)
            for record in read_metrics(path):
                history.add(Step.of(record))
    except FileNotFoundError:
        raise SettingError(flag, clean(path), "holds no metrics.jsonl: no run has begun there") from None
    except OSError as error:
        raise SettingError(flag, clean(path), f"cannot be read ({error.strerror})") from None
    except SettingError:
        raise
    except (ValueError, RecursionError) as error:
        text = str(error) or type(error).__name__
        raise SettingError(flag, clean(path), f"holds a file that cannot be read ({clean(text, 300)})") from None
    history.cut_off = next((str(w.message) for w in caught if issubclass(w.category, HalfWrittenLine)), "")
    if history.last is None:
        raise SettingError(flag, clean(path), "holds no whole record of a step yet")
    return history


def labels(paths: Sequence[Path]) -> list[str]:
    """A short name for each run: the last parts of its path, as many as tell all of them apart."""
    parts = [[clean(os.fsencode(part).decode("utf-8", "replace")) for part in path.absolute().parts] for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {'/'.join(part[-1:])}" for number, part in enumerate(parts, 1)]
