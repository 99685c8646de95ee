"""The one all-reduce a global batch: bytes, number of collectives, time, and the time that overlap leaves exposed.

Real gloo process groups on this machine, one thread a rank, for layers x experts as in real models, with loads alone
(rule `sign`) and with margins (rule `adaptive`). Bytes are those of the real `LoadAllReduce`; collectives are counted
around one `Balancer.launch` and `commit`. Times are the slowest rank's, medians of REPEATS: the bare all-reduce of a
tensor of that size; `LoadAllReduce` and its `wait`, which adds packing; and the time exposed: launch, then other work
(a blocking all-reduce of GRADIENT_BYTES on the same group, as a stand-in for the gradients, and MATMULS products of
MATRIX x MATRIX), then wait, minus the other work alone. Repeats with and without ours are interleaved, and the
difference is taken inside each. There is no network here and ranks share the cores, so both reduction and packing take
time from the other work: on a GPU cluster less stays exposed. Repeat with

    python -m benchmarks.all_reduce      (under a minute)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from alflb_megatron import margins
from alflb_megatron.balancer import Balancer
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import LoadAllReduce, LoadCounter
from alflb_megatron.rules import State

SHAPES = ((5, 32), (26, 64), (61, 256))
"""MoE layers and experts: preset `small`, DeepSeek-V2-Lite, DeepSeek-V3 with every layer an MoE layer."""

RANKS = (2, 4)
RULES = {"loads alone": "sign", "with margins": "adaptive"}
REPEATS = 9
GRADIENT_BYTES = 16 * 2**20
MATMULS, MATRIX = 4, 512

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
    "barrier",
)
"""Functions of torch.distributed that are counted; our code calls them through that module."""


class RouterStandIn(nn.Module):
    """A router as far as the balancer sees it, with the real counter, bias and rule state, and nothing that routes."""

    def __init__(self, experts: int, rule: str) -> None:
        super().__init__()
        self.alf = ALFConfig(rule=rule)
        knobs = self.alf.rule_knobs
        self.load_counter = LoadCounter(experts, with_margins=knobs.threshold is not None)
        self.expert_bias = torch.zeros(experts)
        self.n = torch.zeros(1, dtype=torch.int64)
        self.state = {name: rows[0] for name, rows in knobs.init(1, experts).items()}

    def read_state(self) -> tuple[Tensor, State]:
        return self.n, self.state

    def write_state(self, bias_E: Tensor, n: Tensor, state: State) -> None:
        self.expert_bias, self.n, self.state = bias_E, n, state


def routers(layers: int, experts: int, rule: str) -> list[RouterStandIn]:
    """Routers that saw one token in every bin of every expert's histogram, on every rank."""
    made = [RouterStandIn(experts, rule) for _ in range(layers)]
    for router in made:
        router.load_counter.tokens_per_expert += (
            margins.SIDE
        )  # the margins from zero on are those of tokens that chose the expert
        if router.load_counter.histogram_EB is not None:
            router.load_counter.histogram_EB += 1
    return made


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Counts the calls of every one of COLLECTIVES inside the block; they run as ever."""
    calls: dict[str, int] = {}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments, **options)

        return call

    patches: dict[str, Any] = {name: counted(name, getattr(dist, name)) for name in COLLECTIVES}
    with mock.patch.multiple(dist, **patches):
        yield calls


def _timed(work: Callable[[], Any]) -> float:
    dist.barrier()  # ranks begin together
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _case(layers: int, experts: int, rule: str, repeats: int, gradient_bytes: int) -> dict[str, Any]:
    """One shape on this rank: sizes, counts, and this rank's seconds of every repeat."""
    made = routers(layers, experts, rule)
    windows = [router.load_counter for router in made]
    balancer = Balancer(made, range(1, layers + 1), dist.group.WORLD)
    with counting() as calls:
        balancer.launch()
        balancer.commit()
    counted = dict(calls)
    started = LoadAllReduce(windows, dist.group.WORLD)
    started.wait()
    nbytes = started.nbytes
    flat = torch.ones(nbytes // 4, dtype=torch.int32)
    gradients, matrix = torch.zeros(gradient_bytes // 4), torch.ones(MATRIX, MATRIX)

    def other_work() -> None:
        dist.all_reduce(gradients)
        for _ in range(MATMULS):
            torch.mm(matrix, matrix)

    def with_ours() -> None:
        started = LoadAllReduce(windows, dist.group.WORLD)
        other_work()
        started.wait()

    works: dict[str, Callable[[], Any]] = {
        "bare": lambda: dist.all_reduce(flat),
        "packed": lambda: LoadAllReduce(windows, dist.group.WORLD).wait(),
        "other": other_work,
        "overlapped": with_ours,
    }
    for work in [*works.values()] * 2:
        _timed(work)  # the first calls make connections and buffers
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            seconds[name].append(_timed(work))
    return {"bytes": nbytes, "collectives": counted, "seconds": seconds}


def _over_ranks(here: dict[str, Any]) -> dict[str, Any]:
    """The case of all ranks: every repeat takes as long as its slowest rank."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here["seconds"])
    slowest = {
        name: [max(times) for times in zip(*(rank[name] for rank in everywhere), strict=True)] for name in everywhere[0]
    }
    exposed = [1e3 * (ours - alone) for ours, alone in zip(slowest["overlapped"], slowest["other"], strict=True)]
    return {
        "bytes": here["bytes"],
        "collectives": sum(here["collectives"].values()),
        "calls": here["collectives"],
        **{f"{name}_ms": 1e3 * statistics.median(times) for name, times in slowest.items()},
        "exposed_ms": statistics.median(exposed),
        "exposed_quartiles_ms": statistics.quantiles(exposed, n=4, method="inclusive")[::2],
    }


def _rank(rank: int, ranks: int, folder: str, shapes: Sequence[tuple[int, int]], repeats: int, gradient: int) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(Path(folder, f"store{ranks}")), ranks)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    rows = [
        {"ranks": ranks, "layers": layers, "experts": experts, "what": what, "rule": rule}
        | _over_ranks(_case(layers, experts, rule, repeats, gradient))
        for layers, experts in shapes
        for what, rule in RULES.items()
    ]
    dist.destroy_process_group()
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(rows), encoding="utf-8")


def measure(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    ranks: Sequence[int] = RANKS,
    repeats: int = REPEATS,
    gradient_bytes: int = GRADIENT_BYTES,
) -> dict[str, Any]:
    """The results, as they are written; `machine` is added by `main`."""
    rows: list[dict[str, Any]] = []
    # Threads are set before torch is imported by the ranks, so that none of them starts a pool of its own.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        for group in ranks:
            mp.spawn(_rank, (group, folder, list(shapes), repeats, gradient_bytes), nprocs=group)
            rows += json.loads(Path(folder, f"{group}.json").read_text(encoding="utf-8"))
    other = {"gradient_bytes": gradient_bytes, "matmuls": MATMULS, "matrix": MATRIX}
    how = {"backend": "gloo", "threads_a_rank": 1, "cores": os.cpu_count(), "repeats": repeats}
    return {**how, "other_work": other, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """One row a number of ranks, a shape and what is summed."""
    from benchmarks.scale import ms_text, size_text

    other = results["other_work"]
    lines = [
        f"Milliseconds, medians of {results['repeats']}, the slowest rank; {results['backend']}, "
        f"{results['threads_a_rank']} thread a rank, all ranks on one machine of {results['cores']} cores. *Exposed* "
        "is what launch, other work and wait take longer than the other work alone (in brackets the quartiles of the "
        "repeats): an all-reduce of "
        f"{size_text(other['gradient_bytes'])} and {other['matmuls']} products of {other['matrix']} x "
        f"{other['matrix']} matrices. Quartiles on both sides of zero are noise.",
        "",
        "| ranks | layers x experts | what is summed | bytes a step | collectives a step | all-reduce | with packing | "
        "other work | exposed |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        times = " | ".join(ms_text(row[f"{name}_ms"]) for name in ("bare", "packed", "other", "exposed"))
        low, high = row["exposed_quartiles_ms"]
        lines.append(
            f"| {row['ranks']} | {row['layers']} x {row['experts']} | {row['what']} | {size_text(row['bytes'])} | "
            f"{row['collectives']} | {times} ({ms_text(low)} to {ms_text(high)}) |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    from alflb_megatron.lab.records.files import write_json
    from benchmarks import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "all_reduce.json", help="where the figures go")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {"machine": machine.describe(), **measure()}
    write_json(flags.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
