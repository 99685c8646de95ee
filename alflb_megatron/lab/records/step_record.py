"""One step of a run as its record in metrics.jsonl tells it, whatever is missing from it or wrong with it.

What is missing, null or of another kind than it should be is left open (nan, or an empty list), never guessed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alflb_megatron.lab.records.files import read_json
from alflb_megatron.metrics import sampling_floor

Array = NDArray[np.float64]
nan = math.nan
EXACT = 2**53  # whole numbers up to it are exact as float64

SIMULATED = 1 << 16
"""Tokens of a simulated draw at the most. The floor falls with the root of the tokens where loads are large."""


def as_number(value: Any) -> float:
    """`value` as a float; nan where it is none, or so large that sums of it would not be finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return nan
    return float(value)


def clean_text(text: Any, length: int = 500) -> str:
    """`text` on one line, of `length` characters at the most; what cannot be printed (a terminal's codes) becomes ?."""
    line = "".join(c if c.isprintable() else " " if c in "\n\t" else "?" for c in str(text))
    return line if len(line) <= length else line[: length - 1] + "…"


def _row(value: Any) -> Array:
    """A list of numbers as float64 [n], nan for what is no number; [0] where it is no list."""
    return np.array([as_number(item) for item in value] if isinstance(value, list) else [], dtype=np.float64)


def _rows(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [clean_text(item) for item in _rows(value)]


@dataclass(frozen=True)
class LayerRecord:
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


MICRO = ("maxvio_micro_mean", "maxvio_micro_worst", "overload_micro_worst")
"""What there is where micro-batches move the bias."""


@dataclass(frozen=True)
class StepRecord:
    """One record of metrics.jsonl; see `metrics_file.STEP_KEYS` for units. A figure that it lacks is nan."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    tokens: float
    maxvio_mean: float
    maxvio_max: float
    bias_spread: float
    maxvio_micro_mean: float
    maxvio_micro_worst: float
    overload_micro_worst: float
    floor: float
    layers: list[LayerRecord]
    alarms: list[str]
    rejected: list[str]
    skipped: bool
    diverged: bool
    """Whether there is a loss and it is not finite."""
    certificates: list[dict[str, Any]]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> StepRecord:
        """Reads a record; what `maxvio_mean`, `maxvio_max` and `bias_spread` lack follows from loads and biases.

        ValueError where its step is no number of a step.
        """
        if not 0 <= (at := as_number(record.get("step"))) <= EXACT:
            raise ValueError(f"a record of step {clean_text(record.get('step'), 40)}")
        loads, bias, gain = (_rows(record.get(key)) for key in ("loads", "bias", "gain"))
        names = _rows(record.get("layers"))
        layers = []
        for i, row in enumerate(loads):
            name = as_number(names[i]) if i < len(names) else nan
            bias_E = _row(bias[i]) if i < len(bias) else _row(None)
            layers.append(
                LayerRecord(
                    number=int(name) if abs(name) <= EXACT else i + 1,
                    loads_E=(loads_E := _row(row)),
                    bias_E=bias_E if len(bias_E) == len(loads_E) else _row(None),
                    gain=as_number(gain[i]) if i < len(gain) else nan,
                )
            )
        figures = {key: as_number(record.get(key)) for key in ("loss", "lr", "grad_norm", "seconds", "tokens")}
        measured = {key: as_number(record.get(key)) for key in ("maxvio_mean", "maxvio_max", "bias_spread", *MICRO)}
        vios = [layer.maxvio for layer in layers]
        if vios and math.isnan(measured["maxvio_mean"]):
            measured["maxvio_mean"] = float(np.mean(vios))
        if vios and math.isnan(measured["maxvio_max"]):
            measured["maxvio_max"] = float(np.max(vios))
        if layers and math.isnan(measured["bias_spread"]):
            measured["bias_spread"] = float(np.max([layer.spread for layer in layers]))
        return cls(
            step=int(at),
            floor=as_number(record.get("maxvio_floor")),
            layers=layers,
            alarms=_texts(record.get("alarms")),
            rejected=_texts(record.get("rejected")),
            skipped=record.get("skipped") is True,
            diverged="loss" in record and not math.isfinite(as_number(record["loss"])),
            certificates=[row for row in _rows(record.get("certificates")) if isinstance(row, dict)],
            **figures,
            **measured,
        )


@functools.cache
def _scaled_floor(tokens: int, topk: int, experts: int) -> float:
    drawn = min(tokens, SIMULATED)
    draws = max(20, min(200, 10_000_000 // (drawn * topk)))
    return sampling_floor(drawn, topk, experts, draws=draws) * math.sqrt(drawn / tokens)


def sampling_floor_of(step: StepRecord, topk: int | None) -> float:
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


def as_object(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, {} otherwise."""
    return value if isinstance(value, dict) else {}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none; ValueError where it is something else."""
    try:
        value = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({clean_text(error, 200)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value
