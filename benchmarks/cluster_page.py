"""`docs/cluster.md`, from the results of `benchmarks.cluster`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from alflb_megatron.lab.training.resolve import BUILTIN_RATE
from benchmarks import cluster_tables as tables
from benchmarks.scale import ms_text


def _constants(found: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{link['name']} {link['bandwidth'] / 1e9:.3g} GB/s a GPU and way ({link['bandwidth_from']})"
        for link in found["links"]
    )


def _uneven(found: Mapping[str, Any]) -> str:
    sequences = {model["name"]: model["sequences"] for model in found["models"]}
    pairs = [
        f"{sequences[row['model']]:,} by {row['gpus'] // row['stages']:,}"
        for row in found["collective"]
        if sequences[row["model"]] % (row["gpus"] // row["stages"])
    ]
    return f" (Sequences do not always divide by ranks, {', '.join(pairs)}; on paper they need not.)" if pairs else ""


def _longest(found: Mapping[str, Any]) -> str:
    """The row in which our all-reduce has the largest share, at the assumed utilisation."""
    at = f"{found['utilisation']:g}"
    row = max(found["collective"], key=lambda row: row["margins"]["share"][at])
    counts, margins = (row[kind]["share"][at] for kind in ("counts", "margins"))
    return (
        f"The largest share is that of {row['model']} on {row['gpus']:,} GPUs, where a step takes "
        f"{1e3 * row['step_seconds'][at]:.1f} ms: {tables.percent(counts)} of it with loads alone, "
        f"{tables.percent(margins)} with margins, nearly all of it latency."
    )


def _worth(found: Mapping[str, Any]) -> str:
    hours = " and ".join(
        f"{ms_text(hours / 100)} GPU-hours of {name}'s" for name, hours in found["run_gpu_hours"].items()
    )
    return f"One percent of all steps is {hours} pre-training."


def wrapped(text: str) -> str:
    """The text with its paragraphs of prose in lines of 120, after what was put into them."""
    prose = [
        block if block[:1] in "#|!- " else textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)
        for block in text.split("\n\n")
    ]
    return "\n\n".join(prose)


def page(found: Mapping[str, Any], made: str) -> str:
    """The page; `made` says on what, and by which command, the loads were recorded."""
    models, v3 = found["models"], found["v3"]
    sources = "; ".join(f"{model['name']} from {model['source']}" for model in models)
    return wrapped(f"""# Cluster scale on paper

