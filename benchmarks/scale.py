"""What balancing costs at scale: measured on this CPU up to the network, and on paper from there.

Measured: the time of one update of every rule over all layers at once (`rule.step` on [layers, experts] stacks, on
loads and margins of a real choice by random scores; median), the bytes a rank holds for it, and the bytes of the one
all-reduce, both taken from the real `LoadCounter` and `LoadAllReduce`. On paper: the time of that all-reduce by the
alpha-beta model, for a group of p ranks and n bytes

    ring    2 (p - 1) / p n / B + 2 (p - 1) alpha
    tree    2 n / B + 2 (m - 1) alpha_inside + 2 log2(p / m) alpha_between        m ranks a node, a chain in each node

and the better of the two, with the constants below: a ring hop and a tree hop each have NCCL's own alpha, which holds
the time of a chunk for the tree. A ring beyond one node is priced as if every hop left the node. Nothing of the second
part was measured: the model stands or falls with its constants, and gloo ranks that share the cores of one machine, as
in `benchmarks.all_reduce`, cannot check it. Repeat with

    python -m benchmarks.scale           (about half a minute on one thread)
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alflb_megatron import margins, rules
from alflb_megatron.loads import LoadAllReduce, LoadCounter
from alflb_megatron.rules import Rule, State, Stats

SHAPES = ((26, 64), (61, 256), (128, 1024))
"""Layers and experts: DeepSeek-V2-Lite's, DeepSeek-V3's with every layer an MoE layer, and one four times as wide."""

RANKS = (8, 64, 512, 4096)

TOPK = 8
TOKENS = 512
"""Tokens of the simulated batch; an update takes the same time at every number of tokens."""
DISTINCT_LAYERS = 4
"""Layers that are simulated; the others repeat them, for an update does not look at what the numbers are."""

SMALLEST_REPEATS, LARGEST_REPEATS, SECONDS = 3, 50, 1.0
"""An update is repeated for about SECONDS, within these limits."""

RANKS_A_NODE = 8
"""GPUs behind one NVLink switch, as in a DGX H100."""


@dataclass(frozen=True)
class Link:
    """Constants of the alpha-beta model: seconds a hop of a ring and of a tree, bytes a second and GPU one way."""

    name: str
    alpha: float
    alpha_tree: float
    bandwidth: float
    alpha_from: str
    bandwidth_from: str


NVLINK = Link(
    "inside a node",
    3.4e-6,
    28e-6,
    450e9,
    "NVIDIA/nccl, src/graph/tuning.cc at 01afd20, hwLat of ring and of tree with Simple over NVLink",
    "NVLink 4 of an H100: 900 GB/s both ways together (NVIDIA's data sheet); full use is assumed",
)
NETWORK = Link(
    "between nodes",
    9.6e-6,
    50e-6,
    50e9,
    "NVIDIA/nccl, src/graph/tuning.cc at 01afd20, hwLat of ring and of tree with Simple over a network",
    "one 400 Gb/s InfiniBand port a GPU, as in a DGX H100; full use is assumed",
)


def ring(ranks: int, nbytes: float, link: Link) -> float:
    """Seconds of a ring all-reduce: reduce-scatter and all-gather, p - 1 hops of n / p bytes each."""
    return 2 * (ranks - 1) / ranks * nbytes / link.bandwidth + 2 * (ranks - 1) * link.alpha


def tree(ranks: int, nbytes: float, link: Link) -> float:
    """Seconds of a pipelined tree all-reduce: up and down, a chain inside each node and a tree over the nodes."""
    inside = min(ranks, RANKS_A_NODE)
    hops = (inside - 1) * NVLINK.alpha_tree + math.log2(ranks / inside) * NETWORK.alpha_tree
    return 2 * hops + 2 * nbytes / link.bandwidth


def best(ranks: int, nbytes: float) -> dict[str, Any]:
    """The faster of the two over the link that such a group needs."""
    link = NVLINK if ranks <= RANKS_A_NODE else NETWORK
    seconds, algorithm = min((ring(ranks, nbytes, link), "ring"), (tree(ranks, nbytes, link), "tree"))
    return {"ranks": ranks, "bytes": int(nbytes), "link": link.name, "algorithm": algorithm, "ms": 1e3 * seconds}


def all_reduce_bytes(layers: int, experts: int, with_margins: bool) -> int:
    """Bytes of the one flat tensor of all layers, from the real thing with one layer: layers are laid end to end."""
    return layers * LoadAllReduce([LoadCounter(experts, with_margins=with_margins)], None).nbytes


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_bytes(rule: Rule, layers: int, experts: int) -> dict[str, int]:
    """Bytes a rank holds: `state` is what checkpoints hold (bias, n, rule state), `window` the counts of one batch."""
    state = _bytes(list(rule.init(layers, experts).values()))
    state += _bytes([torch.zeros(layers, experts), torch.zeros(layers, dtype=torch.int64)])
    window = LoadCounter(experts, with_margins=rule.threshold is not None)
    return {"state": state, "window": layers * _bytes([part for part in window.local() if part is not None])}


def batch(layers: int, experts: int, threshold: margins.Threshold, topk: int = TOPK) -> tuple[Tensor, Tensor]:
    """Loads [L, E] and margins [L, E, B] of tokens with random scores, skewed towards some experts."""
    generator = torch.Generator().manual_seed(experts)
    seen = []
    for _ in range(min(layers, DISTINCT_LAYERS)):
        lean_E = 0.5 * torch.randn(experts, generator=generator)
        scores_TE = torch.sigmoid(torch.randn(TOKENS, experts, generator=generator) + lean_E)
        top_TJ, experts_TJ = scores_TE.topk(min(topk + 1, experts), dim=1)
        experts_TK = experts_TJ[:, :topk]
        window = LoadCounter(experts, with_margins=True)
        window.observe(experts_TK)
        window.observe_margins(margins.of_top(scores_TE, top_TJ, experts_TK, threshold))
        seen.append(window.local())
    turn = [seen[layer % len(seen)] for layer in range(layers)]
    histograms = [one.histogram_EB for one in turn if one.histogram_EB is not None]
    return torch.stack([one.loads_E for one in turn]), torch.stack(histograms)


def update_ms(rule: Rule, loads_LE: Tensor, histogram_LEB: Tensor | None) -> float:
    """Median milliseconds of one update of all layers, each from the state that the one before left."""
    layers, experts = loads_LE.shape
    bias_LE, state = torch.zeros(layers, experts), rule.init(layers, experts)
    n_L = torch.ones(layers, dtype=torch.int64)
    times: list[float] = []

    def step(bias_LE: Tensor, state: State) -> tuple[Tensor, State]:
        return rule.step(bias_LE, Stats(loads_LE, n_L, histogram_LEB), state)  # new: Stats keeps what it computed

    bias_LE, state = step(bias_LE, state)  # the first call allocates
    while len(times) < SMALLEST_REPEATS or (sum(times) < SECONDS and len(times) < LARGEST_REPEATS):
        began = time.perf_counter()
        bias_LE, state = step(bias_LE, state)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def measure(shapes: Sequence[tuple[int, int]] = SHAPES, ranks: Sequence[int] = RANKS) -> dict[str, Any]:
    """The results, as they are written; `machine` is added by `main`."""
    rows = []
    for layers, experts in shapes:
        drawn = {threshold: batch(layers, experts, threshold, min(TOPK, experts)) for threshold in margins.Threshold}
        updates = {}
        for name in rules.names():
            rule = rules.make(name)
            loads_LE, histogram_LEB = drawn[rule.threshold or margins.Threshold.OWN]
            needs = rule.threshold is not None
            updates[name] = {
                "margins": needs,
                "ms": update_ms(rule, loads_LE, histogram_LEB if needs else None),
                **kept_bytes(rule, layers, experts),
            }
        sizes = {name: all_reduce_bytes(layers, experts, name == "margins") for name in ("counts", "margins")}
        times = {name: [best(group, nbytes) for group in ranks] for name, nbytes in sizes.items()}
        rows.append({"layers": layers, "experts": experts, "rules": updates, "bytes": sizes, "all_reduce": times})
    return {"ranks": list(ranks), "links": [asdict(NVLINK), asdict(NETWORK)], "rows": rows}


def size_text(nbytes: float) -> str:
    """Bytes for people, in powers of ten as bandwidths are."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} B"


