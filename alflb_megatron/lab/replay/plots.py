"""The picture of `alflb replay`: MaxVio of every rule over the steps. matplotlib is imported when it is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alflb_megatron.lab.display.plot_style import (
    COLOURS,
    DPI,
    WIDTH,
    figure_class,
    log_y_axis,
    save_png,
    style_axes,
    trailing_mean,
)
from alflb_megatron.lab.records.summary import maxvio_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def replay_figure(result: Mapping[str, Any]) -> Figure:
    """The figure of `plot_replay`: one axes, a line for each rule and the hindsight, and the floor."""
    floor = result["floor"]
    if not floor > 0:
        raise ValueError("no picture: with topk = experts there is no choice, and MaxVio is 0")
    figure = figure_class()(figsize=(WIDTH, 5.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    steps_S = np.arange(result["steps"])
    window = max(1, len(steps_S) // 60)  # none in a short replay, where it would hide how fast a rule lands
    lines = [(label, entry["maxvio"], 2.0) for label, entry in result["rules"].items()]
    colours = itertools.cycle(COLOURS[1:])  # grey is the yardstick's
    if result["hindsight"] is not None:
        lines.append(("hindsight", result["hindsight"]["maxvio"], 1.4))
    for label, maxvio, width in lines:
        colour = COLOURS[0] if label == "hindsight" else next(colours)
        ratio_S = np.asarray(maxvio) / floor
        if window > 1:
            axes.plot(steps_S, np.where(ratio_S > 0, ratio_S, np.nan), color=colour, alpha=0.3, linewidth=0.8)
        smooth_S = trailing_mean(ratio_S, window)
        marker = "o" if len(steps_S) == 1 else None  # a line of one point is invisible
        positive_S = np.where(smooth_S > 0, smooth_S, np.nan)
        axes.plot(steps_S, positive_S, color=colour, linewidth=width, label=label, marker=marker)
    axes.axhline(1.0, color="black", linestyle=(0, (5, 3)), linewidth=1.2, label="sampling floor (uniform draws)")
    if result["sequence_floor"] is not None:
        ratio, own = result["sequence_floor"] / floor, (0, (1, 2))
        axes.axhline(ratio, color="black", linestyle=own, linewidth=1.2, label="sequence floor")
    log_y_axis(axes)
    axes.set_xlim(0, max(1, len(steps_S) - 1))
    axes.set_xlabel("updates made" + f"   (thin: every step; thick: mean of the last {window})" * (window > 1))
    axes.set_ylabel("MaxVio / sampling floor,\nmean over the layers")
    style_axes(axes)
    columns = 5 if max(len(label) for label, *_ in lines) < 14 else 4
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0, fontsize=10)
    figure.suptitle(
        f"{len(result['layers'])} MoE layers, top-{result['topk']} of {result['experts']} experts, "
        f"{result['tokens']:,.0f} tokens a step; the floor is a MaxVio of {maxvio_text(floor)}",
        fontsize=11.5,
    )
    return figure


def plot_replay(result: Mapping[str, Any], out: Path) -> Path:
    """Draws what `lab.replay.replay.replay` returned into the PNG file `out`, and returns `out`."""
    return save_png(replay_figure(result), Path(out))