Written by `make docs` from `benchmarks/results/cluster.json`; do not edit. No cluster was used: step times are model
FLOPs over an assumed utilisation, the all-reduce is priced by the alpha-beta model of [Scale](benchmarks.md#scale), and
what balance is worth is a simulation over loads recorded in small trainings. Formulas and constants, each with its
source: [`benchmarks/cluster.py`](../benchmarks/cluster.py),
[`alflb_megatron/lab/sweep/flops.py`](../alflb_megatron/lab/sweep/flops.py).

## The step

Training takes 6 FLOPs for each weight that a token is multiplied with, output head included, and causal attention's
products of queries, keys and values. A step takes FLOPs / (GPUs x peak x utilisation), with the peak of an H100 in
BF16, {found["peak"] / 1e12:g}e12 FLOP/s, and a utilisation that is assumed ({found["utilisation"]:g} where nothing
else is said).

{tables.models(found)}

Shapes: {sources}. DeepSeek-V3 is simplified: its MTP layer counts as one more MoE layer, a projection and a pass
through the head; all is priced in BF16, where it computed mostly and dispatched in FP8; recomputation and the bubble of
the pipeline are part of the utilisation. Its {v3["gpu_hours"]:,.0f} GPU-hours for
{v3["tokens"] / 1e12:.3g}e12 tokens come to a utilisation of {v3["utilisation"]:.2f} of BF16's peak by this count.

## The all-reduce against the step

One all-reduce a global batch and pipeline stage, over all ranks of the stage: loads alone for rules that need no more
(`sign`, `sqrt`, ...), with margins for `quantile` and `adaptive`. The stage is the one with most MoE layers.

{tables.collectives(found)}

{_longest(found)} None of it need be seen: the all-reduce is launched before the gradients' and waited for after them
([how much stays](benchmarks.md#the-all-reduce), measured at small scale). The table is what it would cost if nothing
hid it.{_uneven(found)} The update itself is not in here: on a GPU it is not measured ([Scale](benchmarks.md#scale)).

## What balance is worth

Under expert parallelism (EP) each rank holds E / EP experts, in order, and an MoE layer ends with its fullest rank.
With x the overload of that rank, its tokens over the mean of all ranks, and s the share that routed experts and the
all-to-all exchanges have in a step under even loads,

    step / even step = 1 + s (mean of x over the MoE layers - 1)

The share follows from FLOPs and bytes: {_constants(found)}. Four exchanges a layer of BF16 tokens, one copy for each
expert chosen, as Megatron-Core's `alltoall` dispatcher sends them. Shares at utilisation {found["utilisation"]:g} with
nothing hidden; in the last column s if all exchanges were hidden behind other work.

{tables.shares(found)}

**It is the overload of ranks that is paid, not MaxVio over experts.** MaxVio is x - 1 only where each rank holds one
expert (EP = E). Below, full and empty experts share a rank and the overload is smaller; how much, recorded loads say.
Cells: mean overload x of the recorded layers with that MaxVio, and by how much a step takes longer than under even
loads if all its layers are so.

![Longer steps over MaxVio](cluster.png)

One dot a recorded step, rule and EP; the dotted line is what would be paid if MaxVio were the overload of ranks, with
the shares of the largest EP.

{tables.by_maxvio(found)}

By rule, means over the last quarter of each run. Below them the luck of the draw, which no bias that is set
beforehand can take away: tokens that choose their experts evenly and independently, as many as in a step
of the recorded run, and as many as the expert-parallel ranks of the large model route at once in a micro-batch
({" and ".join(f"{model['micro']} of {model['shape']['seq_length']:,} tokens a rank" for model in models)}).

{tables.by_rule(found)}

{_worth(found)} The runs are short and from scratch: they show what a given imbalance costs and how
soon a rule leaves it, not where a rule ends after a long training. Megatron-Core's own bias and `sign`
move by {BUILTIN_RATE:g} a step and are still on their way
([all rules, on streams that last](benchmarks.md#balance)); they are one rule but for
centring, so the difference between them is the noise of one seed.

{made}

## What this leaves out

- **Overlap.** Exchanges are priced as if nothing hid them; the last column of the shares has the other end. What is
  hidden under even loads may not be under uneven ones.
- **Other dispatchers.** DeepSeek-V3 limits each token to four nodes, crosses the network once a node and forwards over
  NVLink, in FP8. That makes its exchanges shorter, and adds loads of nodes to those of ranks.
- **Micro-batches.** Loads are those of a global batch of the small run, and what is paid is the fullest rank of each
  micro-batch of the large one. Micro-batches differ from each other by more than luck, for neighbouring tokens choose
  alike; the recorded batches hold fewer tokens than a large job's micro-batch, so they have more luck in them.
- **Contention and latency.** Every port is used fully, whatever the pattern; an exchange has no fixed cost. Where there
  are many small messages both sides of the ratio grow.
- **Efficiency of small products.** An expert with few tokens has a lower utilisation; all have the same here.
- **Capacity and memory.** No token is dropped and no memory runs out, though the fullest rank holds the most
  activations. Where it does, imbalance costs the run and not some percent.
- **The pipeline.** With stages, each micro-batch waits for its slowest stage; here only the sum over layers counts.
- **Data.** Ranks route alike here; ranks with different data have different loads, which even out at the receiver.
""")
