"""The pictures of `alflb theory`, one a claim, drawn from what `theory.json` holds.

matplotlib is imported when a picture is drawn, and used without pyplot, as in `lab/display/plot_style.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alflb_megatron.lab.display.plot_style import COLOURS, DPI, figure_class, save_png, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Draws every claim in `results` that has a picture into `out`; returns the files."""
    pictures = {
        "lagrangian": lagrangian,
        "preference": preference,
        "balance": balance,
        "convexity": convexity,
        "regret": regret,
    }
    return [
        save_png(picture(results["claims"][name]["figures"]), out / f"{name}.png")
        for name, picture in pictures.items()
        if name in results["claims"]
    ]


def _canvas(columns: int, width: float = 11.0, height: float = 4.2) -> tuple[Figure, Any]:
    figure = figure_class()(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        style_axes(one)
    return figure, axes


def lagrangian(figures: Mapping[str, Any]) -> Figure:
    """The Lagrangian along a run of the sign rule, and the admissible step size against the loads."""
    figure, (left, right) = _canvas(2)
    path = figures["lagrangian_along_a_run"]
    steps, values = (np.array([row[key] for row in path]) for key in ("step", "lagrangian"))
    rose = np.array([bool(row["rose"]) for row in path])
    above = values - values.min()
    left.plot(steps, np.maximum(above, 1e-4), color=COLOURS[0], linewidth=0.8)
    left.scatter(steps[~rose], np.maximum(above[~rose], 1e-4), s=5, color=COLOURS[2], label="step that lowered it")
    left.scatter(steps[rose], np.maximum(above[rose], 1e-4), s=5, color=COLOURS[1], label="step that raised it")
    left.set(yscale="log", xlabel="step", ylabel="Lagrangian above its lowest value, in scores")
    left.set_title("A constant sign step", fontsize=11)
    left.legend(frameon=False)
    allowed = [row for row in figures["admissible_step"] if row["largest_step"] > 0]
    imbalance = [row["imbalance"] for row in allowed]
    right.scatter(imbalance, [row["largest_step"] for row in allowed], s=14, color=COLOURS[2], label="exact")
    right.scatter(imbalance, [row["by_curvature"] for row in allowed], s=14, marker="x", color=COLOURS[1],
                  label="2 sum|A-L| / (T v'Hv), H from near ties")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="imbalance, sum |A - L| in tokens", ylabel="largest admissible u")
    right.set_title("The step size that still improves", fontsize=11)
    right.legend(frameon=False)
    return figure


def preference(figures: Mapping[str, Any]) -> Figure:
    """Switches from expert to expert, the experts in the order of their first load."""
    figure, (axes,) = _canvas(1, width=5.6, height=4.8)
    order = np.argsort(-np.array(figures["first_gradient"]))
    switched = np.array(figures["map"], dtype=float)[np.ix_(order, order)]
    image = axes.imshow(np.where(switched > 0, switched, np.nan), cmap="viridis")
    axes.grid(False)
    axes.set(xlabel="to expert (most to least loaded at first)", ylabel="from expert")
    axes.set_title("Switches under the sign rule", fontsize=11)
    figure.colorbar(image, ax=axes, label="tokens")
    return figure


def balance(figures: Mapping[str, Any]) -> Figure:
    """The band of a constant sign step."""
    figure, (axes,) = _canvas(1, width=7.0)
    bands = figures["bands"]
    for colour, tokens in zip(COLOURS[1:], sorted({row["tokens"] for row in bands}), strict=False):
        rows = sorted((row for row in bands if row["tokens"] == tokens), key=lambda row: row["step_size"])
        u = [row["step_size"] for row in rows]
        axes.plot(u, [max(row["band"], 0.3) for row in rows], "o-", color=colour, label=f"T = {tokens:,}")
        axes.plot(u, [row["one_step"] for row in rows], ":", color=colour)
    axes.axhline(bands[0]["experts"] - 1, color="black", linestyle=(0, (5, 3)), linewidth=1.2, label="E - 1")
    axes.set(xscale="log", yscale="log", xlabel="u of the sign rule", ylabel="max |A - L| in tokens, last quarter")
    axes.set_title("How far a constant step stays from balance (dotted: 2 u T H)", fontsize=11)
    axes.legend(frameon=False)
    return figure


