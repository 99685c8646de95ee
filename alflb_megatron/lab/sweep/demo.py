"""Trains the same small DeepSeekMoE under several rules, one after another, and shows what balancing did.

Each training is `alflb train --preset tiny` in a process of its own. What it prints goes on to standard error
as it comes and into OUT/RULE.log; the table goes to standard output, the picture to OUT/comparison.png and
everything as JSON to OUT/demo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alflb_megatron.lab.display.text import align_rows, explain_columns
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.run_folder import is_run_folder
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.sweep.processes import last_lines, run_streaming
from alflb_megatron.lab.training.resolve import resolve
from alflb_megatron.settings import SettingError

OURS = "adaptive"
WITHIN = "-micro-batch"
"""After a rule's name: its bias also follows the micro-batches (`--alflb-update-every micro-batch`)."""
RULES = ("none", "builtin", OURS, OURS + WITHIN)
LABELS = {"none": "none", "builtin": "builtin (Megatron-Core's own)"}
STEPS = 80
MICRO_BATCH = 4
"""Sequences of a micro-batch: on two ranks two micro-batches a global batch of the preset."""

COLUMNS = {
    "rule": "none: no balancing; builtin: Megatron-Core's own expert bias; any other: a rule of alflb_megatron; with "
    "-micro-batch its bias follows the micro-batches of a global batch too.",
    "validation loss": "mean cross-entropy on held-out text, nats a token; lower is better.",
    "MaxVio, last 50": "(largest load - mean load) / mean load of a global batch, mean over the MoE layers and over "
    "the last 50 steps; 0 is perfect balance.",
    "floor": "the sequence floor: MaxVio of a fresh global batch of whole sequences under the best bias that can be "
    "set before it is seen, at the final weights. A bias that follows the batch can be below.",
    "steps to 2x": "first step with MaxVio at most twice that floor, as is the mean of its next 4 steps.",
    "MaxVio_global": "MaxVio of the loads over the whole validation set, mean over the MoE layers "
    "(Wang et al. 2024, arXiv 2408.15664).",
    "seconds a step": "median over the steps, the first 5 left out.",
}


class TrainingFailed(RuntimeError):
    """A training ended with an error; its text says which, and the last lines of its output."""


def failure_text(rule: str, code: int, output: str) -> str:
    """One line that says which training failed and how, and below it the last lines of what it printed."""
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"training with rule {rule} failed ({how}); the last lines of its output:\n{last_lines(output)}"


