"""One picture that compares runs: MaxVio over the steps, and the loads of every expert on the validation set.

MaxVio of a layer = (largest load - mean load) / mean load (Wang et al. 2024, arXiv 2408.15664).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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
from alflb_megatron.lab.display.text import DATA_NAMES, short_count
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.metrics import sampling_floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

HEIGHT = 7.4  # inches


@dataclass(frozen=True)
class _FinishedRun:
    """What the picture needs of one run folder."""

    config: dict[str, Any]
    steps_N: NDArray[np.int64]
    maxvio_N: NDArray[np.float64]
    layers: list[int]
    ratio_LE: NDArray[np.float64]  # validation loads over their layer's mean; nan where a layer has fewer experts
    global_maxvio: float
    tokens: int
    shapes: tuple[tuple[int, int, int], ...]  # (tokens, topk, experts) of each MoE layer in a training step
    sequence_floor: float | None

    def floor(self) -> float:
        """The sampling floor, mean over the layers."""
        # Fewer draws where a draw is large: the picture shows two digits.
        floors = [sampling_floor(*shape, draws=max(20, min(200, 20_000_000 // shape[0]))) for shape in self.shapes]
        return sum(floors) / len(floors)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config.json by name, whatever group they were written in."""
    flat: dict[str, Any] = {}
    for name, value in config["settings"].items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return flat


def load_run(path: Path) -> _FinishedRun:
    """Reads a finished run's folder; FileNotFoundError names the file that is missing."""
    summary_file = path / "summary.json"
    if not summary_file.exists():
        raise FileNotFoundError(f"{summary_file} is missing: {path} is no run folder, or its run has not ended")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    steps, maxvio, last = [], [], None
    for last in read_metrics(path):
        steps.append(last["step"])
        maxvio.append(last["maxvio_mean"])
    if last is None:
        raise ValueError(f"{path / 'metrics.jsonl'} holds no step")
    loads = summary["validation_loads"]
    ratio_LE = np.full((len(loads), max(map(len, loads))), np.nan)
    for row, counts in zip(ratio_LE, loads, strict=True):
        row[: len(counts)] = np.asarray(counts) / np.mean(counts)
    shapes = []
    for counts in last["loads"]:
        topk = int(_settings(config).get("topk") or max(1, round(sum(counts) / last["tokens"])))
        shapes.append((round(sum(counts) / topk), topk, len(counts)))
    return _FinishedRun(
        config=config,
        steps_N=np.array(steps),
        maxvio_N=np.array(maxvio),
        layers=last["layers"],
        ratio_LE=ratio_LE,
        global_maxvio=summary["maxvio_global_mean"],
        tokens=last["tokens"],
        shapes=tuple(shapes),
        sequence_floor=summary.get("sequence_floor"),
    )


def describe_run(run: _FinishedRun) -> tuple[str, str]:
    """Two lines for the title: the model, and what it was trained on."""
    settings, parameters = _settings(run.config), run.config["parameters"]
    experts = sorted({experts for _, _, experts in run.shapes})
    preset = settings.get("preset")
    model = (
        f"DeepSeekMoE{f' “{preset}”' if preset else ''}: {len(run.shapes)} MoE layers, "
        f"{' or '.join(map(str, experts))} routed experts, top-{run.shapes[0][1]}, "
        f"{short_count(parameters['total'])} parameters ({short_count(parameters['active'])} active)"
    )
    data = str(settings.get("data") or "text")
    data = DATA_NAMES.get(data, os.path.basename(data.rstrip(os.sep)) or data)
    return model, f"trained on {data}, {len(run.steps_N):,} steps of {run.tokens:,} tokens"