def ms_text(milliseconds: float) -> str:
    """Three digits, never an exponent."""
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _updates(results: dict[str, Any]) -> list[str]:
    shapes = [f"{row['layers']} x {row['experts']}" for row in results["rows"]]
    lines = [
        "One update of all layers (layers x experts): milliseconds on this CPU, and what a rank keeps for it: bias, "
        "rule state and counts, beside two copies of what the all-reduce sums while that runs. A pipeline stage has "
        "its own layers' share.",
        "",
        "| rule | " + " | ".join(f"{shape}, ms | {shape}, kept" for shape in shapes) + " |",
        "|---|" + "---:|" * (2 * len(shapes)),
    ]
    for name in results["rows"][0]["rules"]:
        cells = []
        for row in results["rows"]:
            figures = row["rules"][name]
            cells += [ms_text(figures["ms"]), size_text(figures["state"] + figures["window"])]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def _all_reduces(results: dict[str, Any]) -> list[str]:
    names = {"counts": "loads alone", "margins": "with margins"}
    constants = "; ".join(
        f"{link['name']} alpha = {1e6 * link['alpha']:.3g} µs a hop of a ring, "
        f"{1e6 * link['alpha_tree']:.3g} of a tree ({link['alpha_from']}), B = "
        f"{link['bandwidth'] / 1e9:.3g} GB/s ({link['bandwidth_from']})"
        for link in results["links"]
    )
    lines = [
        "The one all-reduce a global batch: its bytes (measured) and its milliseconds by the alpha-beta model (not "
        "measured), ring or tree, whichever is faster. The bytes do not depend on the expert-parallel size, for every "
        "rank routes over all experts; the group is all ranks of a pipeline stage, expert-parallel ones included. "
        f"Constants: {constants}.",
        "",
        "| layers x experts | what is summed | bytes | "
        + " | ".join(f"{ranks:,} ranks, ms" for ranks in results["ranks"])
        + " |",
        "|---|---|---:|" + "---:|" * len(results["ranks"]),
    ]
    for row in results["rows"]:
        for kind, times in row["all_reduce"].items():
            cells = [f"{ms_text(time['ms'])} ({time['algorithm']})" for time in times]
            lines.append(
                f"| {row['layers']} x {row['experts']} | {names[kind]} | {size_text(row['bytes'][kind])} | "
                + " | ".join(cells)
                + " |"
            )
    return lines


def table(results: dict[str, Any]) -> str:
    """Two tables: the update on this CPU, the all-reduce on paper."""
    return "\n".join([*_updates(results), "", *_all_reduces(results)])


def main(arguments: Sequence[str] | None = None) -> None:
    from alflb_megatron.lab.records.files import write_json
    from benchmarks import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "scale.json", help="where the figures go")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {"machine": machine.describe(), **measure()}
    write_json(flags.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
