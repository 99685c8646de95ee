"""One picture that compares runs: MaxVio over the steps, and the loads of every expert on the validation set.

MaxVio of a layer = (largest load - mean load) / mean load (Wang et al. 2024, arXiv 2408.15664). matplotlib is
imported when a picture is drawn, and its figures are used without pyplot, so no window system or global state
is touched.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.metrics import sampling_floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's palette, told apart by readers with any common colour blindness. Grey is the first run's.
COLOURS = ("#7F7F7F", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DPI = 110
WIDTH, HEIGHT = 10.0, 7.4  # inches

DATA_NAMES = {"stdlib": "the source text of Python's standard library"}


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the last `window` steps at each step, over fewer at the beginning; same shape as `values` [n]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


@dataclass(frozen=True)
class _Run:
    """What the picture needs of one run folder."""

    config: dict[str, Any]
    steps_N: NDArray[np.int64]
    maxvio_N: NDArray[np.float64]
    layers: list[int]
    ratio_LE: NDArray[np.float64]  # validation loads over their layer's mean; nan where a layer has fewer experts
    global_maxvio: float
    tokens: int
    shapes: tuple[tuple[int, int, int], ...]  # (tokens, topk, experts) of each MoE layer in a training step

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


def load_run(path: Path) -> _Run:
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
    return _Run(
        config=config,
        steps_N=np.array(steps),
        maxvio_N=np.array(maxvio),
        layers=last["layers"],
        ratio_LE=ratio_LE,
        global_maxvio=summary["maxvio_global_mean"],
        tokens=last["tokens"],
        shapes=tuple(shapes),
    )


def short_count(count: float) -> str:
    """1234567 is 1.2M: a count with two or three digits and its unit."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{0 if count >= 99.5 * size else 1}f}{unit}"
    return f"{count:.0f}"


def describe(run: _Run) -> tuple[str, str]:
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


def dress(axes: Axes) -> None:
    """A faint grid, and no frame above and to the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, as its range allows; called once everything is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if decades < 0.15:  # no 1, 2 or 5 in sight
        axes.yaxis.set_major_locator(LogLocator(subs=tuple(range(1, 10)), numticks=99))
    if decades > 6:
        axes.yaxis.set_minor_locator(NullLocator())


def _draw_lines(axes: Axes, runs: Mapping[str, _Run]) -> None:
    # 10 steps in a short run; in a long one as many as keep the line readable.
    window = max(10, max(len(run.steps_N) for run in runs.values()) // 50)
    for (label, run), colour in zip(runs.items(), COLOURS, strict=False):
        positive = np.where(run.maxvio_N > 0, run.maxvio_N, np.nan)  # exact balance has no place on a log axis
        marker = "o" if len(run.steps_N) == 1 else None  # a line of one point is invisible
        axes.plot(run.steps_N, positive, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(run.steps_N, smooth(run.maxvio_N, window), color=colour, linewidth=2.2, label=label, marker=marker)
    floors = sorted({run.floor() for run in runs.values()})
    for i, floor in enumerate(floors):
        name = "sampling floor (uniform draws)" if i == 0 else None
        axes.axhline(floor, color="black", linestyle=(0, (5, 3)), linewidth=1.2, label=name)
        axes.annotate(
            maxvio_text(floor), (1, floor), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    logarithmic(axes)
    axes.set_xlim(0, max(run.steps_N[-1] for run in runs.values()))
    axes.set_xlabel(f"training step   (thin: every global batch; thick: mean of the last {window} steps)")
    axes.set_ylabel("MaxVio, mean over the MoE layers\n(largest load - mean) / mean")
    dress(axes)
    columns = min(4, len(runs) + 1)
    # Above the axes, where it can hide no line.
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0, fontsize=10)


def _draw_heat_maps(figure: SubFigure, runs: Mapping[str, _Run]) -> None:
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


def figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib (pip install matplotlib)") from error
    return Figure


def comparison_figure(runs: Mapping[str, Path]) -> Figure:
    """The figure of `plot_comparison`: one axes of lines, one heat map a run, one colour bar."""
    if not 1 <= len(runs) <= len(COLOURS):
        raise ValueError(f"a picture compares 1 to {len(COLOURS)} runs, not {len(runs)}")
    loaded = {label: load_run(Path(path)) for label, path in runs.items()}
    figure = figure_class()(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=(1.65, 1))
    _draw_lines(rows[0].add_subplot(), loaded)
    _draw_heat_maps(rows[1], loaded)
    model, data = describe(next(iter(loaded.values())))
    figure.suptitle(f"{model},\n{data}", fontsize=11.5)
    return figure


def plot_comparison(runs: Mapping[str, Path], out: Path) -> Path:
    """Draws the runs (label -> run folder, in the order to be shown) into the PNG file `out`, and returns `out`.

    Top: MaxVio, mean over the MoE layers, of every step's global batch on a log axis, raw and smoothed, with the
    sampling floor (`sampling_floor`) of the runs' sizes. Bottom: the validation loads of every expert and MoE
    layer, divided by the layer's mean, one heat map a run on a shared scale. The title describes the first run.
    """
    return save(comparison_figure(runs), Path(out))


def save(figure: Figure, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    from PIL import Image  # comes with matplotlib

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:  # a palette of 256 colours makes the file three times smaller, to no visible loss
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        small.save(out, format="PNG", optimize=True)
    return out


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
        smooth_S = smooth(ratio_S, window)
        marker = "o" if len(steps_S) == 1 else None  # a line of one point is invisible
        positive_S = np.where(smooth_S > 0, smooth_S, np.nan)
        axes.plot(steps_S, positive_S, color=colour, linewidth=width, label=label, marker=marker)
    axes.axhline(1.0, color="black", linestyle=(0, (5, 3)), linewidth=1.2, label="sampling floor (uniform draws)")
    logarithmic(axes)
    axes.set_xlim(0, max(1, len(steps_S) - 1))
    axes.set_xlabel("updates made" + f"   (thin: every step; thick: mean of the last {window})" * (window > 1))
    axes.set_ylabel("MaxVio / sampling floor,\nmean over the layers")
    dress(axes)
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
    return save(replay_figure(result), Path(out))
