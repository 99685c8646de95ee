"""The loads that `benchmarks.cluster` prices: small models, trained on real text by `alflb train` under four rules.

Each has the experts and the topk of a large model, and little else of it; a step has fewer tokens than a large job
routes at once, so that more of the imbalance is the luck of the draw: `floor` is what even draws of that many tokens
come to. Of the loads of every EVERY-th step is kept, a layer, MaxVio and the overload of the fullest rank at each EP. A
run that is finished in its folder with the same settings is not run again; after a change of the code remove it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alflb_megatron import metrics
from alflb_megatron.lab.records.files import read_json
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.training.job import Plan
from alflb_megatron.lab.training.resolve import resolve
from benchmarks import in_training

EP = (2, 4, 8, 16, 64)
RULES = ("none", "builtin", "sign", "adaptive")
RECORDED: dict[str, dict[str, int]] = {
    "deepseek-moe-1b": {"num_experts": 64, "topk": 6, "hidden_size": 128, "moe_ffn_hidden_size": 64},
    "DeepSeek-V3": {"num_experts": 256, "topk": 8, "hidden_size": 128, "moe_ffn_hidden_size": 32},
}
"""By the name of the large model: what the small one has instead of what the preset `small` has."""
STEPS, SEED = 200, 1234
EVERY = 4


def run_settings(rule: str, steps: int) -> dict[str, Any]:
    """Settings of a run; one rank, for how a run is split does not change its loads."""
    one_rank = {"nproc": 1, "ep": 1, "save": False, "json": True}
    return {"preset": "small", "rule": rule, "seed": SEED, "steps": steps, **one_rank}


def train(options: Mapping[str, Any], shape: Mapping[str, int], out: Path) -> None:
    """Makes sure that `out` holds the finished run; CalledProcessError if it fails (its output is beside it)."""
    if is_finished(options, shape, out):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with out.with_name(f"{out.name}.log").open("w", encoding="utf-8") as log:
        command = in_training.command({**options, **shape}, out)
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=True)


def is_finished(options: Mapping[str, Any], shape: Mapping[str, int], out: Path) -> bool:
    """Whether `out` holds a finished run of these settings, wherever it was written to."""
    try:
        read_json(out / "summary.json")
        made = Plan.from_dict(read_json(out / "config.json")["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return replace(made, job=replace(made.job, out="")) == resolve(options, shape, {})


def summarise(run: Path) -> dict[str, Any]:
    """MaxVio and the overload of the fullest rank at each EP, a row of layers a step that is kept."""
    config = read_json(run / "config.json")
    records = list(read_metrics(run))
    loads_SLE = torch.tensor([record["loads"] for record in records[EVERY - 1 :: EVERY]])

    def rows(figure: Tensor) -> list[list[float]]:
        return [[round(value, 4) for value in row] for row in figure.tolist()]

    return {
        "git_revision": config["git_revision"],
        "tokens": records[0]["tokens"],
        "maxvio": rows(metrics.max_vio(loads_SLE)),
        "overload": {str(ep): rows(metrics.overload(loads_SLE, ep)) for ep in EP if loads_SLE.shape[-1] % ep == 0},
    }


def record(out: Path, steps: int, jobs: int) -> dict[str, Any]:
    """Trains what is not there yet, `jobs` at a time, and summarises it."""
    folders = {(name, rule): out / f"{name}-{rule}" for name in RECORDED for rule in RULES}
    with ThreadPoolExecutor(jobs) as pool:
        runs = [
            pool.submit(train, run_settings(rule, steps), RECORDED[name], path)
            for (name, rule), path in folders.items()
        ]
        for run in runs:
            run.result()
    found: dict[str, Any] = {}
    for name, shape in RECORDED.items():
        rules = {rule: summarise(folders[name, rule]) for rule in RULES}
        tokens = rules[RULES[0]]["tokens"]
        floor = metrics.sampling_floor(tokens, shape["topk"], shape["num_experts"])
        plan = resolve(run_settings(RULES[0], steps), shape, {}).shape
        found[name] = {
            "shape": asdict(plan),
            "steps": steps,
            "every": EVERY,
            "tokens": tokens,
            "floor": floor,
            "rules": rules,
        }
    return found
