"""What it costs to move the bias on each rank by that rank's own counts, without an all-reduce.

Han's public fork of litgpt (June 2025), which is not proven to be the set-up of Han and Zhong's experiments, moves the
bias so, in every training forward pass. Here two ranks train one model on real text (`alflb train`'s preset `tiny`,
data parallel), with and without an all-reduce of the loads. Without it the ranks' biases part. Loads are those of both
ranks together, of the global batch and of the validation set; the latter also under the mean of the ranks' biases, and
under that of the first rank, which is what a checkpoint of it holds. Repeat with

    python -m benchmarks.local_updates
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.versions import git_revision
from alflb_megatron.lab.training.resolve import resolve
from alflb_megatron.metrics import max_vio
from benchmarks.in_training import in_turn, logged, spread
from benchmarks.within_batch import command, left_in, micro_batch_loads, trains_one, write_results

RANKS, STEPS, FIRST_SEED = 2, 200, 1001
RULES: dict[str, dict[str, Any]] = {
    "sign, u = 0.01": {"rule": "sign", "step_size": 0.01},
    "quantile": {"rule": "quantile"},
}
"""The fork's u is 0.001, which has not arrived after so few steps."""
SUMS = {"summed over the ranks": False, "each rank's own": True}
FIGURES = {
    "last50": "MaxVio, last 50 steps",
    "own": "MaxVio_global, each rank under its own bias",
    "first": "under the first rank's",
    "mean": "under the ranks' mean",
    "apart": "biases apart at the end",
}


def train(one: Mapping[str, Any], out: Path) -> None:
    """Trains on this rank; the first one writes what both saw."""
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    torch.set_num_threads(1)
    from alflb_megatron.hosts import core
    from alflb_megatron.lab.training import train as module

    maxvio: list[float] = []

    def summed(loads_LE: Tensor) -> Tensor:
        dist.all_reduce(loads_LE)
        return loads_LE

    class Run(module.TrainingRun):
        def _step(self, step: int) -> dict[str, Any]:
            with micro_batch_loads(self.setup.balancer.routers) as seen:
                record = super()._step(step)
            maxvio.append(float(max_vio(summed(torch.stack([torch.stack(of).sum(0) for of in seen]))).mean()))
            return record

        def validate(self) -> dict[str, Any]:
            routers = self.setup.balancer.routers
            own_LE = torch.stack([router.expert_bias for router in routers if router.expert_bias is not None])
            first_LE, mean_LE = own_LE.clone(), own_LE.clone()
            dist.broadcast(first_LE, 0)
            dist.all_reduce(mean_LE)
            found = {"apart": float((own_LE - first_LE).abs().max())}
            for name, bias_LE in (("first", first_LE), ("mean", mean_LE / RANKS), ("own", own_LE)):
                for router, bias_E in zip(routers, bias_LE, strict=True):
                    router.expert_bias = bias_E.clone()
                result = super().validate()
                loads_LE = torch.tensor(result["validation_loads"])
                found[name] = float(max_vio(summed(loads_LE) if one["local"] else loads_LE).mean())
            apart = torch.tensor(found["apart"])
            dist.all_reduce(apart, dist.ReduceOp.MAX)
            if self.rank_0:
                figures = {**found, "apart": float(apart), "last50": statistics.fmean(maxvio[-50:])}
                write_json(out / "local.json", {"run": dict(one), "git_revision": git_revision(), **figures})
            return result

    if one["local"]:
        plain = core.balancer_of
        groups: list[dist.ProcessGroup] = []

        def of_this_rank(model: Any, group: Any = None) -> Any:
            if not groups:
                groups.extend(dist.new_group([rank]) for rank in range(RANKS))
            return plain(model, groups[dist.get_rank()])

        core.balancer_of = of_this_rank
    module.TrainingRun = Run  # type: ignore[misc]
    rule = dict(RULES[one["rule"]])
    job = {"preset": "tiny", "nproc": RANKS, "ep": 1, "save": False, "rule": rule.pop("rule")}
    module.train(resolve({**job, "seed": one["seed"], "steps": one["steps"], "out": str(out)}, {}, rule))


def options(rule: str, local: bool, seed: int) -> dict[str, Any]:
    """Everything that makes one run what it is."""
    return {"rule": rule, "local": local, "seed": seed, "steps": STEPS}


def folder(out: Path, one: Mapping[str, Any]) -> Path:
    rule = one["rule"].replace(", ", "-").replace(" = ", "")
    return out / f"{rule}-{'local' if one['local'] else 'summed'}-{one['seed']}"


def finished(out: Path, one: Mapping[str, Any]) -> dict[str, Any] | None:
    return left_in(folder(out, one) / "local.json", one)


def run_all(runs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """One after another, for each has two ranks, but those that are finished."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(one: Mapping[str, Any]) -> str:
        where = folder(out, one)
        if finished(out, one) is None:
            words = ["-m", "benchmarks.local_updates", "--one", json.dumps(dict(one)), "--out", str(out)]
            logged(where.name, [*launcher, *words], where.with_name(f"{where.name}.log"), environment)
        return where.name

    in_turn([partial(run, one) for one in runs], jobs=1)


def table(results: Mapping[str, Any]) -> str:
    lines = [
        f"`tiny`, {RANKS} data-parallel ranks, {results['steps']} steps, {len(results['seeds'])} seeds: mean ± "
        "standard deviation.",
        "",
        f"| rule | loads | {' | '.join(FIGURES.values())} |",
        "|---" * (len(FIGURES) + 2) + "|",
    ]
    for rule, by_sum in results["rules"].items():
        for sums, figures in by_sum.items():
            cells = []
            for name in FIGURES:
                mean, sd = figures[name]["mean"], figures[name]["sd"]
                cells.append(f"{mean:.2f}" + ("" if sd is None else f" ± {sd:.2f}"))
            lines.append(f"| {rule} | {sums} | {' | '.join(cells)} |")
    return "\n".join(lines)


def collect(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """All figures; SystemExit where a run is missing."""
    rules: dict[str, Any] = {}
    revisions = set()
    for rule in RULES:
        rules[rule] = {}
        for sums, local in SUMS.items():
            runs = [found for seed in seeds if (found := finished(out, options(rule, local, seed))) is not None]
            if len(runs) < len(seeds):
                raise SystemExit(f"--out {out}: lacks runs of {rule}, {sums}")
            revisions |= {run["git_revision"] for run in runs}
            rules[rule][sums] = {name: spread([run[name] for run in runs]) for name in FIGURES}
    return {"steps": STEPS, "seeds": list(seeds), "git_revisions": sorted(map(str, revisions)), "rules": rules}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "local_updates", "local_updates.json")
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args(arguments)
    if trains_one(flags, train, folder):
        return
    seeds = [FIRST_SEED + i for i in range(flags.seeds)]
    run_all([options(rule, local, seed) for seed in seeds for rule in RULES for local in SUMS.values()], flags.out)
    write_results(flags.json, collect(flags.out, seeds), table)


if __name__ == "__main__":
    main()
