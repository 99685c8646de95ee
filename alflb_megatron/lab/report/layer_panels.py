"""The pictures of `alflb report` with a panel for each MoE layer of a run: loads as heat maps, biases as lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alflb_megatron.lab.display.plot_style import style_axes
from alflb_megatron.lab.records.history import History, LayerHistory
from alflb_megatron.lab.report.axes import new_figure, steps_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 64
"""Layers in one picture at the most."""
MISSING = "#DDDDDD"


def _grid(layers: Sequence[LayerHistory]) -> tuple[int, int]:
    """Rows and columns of a picture with a panel for each layer."""
    columns = 1 if len(layers) <= 3 else 2 if len(layers) <= 16 else 3 if len(layers) <= 36 else 4
    return math.ceil(len(layers) / columns), columns


def shown_layers(run: History) -> list[LayerHistory]:
    """The layers that have a panel: all of them, or `PANELS` evenly spaced ones, by number."""
    layers = sorted(run.layer_histories.values(), key=lambda layer: (layer.layer, layer.experts))
    if len(layers) <= PANELS:
        return layers
    return [layers[round(at)] for at in np.linspace(0, len(layers) - 1, PANELS)]


def _panels(run: History, layers: Sequence[LayerHistory]) -> tuple[Figure, list[Axes]]:
    rows, columns = _grid(layers)
    height = 2.6 if len(layers) == 1 else {1: 1.5, 2: 1.5, 3: 1.35, 4: 1.15}[columns]
    figure = new_figure(0.75 + rows * height)
    every = figure.subplots(rows, columns, squeeze=False, sharex=True)
    axes = list(every.flat)[: len(layers)]
    for unused in list(every.flat)[len(layers) :]:
        unused.remove()
    for at, (one, layer) in enumerate(zip(axes, layers, strict=True)):
        one.set_title(f"layer {layer.layer}", fontsize=9, pad=3)
        one.tick_params(labelsize=8)
        # The lowest panel of a column has the ticks, wherever it ends.
        one.tick_params(labelbottom=at + columns >= len(layers))
    figure.supxlabel("training step", fontsize=9)
    return figure, axes


def loads_limit(runs: Sequence[History]) -> float:
    """Where the colours of the loads end, one for all runs so that they can be compared: 1.25 to 4 times the mean."""
    parts = [layer.relative_loads(run.bins).ravel() for run in runs for layer in shown_layers(run)]
    values = np.concatenate(parts) if parts else np.array([])
    values = values[np.isfinite(values)]
    largest = float(np.quantile(values, 0.99)) if len(values) else 1.0
    return next((nice for nice in (1.25, 1.5, 2.0, 3.0, 4.0) if nice >= largest), 4.0)


def loads(run: History, limit: float) -> Figure | None:
    """Loads of every expert over the steps, divided by the layer's mean; a panel a layer, colours centred at 1."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    layers = [layer for layer in shown_layers(run) if np.isfinite(layer.relative_loads(run.bins)).any()]
    if not layers:
        return None
    figure, axes = _panels(run, layers)
    colours = colormaps["PuOr_r"].with_extremes(bad=MISSING)
    norm = LogNorm(1 / limit, limit)  # twice and half the mean are equally far from the centre
    image: Any = None
    for one, layer in zip(axes, layers, strict=True):
        relative = layer.relative_loads(run.bins)
        shown = np.ma.masked_invalid(np.where(relative > 0, relative, np.where(relative <= 0, 1e-9, np.nan)))
        image = one.pcolormesh(run.edges(), np.arange(layer.experts + 1) - 0.5, shown.T, norm=norm, cmap=colours)
        one.invert_yaxis()
        one.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        _bin_axis(one, run)
    figure.supylabel("expert", fontsize=9)
    bar = figure.colorbar(image, ax=axes, extend="both", location="top", aspect=45, fraction=0.05, pad=0.02)
    ticks = sorted({1.0, limit, 1 / limit, math.sqrt(limit), 1 / math.sqrt(limit)})
    bar.ax.xaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}x"))
    bar.ax.tick_params(labelsize=8)
    bar.set_label("load / mean load of the layer", fontsize=9)
    return figure


def _bin_axis(axes: Axes, run: History) -> None:
    from matplotlib.ticker import MaxNLocator

    edges = run.edges()
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: steps_text(value, edges[-1]))


def bias(run: History) -> Figure | None:
    """The expert bias over the steps, a line an expert and a panel a layer; None for a run without a bias."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import MaxNLocator

    layers = shown_layers(run)
    if not any(layer.has("bias") for layer in layers):
        return None
    figure, axes = _panels(run, layers)
    middle = run.middles()
    for one, layer in zip(axes, layers, strict=True):
        means = layer.mean("bias", run.bins)
        seen = np.flatnonzero(np.isfinite(means).all(axis=1))
        order = np.argsort(np.argsort(means[seen[-1]])) if len(seen) else np.arange(layer.experts)
        colours = colormaps["viridis"](0.95 * order / max(1, layer.experts - 1))
        if len(seen) == 1:  # a line of one point is invisible
            one.scatter(np.full(layer.experts, middle[seen[0]]), means[seen[0]], c=colours, s=12, linewidths=0)
        lines = [np.column_stack([middle, row]) for row in means.T]
        one.add_collection(LineCollection(lines, colors=colours, linewidths=0.9 if layer.experts <= 64 else 0.5))
        one.autoscale_view()
        style_axes(one)
        _bin_axis(one, run)
        one.yaxis.set_major_locator(MaxNLocator(nbins=4))
        one.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    unit = "logits" if run.setting("score_unit") == "logit" else "score units"
    figure.supylabel(f"expert bias, {unit}", fontsize=9)
    return figure
