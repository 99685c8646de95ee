"""Rules that came up beside ours, on recorded and simulated streams and on the workloads of Megatron-LM #7488.

phi-balancing     Chen et al., arXiv 2605.15403 (ICML 2026): the expected load is to minimise a potential phi, by
                  convex duality and mirror descent, as an average over steps. Its abstract says so much; the update
                  below is derived from that here (`PhiBalancing`), not copied from the paper, whose text could not be
                  had. Potential, weight and rate are the best of GRID on each stream, in hindsight.
moving quantile   Su, "MoE tour 8" (kexue.fm, May 2026), read in summaries: inside each sequence an exponential average
                  of score histograms gives every token a quantile to be lowered by, lambda of it here, and quantile
                  balancing follows for what is left. 100 bins, average 0.99, lambda 1 and 0.3 are his.
causal dual bias  J. Chang's blog (jonathanc.net, "Causal Routing Bias"), read in an excerpt and in summaries: a step of
                  dual descent after every token of a sequence, from zero, beside a bias for all. Steps as in STEPS.

Beside them ours: `adaptive` as it is, and inside global batches of M micro-batches, which is this package's router,
balancer and `WithinBatch` at work on the logits behind the scores.

The last two of the neighbours correct scores inside a sequence. So they need a state where the model is used, which a
bias does not, and are shown where sequences are known. MaxVio inside a sequence is that of one sequence's loads, mean
over sequences; what they pay for it is in the scores kept. Repeat with

    python -m benchmarks.neighbours        (about ten minutes on one thread, and as many for what it has to record)
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alflb_megatron import metrics, rules
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.replay.recording import Gating, Recording
from alflb_megatron.lab.replay.replay import replay, resolve_gating
from alflb_megatron.lab.replay.replayed_rules import ReplayedRule, choose_experts, topk_of
from alflb_megatron.lab.replay.scores import open_scores
from alflb_megatron.rules import Rule, State, Stats
from benchmarks import machine
from benchmarks.balance import RECORDED, SEED, record
from benchmarks.streams import BEYOND, SIMULATED, WORKLOADS

STREAMS = ("slow drift", "fast drift, with momentum", "hard skew", "softmax, hard skew")
PUBLISHED = ("sign", "quantile", "adaptive")
OURS = "adaptive, once a micro-batch"
MICRO_BATCHES = 8
GRID = tuple(itertools.product(("quadratic", "entropy"), (0.01, 0.1, 1.0, 10.0, 100.0), (0.001, 0.01, 0.1)))
"""Potential, weight c and rate of the average."""
STEPS = (1e-3, 1e-2)
"""Of the causal dual bias: a biased expert's move for one token, in score units."""
BINS, AVERAGE = 100, 0.99


@dataclass(frozen=True)
class PhiBalancing(Rule):
    """min over routing of c phi(m) - kept scores, m the expected loads relative to their mean.

    c phi(m) is the largest of <lambda, m> - (c phi)*(lambda), so scores are lowered by lambda, which mirror ascent with
    the map (c phi)* moves: grad (c phi)*(lambda) goes the share `rate` of the way to the loads. That gradient is an
    average of the loads over steps, and lambda = c grad phi of it. phi is half the square or the negative entropy.
    """

    potential: str = "quadratic"
    weight: float = 1.0
    rate: float = 0.1

    def init(self, layers: int, experts: int) -> State:
        return {"average": torch.ones(layers, experts)}

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        average_LE = torch.lerp(state["average"], 1 - stats.violation, self.rate)
        gradient_LE = average_LE if self.potential == "quadratic" else average_LE.clamp(min=1e-6).log()
        return -self.weight * gradient_LE, {"average": average_LE}


