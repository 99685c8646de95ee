"""What the pictures of `alflb report` share: size, a line style for each run, the axis of steps, smoothing, legends.

All are equally wide, half a page, so that two stand side by side and a phone shows one under the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alflb_megatron.lab.display.plot_style import COLOURS, figure_class, trailing_mean
from alflb_megatron.lab.records.history import History
from alflb_megatron.lab.records.step_record import Array, clean_text
from alflb_megatron.lab.records.summary import maxvio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 190
WIDTH = 6.6  # inches
MOST_RUNS = 2 * len(COLOURS)
STYLES: tuple[tuple[str, str], ...] = tuple(itertools.product(("-", "--"), COLOURS))


def line_style(at: int) -> dict[str, Any]:
    """Colour and line of the run at place `at`; after the last colour they come again, dashed."""
    line, colour = STYLES[at]
    return {"color": colour, "linestyle": line}


def line_styles(runs: Sequence[History]) -> list[dict[str, Any]]:
    """What to draw each run with, in their order; one run alone is blue: grey is the yardstick's."""
    return [line_style(2)] if len(runs) == 1 else [line_style(at) for at in range(len(runs))]


def plot_label(text: str, length: int = 34) -> str:
    """`text` from a file as matplotlib shows it: no mathematics, and no underscore in front, which hides it."""
    shown = clean_text(text, length).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def new_figure(height: float) -> Figure:
    figure: Figure = figure_class()(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure


def set_step_axis(axes: Axes, runs: Sequence[History]) -> None:
    from matplotlib.ticker import MaxNLocator

    first = min(float(run.series("step")[0]) for run in runs)
    last = max(float(run.series("step")[-1]) for run in runs)
    axes.set_xlim(first if first < last else first - 0.5, last if first < last else last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: steps_text(value, last))


def steps_text(value: float, largest: float) -> str:
    return f"{value / 1000:g}k" if largest >= 10_000 and value else f"{value:g}"


def legend_above(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if names:  # above the axes, where it can hide no line; as many columns as the names leave room for
        columns = max(1, min(len(names), 80 // (max(map(len, names)) + 8)))
        axes.legend(handles, names, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9)


def smoothing_window(runs: Iterable[History]) -> int:
    """Steps that a thick line averages: as many as keep it readable, and 1 in a very short run."""
    window = max(len(run.series("step")) for run in runs) // 30
    return window if window >= 5 else 1


def trailing_mean_of_finite(values: Array, window: int) -> Array:
    """The trailing mean over what is finite in the window; nan where nothing is."""
    finite = np.isfinite(values)
    sums, share = trailing_mean(np.where(finite, values, 0.0), window), trailing_mean(finite.astype(np.float64), window)
    means: Array = np.where(share > 0.5 / window, sums / np.maximum(share, 1e-12), np.nan)
    return np.where(finite, means, np.nan)  # a gap stays a gap


def draw_thin_and_thick(
    axes: Axes, runs: Sequence[History], name: str, window: int, keep: Callable[[Array], Array]
) -> bool:
    """Draws one series of every run; whether there was anything to draw."""
    drawn = False
    for run, style in zip(runs, line_styles(runs), strict=True):
        values = run.series(name)
        values = keep(np.where(np.isfinite(values), values, np.nan))
        if np.isnan(values).all():
            continue
        drawn = True
        steps = run.series("step")
        if window > 1:
            axes.plot(steps, values, color=style["color"], alpha=0.3, linewidth=0.7)
        lonely = np.isfinite(values).sum() < 3  # a line of one point is invisible
        thick = trailing_mean_of_finite(values, window)
        axes.plot(steps, thick, linewidth=1.8, label=plot_label(run.label), marker="o" if lonely else None, **style)
    return drawn


def positive_or_nan(values: Array) -> Array:
    return np.where(values > 0, values, np.nan)  # exact balance has no place on a log axis


def window_text(window: int) -> str:
    return f"   (mean of the last {window} steps)" if window > 1 else ""


def name_floors(axes: Axes, floors: Sequence[float]) -> None:
    """Writes the values at the right edge; those that would stand on top of one another as a range."""
    low, high = axes.get_ylim()
    room = 0.06 * math.log(high / low)
    groups: list[list[float]] = []
    for floor in floors:
        if groups and math.log(floor / groups[-1][0]) < room:
            groups[-1].append(floor)
        else:
            groups.append([floor])
    for group in groups:
        text = " - ".join(dict.fromkeys(maxvio_text(floor) for floor in (group[0], group[-1])))
        axes.annotate(
            text, (1, math.sqrt(group[0] * group[-1])), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
