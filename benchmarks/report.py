"""Writes `docs/benchmarks.md` and `docs/cluster.md`, and the tables and pictures of `docs/rules.md` and
`docs/theory.md`, from `benchmarks/results/*.json`.

Nothing is measured here and no figure is typed: `python -m benchmarks.report`, or `make docs`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alflb_megatron.lab.theory import plots as theory_plots
from alflb_megatron.lab.theory import tables as theory_tables
from benchmarks import (
    all_reduce,
    balance,
    by_execution,
    cluster_page,
    cluster_tables,
    cost,
    data_change,
    gpu,
    in_training,
    local_updates,
    neighbours,
    one_gpu,
    sample,
    scale,
    traced,
    traced_steps,
    tried,
    upstream_quantile,
    within_batch,
)
from benchmarks.machine import RESULTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
DRAWN = ("hard skew", "fast drift, with momentum", "recorded: sigmoid")
RULES = ("sign", "sqrt", "quantile", "adaptive")


def results(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def made(found: dict[str, Any]) -> str:
    """What the figures were measured on, and by which command."""
    on = found["machine"]
    return (
        f"Made by `{on['command']}`: torch {on['torch']}, megatron-core {on['megatron-core']}, Python {on['python']}, "
        f"{on['processor']}, {on['threads']} thread{'s' * (on['threads'] > 1)}."
    )


def section(name: str, table: Callable[[dict[str, Any]], str] | None = None) -> str:
    """A benchmark's table and how it was made, or that it is not measured."""
    found = results(name)
    if found is None:
        return f"Not measured. To measure: `python -m benchmarks.{name.partition('-')[0]}`."
    return f"{table(found) if table else ''}\n\n{made(found)}"


def gpu_section() -> str:
    """What `make gpu` found, and what it had found before margins were sampled and fused."""
    found, before = results("gpu"), results("gpu-all-margins")
    if not found:
        return "Not measured. To measure, on a machine with a GPU: `make gpu`."
    earlier = (
        gpu.cost_table(
            [row for row in before["cost"]["results"]["rows"] if row["tokens"] == 4096 and row["experts"] > 16],
            before["cost"]["results"]["layers"],
        )
        if before
        else "Not measured."
    )
    return f"""`make gpu` runs the tests that need a device, measures what a router costs there, and trains.

{gpu.table(found)}

{made(found)} The time is the host's, which waits for the device after each part: with inputs this small it is launches
that cost, and the guards of compiled margins. One round of ten steps is no comparison of throughput. The two failures
of `test_counts_and_margins_are_those_of_the_cpu` were equal scores, between which a device chooses its own way; the
test has none any more, and has not been run on a device since. `test_megatron_cores_cuda_graphs` put the MoE layer of
Megatron-Core's hybrid models into a GPTModel with `cuda_graph_impl=local`, which stopped inside Megatron-Core's
capture, before any replay; that test is gone. Routers captured by themselves, with their update or without, passed.

The same with margins of all tokens, each step of them a kernel of its own, before both were changed:

{earlier}"""


def one_gpu_section() -> str:
    found = results("one_gpu")
    return one_gpu.one_gpu_table(found) + (f"\n\n{made(found)}" if found else "")


def missed(found: dict[str, Any]) -> str:
    """Each target of the balance benchmark, held or missed where."""
    targets = {
        "lowest of all rules": f"`adaptive` has the lowest mean (within {balance.TIE - 1:.0%}) on every stream",
        "at the floor": f"mean at most {balance.SLOW} on slow, {balance.FAST} on fast simulated streams",
        "cold start": f"at most {balance.COLD_START} steps from a cold start to twice the floor",
        "affinity": "affinity kept no lower than `quantile`'s",
    }
    lines = []
    for key, text in targets.items():
        where = found["verdicts"]["missed"][key]
        holds = "holds on all" if not where else f"misses on {len(where)} of"
        names = "" if not where else ": " + "; ".join(where)
        lines.append(f"- {text}: {holds} {found['verdicts']['streams']} streams{names}.")
    return "\n".join(lines)


def balance_figure(found: dict[str, Any]) -> Figure:
    """MaxVio over the sampling floor, step by step, for a few streams and rules."""
    from matplotlib.figure import Figure

    from alflb_megatron.lab.display.plot_style import COLOURS, DPI, style_axes

    rows = [row for row in found["rows"] if row["stream"] in DRAWN]
    drawn = Figure(figsize=(4.2 * len(rows), 3.6), dpi=DPI, layout="constrained")
    for panel, row in enumerate(rows, 1):
        axes = drawn.add_subplot(1, len(rows), panel)
        for rule, colour in zip(RULES, (COLOURS[0], COLOURS[4], COLOURS[2], COLOURS[1]), strict=True):
            ratio = [value / row["floor"] or math.nan for value in row["rules"][rule]["maxvio"]]
            axes.plot(ratio, color=colour, label=rule, lw=1.4)
        axes.axhline(1.0, color="black", linestyle=":", linewidth=1.2, label="sampling floor")
        axes.set_yscale("log")
        axes.set_title(f"{row['stream']} (top-{row['topk']} of {row['experts']})", fontsize=10)
        axes.set_xlabel(f"update ({row['tokens']:,.0f} tokens)")
        style_axes(axes)
        if panel == 1:
            axes.set_ylabel("MaxVio / sampling floor")
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return drawn