def convexity(figures: Mapping[str, Any]) -> Figure:
    """The modulus over the distance from the optimum, under heavy-tailed preferences, and the ties it is read from."""
    figure, (left, right, last) = _canvas(3, width=14.0)
    balls = figures["balls"]
    radius = [row["radius"] for row in balls]
    left.plot(radius, [row["modulus"] for row in balls], "o-", color=COLOURS[2], label="mu")
    left.plot(radius, [row["bound"] for row in balls], "s--", color=COLOURS[1], label="E min h")
    finite = [row for row in balls if row["radius"] > 0]
    left.plot([row["radius"] for row in finite], [row["ceiling"] for row in finite], ":", color="black",
              label="sqrt(K (1 - K/E)) / |p|")  # fmt: skip
    left.set(yscale="log", ylim=(1e-8, 10), xlabel="|p - p*|", ylabel="per token")
    left.set_title("Strong convexity ends where the bias is far", fontsize=11)
    left.legend(frameon=False)
    heavy = sorted(figures["heavy"], key=lambda row: row["tail"])
    tails = [row["tail"] for row in heavy]
    right.plot(tails, [max(row["without_bias"], 1e-13) for row in heavy], "o-", color=COLOURS[1],
               label="p = 0 (1e-13 stands for 0)")  # fmt: skip
    right.plot(tails, [row["at_optimum"] for row in heavy], "o-", color=COLOURS[2], label="at the optimum p*")
    right.set(yscale="log", xlabel="tail index of the experts' preferences (Pareto)", ylabel="mu per token")
    right.set_title("Heavy-tailed preferences", fontsize=11)
    right.legend(frameon=False)
    ties = figures["ties"]
    last.step(ties["gap"], ties["density"], where="mid", color=COLOURS[2], label="sample")
    last.plot(0, ties["at_zero"], "D", color=COLOURS[1], label="trace H, by quadrature", clip_on=False)
    last.axvspan(0, ties["near"], color=COLOURS[0], alpha=0.25, label="near ties")
    last.set(xlabel="gap between a token's K-th and next", ylabel="density", xlim=(0, None), ylim=(0, None))
    last.set_title("Ties, from which mu is estimated", fontsize=11)
    last.legend(frameon=False)
    return figure


def regret(figures: Mapping[str, Any]) -> Figure:
    """u/n around 1/mu, the best of each rule, and what happens when the comparator moves."""
    figure, (left, middle, right) = _canvas(3, width=14.0, height=4.6)
    curves = figures["curves"]
    around = [label for label in curves if label.startswith("u/n, u = ")]
    for colour, label in zip(COLOURS, around, strict=False):
        _curve(left, curves[label], colour, label.removeprefix("u/n, "))
    steps = np.array(curves[around[0]]["step"], dtype=float)
    slope = figures["growth"]["u/n, u = 1/mu"]["log_slope"]
    level = figures["last"]["u/n, u = 1/mu"] + slope * np.log(steps / steps[-1])
    left.plot(steps[steps >= 8], level[steps >= 8], "--", color="black", linewidth=1.0, label="a + b ln N, for 1/mu")
    left.plot(steps[-1], figures["bound"], "v", color="black", label="bound for 1/mu", clip_on=False)
    left.set(xscale="log", yscale="log", xlabel="N", ylabel="regret against p*, score per token")
    left.set_title("u/n, u in units of 1/mu", fontsize=11)
    shown = [*figures["best"].values(), "quantile", "adaptive"]
    for colour, label in zip(COLOURS, shown, strict=False):
        found = figures["growth"][label]["exponent"]
        _curve(middle, curves[label], colour, f"{label}: N^{found:.2f}" if found > 0.1 else label)
    middle.set(xscale="log", yscale="log", xlabel="N")
    middle.set_title("Each rule at its best u of the sweep", fontsize=11)
    for colour, (label, curve) in zip(COLOURS, figures["dynamic"].items(), strict=False):
        _curve(right, curve, colour, label)
    right.set(xscale="log", yscale="log", xlabel="N", ylabel="dynamic regret")
    right.set_title("When the best bias moves", fontsize=11)
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
    return figure


def _curve(axes: Any, curve: Mapping[str, Any], colour: str, label: str) -> None:
    step, mean, error = (np.array(curve[key], dtype=float) for key in ("step", "mean", "error"))
    axes.plot(step, mean, color=colour, label=label)
    axes.fill_between(step, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)
