"""A sudden change of the data in training: how soon biases fit the new kind of text.

Every run is a training of one rank and one thread on the preset `tiny`, M micro-batches a global batch, on the source
text of Python's standard library up to CHANGE_AT; from the next step on it is trained on the C++ headers that torch is
installed with. At every step from then on, at the weights that the step begins with, fresh global batches of headers
are scored: once for the sequence floor (`alflb_megatron.lab.replay.sequence_floor`), and for MaxVio under each bias
that a micro-batch of the step is routed with. A bias fits where that is at most twice the floor, mean over the MoE
layers. Repeat with

    python -m benchmarks.data_change     (--seeds 1 for a look)
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.versions import git_revision
from alflb_megatron.lab.replay.replayed_rules import choose_experts
from alflb_megatron.lab.training.launch import as_single_rank
from alflb_megatron.metrics import max_vio
from benchmarks.in_training import spread
from benchmarks.within_batch import (
    FIRST_SEED,
    FLOOR_BATCHES,
    command,
    finished,
    planned,
    run_all,
    scored_run,
    trains_one,
    write_results,
)

CHANGE_AT, FOLLOWED = 60, 12
"""The last step on the old text, and how many steps are followed after it."""
MICRO_BATCHES = 8
ROWS_SHOWN = (
    "Megatron-Core's sign",
    "quantile, once a global-batch",
    "quantile, once a micro-batch",
    "adaptive, once a global-batch",
    "adaptive, once a micro-batch",
)


def options(row: str, seed: int) -> dict[str, Any]:
    """Everything that makes one run what it is."""
    return {"preset": "tiny", "row": row, "micro_batches": MICRO_BATCHES, "seed": seed, "steps": CHANGE_AT + FOLLOWED}


def train(one: Mapping[str, Any], out: Path) -> None:
    """Trains one run in this process and writes MaxVio over the floor, a row a step and in it one a micro-batch."""
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    as_single_rank()
    torch.set_num_threads(1)
    from alflb_megatron.lab.data import open_data
    from alflb_megatron.lab.training import train as module

    found: list[dict[str, Any]] = []

    class Run(scored_run()):  # type: ignore[misc]
        """A training whose text changes."""

        def _step(self, step: int) -> dict[str, Any]:
            if step <= CHANGE_AT:
                return super()._step(step)
            if step == CHANGE_AT + 1:
                headers = str(Path(torch.__file__).parent / "include")
                shape, job = self.plan.shape, self.job
                self.training, _ = open_data(
                    headers, seq_length=shape.seq_length, vocab_size=shape.vocab_size, seed=job.seed
                )
            scores = self.fresh_scores(self.training, FLOOR_BATCHES)
            with _biases(self.setup.balancer.routers) as used:
                record = super()._step(step)
            floor = statistics.fmean(self.floors(scores))
            found.append({
                "floor": floor,
                "maxvio": [self._under(biases, scores) for biases in zip(*used, strict=True)],
            })  # fmt: skip
            return record

        def _under(self, biases: Sequence[Tensor], scores: Sequence[Sequence[Tensor]]) -> float:
            """MaxVio of the fresh global batches under a bias of each layer, mean over batches and layers."""
            vio = []
            for bias_E, parts in zip(biases, scores, strict=True):
                loads = [choose_experts(part_TE + bias_E, self.gating).loads() for part_TE in parts]
                vio += [float(max_vio(of.sum(0))) for of in torch.stack(loads).split(len(loads) // FLOOR_BATCHES)]
            return statistics.fmean(vio)

    module.TrainingRun = Run  # type: ignore[misc]
    module.train(planned(one, out))
    write_json(out / "within.json", {"run": dict(one), "git_revision": git_revision(), "steps": found})


@contextmanager
def _biases(routers: Sequence[Any]) -> Any:
    """The bias of every training pass of each router, zeros where it has none."""
    used: list[list[Tensor]] = [[] for _ in routers]

    def seen(kept: list[Tensor]) -> Any:
        def hook(router: Any, *_: Any) -> None:
            within = getattr(router, "within_batch", None)
            kept.append((router.expert_bias if within is None else within.bias_of(router)).detach().clone())

        return hook

    hooks = [router.register_forward_pre_hook(seen(kept)) for router, kept in zip(routers, used, strict=True)]
    yield used
    for hook in hooks:
        hook.remove()


def fits_after(run: Mapping[str, Any], row: str) -> dict[str, int | None]:
    """Micro-batches and global batches that were routed before a bias fitted; None where none did."""
    of = [
        (step, number)
        for step, figures in enumerate(run["steps"])
        for number, vio in enumerate(figures["maxvio"])
        if vio <= 2 * figures["floor"]
    ]
    if not of:
        return {"micro_batches": None, "global_batches": None}
    step, number = of[0]
    return {"micro_batches": step * MICRO_BATCHES + number, "global_batches": step + (number > 0)}


def table(results: Mapping[str, Any]) -> str:
    lines = [
        f"`tiny`, M = {MICRO_BATCHES}, {len(results['seeds'])} seeds; routed before a bias fits, by seed; MaxVio over "
        "the sequence floor when the first global batch of the new text ends, and the fifth.",
        "",
        "| row | micro-batches | global batches | after the first | after the fifth |",
        "|---|---|---|---|---|",
    ]
    for row, figures in results["rows"].items():
        cells = [
            ", ".join("never" if value is None else str(value) for value in figures[name])
            for name in ("micro_batches", "global_batches")
        ]
        cells += [f"{figures[name]['mean']:.2f}" for name in ("first", "fifth")]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def collect(out: Path, rows: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """All figures of the rows whose runs are there."""
    shown: dict[str, Any] = {}
    revisions = set()
    for row in rows:
        each = [finished(out, options(row, seed)) for seed in seeds]
        runs = [run for run in each if run is not None]
        if len(runs) < len(seeds):
            continue
        revisions |= {run["git_revision"] for run in runs}
        fits = [fits_after(run, row) for run in runs]
        shown[row] = {name: [one[name] for one in fits] for name in ("micro_batches", "global_batches")}
        for name, number in (("first", 1), ("fifth", 5)):
            ends = [run["steps"][number]["maxvio"][0] / run["steps"][number]["floor"] for run in runs]
            shown[row][name] = spread(ends)
    return {"seeds": list(seeds), "git_revisions": sorted(map(str, revisions)), "rows": shown}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "data_change", "data_change.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="|".join(ROWS_SHOWN), help="names of rows, with | between them")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    flags = parser.parse_args(arguments)
    if trains_one(flags, train):
        return
    seeds, rows = [FIRST_SEED + i for i in range(flags.seeds)], flags.rows.split("|")
    runs = [options(row, seed) for seed in seeds for row in rows]
    run_all(runs, flags.out, flags.jobs, "data_change")
    write_results(flags.json, collect(flags.out, rows, seeds), table)


if __name__ == "__main__":
    main()