def page() -> str:
    at_once = results("balance")
    held_out = [path.stem for path in sorted(RESULTS.glob("balance-seed*.json"))]
    others = "\n\n".join(
        f"**Seed {found['seed']}**, first used after the rules were done:\n\n"
        f"{balance.table(found)}\n\n{missed(found)}\n\n"
        f"{made(found)}"
        for found in map(results, held_out)
        if found
    )
    first = "Not measured."
    if at_once:
        first = (
            f"{balance.table(at_once)}\n\n{missed(at_once)}\n\n{made(at_once)}\n\nScores kept, relative to unbiased "
            "routing, from step 10 on; in the last column the best bias in hindsight (made from the very batch) and "
            f"its MaxVio over the floor:\n\n{balance.affinity_table(at_once)}"
        )
    return f"""# Benchmarks

Written by `make docs` from `benchmarks/results/`; do not edit. Each table names the command that measured it.

MaxVio = (largest load - mean load) / mean load. The *sampling floor* is its expected value when every token draws K
distinct experts uniformly and independently at the same T, K, E: a yardstick for biases that are set before the batch
is seen, which can even out the experts' probabilities and not the luck of the draw.

## Balance

All rules with their published defaults on the same score streams, nothing tuned to a stream; step n is routed with the
bias made from the steps before n. Cells: mean MaxVio over the floor from step 10 on / steps from a cold start until
twice the floor (`-`: never). The lowest mean of a row, and what is within {balance.TIE - 1:.0%} of it, is bold. What
the streams are: [`benchmarks/streams.py`](../benchmarks/streams.py); the last two simulated ones lie outside the
targets, to show where the rules end. The recorded streams are the first steps of small models at their full learning
rate, which change much from one step to the next.

![MaxVio over the sampling floor on three streams](balance.png)

{first}

{others}

### With margins of a sample

Rules that need margins are shown those of every r-th position, and the loads of all tokens
([design.md](design.md#what-a-rule-is-shown)). Mean over the floor / steps to twice the floor; r of the sample itself.

{section("sample", sample.table)}

### Against Megatron-Core's quantile balancing

Its own router and update as they are (megatron-core 0.19), on the recorded streams, beside ours. Mean from step 10 on
and mean of the last quarter, over the floor.

{section("upstream_quantile", upstream_quantile.table)}

### Rules that came up since

phi-balancing (arXiv 2605.15403), with constants that are the best of a grid on each stream, in hindsight: potential's
weight and the average's rate are in brackets. Its update is derived here from its abstract, for the text could not be
had. W1 to W7 are the workloads of Megatron-LM's pull request 7488 as scores
([`streams.py`](../benchmarks/streams.py)): a hot quarter of the experts, a half that nobody chooses, a hot quarter that
moves on every three steps, and one that is hot in one step of four. A bias that moves once a step can only follow what
stays: it is late for the third, and to the fourth it answers a step too late, worse than `sign`, which hardly moves.
Inside the step, here of {neighbours.MICRO_BATCHES} micro-batches, less of either is left. Cells as above.

{section("neighbours", neighbours.table)}

Two correct the scores of a token by the tokens before it in its sequence: Su's moving quantile balancing and Chang's
causal dual bias, as far as they could be read ([`neighbours.py`](../benchmarks/neighbours.py)). They even out single
sequences, which a bias does not, and pay for it in scores kept. MaxVio of the step over the floor / MaxVio inside a
sequence / scores kept. Tokens are taken sequence by sequence here, so the sample of margins is another than above.

{neighbours.inside_table(found) if (found := results("neighbours")) else "Not measured."}

## In training

![MaxVio over training steps](in_training.png)

{section("in_training", in_training.table)}

Few steps of small models rank balance, not quality.

### Inside the global batch

Biases moved once a global batch, and by its micro-batches too ([rules.md](rules.md#inside-the-global-batch)): the
global batch is fixed and cut into M micro-batches of whole sequences. The sequence floor is the MaxVio of a fresh batch
of whole sequences under the bias that balances the distribution at the very weights, solved on other batches: a bias
that is set before the batch is seen cannot be expected below it, one that follows the batch can.

![MaxVio over training steps, biases moved inside the global batch](within_batch.png)

{section("within_batch", within_batch.table)}

On megatron-core 0.19.2, with its own quantile balancing:

{section("within_batch-mcore-0.19.2", within_batch.table)}

With other numbers of micro-batches a global batch:

{section("within_batch-fewer", within_batch.table)}

A larger model, of five MoE layers with 32 experts:

{section("within_batch-small", within_batch.table)}

Where the kind of text changes from one step to the next ([`data_change.py`](../benchmarks/data_change.py)), a bias fits
once it leaves a fresh global batch at most twice its sequence floor:

{section("data_change", data_change.table)}

### Without an all-reduce

A bias that each rank moves by its own counts, as Han's public fork of litgpt does
([models.md](models.md#hans-fork)), beside one that is moved by the counts of all:

{section("local_updates", local_updates.table)}

### Beside balance by execution

An expert-parallel rank's overload in single micro-batches of real trainings, what is left of it where tokens and
weights move instead, and how many experts' weights then move ([execution.md](execution.md)).

{section("by_execution", by_execution.table)}

## Cost

Router forward and backward plus its share of one update, as a ratio to Megatron-Core's `TopKRouter` with its own expert
bias (with the softmax gate: without, as it refuses one there, so with no counting and no update at all). Hidden size
{cost.HIDDEN}, {cost.LAYERS} layers; a global batch of {cost.MICRO_BATCHES} micro-batches on each of {cost.RANKS} ranks,
and below it one of a single micro-batch, where hardly any token is left out of the sample of margins; in brackets
forward and backward alone. To reach, with {cost.MICRO_BATCHES} micro-batches: {cost.COUNTS_ALONE} for rules that need
loads alone, {cost.WITH_MARGINS} for those that need margins.

{section("cost", cost.table)}

On megatron-core 0.19.2, with its own quantile balancing:

{section("cost-mcore-0.19.2", cost.table)}

### As traced

What a router launches and moves, counted operation by operation, beside a roofline on paper for an H100
([`traced.py`](../benchmarks/traced.py)). An operation is a launch or two; a GPU compiles some of them together.

{section("traced-mcore-0.19.2", traced.table)}

The collectives of a whole training step, as one process traces them on groups of any size
([`traced_steps.py`](../benchmarks/traced_steps.py)):

{section("traced_steps-mcore-0.19.2", traced_steps.table)}

### On a GPU

{gpu_section()}

### A training on one GPU

The 1B model of Wang et al. with every rule in turn, ratios of throughput inside one round, memory, and a profile of
where the router's time goes ([`one_gpu.py`](../benchmarks/one_gpu.py)).

{one_gpu_section()}

### The all-reduce

{section("all_reduce", all_reduce.table)}

## Scale

{section("scale", scale.table)}
"""


