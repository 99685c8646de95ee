"""The tables of a sweep, in Markdown, from the rows of its results.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.sweep.collect import Interval, confidence_interval, rows_by_group, rows_by_step_size
from alflb_megatron.lab.sweep.plan import FIGURES, Sweep

Rows = Sequence[Mapping[str, Any]]

FIGURE_TITLES = {
    "perplexity": "validation perplexity",
    "maxvio_global": "MaxVio_global",
    "maxvio_last50": "MaxVio, last 50 steps",
    "maxvio_mean": "MaxVio, all steps",
}
"""The figures of every table; the first two are those that papers publish."""


def group_label(row: Mapping[str, Any], models: int = 1, gates: int = 1) -> str:
    """A group for people: `sign, u = 0.001`, with model and gate where the table has several."""
    parts = [row["model"]] * (models > 1) + [row["gate"]] * (gates > 1)
    if row["rule"] != "none" or not row["aux"]:
        parts.append("no balancing" if row["rule"] == "none" else row["rule"])
    if row["aux"]:
        parts.append(f"auxiliary loss {row['aux']:g}")
    if row["u"] is not None:
        parts.append(f"u = {row['u']:g}")
    if row["label"]:
        parts.append(row["label"])
    return ", ".join(parts)


def group_labels(rows: Rows) -> dict[str, str]:
    """Group -> label."""
    models, gates = (len({row[name] for row in rows}) for name in ("model", "gate"))
    return {group: group_label(found[0], models, gates) for group, found in rows_by_group(rows).items()}


def _maxvio(value: Interval) -> str:
    if value.half is None:
        return maxvio_text(value.mean)
    digits = 2 if value.mean >= 0.095 else 3
    return f"{value.mean:.{digits}f} ± {value.half:.{digits}f}"


def results_table(rows: Rows) -> str:
    """A row a group: means over seeds with 95 % intervals, and the published figures beside them."""
    names, groups = group_labels(rows), rows_by_group(rows)
    published = any(row[f"published_{figure}"] is not None for row in rows for figure in FIGURES)
    scaled = any(row["u"] is not None and row["u"] != row["u_used"] for row in rows)
    certified = any(row["gap"] is not None for row in rows)
    floors = any(row["sequence_floor"] is not None for row in rows)
    head = ["rule", *["u used"] * scaled, "seeds", *FIGURE_TITLES.values()]
    head += ["sequence floor", "steps to 2x sequence floor"] * floors
    head += ["dual gap a step", "regret a step", "modulus", "2 K / (E largest curvature)"] * certified
    head += ["published perplexity", "published MaxVio_global"] * published
    lines = [head, ["---"] * len(head)]
    for group, found in groups.items():
        one = found[0]
        cells = [names[group]]
        if scaled:
            cells.append("" if one["u"] is None else f"{one['u_used']:g}")
        cells += [str(len(found)), _over(found, "perplexity").text()]
        cells += [_maxvio(_over(found, name)) for name in FIGURE_TITLES if name != "perplexity"]
        if floors:
            reached = [row["steps_to_2x_sequence_floor"] for row in found]
            cells += [_floor(found), ", ".join("never" if step is None else f"{step:,}" for step in reached)]
        if certified:
            cells += [_small(found, name) for name in ("gap", "regret", "modulus", "largest_step")]
        if published:
            cells += ["" if one[f"published_{f}"] is None else f"{one[f'published_{f}']:g}" for f in FIGURES]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _over(found: Rows, name: str) -> Interval:
    return confidence_interval([row[name] for row in found])


def _floor(found: Rows) -> str:
    known = [row["sequence_floor"] for row in found if row["sequence_floor"] is not None]
    return maxvio_text(confidence_interval(known).mean) if known else ""


def _small(found: Rows, name: str) -> str:
    values = [row[name] for row in found if row[name] is not None]
    if not values:
        return ""
    over = confidence_interval(values)
    return f"{over.mean:.2g}" + ("" if over.half is None else f" ± {over.half:.1g}")


def best_step_size_table(rows: Rows) -> str:
    """For each rule that was swept over u: the u with the least mean of each figure, that mean, and how many of the
    rule's u stay within twice it; empty where nothing was swept."""
    figures = {**{name: FIGURE_TITLES[name] for name in ("maxvio_global", "maxvio_last50")}, "gap": "dual gap a step"}
    found = {rule: by_u for rule, by_u in rows_by_step_size(rows).items() if rule != "none"}
    shown = {name: title for name, title in figures.items() if any(row[name] is not None for row in rows)}
    lines = [["rule", "u tried", *(f"best u, {title}" for title in shown.values())]]
    lines.append(["---"] * len(lines[0]))
    for rule, by_u in found.items():
        cells = [rule, str(len(by_u))]
        for name in shown:
            means = {u: _over(group, name).mean for u, group in by_u.items()}
            least = min(means, key=lambda u: means[u])
            near = sum(mean <= 2 * means[least] for mean in means.values())
            cells.append(f"{least:g}: {means[least]:.2g} ({near} within twice)")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if found else ""


