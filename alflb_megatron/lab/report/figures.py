"""The pictures of `alflb report` in which runs share the axes: loss, MaxVio, spread, gain, certificates.

Each function takes `History` objects and returns a matplotlib figure, or None where no run has what it shows. All are
equally wide, half a page, so that two stand side by side and a phone shows one under the other. House style of
`lab/display/plot_style.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from alflb_megatron.lab.display.plot_style import COLOURS, log_y_axis, style_axes
from alflb_megatron.lab.records.history import History
from alflb_megatron.lab.records.step_record import as_number
from alflb_megatron.lab.report.axes import (
    draw_thin_and_thick,
    legend_above,
    line_styles,
    name_floors,
    new_figure,
    plot_label,
    positive_or_nan,
    set_step_axis,
    smoothing_window,
    trailing_mean_of_finite,
    window_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss(runs: Sequence[History]) -> Figure | None:
    """The loss over the steps, raw and smoothed, a line a run; a loss that is not finite is a gap."""
    figure = new_figure(3.7)
    axes, window = figure.add_subplot(), smoothing_window(runs)
    if not draw_thin_and_thick(axes, runs, "loss", window, lambda values: values):
        return None
    style_axes(axes)
    set_step_axis(axes, runs)
    axes.set(xlabel="training step" + window_text(window), ylabel="loss, nats a token")
    if len(runs) > 1:
        legend_above(axes)
    return figure


def loss_difference(runs: Sequence[History]) -> Figure | None:
    """The loss minus that of the first run at the same step, smoothed; None where no other run shares 3 steps."""
    figure = new_figure(3.7)
    axes, window, drawn = figure.add_subplot(), smoothing_window(runs), []
    first = runs[0]
    for run, style in zip(runs[1:], line_styles(runs)[1:], strict=True):
        _, here, there = np.intersect1d(run.series("step"), first.series("step"), return_indices=True)
        difference = run.series("loss")[here] - first.series("loss")[there]
        if np.isfinite(difference).sum() < 3:
            continue
        drawn.append(run)
        shown = trailing_mean_of_finite(np.where(np.isfinite(difference), difference, np.nan), window)
        axes.plot(run.series("step")[here], shown, linewidth=1.6, label=plot_label(run.label), **style)
    if not drawn:
        return None
    axes.axhline(0.0, color=COLOURS[0], linewidth=1.0)
    style_axes(axes)
    set_step_axis(axes, drawn)
    axes.set(xlabel="training step" + window_text(window), ylabel=f"loss - loss of {plot_label(first.label, 20)}")
    legend_above(axes)
    return figure


def maxvio(runs: Sequence[History]) -> Figure | None:
    """MaxVio over the steps, mean over the MoE layers, with the sampling floor of each run's sizes."""
    figure = new_figure(3.7)
    axes, window = figure.add_subplot(), smoothing_window(runs)
    if not draw_thin_and_thick(axes, runs, "maxvio_mean", window, positive_or_nan):
        return None
    if len(runs) == 1:
        worst = positive_or_nan(runs[0].series("maxvio_max"))
        if len(runs[0].layer_histories) > 1 and np.isfinite(worst).any():
            worst = trailing_mean_of_finite(np.where(np.isfinite(worst), worst, np.nan), window)
            marker = "o" if np.isfinite(worst).sum() < 3 else None
            axes.plot(
                runs[0].series("step"), worst, color=COLOURS[1], linewidth=1.0, label="worst layer", marker=marker
            )
        micro = positive_or_nan(runs[0].series("maxvio_micro_mean"))
        if np.isfinite(micro).any():
            shown = trailing_mean_of_finite(np.where(np.isfinite(micro), micro, np.nan), window)
            axes.plot(runs[0].series("step"), shown, color=COLOURS[2], linewidth=1.0, label="of micro-batches, mean")
    floors = sorted({round(floor, 6) for floor in (run.floor() for run in runs) if floor > 0})
    for at, floor in enumerate(floors):
        name = "sampling floor" if at == 0 else None
        axes.axhline(floor, color="black", linestyle=(0, (5, 3)), linewidth=1.0, label=name)
    style_axes(axes)
    set_step_axis(axes, runs)
    log_y_axis(axes)
    name_floors(axes, floors)
    axes.set_xlabel("training step" + window_text(window))
    axes.set_ylabel("MaxVio, mean over the layers\n(largest load - mean) / mean")
    if len(runs) == 1 and axes.lines:
        for line in axes.lines:
            if line.get_label() == plot_label(runs[0].label):
                line.set_label("mean over the layers")
    legend_above(axes)
    return figure


def spread(runs: Sequence[History]) -> Figure | None:
    """max - min of the expert bias, of the layer where it is largest, a line a run; None where no run has a bias."""
    with_bias = [run for run in runs if any(layer.has("bias") for layer in run.layer_histories.values())]
    if not with_bias:
        return None
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    for run, style in zip(runs, line_styles(runs), strict=True):
        if run in with_bias:
            values = run.series("bias_spread")
            marker = "o" if len(values) == 1 else None
            shown = np.where(np.isfinite(values), values, np.nan)
            axes.plot(run.series("step"), shown, linewidth=1.6, label=plot_label(run.label), marker=marker, **style)
    style_axes(axes)
    set_step_axis(axes, with_bias)
    axes.set(xlabel="training step", ylabel="spread of the bias (max - min),\nlargest layer")
    if len(runs) > 1:
        legend_above(axes)
    return figure


def gain(runs: Sequence[History]) -> Figure | None:
    """The rule's gain over the steps: a thin line a layer, a thick one for their mean; None where none is recorded."""
    with_gain = [run for run in runs if any(layer.has("gain") for layer in run.layer_histories.values())]
    if not with_gain:
        return None
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    for run, style in zip(runs, line_styles(runs), strict=True):
        if run not in with_gain:
            continue
        middle = run.middles()
        rows = np.array(
            [layer.mean("gain", run.bins)[:, 0] for layer in run.layer_histories.values() if layer.has("gain")]
        )
        marker = "o" if run.bins == 1 else None
        for row in rows if len(rows) > 1 else []:
            axes.plot(middle, row, color=style["color"], alpha=0.35, linewidth=0.7)
        count = np.isfinite(rows).sum(axis=0)
        mean = np.where(count > 0, np.nansum(rows, axis=0) / np.maximum(count, 1), np.nan)
        axes.plot(middle, mean, linewidth=1.8, label=plot_label(run.label), marker=marker, **style)
    style_axes(axes)
    set_step_axis(axes, with_gain)
    axes.set_xlabel("training step   (thin: each layer; thick: their mean)")
    axes.set_ylabel("gain of the rule")
    if len(runs) > 1:
        legend_above(axes)
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
    figure = new_figure(3.2)
    found = False
    for axes, (key, text) in zip(figure.subplots(1, len(CERTIFIED)), CERTIFIED, strict=True):
        for run, style in zip(runs, line_styles(runs), strict=True):
            steps = np.array([step for step, _ in run.certificates], dtype=np.float64)
            values = np.array([as_number(row.get(key)) for _, row in run.certificates], dtype=np.float64)
            fit = np.isfinite(values) & (values > 0)
            if not fit.any():
                continue
            found = True
            axes.scatter(steps[fit], values[fit], s=16, alpha=0.55, color=style["color"], linewidths=0, clip_on=False)
            at = np.unique(steps[fit])
            medians = [float(np.median(values[fit & (steps == step)])) for step in at]
            axes.plot(at, medians, linewidth=1.6, label=plot_label(run.label, 20), **style)
        style_axes(axes)
        set_step_axis(axes, certified)
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
