"""The figures of a finished run, as summary.json holds them, and how each is defined."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FIGURE_KEYS = (
    "steps",
    "final_loss",
    "maxvio_last50",
    "steps_to_maxvio_0.2",
    "steps_to_2x_sequence_floor",
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
    "sequence_floor",
    "checkpoint",
    "run",
)

SUMMARISED = ("maxvio_mean", "seconds", "tokens")
"""What the summary rests on: numbers in every record."""


def require_numbers(records: Sequence[Mapping[str, Any]], *names: str) -> None:
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


def summarise(records: Iterable[Mapping[str, Any]], sequence_floor: float | None = None) -> dict[str, Any]:
    """The figures of summary.json that follow from the records of the steps, under the names in `FIGURE_KEYS`.

    steps: the number of the last step; final_loss: its loss; maxvio_last50: `maxvio_last(records, 50)`;
    steps_to_maxvio_0.2: `steps_to_maxvio(records, 0.2)`; steps_to_2x_sequence_floor: the same with twice the floor,
    None where it is not known; seconds_per_step: `seconds_per_step(records)`;
    tokens_per_second: the median of `tokens` over the same steps, divided by seconds_per_step.
    ValueError if there is no record, or one of them lacks what a figure is made of.
    """
    records = list(records)
    if not records:
        raise ValueError("a run without a step has no summary")
    require_numbers(records, *SUMMARISED)
    if not all(record["seconds"] > 0 for record in records):
        raise ValueError("a step that took no time has no tokens per second")
    seconds = seconds_per_step(records)
    tokens = statistics.median(record["tokens"] for record in _after_warm_up(records))
    return {
        "steps": records[-1]["step"],
        "final_loss": records[-1]["loss"],
        "maxvio_last50": maxvio_last(records, 50),
        "steps_to_maxvio_0.2": steps_to_maxvio(records, 0.2),
        "steps_to_2x_sequence_floor": None if sequence_floor is None else steps_to_maxvio(records, 2 * sequence_floor),
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
    }


def maxvio_text(value: float) -> str:
    """A MaxVio for people: two decimals, or two digits where the loads are so even that those would say nothing."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"
