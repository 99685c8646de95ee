"""The pictures of `alflb report` in which runs share the axes: loss, MaxVio, spread, gain, certificates.

Each function takes `History` objects and returns a matplotlib figure, or None where no run has what it shows. All are
equally wide, half a page, so that two stand side by side and a phone shows one under the other. House look of
`lab/display/plots.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alflb_megatron.lab.display.plot_style import COLOURS, figure_class, log_y_axis, style_axes, trailing_mean
from alflb_megatron.lab.records.history import History
from alflb_megatron.lab.records.step_record import Array, as_number, clean_text
from alflb_megatron.lab.records.summary import maxvio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 190
WIDTH = 6.6  # inches
MOST_RUNS = 2 * len(COLOURS)
STYLES: tuple[tuple[str, str], ...] = tuple(itertools.product(("-", "--"), COLOURS))


def style(at: int) -> dict[str, Any]:
    """Colour and line of the run at place `at`; after the last colour they come again, dashed."""
    line, colour = STYLES[at]
    return {"color": colour, "linestyle": line}


def styles(runs: Sequence[History]) -> list[dict[str, Any]]:
    """What to draw each run with, in their order; one run alone is blue: grey is the yardstick's."""
    return [style(2)] if len(runs) == 1 else [style(at) for at in range(len(runs))]