def _draw_lines(axes: Axes, runs: Mapping[str, _FinishedRun]) -> None:
    # 10 steps in a short run; in a long one as many as keep the line readable.
    window = max(10, max(len(run.steps_N) for run in runs.values()) // 50)
    for (label, run), colour in zip(runs.items(), COLOURS, strict=False):
        positive = np.where(run.maxvio_N > 0, run.maxvio_N, np.nan)  # exact balance has no place on a log axis
        marker = "o" if len(run.steps_N) == 1 else None  # a line of one point is invisible
        axes.plot(run.steps_N, positive, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(
            run.steps_N, trailing_mean(run.maxvio_N, window), color=colour, linewidth=2.2, label=label, marker=marker
        )
    floors = sorted({run.floor() for run in runs.values()})
    drawn = [(floor, "" if i else "sampling floor (uniform draws)", (5, 3)) for i, floor in enumerate(floors)]
    of_last = list(runs.values())[-1].sequence_floor
    drawn += [(of_last, "sequence floor (best bias set beforehand)", (1, 2))] if of_last else []
    for floor, name, dashes in drawn:
        axes.axhline(floor, color="black", linestyle=(0, dashes), linewidth=1.2, label=name or None)
        axes.annotate(
            maxvio_text(floor), (1, floor), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    log_y_axis(axes)
    axes.set_xlim(0, max(run.steps_N[-1] for run in runs.values()))
    axes.set_xlabel(f"training step   (thin: every global batch; thick: mean of the last {window} steps)")
    axes.set_ylabel("MaxVio, mean over the MoE layers\n(largest load - mean) / mean")
    style_axes(axes)
    columns = min(4 if len(drawn) == 1 else 3, len(runs) + 1)
    # Above the axes, where it can hide no line.
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0, fontsize=10)


def _draw_heat_maps(figure: SubFigure, runs: Mapping[str, _FinishedRun]) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    # Logarithmic, so that twice and half the mean are equally far from the centre.
    largest = max(float(np.nanmax(run.ratio_LE)) for run in runs.values())
    limit = next((nice for nice in (1.25, 1.5, 2.0, 3.0, 4.0) if nice >= largest), 4.0)
    smallest = min(float(np.nanmin(run.ratio_LE)) for run in runs.values())
    beyond = (largest > limit, smallest < 1 / limit)
    extend = {(True, True): "both", (True, False): "max", (False, True): "min"}.get(beyond, "neither")
    norm, image = LogNorm(1 / limit, limit), None
    all_axes = [figure.add_subplot(1, len(runs), i + 1) for i in range(len(runs))]
    for axes, (label, run), colour in zip(all_axes, runs.items(), COLOURS, strict=False):
        floor = np.maximum(run.ratio_LE, 1e-9)  # an expert without a token: below the scale, not missing
        image = axes.imshow(floor, norm=norm, cmap="PuOr_r", aspect="auto", interpolation="nearest")
        title = f"{label}\nMaxVio_global {maxvio_text(run.global_maxvio)}"
        axes.set_title(title, color=colour, fontsize=10, fontweight="bold")
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=min(8, 20 // len(runs)), integer=True))
        step = math.ceil(len(run.layers) / 12)
        axes.set_yticks(range(0, len(run.layers), step), [str(layer) for layer in run.layers[::step]])
    all_axes[0].set_ylabel("MoE layer")
    assert image is not None
    bar = figure.colorbar(image, ax=all_axes, extend=extend, aspect=12, pad=0.015)
    ticks = sorted({1.0, limit, 1 / limit, math.sqrt(limit), 1 / math.sqrt(limit)})
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}x"))
    bar.set_label("validation load\n/ mean of its layer")


def comparison_figure(runs: Mapping[str, Path]) -> Figure:
    """The figure of `plot_comparison`: one axes of lines, one heat map a run, one colour bar."""
    if not 1 <= len(runs) <= len(COLOURS):
        raise ValueError(f"a picture compares 1 to {len(COLOURS)} runs, not {len(runs)}")
    loaded = {label: load_run(Path(path)) for label, path in runs.items()}
    figure = figure_class()(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=(1.65, 1))
    _draw_lines(rows[0].add_subplot(), loaded)
    _draw_heat_maps(rows[1], loaded)
    model, data = describe_run(next(iter(loaded.values())))
    figure.suptitle(f"{model},\n{data}", fontsize=11.5)
    return figure


def plot_comparison(runs: Mapping[str, Path], out: Path) -> Path:
    """Draws the runs (label -> run folder, in the order to be shown) into the PNG file `out`, and returns `out`.

    Top: MaxVio, mean over the MoE layers, of every step's global batch on a log axis, raw and smoothed, with the
    sampling floor (`sampling_floor`) of the runs' sizes and the sequence floor of the last one. Bottom: the
    validation loads of every expert and MoE layer, divided by the layer's mean, one heat map a run on a shared
    scale. The title describes the first run.
    """
    return save_png(comparison_figure(runs), Path(out))