class InMicroBatches:
    """`ALFRouter`s, one a layer, that are shown each step in micro-batches, and move within it."""

    def __init__(self, recording: Recording) -> None:
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        from alflb_megatron.balancer import Balancer
        from alflb_megatron.config import ALFConfig
        from alflb_megatron.hosts.core import RouterBuilder
        from alflb_megatron.lab.training import build
        from alflb_megatron.lab.training.resolve import resolve
        from alflb_megatron.within_batch import WithinBatch

        shape = {
            "num_experts": recording.experts,
            "topk": topk_of(recording.gating),
            "gate": recording.gating.score_function,
        }
        config = dataclasses.replace(
            build.transformer_config(resolve({"rule": "none", "nproc": 1, "ep": 1}, shape, {})),
            hidden_size=recording.experts,
            moe_router_dtype="fp32",
            moe_router_pre_softmax=True,
        )
        self.gate = recording.gating.score_function
        builder, groups = RouterBuilder(ALFConfig(update_every="micro-batch")), get_default_pg_collection()
        self.routers = [builder(config=config, pg_collection=groups) for _ in recording.layers]
        for number, router in enumerate(self.routers, 1):
            router.set_layer_number(number)
            torch.nn.init.eye_(router.weight)  # its logits are its input
        self.within = WithinBatch(self.routers, groups.tp_dp_cp)
        self.balancer = Balancer(self.routers, range(1, len(self.routers) + 1), groups.tp_dp_cp)
        self.seconds: list[float] = []

    def step(self, scores_LTE: Tensor) -> tuple[Tensor, list[float]]:
        logits_LTE = torch.logit(scores_LTE, eps=1e-7) if self.gate == "sigmoid" else scores_LTE.clamp(min=1e-30).log()
        loads_LE = torch.zeros(len(scores_LTE), scores_LTE.shape[-1], dtype=torch.int64)
        affinity = [0.0] * len(scores_LTE)
        began = time.perf_counter()
        parts = zip(logits_LTE.chunk(MICRO_BATCHES, dim=1), scores_LTE.chunk(MICRO_BATCHES, dim=1), strict=True)
        for logits_LXE, scores_LXE in parts:
            self.within.begin_micro_batch()
            for layer, router in enumerate(self.routers):
                map_XE = router(logits_LXE[layer][:, None])[1]
                loads_LE[layer] += map_XE.sum(dim=0)
                affinity[layer] += float(scores_LXE[layer][map_XE].sum(dtype=torch.float64))
        self.balancer.launch()
        self.balancer.commit()
        self.seconds.append((time.perf_counter() - began) / len(self.routers))  # its routing too
        return loads_LE, affinity


class Routed:
    """A rule's bias on scores that are first corrected inside each sequence, and MaxVio inside sequences."""

    def __init__(self, rule: Rule, recording: Recording, gating: Gating) -> None:
        layers, experts = len(recording.layers), recording.experts
        self.replayed = ReplayedRule(rule, layers, experts, gating)
        self.layout, self.gating = recording.layout, gating
        self.seconds: list[float] = []
        self.inside: list[float] = []  # MaxVio of single sequences, mean over them, of each step and layer

    def correct(self, scores_NTE: Tensor, bias_E: Tensor) -> Tensor:
        """What is added to the scores of each token; it may depend on the tokens before it in its sequence."""
        return torch.zeros_like(scores_NTE)

    @torch.no_grad()
    def step(self, scores_LTE: Tensor) -> tuple[Tensor, list[float]]:
        assert self.layout is not None
        began = time.perf_counter()
        corrected, affinity = [], []
        for layer, scores_TE in enumerate(scores_LTE):
            scores_NTE = self.layout.sequences(scores_TE)
            assert scores_NTE is not None
            bias_E = self.replayed.bias_LE[layer]
            ranked_NTE = scores_NTE + self.correct(scores_NTE, bias_E)
            experts = scores_NTE.shape[-1]
            chosen = choose_experts(ranked_NTE.flatten(0, 1) + bias_E, self.gating)
            affinity.append(chosen.affinity(scores_NTE.flatten(0, 1)))
            chosen_NX = chosen.experts_TK.view(len(scores_NTE), -1)
            loads_NE = torch.stack([torch.bincount(chosen_X, minlength=experts) for chosen_X in chosen_NX])
            self.inside.append(float(metrics.max_vio(loads_NE).mean()))
            corrected.append(ranked_NTE.flatten(0, 1))
        loads_LE, _ = self.replayed.step(torch.stack(corrected))
        self.seconds.append((time.perf_counter() - began) / len(scores_LTE))
        return loads_LE, affinity


class MovingQuantile(Routed):
    """The token's scores less `share` of their (1 - K/E)-quantiles over the tokens before it."""

    share = 1.0

    def correct(self, scores_NTE: Tensor, bias_E: Tensor) -> Tensor:
        count, tokens, experts = scores_NTE.shape
        wanted = 1 - topk_of(self.gating) / experts
        averaged_NEB = torch.zeros(count, experts, BINS)
        bins_NTE = (scores_NTE * BINS).long().clamp(0, BINS - 1)
        corrections = torch.zeros_like(scores_NTE)
        for at in range(1, tokens):
            averaged_NEB.mul_(AVERAGE).scatter_add_(
                2, bins_NTE[:, at - 1, :, None], torch.full((count, experts, 1), 1 - AVERAGE)
            )
            below_NEB = averaged_NEB.cumsum(-1)
            reached_NE = (below_NEB < wanted * below_NEB[..., -1:]).sum(-1)
            corrections[:, at] = -self.share * (reached_NE + 0.5) / BINS
        return corrections


class MovingQuantileWeak(MovingQuantile):
    share = 0.3


