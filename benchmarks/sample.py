"""What is lost where margins are measured on a sample (`margins.sample_stride`): the rules that need margins, on all
simulated streams, with margins of all tokens, of the sample, and of a fourth of it.

Loads are exact in all of them. A step of a stream is a global batch. Figures are those of benchmarks/balance.py: mean
MaxVio over the sampling floor from step 10 on, and steps from a cold start to twice the floor. Repeat with

    python -m benchmarks.sample          (about ten minutes on one thread)
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch

from alflb_megatron import margins, metrics, rules
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.replay.replayed_rules import ReplayedRule
from benchmarks import machine
from benchmarks.streams import BEYOND, SIMULATED, Stream

RULES = ("adaptive", "quantile")
SAMPLES = {"all tokens": 2**30, "the sample": margins.SAMPLE, "a fourth of it": margins.SAMPLE // 4}
"""Values of `margins.SAMPLE`."""
WITHIN = 1.02
"""To reach: the sample's mean over that of all tokens."""


def measure(stream: Stream, rule: str, sample: int, seed: int) -> dict[str, Any]:
    """One rule on one stream."""
    margins.SAMPLE = sample
    floor = metrics.sampling_floor(stream.tokens, stream.topk, stream.experts)
    player = ReplayedRule(rules.make(rule), 1, stream.experts, stream.recording(seed).gating)
    vio = [float(metrics.max_vio(player.step(scores)[0])) for scores in stream.scores(seed)]
    return {
        "stride": margins.sample_stride(stream.tokens, stream.topk, stream.experts, run=stream.tokens),
        "mean_over_floor": statistics.fmean(vio[10:]) / floor,
        "steps_to_2x_floor": next((step for step, one in enumerate(vio) if one <= 2 * floor), None),
    }


def verdict(rows: list[dict[str, Any]], rule: str) -> str:
    """On how many streams the sample costs a rule no more than it may."""
    ratios = {
        row["stream"]: row["rules"][rule]["the sample"]["mean_over_floor"]
        / row["rules"][rule]["all tokens"]["mean_over_floor"]
        for row in rows
    }
    over = [f"{name} ({ratio:.3f})" for name, ratio in ratios.items() if ratio > WITHIN]
    return f"- `{rule}`: within {WITHIN - 1:.0%} of all tokens on {len(rows) - len(over)} of {len(rows)} streams" + (
        f", not on {'; '.join(over)}." if over else "."
    )


def table(results: dict[str, Any]) -> str:
    labels = [f"{rule}, {sample}" for rule in RULES for sample in SAMPLES]
    lines = ["| stream | r | " + " | ".join(labels) + " |", "|---|---:|" + "---|" * len(labels)]
    for row in results["rows"]:
        cells = []
        for rule in RULES:
            for sample in SAMPLES:
                one = row["rules"][rule][sample]
                steps = "-" if one["steps_to_2x_floor"] is None else one["steps_to_2x_floor"]
                cells.append(f"{one['mean_over_floor']:.3f} / {steps}")
        stride = row["rules"][RULES[0]]["the sample"]["stride"]
        lines.append(f"| {row['stream']} | {stride} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(verdict(results["rows"], rule) for rule in RULES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for stream in (*SIMULATED, *BEYOND):
        found = {
            rule: {name: measure(stream, rule, sample, arguments.seed) for name, sample in SAMPLES.items()}
            for rule in RULES
        }
        rows.append({"stream": stream.name, "rules": found})
        print(stream.name, file=sys.stderr, flush=True)
    results = {"machine": machine.describe(), "seed": arguments.seed, "rows": rows}
    write_json(machine.RESULTS / "sample.json", results)
    print(table(results))


if __name__ == "__main__":
    main()