def label(text: str, length: int = 34) -> str:
    """`text` from a file as matplotlib shows it: no mathematics, and no underscore in front, which hides it."""
    shown = clean_text(text, length).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def canvas(height: float) -> Figure:
    figure: Figure = figure_class()(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure


def _step_axis(axes: Axes, runs: Sequence[History]) -> None:
    from matplotlib.ticker import MaxNLocator

    first = min(float(run.series("step")[0]) for run in runs)
    last = max(float(run.series("step")[-1]) for run in runs)
    axes.set_xlim(first if first < last else first - 0.5, last if first < last else last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: steps_text(value, last))


def steps_text(value: float, largest: float) -> str:
    return f"{value / 1000:g}k" if largest >= 10_000 and value else f"{value:g}"


def _legend(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if names:  # above the axes, where it can hide no line; as many columns as the names leave room for
        columns = max(1, min(len(names), 80 // (max(map(len, names)) + 8)))
        axes.legend(handles, names, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9)


def window_of(runs: Iterable[History]) -> int:
    """Steps that a thick line averages: as many as keep it readable, and 1 in a very short run."""
    window = max(len(run.series("step")) for run in runs) // 30
    return window if window >= 5 else 1


def _smooth(values: Array, window: int) -> Array:
    """The trailing mean over what is finite in the window; nan where nothing is."""
    finite = np.isfinite(values)
    sums, share = trailing_mean(np.where(finite, values, 0.0), window), trailing_mean(finite.astype(np.float64), window)
    means: Array = np.where(share > 0.5 / window, sums / np.maximum(share, 1e-12), np.nan)
    return np.where(finite, means, np.nan)  # a gap stays a gap


def _thin_and_thick(
    axes: Axes, runs: Sequence[History], name: str, window: int, keep: Callable[[Array], Array]
) -> bool:
    """Draws one series of every run; whether there was anything to draw."""
    drawn = False
    for run, look in zip(runs, styles(runs), strict=True):
        values = run.series(name)
        values = keep(np.where(np.isfinite(values), values, np.nan))
        if np.isnan(values).all():
            continue
        drawn = True
        steps = run.series("step")
        if window > 1:
            axes.plot(steps, values, color=look["color"], alpha=0.3, linewidth=0.7)
        lonely = np.isfinite(values).sum() < 3  # a line of one point is invisible
        thick = _smooth(values, window)
        axes.plot(steps, thick, linewidth=1.8, label=label(run.label), marker="o" if lonely else None, **look)
    return drawn


def _positive(values: Array) -> Array:
    return np.where(values > 0, values, np.nan)  # exact balance has no place on a log axis


def loss(runs: Sequence[History]) -> Figure | None:
    """The loss over the steps, raw and smoothed, a line a run; a loss that is not finite is a gap."""
    figure = canvas(3.7)
    axes, window = figure.add_subplot(), window_of(runs)
    if not _thin_and_thick(axes, runs, "loss", window, lambda values: values):
        return None
    style_axes(axes)
    _step_axis(axes, runs)
    axes.set(xlabel="training step" + _window_text(window), ylabel="loss, nats a token")
    if len(runs) > 1:
        _legend(axes)
    return figure


def loss_difference(runs: Sequence[History]) -> Figure | None:
    """The loss minus that of the first run at the same step, smoothed; None where no other run shares 3 steps."""
    figure = canvas(3.7)
    axes, window, drawn = figure.add_subplot(), window_of(runs), []
    first = runs[0]
    for run, look in zip(runs[1:], styles(runs)[1:], strict=True):
        _, here, there = np.intersect1d(run.series("step"), first.series("step"), return_indices=True)
        difference = run.series("loss")[here] - first.series("loss")[there]
        if np.isfinite(difference).sum() < 3:
            continue
        drawn.append(run)
        shown = _smooth(np.where(np.isfinite(difference), difference, np.nan), window)
        axes.plot(run.series("step")[here], shown, linewidth=1.6, label=label(run.label), **look)
    if not drawn:
        return None
    axes.axhline(0.0, color=COLOURS[0], linewidth=1.0)
    style_axes(axes)
    _step_axis(axes, drawn)
    axes.set(xlabel="training step" + _window_text(window), ylabel=f"loss - loss of {label(first.label, 20)}")
    _legend(axes)
    return figure


def _window_text(window: int) -> str:
    return f"   (mean of the last {window} steps)" if window > 1 else ""


def maxvio(runs: Sequence[History]) -> Figure | None:
    """MaxVio over the steps, mean over the MoE layers, with the sampling floor of each run's sizes."""
    figure = canvas(3.7)
    axes, window = figure.add_subplot(), window_of(runs)
    if not _thin_and_thick(axes, runs, "maxvio_mean", window, _positive):
        return None
    if len(runs) == 1:
        worst = _positive(runs[0].series("maxvio_max"))
        if len(runs[0].layer_histories) > 1 and np.isfinite(worst).any():
            worst = _smooth(np.where(np.isfinite(worst), worst, np.nan), window)
            marker = "o" if np.isfinite(worst).sum() < 3 else None
            axes.plot(
                runs[0].series("step"), worst, color=COLOURS[1], linewidth=1.0, label="worst layer", marker=marker
            )
    floors = sorted({round(floor, 6) for floor in (run.floor() for run in runs) if floor > 0})
    for at, floor in enumerate(floors):
        name = "sampling floor" if at == 0 else None
        axes.axhline(floor, color="black", linestyle=(0, (5, 3)), linewidth=1.0, label=name)
    style_axes(axes)
    _step_axis(axes, runs)
    log_y_axis(axes)
    _name_floors(axes, floors)
    axes.set_xlabel("training step" + _window_text(window))
    axes.set_ylabel("MaxVio, mean over the layers\n(largest load - mean) / mean")
    if len(runs) == 1 and axes.lines:
        for line in axes.lines:
            if line.get_label() == label(runs[0].label):
                line.set_label("mean over the layers")
    _legend(axes)
    return figure


def _name_floors(axes: Axes, floors: Sequence[float]) -> None:
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


def spread(runs: Sequence[History]) -> Figure | None:
    """max - min of the expert bias, of the layer where it is largest, a line a run; None where no run has a bias."""
    with_bias = [run for run in runs if any(layer.has("bias") for layer in run.layer_histories.values())]
    if not with_bias:
        return None
    figure = canvas(3.2)
    axes = figure.add_subplot()
    for run, look in zip(runs, styles(runs), strict=True):
        if run in with_bias:
            values = run.series("bias_spread")
            marker = "o" if len(values) == 1 else None
            shown = np.where(np.isfinite(values), values, np.nan)
            axes.plot(run.series("step"), shown, linewidth=1.6, label=label(run.label), marker=marker, **look)
    style_axes(axes)
    _step_axis(axes, with_bias)
    axes.set(xlabel="training step", ylabel="spread of the bias (max - min),\nlargest layer")
    if len(runs) > 1:
        _legend(axes)
    return figure


def gain(runs: Sequence[History]) -> Figure | None:
    """The rule's gain over the steps: a thin line a layer, a thick one for their mean; None where none is recorded."""
    with_gain = [run for run in runs if any(layer.has("gain") for layer in run.layer_histories.values())]
    if not with_gain:
        return None
    figure = canvas(3.2)
    axes = figure.add_subplot()
    for run, look in zip(runs, styles(runs), strict=True):
        if run not in with_gain:
            continue
        middle = run.middles()
        rows = np.array(
            [layer.mean("gain", run.bins)[:, 0] for layer in run.layer_histories.values() if layer.has("gain")]
        )
        marker = "o" if run.bins == 1 else None
        for row in rows if len(rows) > 1 else []:
            axes.plot(middle, row, color=look["color"], alpha=0.35, linewidth=0.7)
        count = np.isfinite(rows).sum(axis=0)
        mean = np.where(count > 0, np.nansum(rows, axis=0) / np.maximum(count, 1), np.nan)
        axes.plot(middle, mean, linewidth=1.8, label=label(run.label), marker=marker, **look)
    style_axes(axes)
    _step_axis(axes, with_gain)
    axes.set_xlabel("training step   (thin: each layer; thick: their mean)")
    axes.set_ylabel("gain of the rule")
    if len(runs) > 1:
        _legend(axes)
    return figure


CERTIFIED = (
    ("gap", "gap to the best bias,\nscore a token"),
    ("modulus", "modulus of the dual,\n1 / score a token"),
)


def certificates(runs: Sequence[History]) -> Figure | None:
    """Gap and modulus of every certificate: a point a layer, a line for their median; None where none is recorded."""
    certified = [run for run in runs if run.certificates]
    if not certified:
        return None
    figure = canvas(3.2)
    found = False
    for axes, (key, text) in zip(figure.subplots(1, len(CERTIFIED)), CERTIFIED, strict=True):
        for run, look in zip(runs, styles(runs), strict=True):
            steps = np.array([step for step, _ in run.certificates], dtype=np.float64)
            values = np.array([as_number(row.get(key)) for _, row in run.certificates], dtype=np.float64)
            fit = np.isfinite(values) & (values > 0)
            if not fit.any():
                continue
            found = True
            axes.scatter(steps[fit], values[fit], s=16, alpha=0.55, color=look["color"], linewidths=0, clip_on=False)
            at = np.unique(steps[fit])
            medians = [float(np.median(values[fit & (steps == step)])) for step in at]
            axes.plot(at, medians, linewidth=1.6, label=label(run.label, 20), **look)
        style_axes(axes)
        _step_axis(axes, certified)
        axes.xaxis.get_major_locator().set_params(nbins=4)
        log_y_axis(axes)
        axes.tick_params(labelsize=8)
        axes.set_ylabel(text, fontsize=9)
    if not found:
        return None
    figure.supxlabel("training step   (points: each layer; line: their median)", fontsize=9)
    if len(runs) > 1:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, loc="outside upper left", ncols=min(3, len(names)), fontsize=9)
    return figure