def _published(left: Rows, right: Rows, figure: str) -> float | None:
    """The published difference left - right; None where either was not published."""
    one, other = (rows[0].get(f"published_{figure}") for rows in (left, right))
    return None if one is None or other is None else one - other


def paired_by_seed(left: Rows, right: Rows) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Rows of two groups with the same seed; a sweep under way has not every seed of each."""
    of_seed = {row["seed"]: row for row in right}
    return [(row, of_seed[row["seed"]]) for row in left if row["seed"] in of_seed]


def compare_pair(left: Rows, right: Rows, figure: str) -> tuple[Interval, str]:
    """The difference left - right, paired by seed, with its interval, and what it says of the published one.

    `holds` and `reversed` where the interval excludes zero, `not decided` where it does not or where there is one seed;
    `clear` and `not decided` where nothing was published.
    """
    difference = confidence_interval([a[figure] - b[figure] for a, b in paired_by_seed(left, right)])
    said = _published(left, right, figure)
    if difference.half is None or abs(difference.mean) <= difference.half:
        return difference, "not decided"
    if not said:
        return difference, "clear"
    return difference, "holds" if (difference.mean < 0) == (said < 0) else "reversed"


def order_table(rows: Rows, compare: Sequence[tuple[str, str]]) -> str:
    """A row for each pair and figure: published and measured difference, and the verdict; empty without pairs."""
    names, groups = group_labels(rows), rows_by_group(rows)
    lines = ["| pair | figure | published difference | measured difference | verdict |", "|---|---|---|---|---|"]
    for one, other in compare:
        for figure in FIGURE_TITLES:
            left, right = groups[one], groups[other]
            difference, verdict = compare_pair(left, right, figure)
            said = _published(left, right, figure)
            published = "" if said is None else f"{said:+.3g}"
            half = "" if difference.half is None else f" ± {difference.half:.3f}"
            pair = f"{names[one]} - {names[other]}" if figure == next(iter(FIGURE_TITLES)) else ""
            lines.append(
                f"| {pair} | {FIGURE_TITLES[figure]} | {published} | {difference.mean:+.3f}{half} | {verdict} |"
            )
    return "\n".join(lines) if compare else ""


def scale_table(sweep: Sweep) -> str:
    """What the scale changed, and divided by what, for each model; empty at full size."""
    factors = sweep.changes()
    if not any(factors.values()):
        return ""
    names = list(dict.fromkeys(name for changed in factors.values() for name in changed))
    lines = [f"| setting | {' | '.join(factors)} |", "|---" * (len(factors) + 1) + "|"]
    for name in names:
        cells = []
        for changed in factors.values():
            if name not in changed:
                cells.append("as published")
                continue
            full, here = changed[name]
            if isinstance(full, str | bool):
                cells.append(f"{full} → {here}")
                continue
            ratio = f" (1/{full / here:.3g})" if here and full > here else f" ({here / full:.3g} times)" if full else ""
            cells.append(f"{full:,g} → {here:,g}{ratio}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep_page(sweep: Sweep, rows: Rows, figures: Sequence[str], folder: str = "") -> str:
    """All of a sweep on one page: what was run, tables, and links to its figures, PNG files in `folder`."""
    first, seeds = rows[0], sorted({row["seed"] for row in rows})
    models = {row["model"]: row for row in reversed(rows)}
    sizes = {
        f"{row['steps']:,} steps, {row['tokens']:,} tokens, sampling floor of a global batch's MaxVio "
        f"{maxvio_text(row['maxvio_floor'])}": model
        for model, row in models.items()
    }
    each = next(iter(sizes)) if len(sizes) == 1 else "; ".join(f"{model} {size}" for size, model in sizes.items())
    of = f" of {sweep.planned}" if len(rows) < sweep.planned else ""
    parts = [
        sweep.about,
        f"{len(rows)}{of} runs, seeds {', '.join(map(str, seeds))}: {each}. torch {first['torch']}, megatron-core "
        f"{first['megatron_core']}, revision `{(first['revision'] or 'unknown')[:12]}`. ± is half a 95 % interval over "
        "the seeds (Student's t).",
        results_table(rows),
        *([f"Published figures: {sweep.source}."] if sweep.source else []),
    ]
    if best := best_step_size_table(rows):
        parts += ["The best step size of each rule, chosen on these very seeds:", best]
    if sweep.compare:
        parts += ["Differences paired by seed; a verdict needs an interval that leaves out zero:"]
        parts += [order_table(rows, sweep.compare)]
    parts += [f"![{name.removesuffix('.png').replace('-', ' ')}]({folder}{name})" for name in figures]
    if scale := scale_table(sweep):
        parts += [f"**What {sweep.scale} can and cannot say.** {sweep.scale_about}", "Shrunk from full size:", scale]
    return "\n\n".join(part for part in parts if part) + "\n"
