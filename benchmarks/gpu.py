"""What is to be seen on a machine with a GPU, in one command and one file: tests that need a device, the cost of a rule
there, and a training of the 1B DeepSeekMoE.

Needs no network: what is installed is what is used. Runs for --minutes at most; each part has its share, and the
training takes what is left. Without a GPU it says so, writes nothing and exits with 0. Repeat with

    make gpu        (python -m benchmarks.gpu, where megatron-core is installed)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alflb_megatron.lab.records.files import read_json, write_json
from alflb_megatron.lab.records.versions import git_revision
from alflb_megatron.lab.training import build
from benchmarks import one_gpu
from benchmarks.machine import RESULTS, describe, versioned

MINUTES = 8.5
RESERVE = 10.0
"""Seconds kept back for writing the file."""


class Part:
    """One command of the whole, with a time limit; its output is kept in the folder of the runs."""

    def __init__(self, name: str, runs: Path) -> None:
        self.name, self.log = name, runs / f"{name}.log"

    def run(self, module: str, *words: str, limit: float) -> dict[str, Any]:
        began = time.monotonic()
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", module, *words]
            environment = {"OMP_NUM_THREADS": "1"} | os.environ
            try:
                code = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=max(limit, 1.0), env=environment, check=False
                ).returncode
                ended = f"exit status {code}"
            except subprocess.TimeoutExpired:
                ended = "out of time"
        seconds = round(time.monotonic() - began, 1)
        print(f"{self.name}: {ended} after {seconds} s", flush=True)
        return {"ended": ended, "seconds": seconds}


def tests(runs: Path, limit: float) -> dict[str, Any]:
    """Runs tests/gpu; how many passed, were skipped and failed, the latter by name."""
    report = runs / "tests.xml"
    report.unlink(missing_ok=True)
    found = Part("tests", runs).run("pytest", "tests/gpu", "-rfEs", f"--junitxml={report}", limit=limit)
    counts: dict[str, Any] = {"passed": 0, "skipped": {}, "failed": []}
    for case in ET.parse(report).iter("testcase") if report.exists() else ():
        skipped = case.find("skipped")
        if skipped is not None:
            reason = skipped.get("message", "")
            counts["skipped"][reason] = counts["skipped"].get(reason, 0) + 1
        elif case.find("failure") is not None or case.find("error") is not None:
            counts["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["passed"] += 1
    return {**found, **counts}


def measured(name: str, runs: Path, words: Sequence[str], limit: float) -> dict[str, Any]:
    """Runs a benchmark that writes a JSON file; its results, as far as it came."""
    out = runs / f"{name}.json"
    out.unlink(missing_ok=True)
    found = Part(name, runs).run(f"benchmarks.{name}", "--out", str(out), *words, limit=limit)
    return {**found, "results": read_json(out) if out.exists() else None}


def what_is_there() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        **describe(),
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        **build.implementations(),
    }


def table(found: dict[str, Any]) -> str:
    """What the tests said, what each kind of router launches and costs, and how fast the trainings were."""
    there, tests_, cost, training = found["machine"], found["tests"], found["cost"], found.get("one_gpu")
    lines = [
        f"{there['device']}, {there['memory_gib']:.0f} GiB; CUDA {there['cuda']}, torch {there['torch']}, megatron-"
        f"core {there['megatron-core']}, Transformer Engine {there['transformer-engine']}.",
        "",
        f"`tests/gpu`: {tests_['passed']} passed, {len(tests_['failed'])} failed"
        + "".join(f"; `{name.rpartition('::')[2]}`" for name in tests_["failed"])
        + ".",
    ]
    if cost["results"]:
        lines += ["", cost_table(cost["results"]["rows"], cost["results"]["layers"])]
    if training and training["results"]:
        lines += ["", one_gpu.one_gpu_table(training["results"])]
    return "\n".join(lines)


def cost_table(rows: Sequence[dict[str, Any]], layers: int) -> str:
    """Of one router's forward and backward pass, and of one update of all layers; ratios to Megatron-Core's."""
    lines = [
        "| gate | E | T | router | ratio of host time | launches | device busy, µs | update: launches | ms |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        for kind, one in row["kinds"].items():
            if "forward_backward" not in one:
                continue
            passes, update = one["forward_backward"], one["update"]
            lines.append(
                f"| {row['gate']} | {row['experts']} | {row['tokens']} | {kind} | {one['ratio_without_update']:.2f} | "
                f"{passes['launches'] / layers:.0f} | {1e3 * passes['busy_ms'] / layers:.0f} | "
                f"{update['launches']} | {layers * one['update_ms']:.2f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="global batches of each training (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="trainings of each rule (%(default)s)")
    parser.add_argument("--rules", default=one_gpu.DEFAULTS["rules"], help="to train with (%(default)s)")
    parser.add_argument("--parts", default="tests,cost,one_gpu", help="which of them (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="the cost of four shapes alone")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu[-VERSION].json")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="folder of logs and runs (%(default)s)")
    flags = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu: no GPU here: nothing was run, and nothing is claimed")
        return 0
    end = time.monotonic() + 60 * flags.minutes - RESERVE
    out, parts = flags.out or RESULTS / versioned("gpu"), flags.parts.split(",")
    flags.runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": what_is_there(), "git_revision": git_revision()}
    for name, value in found["machine"].items():
        print(f"{name}: {value}", flush=True)

    def keep(name: str, part: dict[str, Any]) -> None:
        found[name] = part
        write_json(out, found)

    if "tests" in parts:
        keep("tests", tests(flags.runs, limit=(end - time.monotonic()) / 2))
    if "cost" in parts:
        words = ["--quick"] if flags.quick else []
        keep("cost", measured("cost", flags.runs, words, limit=(end - time.monotonic()) / 2))
    if "one_gpu" in parts:
        words = ["--steps", str(flags.steps), "--rounds", str(flags.rounds), "--rules", flags.rules]
        words += [
            "--runs",
            str(flags.runs / "one_gpu"),
            "--",
            "--validation-sequences",
            "16",
            *(["--grouped-gemm"] if build.have_transformer_engine() else []),
        ]
        keep("one_gpu", measured("one_gpu", flags.runs, words, limit=end - time.monotonic()))
    failed = found.get("tests", {}).get("failed", [])
    for name in failed:
        print(f"failed: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
