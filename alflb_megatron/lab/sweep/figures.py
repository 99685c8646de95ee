"""The figures of a sweep, from the rows of its results.csv alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alflb_megatron.lab.display.plot_style import COLOURS, DPI, WIDTH, figure_class, log_y_axis, save_png, style_axes
from alflb_megatron.lab.sweep.collect import confidence_interval, rows_by_group, rows_by_step_size
from alflb_megatron.lab.sweep.tables import group_label, group_labels, paired_by_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
"""Beyond the palette, colours are used again with another stroke."""


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def maxvio_over_steps(rows: Rows) -> Figure:
    """MaxVio over the steps: a panel for each model and gate, a line for each rule and u, mean over seeds."""
    panels: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for group, found in rows_by_group(rows).items():
        panels.setdefault((found[0]["model"], found[0]["gate"]), {})[group] = list(found)
    figure = figure_class()(figsize=(WIDTH, 4.6 * len(panels)), dpi=DPI, layout="constrained")
    for place, ((model, gate), groups) in enumerate(panels.items()):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        for index, found in enumerate(groups.values()):
            curves_SN = np.array([row["maxvio_curve"] for row in found])
            mean_N, steps = curves_SN.mean(0), found[0]["steps"]
            x_N = (np.arange(len(mean_N)) + 0.5) * steps / len(mean_N)
            style = _style(index)
            axes.plot(x_N, mean_N, label=group_label(found[0]), linewidth=1.8, **style)
            if len(found) > 1:
                axes.fill_between(
                    x_N, curves_SN.min(0), curves_SN.max(0), color=style["color"], alpha=0.13, linewidth=0
                )
        floor = next(iter(groups.values()))[0]["maxvio_floor"]
        axes.axhline(floor, color="black", linestyle=(0, (5, 3)), linewidth=1, label="sampling floor")
        _sequence_floor(axes, [row for found in groups.values() for row in found])
        _finish_course(axes, f"{model}, {gate}", "MaxVio of a global batch")
    return figure


def maxvio_global_over_steps(rows: Rows) -> Figure:
    """MaxVio of the loads over the whole validation set at the steps that were evaluated, mean over seeds."""
    panels: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for group, found in rows_by_group(rows).items():
        if evaluated := [row for row in found if row["evaluated"]]:
            panels.setdefault((found[0]["model"], found[0]["gate"]), {})[group] = evaluated
    figure = figure_class()(figsize=(WIDTH, 4.6 * len(panels)), dpi=DPI, layout="constrained")
    for place, ((model, gate), groups) in enumerate(panels.items()):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        for index, found in enumerate(groups.values()):
            mean_N = np.mean([row["maxvio_global_curve"] for row in found], axis=0)
            label = group_label(found[0])
            axes.plot(found[0]["evaluated"], mean_N, marker="o", markersize=3.5, label=label, **_style(index))
        _finish_course(axes, f"{model}, {gate}", "MaxVio_global of the validation set")
    return figure


def _sequence_floor(axes: Any, rows: Rows) -> None:
    """The median over the runs of the sequence floor at the steps that were evaluated."""
    if evaluated := [row for row in rows if row["evaluated"]]:
        floors_N = np.nanmedian([row["sequence_floor_curve"] for row in evaluated], axis=0)
        dotted = (0, (1, 1.5))
        axes.plot(evaluated[0]["evaluated"], floors_N, color="black", linestyle=dotted, label="sequence floor")


def _finish_course(axes: Any, title: str, what: str) -> None:
    log_y_axis(axes)
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set_ylabel(what)
    axes.set_xlabel("training step")
    style_axes(axes)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))


def published_and_measured(rows: Rows) -> Figure:
    """MaxVio_global as measured and published, and by how much a group's perplexity is above that of the first of its
    model and gate: perplexities themselves are of other text and other tokens."""
    names = group_labels(rows)
    groups = {g: f for g, f in rows_by_group(rows).items() if f[0]["published_maxvio_global"] is not None}
    first = {(f[0]["model"], f[0]["gate"]): f for f in reversed(groups.values())}
    figure = figure_class()(figsize=(WIDTH, 1.5 + 0.36 * len(groups)), dpi=DPI, layout="constrained")
    y = np.arange(len(groups))[::-1]
    for place, title in enumerate(("MaxVio_global", "perplexity, % above the first row\nof its model and gate")):
        axes = figure.add_subplot(1, 2, place + 1)
        measured = []
        published = []
        for found in groups.values():
            beside = first[found[0]["model"], found[0]["gate"]]
            if place == 0:
                measured.append(confidence_interval([row["maxvio_global"] for row in found]))
                published.append(found[0]["published_maxvio_global"])
            else:
                pairs = paired_by_seed(found, beside)
                above = [100 * (a["perplexity"] / b["perplexity"] - 1) for a, b in pairs]
                measured.append(confidence_interval(above or [np.nan]))
                said = [one[0]["published_perplexity"] for one in (found, beside)]
                published.append(np.nan if None in said else 100 * (said[0] / said[1] - 1))
        axes.plot(published, y, "D", color=COLOURS[0], label="published, full size", markersize=6)
        means, halves = [one.mean for one in measured], [one.half or 0.0 for one in measured]
        axes.errorbar(means, y, xerr=halves, fmt="o", color=COLOURS[2], label="measured", capsize=2.5, markersize=6)
        axes.set_yticks(y, [names[g] for g in groups] if place == 0 else [""] * len(groups), fontsize=9)
        if place == 0:
            axes.set_xscale("log")
        axes.set_xlabel(title)
        style_axes(axes)
        if place == 0:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0, fontsize=9)
    return figure


def by_step_size(rows: Rows) -> Figure:
    """What a rule makes of its u: MaxVio of the last steps and global, perplexity, and where certified the theory's."""
    found_by_rule = rows_by_step_size(rows)
    times = {round(row["u_used"] / row["u"], 6) for row in rows if row["u"]}
    unit = (
        "u"
        if times == {1}
        else f"u as the plan names it ({', '.join(f'{k:g}' for k in sorted(times))} times as much here)"
    )
    columns: list[tuple[str, str, float | None]] = [  # logarithmic beyond the last: None all of it, 0 none of it
        ("maxvio_last50", "MaxVio, last 50 steps", None),
        ("maxvio_global", "MaxVio_global", None),
        ("perplexity", "validation perplexity", 0),
        ("gap", "dual gap a step, per token", None),
        ("regret", "regret a step, per token", 1e-3),
        ("modulus", "modulus, per token", 1e-2),
    ]
    columns = [one for one in columns if any(row[one[0]] is not None for row in rows)]
    figure = figure_class()(figsize=(WIDTH, 3.6 * ((len(columns) + 1) // 2)), dpi=DPI, layout="constrained")
    for place, (name, title, linear_below) in enumerate(columns):
        axes = figure.add_subplot((len(columns) + 1) // 2, 2, place + 1)
        for index, (rule, by_u) in enumerate(found_by_rule.items()):
            points = {u: [row[name] for row in found if row[name] is not None] for u, found in sorted(by_u.items())}
            points = {u: values for u, values in points.items() if values}
            means = [confidence_interval(values) for values in points.values()]
            style = _style(index)
            axes.plot(list(points), [one.mean for one in means], marker="o", markersize=4.5, label=rule, **style)
            low, high = [min(v) for v in points.values()], [max(v) for v in points.values()]
            axes.fill_between(list(points), low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        if linear_below is None:
            log_y_axis(axes)
        elif linear_below > 0:
            axes.set_yscale("symlog", linthresh=linear_below)
        axes.set_xlabel(unit)
        axes.set_ylabel(title)
        style_axes(axes)
        if place == 0:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0, fontsize=9)
    return figure


def _wanted(name: str, rows: Rows) -> dict[str, Callable[[Rows], Figure]]:
    """File name -> figure, of every figure that the rows have something for."""
    wanted = {"course": maxvio_over_steps}
    if any(row["evaluated"] for row in rows):
        wanted["global"] = maxvio_global_over_steps
    if rows_by_step_size(rows):
        wanted["step-size"] = by_step_size
    if any(row["published_maxvio_global"] is not None for row in rows):
        wanted["published"] = published_and_measured
    return {f"{name}-{kind}.png": figure for kind, figure in wanted.items()}


def figure_files(name: str, rows: Rows) -> list[str]:
    """The files that `draw_figures` writes."""
    return list(_wanted(name, rows))


def draw_figures(name: str, rows: Rows, out: Path) -> list[str]:
    """Draws every figure that the rows have something for into `out`, and returns the files' names."""
    for file, figure in (wanted := _wanted(name, rows)).items():
        save_png(figure(rows), out / file)
    return list(wanted)
