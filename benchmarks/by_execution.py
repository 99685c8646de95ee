"""Balance by execution beside a bias: what is left of an expert-parallel rank's overload, and what weights must move.

Planners of 2026 leave the router's choice alone and move work: an overloaded rank's tokens go to another rank, and the
expert's weights with them, planned anew for every micro-batch from its own loads. Here they are small simulations on
the micro-batches of real trainings, each under one of ROWS. A micro-batch is what an expert-parallel group routes at
once, EP ranks of E / EP experts each. Times are not simulated. Planners, each from what its source says of it:

    exact         every rank gets the same number of tokens, whatever the routing, by copies of experts: MoonEP
                  (github.com/MoonshotAI/MoonEP; Megatron-LM #6274, #7450). Which tokens move is ours: those of the
                  fullest expert of the fullest rank, to the emptiest rank, which needs few copies.
    to 1.04       the same, which ends once no rank is above 1.04 of the mean: what UltraEP (arXiv 2606.04101) says it
                  leaves. Its planner could not be read.
    least loaded  Least-Loaded EP (arXiv 2601.17111; github.com/SalesforceAIResearch/LeastLoadedEP): nothing moves
                  unless the fullest rank is above 1.3 of the mean; then experts, the fullest first, fill their own rank
                  to the mean, and what is beyond goes to the rank with the least, in pieces of a smallest size.

Runs that are finished in their folder are not run again; after a change of the code remove it. Repeat with

    python -m benchmarks.by_execution
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from alflb_megatron.lab.records.files import write_atomically, write_json
from alflb_megatron.lab.records.versions import git_revision
from alflb_megatron.lab.training.launch import as_single_rank
from alflb_megatron.lab.training.resolve import resolve
from benchmarks.within_batch import command, finished, folder, micro_batch_loads, run_all, trains_one, write_results

EP = 8
SHAPE = {"num_experts": 64, "topk": 6, "hidden_size": 128, "moe_ffn_hidden_size": 64}
"""Experts and K of the 1B model of Wang et al. 2024, and little else of it."""
SIZES = {"global_batch_size": 32, "micro_batch_size": 8}
STEPS, SEED = 150, 1001
SPANS = {"steps 10 to 60": (10, 60), "last third": (100, 150)}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no bias": ({"rule": "none"}, {}),
    "Megatron-Core's sign": ({"rule": "builtin"}, {}),
    "adaptive, once a global-batch": ({"rule": "adaptive"}, {}),
    "adaptive, once a micro-batch": ({"rule": "adaptive"}, {"update_every": "micro-batch"}),
}
EXPERT_BYTES = {"the 1B model": 3 * 1024 * 528 * 2, "DeepSeek-V3": 3 * 7168 * 2048 * 2}
"""Of the weights of one expert in bf16: three matrices."""

Moves = list[tuple[int, int, int]]
"""Expert, the rank that gets some of its tokens, how many."""


# -- planners ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a planner makes of one micro-batch."""

    overload: float
    """Tokens of the fullest rank over the mean."""
    copies: int
    """Pairs of an expert and a rank that is not its own: weights there, and gradients back."""


def _of_ranks(loads: Sequence[int], ranks: int) -> list[int]:
    """Tokens of each rank, which has E / ranks experts in a row."""
    home = len(loads) // ranks
    return [sum(loads[rank * home : (rank + 1) * home]) for rank in range(ranks)]


def no_plan(loads: Sequence[int], ranks: int) -> Moves:
    return []


def exact(loads: Sequence[int], ranks: int, allowed: float = 1.0) -> Moves:
    """Moves after which no rank has more than `allowed` times the mean, rounded up."""
    left, home = list(loads), len(loads) // ranks
    totals = _of_ranks(loads, ranks)
    most, mean = math.ceil(allowed * sum(loads) / ranks), math.ceil(sum(loads) / ranks)
    moves: Moves = []
    while totals[full := max(range(ranks), key=totals.__getitem__)] > most:
        free = min(range(ranks), key=totals.__getitem__)
        expert = max(range(full * home, (full + 1) * home), key=left.__getitem__)
        count = min(totals[full] - mean, mean - totals[free], left[expert])
        moves.append((expert, free, count))
        left[expert] -= count
        totals[full] -= count
        totals[free] += count
    return moves


def least_loaded(loads: Sequence[int], ranks: int, threshold: float = 1.3, smallest: int = 32) -> Moves:
    """Least-Loaded EP, its pieces at least `smallest` tokens (its 1,024 are of batches 32 times as large)."""
    home, mean = len(loads) // ranks, sum(loads) / ranks
    if max(_of_ranks(loads, ranks)) <= threshold * mean:
        return []
    totals, moves = [0] * ranks, []
    for expert in sorted(range(len(loads)), key=lambda expert: -loads[expert]):
        own, left = expert // home, loads[expert]
        kept = min(left, max(0, int(mean) - totals[own]))
        if left - kept < smallest:
            kept = left
        totals[own] += kept
        left -= kept
        while left:
            free = min(range(ranks), key=totals.__getitem__)
            count = min(left, max(smallest, int(mean) - totals[free]))
            if left - count < smallest:
                count = left
            totals[free] += count
            left -= count
            if free != own:
                moves.append((expert, free, count))
    return moves


PLANNERS: dict[str, Callable[[Sequence[int], int], Moves]] = {
    "none": no_plan,
    "exact": exact,
    "to 1.04": lambda loads, ranks: exact(loads, ranks, 1.04),
    "least loaded": least_loaded,
}


