"""How well each rule balances: all rules, their published defaults, on simulated and on recorded score streams.

Nothing is tuned to a stream. Figures are those of `alflb replay` (`alflb_megatron.lab.replay.replay`): MaxVio over the
sampling floor from step 10 on, steps from a cold start to twice the floor, scores kept. Recorded streams come from real
trainings of the preset `small` (`RECORDED`), made on the first run and kept in --runs. Repeat with

    python -m benchmarks.balance                   (about 20 minutes, two streams at a time)
    python -m benchmarks.balance --seed 7          other random numbers throughout, the recorded trainings' too
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from alflb_megatron import rules
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.replay.recording import Recording
from alflb_megatron.lab.replay.replay import replay
from alflb_megatron.lab.replay.scores import open_scores
from alflb_megatron.rules import Rule
from benchmarks import machine
from benchmarks.streams import BEYOND, SIMULATED

SEED = 0
STEPS = 100
"""Of a recorded training."""
RECORDED: dict[str, list[str]] = {
    "recorded: sigmoid": ["--rule", "adaptive"],
    "recorded: softmax": ["--rule", "adaptive", "--gate", "softmax"],
    "recorded: sigmoid, under sign": ["--rule", "sign"],
}
"""Flags of `alflb train --preset small`, by name."""

HINDSIGHT = 1_000_000
"""Scores a step from which on the best bias in hindsight is not searched for: it takes minutes."""

TIE = 1.02
SLOW, FAST, COLD_START = 1.25, 1.45, 5
"""Targets: mean_over_floor on slow and fast streams, steps to twice the floor."""


def players() -> dict[str, Rule]:
    """Every rule with its defaults, and the variants of quantile and of the decaying rules."""
    found = {name: rules.make(name) for name in rules.names()}
    found["quantile, own threshold"] = rules.make("quantile", against="own")
    found["quantile, EMA 0.8"] = rules.make("quantile", ema=0.8)
    found["sqrt, restart"] = rules.make("sqrt", restart=0.5, floor=1e-3)
    return found


def record(name: str, folder: Path, seed: int) -> Path:
    """The run folder of a recorded stream; trains it where it is not there yet."""
    run = folder / f"{name.replace(': ', '-').replace(', ', '-').replace(' ', '-')}-{seed}"
    if not (run / "summary.json").exists():  # after a change of the code or of RECORDED remove the folder
        command = [sys.executable, "-m", "alflb_megatron.lab.cli", "train", "--preset", "small", *RECORDED[name]]
        command += ["--nproc", "1", "--ep", "1", "--steps", str(STEPS), "--record-scores", str(STEPS), "--no-save"]
        command += ["--seed", str(1234 + seed), "--out", str(run)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    return run


def measure(job: tuple[str, Path, int]) -> dict[str, Any]:
    """Replays every rule on one stream."""
    torch.set_num_threads(1)
    name, folder, seed = job
    streams = {stream.name: stream for stream in (*SIMULATED, *BEYOND)}
    if stream := streams.get(name):
        recording: Recording = stream.recording(seed)
        group = stream.kind if stream in SIMULATED else "beyond"
    else:
        recording, group = open_scores(record(name, folder, seed)), "recorded"
    found = replay(recording, players(), hindsight=stream is None or stream.tokens * stream.experts < HINDSIGHT)
    print(f"{name}: adaptive {found['rules']['adaptive']['mean_over_floor']:.2f}", file=sys.stderr, flush=True)
    for row in found["rules"].values():
        del row["per_layer"]
        row["maxvio"] = [round(value, 5) for value in row["maxvio"]]
    if found["hindsight"]:
        del found["hindsight"]["per_layer"], found["hindsight"]["maxvio"]
    return {"stream": name, "group": group, **found}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The targets held against the figures; a list of the streams where each is missed."""
    inside = [row for row in rows if row["group"] != "beyond"]
    missed: dict[str, list[str]] = {"lowest of all rules": [], "at the floor": [], "cold start": [], "affinity": []}
    for row in inside:
        ours, others = row["rules"]["adaptive"], [v for k, v in row["rules"].items() if k != "adaptive"]
        if ours["mean_over_floor"] > TIE * min(other["mean_over_floor"] for other in others):
            missed["lowest of all rules"].append(row["stream"])
        limit = {"slow": SLOW, "fast": FAST}.get(row["group"])
        if limit is not None and ours["mean_over_floor"] > limit:
            missed["at the floor"].append(row["stream"])
        if ours["steps_to_2x_floor"] is None or ours["steps_to_2x_floor"] > COLD_START:
            missed["cold start"].append(row["stream"])
        if ours["affinity_kept"] < row["rules"]["quantile"]["affinity_kept"]:
            missed["affinity"].append(row["stream"])
    return {"streams": len(inside), "missed": missed}


def table(results: dict[str, Any]) -> str:
    """mean_over_floor / steps to twice the floor, one row a stream; the lowest of a row (and its ties) in bold."""
    labels = list(results["rows"][0]["rules"])
    labels.sort(key=lambda label: (label == "adaptive", label.startswith("quantile"), label))
    lines = ["| stream | floor | " + " | ".join(labels) + " |", "|---|---|" + "---|" * len(labels)]
    for row in results["rows"]:
        lowest = min(figures["mean_over_floor"] for figures in row["rules"].values())
        cells = []
        for label in labels:
            figures = row["rules"][label]
            steps = "-" if figures["steps_to_2x_floor"] is None else figures["steps_to_2x_floor"]
            cell = f"{figures['mean_over_floor']:.2f} / {steps}"
            cells.append(f"**{cell}**" if figures["mean_over_floor"] <= TIE * lowest else cell)
        lines.append(f"| {row['stream']} | {row['floor']:.4f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def affinity_table(results: dict[str, Any]) -> str:
    """Scores kept by the rules that balance at all, and by the best bias in hindsight."""
    labels = ["sign", "sqrt", "quantile", "quantile, own threshold", "adaptive"]
    lines = ["| stream | " + " | ".join(labels) + " | hindsight |", "|---|" + "---|" * (len(labels) + 1)]
    for row in results["rows"]:
        cells = [f"{row['rules'][label]['affinity_kept']:.5f}" for label in labels]
        best = row["hindsight"]
        cells.append(f"{best['affinity_kept']:.5f} at {best['mean_over_floor']:.2f}" if best else "not run")
        lines.append(f"| {row['stream']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", nargs="*", help="names of streams")
    parser.add_argument("--jobs", type=int, default=2, help="streams replayed at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/balance"), help="where recorded trainings are kept")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/balance[-seedN].json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in every process that measures
    names = [stream.name for stream in (*SIMULATED, *BEYOND)] + list(RECORDED)
    names = [name for name in names if not arguments.only or name in arguments.only]
    tasks = [(name, arguments.runs, arguments.seed) for name in names]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        rows = pool.map(measure, tasks, chunksize=1)
    results = {"machine": machine.describe(), "seed": arguments.seed, "rows": rows, "verdicts": verdicts(rows)}
    suffix = "" if arguments.seed == SEED else f"-seed{arguments.seed}"
    write_json(arguments.out or machine.RESULTS / f"balance{suffix}.json", results)
    print(table(results))
    print(results["verdicts"])


if __name__ == "__main__":
    main()
