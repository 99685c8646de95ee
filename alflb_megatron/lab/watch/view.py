"""How `alflb watch` shows a run: one frame with rich, and one line where the output is no terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from alflb_megatron.lab.display.text import short_count
from alflb_megatron.lab.records.step_record import Array, LayerRecord, as_number, clean_text
from alflb_megatron.lab.records.summary import maxvio_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from alflb_megatron.lab.watch.follow import FollowedRun

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = ".:-=+*#@"
"""The same eight levels where the output has no block characters."""
RECENT = 20
"""Steps whose rate is shown."""
ALARMS = 5
SILENT = 60.0
"""Seconds without a record after which it is said, if it is also ten times a step's."""
NARROW = 24
"""Characters of loads that make two lines of figures better than one."""


def maxvio_cell(value: float) -> str:
    return maxvio_text(value) if math.isfinite(value) else "-"


def _digits(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def block_levels(values: Array, low: float, high: float, symbols: str) -> str:
    """A character for each value: its place between `low` and `high` in eight levels; a space where it is nan."""
    span = high - low if high > low else 1.0
    places = np.clip((values - low) / span * len(symbols), 0, len(symbols) - 1)
    return "".join(" " if math.isnan(place) else symbols[int(place)] for place in places)


def sparkline(values: Array, width: int, symbols: str) -> tuple[str, int, Array]:
    """The last values on a log scale, oldest first, in `width` characters at the most, each a mean over equally many.

    Returns the characters, how many values they stand for, and what they show, float64 [characters].
    """
    each = max(1, min(10, len(values) // width))  # not more, so that what is new can be seen
    values = values[-(min(len(values) // each, width) * each) :]
    grouped = values.reshape(-1, each)
    seen = np.isfinite(grouped).sum(axis=1)
    means = np.where(seen > 0, np.nansum(grouped, axis=1) / np.maximum(seen, 1), np.nan)
    logs = np.log(np.where(means > 0, means, np.nan))
    finite = logs[np.isfinite(logs)]
    if not len(finite):
        return "", 0, means
    return block_levels(logs, float(finite.min()), float(finite.max()), symbols), len(values), means


def loads_text(layer: LayerRecord, width: int, symbols: str) -> Text:
    """A character an expert, half height at the mean load; largest first where there are more experts than room."""
    loads = layer.loads_E
    mean = float(loads.mean()) if len(loads) else 0.0
    if not mean > 0:
        return Text("no loads")
    relative = loads / mean
    if len(relative) > width:
        ordered = np.sort(relative)[::-1]
        relative = ordered[np.linspace(0, len(ordered) - 1, width).round().astype(int)]
    text = Text()
    for value, symbol in zip(relative, block_levels(relative, 0.0, 2.0, symbols), strict=True):
        style = "yellow" if value >= 1.5 else "magenta" if value <= 0.5 else ""
        text.append("x" if value == 0 else symbol, "bold red" if value == 0 else style)
    return text


def _rate(followed: FollowedRun) -> tuple[float, float]:
    """Tokens a second and seconds a step of the last `RECENT` steps; nan where they are not known."""
    tokens, seconds = (followed.history.series(name)[-RECENT:] for name in ("tokens", "seconds"))
    known = np.isfinite(tokens) & np.isfinite(seconds) & (seconds > 0)
    if not known.any():
        return math.nan, math.nan
    return float(tokens[known].sum() / seconds[known].sum()), float(np.median(seconds[known]))


def _total(followed: FollowedRun) -> float:
    total = as_number(followed.history.setting("steps"))
    return total if total >= 1 else math.nan


def _step_text(followed: FollowedRun) -> str:
    assert followed.history.last is not None
    total = _total(followed)
    return f"step {followed.history.last.step:,}" + (f" / {total:,.0f}" if math.isfinite(total) else "")


def render_line(followed: FollowedRun) -> str:
    """The last step in one line of text."""
    last = followed.history.last
    assert last is not None
    rate, _ = _rate(followed)
    speed = f"  {short_count(rate)} tokens/s" if math.isfinite(rate) else ""
    return (
        f"{_step_text(followed)}  loss {_digits(last.loss, '.3f')}  MaxVio {maxvio_cell(last.maxvio_mean)}  "
        f"worst layer {maxvio_cell(last.maxvio_max)}  floor {maxvio_cell(followed.history.floor())}{speed}"
    )


def render_frame(followed: FollowedRun, console: Console, whole: bool = False) -> RenderableType:
    """All that is shown of a run; `whole` shows every layer, else as many as the terminal is high."""
    history, last = followed.history, followed.history.last
    if last is None:
        return Text(f"waiting for {clean_text(followed.tail.path)}")
    symbols = BLOCKS if console.encoding.lower().startswith("utf") else PLAIN
    parts: list[RenderableType] = [_title(followed), _progress(followed, console.width), *_figures(followed)]
    spark, many, means = sparkline(history.series("maxvio_mean"), max(10, min(100, console.width - 45)), symbols)
    if spark:
        ends = f" {maxvio_cell(float(np.nanmin(means)))} to {maxvio_cell(float(np.nanmax(means)))}, log"
        parts.append(Text.assemble((f"MaxVio, last {many:,} steps ", "dim"), (spark, "cyan"), (ends, "dim")))
    alarms = _alarms(followed)
    if last.layers:
        height = len(last.layers) if whole else max(1, console.height - len(parts) - len(alarms) - 7)
        parts += [Text(""), *_layers(last.layers, height, console.width, symbols)]
    parts += alarms
    if history.ended():
        parts.append(_ended(followed))
    return Group(*parts)


def _title(followed: FollowedRun) -> Text:
    history = followed.history
    rule = history.summary.get("rule") or history.setting("rule") or ""
    preset = history.setting("preset") or ""
    words = [clean_text(word, 60) for word in (f"rule {rule}" if rule else "", preset) if word]
    text = Text.assemble((history.label, "bold"), ("  " + "  ".join(words), "dim"))
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _progress(followed: FollowedRun, width: int) -> RenderableType:
    history, last, total = followed.history, followed.history.last, _total(followed)
    assert last is not None
    rate, seconds = _rate(followed)
    words = [_step_text(followed)]
    if math.isfinite(rate):
        words.append(f"{short_count(rate)} tokens/s, {seconds:.3g} s a step")
    if not history.ended():
        if math.isfinite(seconds) and total > last.step:
            words.append(f"{_clock((total - last.step) * seconds)} left")
        age = followed.age()
        silent = age > max(SILENT, 10 * (seconds if math.isfinite(seconds) else 0.0))
        if math.isfinite(age):
            words.append(f"last record {_clock(age)} ago" + (": is the job still running?" if silent else ""))
    text = Text("  ".join(words), style="" if history.ended() or not silent else "yellow")
    if not math.isfinite(total):
        return text
    grid = Table.grid(padding=(0, 2))
    grid.add_row(text, ProgressBar(total=total, completed=last.step, width=max(10, min(40, width - len(text) - 4))))
    return text if width - len(text) < 14 else grid


def _figures(followed: FollowedRun) -> list[Text]:
    last, floor = followed.history.last, followed.history.floor()
    assert last is not None
    over = f" ({last.maxvio_mean / floor:.1f}x the floor of {maxvio_cell(floor)})" if floor > 0 else ""
    loss = "not finite" if last.diverged else _digits(last.loss, ".4f")
    first = Text.assemble(
        ("loss ", "dim"), (loss, "bold red" if last.diverged else "bold"),
        ("  MaxVio ", "dim"), (maxvio_cell(last.maxvio_mean), "bold"), over if math.isfinite(last.maxvio_mean) else "",
        ("  worst layer ", "dim"), maxvio_cell(last.maxvio_max),
    )  # fmt: skip
    second = Text.assemble(
        ("bias spread ", "dim"), _digits(last.bias_spread if last.bias_spread > 0 else math.nan, ".3g"),
        ("  learning rate ", "dim"), _digits(last.lr, ".3g"),
        ("  gradient norm ", "dim"), _digits(last.grad_norm, ".3g"),
    )  # fmt: skip
    if not math.isfinite(last.maxvio_micro_mean):
        return [first, second]
    third = Text.assemble(
        ("micro-batches: MaxVio ", "dim"), maxvio_cell(last.maxvio_micro_mean),
        ("  worst ", "dim"), maxvio_cell(last.maxvio_micro_worst),
        ("  fullest expert-parallel rank ", "dim"), f"{last.overload_micro_worst:.2f}x the mean",
    )  # fmt: skip
    return [first, second, third]


def _layers(layers: Sequence[LayerRecord], height: int, width: int, symbols: str) -> list[RenderableType]:
    """A row for each layer; the worst `height` of them where there are more."""
    shown = list(layers)
    if len(shown) > height:
        worst = sorted(shown, key=lambda layer: -layer.maxvio if math.isfinite(layer.maxvio) else 1.0)[:height]
        shown = [layer for layer in shown if any(layer is one for one in worst)]
    gains = any(math.isfinite(layer.gain) for layer in shown)
    biases = any(len(layer.bias_E) for layer in shown)
    head = ["layer", "MaxVio", "min", "max", *(["bias spread"] if biases else []), *(["gain"] if gains else [])]
    room = width - sum(max(len(name), 6) + 2 for name in head) - 2
    experts = max(len(layer.loads_E) for layer in shown)
    fits = experts <= room
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    if room >= 8:
        table.add_column("loads of the experts" if fits else "loads, largest first", no_wrap=True, overflow="crop")
    for layer in shown:
        mean = float(layer.loads_E.mean()) if len(layer.loads_E) else math.nan
        ends = (layer.loads_E.min() / mean, layer.loads_E.max() / mean) if mean > 0 else (math.nan, math.nan)
        cells: list[RenderableType] = [
            str(layer.number),
            maxvio_cell(layer.maxvio),
            *(_ratio_text(end) for end in ends),
        ]
        cells += [_digits(layer.spread, ".3g")] * biases + [_digits(layer.gain, ".3g")] * gains
        table.add_row(*cells, *([loads_text(layer, min(experts, room), symbols)] if room >= 8 else []))
    left_out = len(layers) - len(shown)
    more = f"; {left_out} of {len(layers)} layers with a smaller MaxVio are not shown" if left_out else ""
    note = f"min, max: load / mean of the layer; half height: the mean; x: no token{more}"
    return [table, Text(note, style="dim", no_wrap=True, overflow="ellipsis")]


def _ratio_text(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _alarms(followed: FollowedRun) -> list[RenderableType]:
    events = list(followed.history.events)[-ALARMS:]
    broken = followed.tail.broken
    found: list[RenderableType] = []
    for event in events:
        style = "bold red" if event.kind == "alarm" else "yellow"
        found.append(Text(f"step {event.steps}: {event.text}", style=style, no_wrap=True, overflow="ellipsis"))
    if broken:
        found.append(Text(f"{broken} lines of metrics.jsonl are no records of a step", style="yellow"))
    return [Text(""), *found] if found else []


def _ended(followed: FollowedRun) -> Text:
    summary = followed.history.summary
    loss, of_all = as_number(summary.get("validation_loss")), as_number(summary.get("maxvio_global_mean"))
    return Text(f"ended: validation loss {_digits(loss, '.4f')}, MaxVio_global {maxvio_cell(of_all)}", style="green")