def rules_page() -> str:
    """`docs/rules.md` with the table of what was tried between its markers."""
    text = (DOCS / "rules.md").read_text(encoding="utf-8")
    between = section("tried", tried.table)
    return re.sub(
        r"<!-- tried -->.*<!-- /tried -->", lambda _: f"<!-- tried -->\n{between}\n<!-- /tried -->", text, flags=re.S
    )


def theory_page() -> str:
    """`docs/theory.md` with the tables of `benchmarks/results/theory.json` between its markers."""
    text = (DOCS / "theory.md").read_text(encoding="utf-8")
    found = results("theory")
    if not found:
        return text
    tables = {name: theory_tables.markdown_table(claim) for name, claim in found["claims"].items()}
    tables["sweep"] = f"{theory_tables.sweep_table(found['claims']['regret']['figures'])}\n\n{made(found)}"
    for name, table in tables.items():
        between = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*<!-- /{name} -->", lambda _, b=between: b, text, flags=re.S)  # type: ignore[misc]
    return text


def cluster() -> str:
    """`docs/cluster.md`."""
    found = results("cluster")
    return cluster_page.page(found, made(found)) if found else "# Cluster scale on paper\n\nNot made.\n"


def main() -> None:
    (DOCS / "theory.md").write_text(theory_page(), encoding="utf-8")
    if found := results("theory"):
        for path in theory_plots.draw(found, DOCS):
            path.replace(DOCS / f"theory-{path.name}")
    (DOCS / "benchmarks.md").write_text(page(), encoding="utf-8")
    (DOCS / "rules.md").write_text(rules_page(), encoding="utf-8")
    if found := results("balance"):
        balance_figure(found).savefig(DOCS / "balance.png")
    (DOCS / "cluster.md").write_text(cluster(), encoding="utf-8")
    if found := results("cluster"):
        cluster_tables.figure(found).savefig(DOCS / "cluster.png")
    if found := results("within_batch"):
        within_batch.figure(found).savefig(DOCS / "within_batch.png")
    if found := results("in_training"):
        in_training.figure(found).savefig(DOCS / "in_training.png")


if __name__ == "__main__":
    main()