def _job(row: str, steps: int, nproc: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of `alflb train` that the demo makes for a row, by name: of the job, and of the balancer."""
    ep = 2 if nproc % 2 == 0 else 1  # the experts of the preset can be split in two
    rule = row.removesuffix(WITHIN)
    job = {"preset": "tiny", "rule": rule, "nproc": nproc, "ep": ep, "micro_batch_size": MICRO_BATCH}
    return {**job, "steps": steps, "seed": seed}, {"update_every": "micro-batch"} if row != rule else {}


def train(rule: str, out: Path, steps: int, nproc: int, seed: int) -> dict[str, Any]:
    """Trains under `rule` into the run folder `out`, and returns its summary; `TrainingFailed` if that fails."""
    job, balancer = _job(rule, steps, nproc, seed)
    options = {**job, **{f"alflb_{name}": value for name, value in balancer.items()}, "out": out}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    log = out.with_name(f"{out.name}.log")
    code, printed = run_streaming([sys.executable, "-m", "alflb_megatron.lab.cli", "train", *flags, "--json"], log)
    if code != 0:
        raise TrainingFailed(
            failure_text(rule, code, printed + "\n" + log.read_text(encoding="utf-8", errors="replace"))
        )
    try:
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingFailed(f"training with rule {rule} left no summary ({error}); see {log}") from None
    return summary


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def format_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the runs (rule -> content of summary.json), and below it what each column holds."""
    rows = [list(COLUMNS)]
    for rule, summary in summaries.items():
        reached, floor = summary["steps_to_2x_sequence_floor"], summary["sequence_floor"]
        rows.append([
            rule,
            _number(summary["validation_loss"], 3),
            maxvio_text(summary["maxvio_last50"]),
            "-" if floor is None else maxvio_text(floor),
            "-" if floor is None else f"never in {summary['steps']}" if reached is None else str(reached),
            maxvio_text(summary["maxvio_global_mean"]),
            _number(summary["seconds_per_step"], 3),
        ])  # fmt: skip
    return "\n".join([*align_rows(rows), "", *explain_columns(COLUMNS)])


def _prepare(out: Path, rules: Sequence[str], record: Mapping[str, Any]) -> None:
    """Makes `out` ready: runs of an earlier demo are removed, and nothing else ever is."""
    marker = out / "demo.json"
    if out.exists() and not out.is_dir():
        raise SettingError("--out", out, "must be a folder, and this is a file")
    for rule in rules:
        run = out / rule
        if run.exists() and not (marker.is_file() and is_run_folder(run)):
            raise SettingError("--out", out, f"holds {rule}, which no earlier demo made; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(marker, record)  # now, so that an interrupted demo can be started again
    except OSError as error:
        raise SettingError("--out", out, f"must be a folder that can be written ({error.strerror})") from None
    for rule in rules:
        shutil.rmtree(out / rule, ignore_errors=True)


def demo(
    out: str | os.PathLike[str] = "runs/demo",
    steps: int = STEPS,
    nproc: int = 2,
    rules: Sequence[str] = RULES,
    seed: int = 1234,
) -> dict[str, Any]:
    """Trains once for each rule, prints the table, draws the picture; returns what it writes to `out`/demo.json.

    `steps` of training each, on `nproc` processes (expert-parallel size 2 where that is even), all from `seed`.
    Raises SettingError for a bad argument, and `TrainingFailed` if a training does.
    """
    if not 1 <= len(set(rules)) == len(rules):
        raise SettingError("--rules", " ".join(rules) or "nothing", "must name at least one rule, and each once")
    for rule in rules:  # all of them now: the third must not fail after two trainings
        job, balancer = _job(rule, steps, nproc, seed)
        resolve(job, {}, balancer)
    out = Path(out)
    record: dict[str, Any] = {"steps": steps, "nproc": nproc, "seed": seed, "rules": list(rules), "runs": {}}
    _prepare(out, rules, record)
    start = time.monotonic()
    for number, rule in enumerate(rules, 1):
        print(f"[{number}/{len(rules)}] training with rule {rule}: {out / rule}", file=sys.stderr, flush=True)
        record["runs"][rule] = train(rule, out / rule, steps, nproc, seed)
    from alflb_megatron.lab.sweep.comparison import plot_comparison

    folders = {LABELS.get(rule, f"{rule} (alflb)"): out / rule for rule in rules}
    picture = plot_comparison(folders, out / "comparison.png")
    record |= {"seconds": round(time.monotonic() - start, 1), "picture": str(picture)}
    write_json(out / "demo.json", record)
    print(f"\n{format_table(record['runs'])}\n\npicture: {picture.resolve()}", flush=True)
    return record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the demo to `parser`."""
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps for each rule (default: %(default)s)")
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks of each training (default: %(default)s)")
    parser.add_argument(
        "--rules", nargs="+", default=list(RULES), metavar="RULE", help=f"what to compare (default: {' '.join(RULES)})"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of weights and data order (default: %(default)s)")


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """`demo` with parsed flags; returns the exit code: 0, or 1 if a training failed. A bad flag is a SettingError."""
    try:
        demo(flags.out, flags.steps, flags.nproc, flags.rules, flags.seed)
    except TrainingFailed as error:
        print(f"alflb demo: {error}", file=sys.stderr)
        return 1
    return 0