class CausalDual(Routed):
    """A step against each token's own choice, from zero in every sequence."""

    step_size = STEPS[0]

    def correct(self, scores_NTE: Tensor, bias_E: Tensor) -> Tensor:
        count, tokens, experts = scores_NTE.shape
        corrections = torch.zeros_like(scores_NTE)
        dual_NE = torch.zeros(count, experts)
        for at in range(tokens):
            corrections[:, at] = dual_NE
            chosen = choose_experts(scores_NTE[:, at] + dual_NE + bias_E, self.gating)
            taken_NE = torch.zeros(count, experts).scatter_(1, chosen.experts_TK, 1.0)
            dual_NE = dual_NE + self.step_size * (topk_of(self.gating) / experts - taken_NE)
        return corrections


class CausalDualLarge(CausalDual):
    step_size = STEPS[1]


INSIDE: dict[str, tuple[type[Routed], str]] = {
    "sign": (Routed, "sign"),
    "quantile": (Routed, "quantile"),
    "adaptive": (Routed, "adaptive"),
    "moving quantile 0.3, then quantile": (MovingQuantileWeak, "quantile"),
    "moving quantile 1, then quantile": (MovingQuantile, "quantile"),
    f"causal dual {STEPS[0]}, beside adaptive": (CausalDual, "adaptive"),
    f"causal dual {STEPS[1]}, beside adaptive": (CausalDualLarge, "adaptive"),
}
KEYS = ("mean_over_floor", "tail_over_floor", "steps_to_2x_floor", "affinity_kept")


def of_rules(recording: Recording) -> dict[str, Any]:
    """Rules that move one bias for all tokens."""
    grid = {"/".join(map(str, one)): PhiBalancing(*one) for one in GRID}
    candidates = {name: rules.make(name) for name in PUBLISHED} | grid
    found = replay(recording, candidates | {OURS: InMicroBatches(recording)}, hindsight=False)
    rows = {label: {key: row[key] for key in KEYS} for label, row in found["rules"].items()}
    for potential in ("quadratic", "entropy"):
        tried = {label: row for label, row in rows.items() if label.startswith(potential)}
        best = min(tried, key=lambda label: tried[label]["mean_over_floor"])
        rows[f"phi-balancing, {potential}"] = {**rows[best], "constants": best.partition("/")[2]}
    return {"floor": found["floor"], "rules": {label: row for label, row in rows.items() if "/" not in label}}


def inside_sequences(recording: Recording) -> dict[str, Any]:
    """Those that correct the scores of a token by the tokens before it, beside rules that do not."""
    gating = resolve_gating(recording, None)
    routed = {label: kind(rules.make(rule), recording, gating) for label, (kind, rule) in INSIDE.items()}
    found = replay(recording, routed, hindsight=False)
    return {
        label: {key: row[key] for key in KEYS}
        | {"inside_a_sequence": statistics.fmean(routed[label].inside[10 * len(recording.layers) :])}
        for label, row in found["rules"].items()
    }


def table(results: dict[str, Any]) -> str:
    labels = list(results["rows"][0]["rules"])
    lines = ["| stream | floor | " + " | ".join(labels) + " |", "|---|---|" + "---|" * len(labels)]
    for row in results["rows"]:
        cells = []
        for label in labels:
            figures = row["rules"][label]
            steps = "-" if figures["steps_to_2x_floor"] is None else figures["steps_to_2x_floor"]
            constants = f" ({figures['constants']})" if "constants" in figures else ""
            cells.append(f"{figures['mean_over_floor']:.2f} / {steps}{constants}")
        lines.append(f"| {row['stream']} | {row['floor']:.4f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def inside_table(results: dict[str, Any]) -> str:
    lines = ["| | " + " | ".join(row["stream"] for row in results["inside"]) + " |"]
    lines.append("|---|" + "---|" * len(results["inside"]))
    for label in results["inside"][0]["rules"]:
        cells = []
        for row in results["inside"]:
            figures = row["rules"][label]
            kept = f"{figures['affinity_kept']:.4f}"
            cells.append(f"{figures['mean_over_floor']:.2f} / {figures['inside_a_sequence']:.2f} / {kept}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/balance"), help="where recorded trainings are kept")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "neighbours.json")
    flags = parser.parse_args()
    recorded = [(name, open_scores(record(name, flags.runs, SEED))) for name in RECORDED]
    machine.be_one_rank()
    made = [(stream.name, stream.recording(SEED)) for stream in (*SIMULATED, *BEYOND) if stream.name in STREAMS]
    made += [(workload.name, workload.recording(SEED)) for workload in WORKLOADS]
    rows, inside = [], []
    for name, recording in made + recorded:
        rows.append({"stream": name, **of_rules(recording)})
        print(name, file=sys.stderr, flush=True)
    for name, recording in recorded:
        inside.append({"stream": name, "rules": inside_sequences(recording)})
        print(f"{name}, inside sequences", file=sys.stderr, flush=True)
    torch.distributed.destroy_process_group()
    results = {"machine": {**machine.describe(), "threads": 1}, "seed": SEED, "rows": rows, "inside": inside}
    write_json(flags.json, results)
    print(table(results), inside_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