def planned(planner: str, loads: Sequence[int], ranks: int = EP) -> Plan:
    """What becomes of the loads of one micro-batch, int [E]."""
    home, totals = len(loads) // ranks, _of_ranks(loads, ranks)
    moves = PLANNERS[planner](loads, ranks)
    for expert, rank, count in moves:
        totals[expert // home] -= count
        totals[rank] += count
    copies = {(expert, rank) for expert, rank, _ in moves if rank != expert // home}
    return Plan(max(totals) * ranks / max(1, sum(totals)), len(copies))


# -- trainings ---------------------------------------------------------------------------------------------------------


def options(row: str, steps: int = STEPS) -> dict[str, Any]:
    """Everything that makes one run what it is."""
    count = SIZES["global_batch_size"] // SIZES["micro_batch_size"]
    return {"preset": "small", "row": row, "micro_batches": count, "seed": SEED, "steps": steps, "shape": SHAPE}


def train(one: Mapping[str, Any], out: Path) -> None:
    """Trains one run in this process, and keeps the loads of all its micro-batches: int64 [steps, layers, M, E]."""
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    as_single_rank()
    torch.set_num_threads(1)
    from alflb_megatron.lab.training import train as module

    kept: list[Tensor] = []

    class Run(module.TrainingRun):
        def _step(self, step: int) -> dict[str, Any]:
            with micro_batch_loads(self.setup.balancer.routers) as seen:
                record = super()._step(step)
            kept.append(torch.stack([torch.stack(loads) for loads in seen]))
            return record

    module.TrainingRun = Run  # type: ignore[misc]
    job, alf = ROWS[one["row"]]
    own = {"nproc": 1, "ep": 1, "save": False, "seed": one["seed"], "steps": one["steps"], "out": str(out)}
    summary = module.train(resolve({"preset": "small", **SIZES, **job, **own}, SHAPE, alf))
    write_atomically(out / "loads.safetensors", [save({"loads": torch.stack(kept)})])
    found = {"run": dict(one), "git_revision": git_revision(), "validation_loss": summary["validation_loss"]}
    write_json(out / "within.json", found)


def figures_of(loads_SLME: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """By span of steps and planner: means over steps, layers and micro-batches, and the worst overload."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for span, (begin, end) in SPANS.items():
        batches = loads_SLME[begin:end].flatten(0, 2).tolist()
        found[span] = {}
        for planner in PLANNERS:
            plans = [planned(planner, loads) for loads in batches]
            found[span][planner] = {
                "overload": statistics.fmean(plan.overload for plan in plans),
                "worst": max(plan.overload for plan in plans),
                "copies": statistics.fmean(plan.copies for plan in plans),
            }
    return found


def sampling_overload(tokens: int, draws: int = 200) -> float:
    """Of the fullest rank where every token draws K experts evenly and independently."""
    experts, topk = SHAPE["num_experts"], SHAPE["topk"]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        chosen = torch.rand(tokens, experts, generator=generator).topk(topk).indices
        found.append(planned("none", torch.bincount(chosen.flatten(), minlength=experts).tolist()).overload)
    return statistics.fmean(found)


def collect(out: Path) -> dict[str, Any]:
    """All figures of the rows whose runs are there."""
    rows, losses, revisions = {}, {}, set()
    for row in ROWS:
        one = options(row)
        if (found := finished(out, one)) is not None:
            loads_SLME = load_file(folder(out, one) / "loads.safetensors")["loads"]
            rows[row], losses[row] = figures_of(loads_SLME), found["validation_loss"]
            revisions.add(found["git_revision"])
            tokens = int(loads_SLME[0, 0, 0].sum()) // SHAPE["topk"]
    if not rows:
        raise SystemExit(f"--out {out}: holds no finished run")
    even = sampling_overload(tokens)
    return {
        "git_revisions": sorted(map(str, revisions)),
        "tokens": tokens,
        "even": even,
        "rows": rows,
        "losses": losses,
    }


# -- the page ----------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    lines = [
        f"{STEPS} steps of {SIZES['global_batch_size']} sequences in micro-batches of {results['tokens']:,} tokens, "
        f"{SHAPE['num_experts']} experts, K = {SHAPE['topk']}, EP {EP}; one seed. Of a layer and micro-batch: "
        "overload is the tokens of the fullest rank over the mean, mean (worst); copies are experts whose weights go "
        f"to another rank. Even, independent draws have an overload of {results['even']:.2f}.",
    ]
    moving = [planner for planner in PLANNERS if planner != "none"]
    for span in SPANS:
        lines += ["", f"In {span}:", ""]
        lines.append(f"| routed with | {' | '.join(PLANNERS)} | {' | '.join(f'copies: {name}' for name in moving)} |")
        lines.append("|---" * (1 + len(PLANNERS) + len(moving)) + "|")
        for row, found in results["rows"].items():
            of = found[span]
            cells = [f"{of[planner]['overload']:.2f} ({of[planner]['worst']:.2f})" for planner in PLANNERS]
            cells += [f"{of[planner]['copies']:.1f}" for planner in moving]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    sizes = ", ".join(f"{size / 2**20:.1f} MiB of {name}" for name, size in EXPERT_BYTES.items())
    return "\n".join([*lines, "", f"A copy is {sizes} (bf16), and as many gradients back."])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "by_execution", "by_execution.json")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    flags = parser.parse_args(arguments)
    if trains_one(flags, train):
        return
    run_all([options(row) for row in ROWS], flags.out, flags.jobs, "by_execution")
    write_results(flags.json, collect(flags.out), table)


if __name__ == "__main__":
    main()
