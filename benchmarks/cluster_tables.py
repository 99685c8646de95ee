"""Tables and the picture of `docs/cluster.md`, from the results of `benchmarks.cluster`."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.cluster import luck, step_ratio
from benchmarks.scale import ms_text, size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Edges of MaxVio in the table of what it costs."""
SMALLEST_BIN = 20
"""A bin with fewer recorded layers has no row."""

LABELS = {
    "none": "no balancing",
    "builtin": "Megatron-Core's own bias",
    "sign": "`sign`",
    "adaptive": "`adaptive`",
}


def percent(part: float) -> str:
    """Two digits, never an exponent."""
    value = 100 * part
    return f"{value:.0f}%" if abs(value) >= 10 else f"{value:.2g}%" if abs(value) >= 0.001 else f"{value:.1g}%"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Markdown; the first `words` columns are to the left."""
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def models(found: Mapping[str, Any]) -> str:
    rows = [
        [
            model["name"],
            f"{model['tokens']:,}",
            f"{model['shape']['num_layers']} + {model['shape']['mtp_layers']}",
            str(model["moe_layers"]),
            f"{model['active_weights'] / 1e9:.3g}e9",
            f"{model['flops'] / 1e9:.3g}e9",
            percent(model["attention_flops"] / model["flops"]),
            f"{model['tokens'] * model['flops']:.2e}",
        ]
        for model in found["models"]
    ]
    head = ["model", "tokens a step", "layers + MTP", "MoE layers", "weights a token meets", "FLOPs a token",
            "of them attention's core", "FLOPs a step"]  # fmt: skip
    return table(head, rows)


def collectives(found: Mapping[str, Any]) -> str:
    names = {"counts": "loads alone", "margins": "with margins"}
    utilisations = list(found["collective"][0]["step_seconds"])
    rows = []
    for row in found["collective"]:
        for kind, name in names.items():
            one = row[kind]
            rows.append([
                row["model"], name, f"{row['gpus']:,}", str(row["stages"]), f"{one['ranks']:,}", str(row["layers"]),
                size_text(one["bytes"]), f"{ms_text(one['ms'])} ({one['algorithm']})",
                *(f"{percent(one['share'][u])} of {row['step_seconds'][u]:.3g} s" for u in utilisations),
            ])  # fmt: skip
    head = ["model", "what is summed", "GPUs", "stages", "ranks", "MoE layers", "bytes", "ms"]
    return table([*head, *(f"at utilisation {u}" for u in utilisations)], rows, words=2)


def shares(found: Mapping[str, Any]) -> str:
    rows = []
    for name, by_ep in found["shares"].items():
        for ep, part in by_ep.items():
            experts, exchange = part["experts"], part["exchange"]
            rows.append(
                [name, ep, percent(experts), percent(exchange), f"{experts + exchange:.2f}",
                 f"{experts / (1 - exchange):.2f}"]
            )  # fmt: skip
    return table(["model", "EP", "experts", "exchanges", "s", "s, exchanges hidden"], rows)


def _layers(rules: Mapping[str, Any]) -> Iterator[tuple[float, dict[str, float]]]:
    """MaxVio and overloads of every recorded layer of every step and rule."""
    for run in rules.values():
        for step, row in enumerate(run["maxvio"]):
            for layer, maxvio in enumerate(row):
                yield maxvio, {ep: rows[step][layer] for ep, rows in run["overload"].items()}


def binned(rules: Mapping[str, Any]) -> list[tuple[float, float, int, float, dict[str, float]]]:
    """Edges, number, mean MaxVio and mean overloads of the recorded layers in each bin of MaxVio."""
    layers = list(_layers(rules))
    found = []
    for low, high in itertools.pairwise(BINS):
        inside = [one for one in layers if low <= one[0] < high]
        if len(inside) >= SMALLEST_BIN:
            means = {ep: statistics.fmean(over[ep] for _, over in inside) for ep in inside[0][1]}
            found.append((low, high, len(inside), statistics.fmean(vio for vio, _ in inside), means))
    return found


def _cell(part: Mapping[str, float], overload: float) -> str:
    return f"{overload:.2f}: +{percent(step_ratio(part, overload) - 1)}"


def by_maxvio(found: Mapping[str, Any]) -> str:
    parts = []
    for name, loads in found["loads"].items():
        parts_of = found["shares"][name]
        rows = [
            [f"{low:g} to {high:g}", str(number), f"{vio:.2f}", *(_cell(parts_of[ep], over[ep]) for ep in over)]
            for low, high, number, vio, over in binned(loads["rules"])
        ]
        eps = next(iter(loads["rules"].values()))["overload"]
        head = ["MaxVio of a layer", "recorded", "mean", *(f"EP {ep}" for ep in eps)]
        parts.append(f"{name}:\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _mean(rows: Sequence[Sequence[float]]) -> float:
    """Over layers and the last quarter of the steps."""
    return statistics.fmean(value for row in rows[-math.ceil(len(rows) / 4) :] for value in row)


def _of_one_model(model: Mapping[str, Any], loads: Mapping[str, Any], shares_of: Mapping[str, Any]) -> str:
    shape, tokens = loads["shape"], loads["tokens"]
    eps = next(iter(loads["rules"].values()))["overload"]
    micro = model["micro"] * model["shape"]["seq_length"]

    def even(ep: str, routed: int) -> float:
        return luck(routed, shape["topk"], shape["num_experts"], int(ep))

    figures = {
        LABELS[rule]: (f"{_mean(run['maxvio']):.2f}", {ep: _mean(over) for ep, over in run["overload"].items()})
        for rule, run in loads["rules"].items()
    }
    figures[f"even draws of {tokens:,} tokens"] = (f"{loads['floor']:.2f}", {ep: even(ep, tokens) for ep in eps})
    figures[f"even draws of {micro:,} tokens a rank"] = ("", {ep: even(ep, micro * int(ep)) for ep in eps})
    rows = [[name, vio, *(_cell(shares_of[ep], over[ep]) for ep in eps)] for name, (vio, over) in figures.items()]
    return (
        f"{model['name']}; loads of a model of {shape['num_layers'] - shape['num_dense_layers']} MoE layers, hidden "
        f"size {shape['hidden_size']}, top-{shape['topk']} of {shape['num_experts']} experts of width "
        f"{shape['moe_ffn_hidden_size']}, {loads['steps']} steps of {tokens:,} tokens, each {loads['every']}th kept:"
        "\n\n" + table(["rule", "MaxVio", *(f"EP {ep}" for ep in eps)], rows)
    )


def by_rule(found: Mapping[str, Any]) -> str:
    return "\n\n".join(
        _of_one_model(model, found["loads"][model["name"]], found["shares"][model["name"]]) for model in found["models"]
    )


def figure(found: Mapping[str, Any]) -> Figure:
    """How much longer each recorded step takes than an even one over its MaxVio, a panel a model and a colour an EP.

    The dotted line is what would be paid if MaxVio were the overload of ranks, at the shares of the largest EP.
    """
    from matplotlib.figure import Figure

    from alflb_megatron.lab.display.plot_style import COLOURS, DPI, style_axes

    drawn = Figure(figsize=(5.0 * len(found["loads"]), 4.2), dpi=DPI, layout="constrained")
    for panel, (name, loads) in enumerate(found["loads"].items(), 1):
        axes = drawn.add_subplot(1, len(found["loads"]), panel)
        runs = loads["rules"].values()
        maxvio = [statistics.fmean(row) for run in runs for row in run["maxvio"]]
        for colour, (ep, part) in zip(COLOURS, found["shares"][name].items(), strict=False):
            over = [statistics.fmean(row) for run in runs for row in run["overload"].get(ep, [])]
            if over:
                longer = [100 * (step_ratio(part, value) - 1) for value in over]
                axes.scatter(maxvio, longer, s=7, color=colour, label=f"EP {ep}", linewidths=0)
        whole = found["shares"][name][max(found["shares"][name], key=int)]
        ends = [min(maxvio), max(maxvio)]
        axes.plot(ends, [100 * (step_ratio(whole, 1 + end) - 1) for end in ends], color="black", ls=":", lw=1.2,
                  label="x = 1 + MaxVio")  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{name}, loads of {loads['shape']['num_experts']} experts", fontsize=10)
        axes.set_xlabel("MaxVio, mean over MoE layers")
        style_axes(axes)
        if panel == 1:
            axes.set_ylabel("step longer than under even loads, %")
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    return drawn
