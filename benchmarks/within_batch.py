"""Balance inside the global batch, in training: biases moved once a global batch and once a micro-batch, side by side.

Every run is a training of one rank and one thread on a preset, its global batch fixed and cut into M micro-batches of
whole sequences. The rows are those of ROWS; `micro-batch` rows have `--alflb-update-every micro-batch`. MaxVio is the
mean over the MoE layers, of a global batch or of its micro-batches (their mean). The sequence floor
(`alflb_megatron.lab.replay.sequence_floor`) is taken at the steps of FLOOR_AT on FLOOR_BATCHES global batches of the
run's own text. A run that is finished in its folder is not run again, so an interrupted benchmark goes on; after a
change of the code remove the folder. Repeat with

    python -m benchmarks.within_batch     (--seeds 1 --micro-batches 8 for a look)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.records.versions import git_revision
from alflb_megatron.lab.replay.recording import Layout
from alflb_megatron.lab.training.launch import as_single_rank
from alflb_megatron.lab.training.resolve import resolve
from alflb_megatron.metrics import max_vio, sampling_floor
from benchmarks import machine
from benchmarks.in_training import AUX_COEFF, NOISE, difference, in_turn, logged, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILE_BALANCING = "Megatron-Core's quantile balancing"
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "auxiliary loss": ({"rule": "none", "aux_loss_coeff": AUX_COEFF}, {}),
    "Megatron-Core's sign": ({"rule": "builtin"}, {}),
    **({QUANTILE_BALANCING: ({"rule": "none"}, {})} if machine.installed("megatron-core") != machine.OLDEST else {}),
    **{
        f"{rule}, once a {every}": ({"rule": rule}, {"update_every": every})
        for rule in ("sign", "quantile", "adaptive")
        for every in ("global-batch", "micro-batch")
    },
}
"""What is compared: settings of the job, and of the balancer."""
OURS, YARDSTICK = "adaptive, once a micro-batch", "adaptive, once a global-batch"

STEPS = {"tiny": 160, "small": 60}
FIRST_SEED = 1001
FLOOR_AT = (20, 40, 80, 160)
FLOOR_BATCHES = 4
SPANS = {"steps 10 to 60": (10, 60), "last quarter": (-0.25, None)}
FIGURES = {
    "steps 10 to 60": "MaxVio, steps 10 to 60",
    "last quarter": "MaxVio, last quarter",
    "micro-batches": "MaxVio of micro-batches, from step 10",
    "first": "MaxVio of the first global batch",
    "maxvio_global": "MaxVio_global",
    "validation_loss": "validation loss",
}


# -- one run ----------------------------------------------------------------------------------------------------------


def options(preset: str, row: str, micro_batches: int, seed: int) -> dict[str, Any]:
    """Everything that makes one run what it is."""
    return {"preset": preset, "row": row, "micro_batches": micro_batches, "seed": seed, "steps": STEPS[preset]}


def planned(one: Mapping[str, Any], out: Path) -> Any:
    job, alf = ROWS[one["row"]]
    size = resolve({"preset": one["preset"], "nproc": 1, "ep": 1, "rule": "none"}, {}, {}).job.global_batch_size
    if size % one["micro_batches"]:
        raise SystemExit(f"--micro-batches {one['micro_batches']}: must divide the {size} sequences of a global batch")
    own = {"micro_batch_size": size // one["micro_batches"], "seed": one["seed"], "steps": one["steps"]}
    return resolve(
        {"preset": one["preset"], "nproc": 1, "ep": 1, "save": False, **job, **own, "out": str(out)}, {}, alf
    )


def train(one: Mapping[str, Any], out: Path) -> None:
    """Trains one run in this process, and writes beside its records what only it can see."""
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    as_single_rank()
    torch.set_num_threads(1)
    from alflb_megatron.lab.training import train as module

    micro: list[list[float]] = []
    floors: dict[int, float] = {}

    class Run(scored_run()):  # type: ignore[misc]
        """A training that looks at every micro-batch, and now and then at the floor."""

        def _step(self, step: int) -> dict[str, Any]:
            with micro_batch_loads(self.setup.balancer.routers) as seen:
                record = super()._step(step)
            micro.append([float(max_vio(torch.stack(loads)).mean()) for loads in zip(*seen, strict=True)])
            if step in FLOOR_AT:
                floors[step] = self._floor()
            return record

        def _floor(self) -> float:
            return statistics.fmean(self.floors(self.fresh_scores(self.training, FLOOR_BATCHES)))

    module.TrainingRun = Run  # type: ignore[misc]
    if one["row"] == QUANTILE_BALANCING:
        _with_quantile_balancing()
    summary = module.train(planned(one, out))
    write_json(
        out / "within.json",
        {
            "run": dict(one),
            "git_revision": git_revision(),
            "micro_batches": micro,
            "floors": floors,
            "validation_loss": summary["validation_loss"],
            "maxvio_global": summary["maxvio_global_mean"],
            "maxvio": [record["maxvio_mean"] for record in read_metrics(out)],
        },
    )


def _with_quantile_balancing() -> None:
    """Has models built that balance as Megatron-Core does it by itself from 0.19 on."""
    from alflb_megatron.lab.training import build

    plain = build.transformer_config
    build.transformer_config = lambda plan: dataclasses.replace(
        plain(plan), moe_router_load_balancing_type="quantile_balancing"
    )


def scored_run() -> type[Any]:
    """`TrainingRun` that can be asked what its gates give for batches that it is not trained on."""
    from alflb_megatron.lab.replay.gate_scores import gate_scores, sequence_floors
    from alflb_megatron.lab.training.train import TrainingRun

    class ScoredRun(TrainingRun):
        def fresh_scores(self, data: Any, count: int) -> list[list[Tensor]]:
            """Scores of `count` global batches spread over those of the run, [T, E] a micro-batch, for each router."""
            stride = max(1, self.job.steps // count)
            with (
                self.forward_backward.evaluating(),
                gate_scores(self.setup.balancer.routers, self.plan.shape.gate) as found,
            ):
                for other in range(count):
                    self.forward_backward(self._batches(data, other * stride), forward_only=True)
            return found

        def floors(self, scores: list[list[Tensor]]) -> list[float]:
            """The sequence floor of each layer for a global batch."""
            layout = Layout(self.plan.shape.seq_length, self.job.micro_batch_size)
            return sequence_floors(scores, self.gating, layout, self.job.global_batch_size)

    return ScoredRun


@contextmanager
def micro_batch_loads(routers: Sequence[Any]) -> Iterator[list[list[Tensor]]]:
    """Loads of every training forward pass of each router; nothing is recomputed here."""
    seen: list[list[Tensor]] = [[] for _ in routers]
    hooks = [
        router.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output[1].sum(0)))
        for router, kept in zip(routers, seen, strict=True)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


# -- what it costs ----------------------------------------------------------------------------------------------------

COST_SHAPES = ((16, 2, 4096), (64, 6, 4096), (256, 8, 4096))
"""Experts, K and tokens of a micro-batch."""


def cost(rounds: int = 15, layers: int = 8, micro_batches: int = 8, hidden_size: int = 1024) -> list[dict[str, Any]]:
    """Seconds of routers' forward and backward and of the update, a global batch, once a micro-batch against once.

    Both in one process, in turn; the ratio is the median over rounds of the ratio of neighbours. Also the bytes and the
    number of all-reduces of each, which are of one rank's own messages and need no second rank to be counted.
    """
    import time

    from alflb_megatron.balancer import Balancer
    from alflb_megatron.config import ALFConfig

    machine.be_one_rank(seed=1)
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from alflb_megatron.hosts.core import RouterBuilder
    from alflb_megatron.lab.training import build
    from alflb_megatron.within_batch import WithinBatch

    rows = []
    for experts, topk, tokens in COST_SHAPES:
        plan = resolve({"rule": "none", "nproc": 1, "ep": 1}, {"num_experts": experts, "topk": topk}, {})
        config = dataclasses.replace(build.transformer_config(plan), hidden_size=hidden_size, moe_router_dtype="fp32")
        row: dict[str, Any] = {"experts": experts, "topk": topk, "tokens": tokens}
        for rule in ("sign", "adaptive"):
            seconds: dict[str, list[float]] = {}
            kinds = {}
            for every in ("global-batch", "micro-batch"):
                builder = RouterBuilder(ALFConfig(rule=rule, update_every=every))
                groups = get_default_pg_collection()
                routers = [builder(config=config, pg_collection=groups) for _ in range(layers)]
                for number, router in enumerate(routers, 1):
                    router.set_layer_number(number)
                if every == "micro-batch":
                    WithinBatch(routers, routers[0].tp_dp_cp_group)
                kinds[every] = routers, Balancer(routers, range(1, layers + 1), routers[0].tp_dp_cp_group)
            upstream_TE = torch.randn(tokens, experts)
            for number in range(rounds + 2):
                hidden = torch.randn(tokens // 8, 8, hidden_size)
                for every, (routers, balancer) in sorted(kinds.items(), reverse=number % 2 == 1):
                    began = time.perf_counter()
                    for _ in range(micro_batches):
                        if routers[0].within_batch is not None:
                            routers[0].within_batch.begin_micro_batch()
                        for router in routers:
                            router(hidden)[0].backward(upstream_TE)
                    balancer.launch()
                    within = routers[0].within_batch
                    if number == 0:
                        sent = [balancer.under_way.nbytes if balancer.under_way else 0, 1]
                        if within is not None:
                            sent = [sent[0] + within.bytes_sent, sent[1] + within.messages]
                        row[f"{rule}, {every}"] = sent
                    balancer.commit()
                    if number > 1:
                        seconds.setdefault(every, []).append(time.perf_counter() - began)
            pairs = zip(seconds["micro-batch"], seconds["global-batch"], strict=True)
            row[rule] = statistics.median(micro / whole for micro, whole in pairs)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


# -- all runs ----------------------------------------------------------------------------------------------------------


def folder(out: Path, one: Mapping[str, Any]) -> Path:
    row = one["row"].replace(" ", "-").replace(",", "").replace("'", "")
    return out / f"{one['preset']}-{row}-M{one['micro_batches']}-{one['seed']}"


def finished(out: Path, one: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a finished run left, None where there is none of these settings."""
    return left_in(folder(out, one) / "within.json", one)


def left_in(path: Path, one: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run of these settings wrote to a file, None where there is none."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if found.get("run") == dict(one) else None


def run_all(runs: Sequence[Mapping[str, Any]], out: Path, jobs: int, module: str = "within_batch") -> None:
    """Has each run trained by a process of that benchmark's own, but those that are finished."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(one: Mapping[str, Any]) -> str:
        where = folder(out, one)
        if finished(out, one) is None:
            words = [sys.executable, "-m", f"benchmarks.{module}", "--one", json.dumps(dict(one)), "--out", str(out)]
            logged(where.name, words, where.with_name(f"{where.name}.log"), environment)
        return where.name

    in_turn([partial(run, one) for one in runs], jobs)


def figures_of(found: Mapping[str, Any]) -> dict[str, float]:
    vio, micro = found["maxvio"], found["micro_batches"]
    return {
        "steps 10 to 60": statistics.fmean(vio[10:60]),
        "last quarter": statistics.fmean(vio[-math.ceil(len(vio) / 4) :]),
        "micro-batches": statistics.fmean(statistics.fmean(step) for step in micro[10:]),
        "first": vio[0],
        "maxvio_global": found["maxvio_global"],
        "validation_loss": found["validation_loss"],
    }


def collect(
    out: Path, preset: str, counts: Sequence[int], seeds: Sequence[int], rows: Sequence[str], fewest: int = 3
) -> dict[str, Any]:
    """All figures of a preset, of rows with at least `fewest` seeds."""
    plan = planned(options(preset, YARDSTICK, counts[0], seeds[0]), out)
    tokens = plan.job.global_batch_size * plan.shape.seq_length
    by_count: dict[str, Any] = {}
    revisions = set()
    for count in counts:
        shown: dict[str, Any] = {}
        for row in rows:
            if "micro-batch" in row and count == 1:
                continue  # the same as once a global batch, bit for bit: a test says so
            # the loss of the two rows that matter may need more seeds than the rest: as many as there are, in order
            found = [finished(out, options(preset, row, count, seed)) for seed in seeds]
            runs = [one for one in found if one is not None]
            runs = runs[: next((at for at, one in enumerate(found) if one is None), len(found))]
            if len(runs) < min(len(seeds), fewest):
                continue  # not run, or not yet
            revisions |= {one["git_revision"] for one in runs}
            each = [figures_of(one) for one in runs]
            shown[row] = {name: spread([one[name] for one in each]) for name in FIGURES}
            shown[row]["floor"] = {
                step: statistics.fmean(one["floors"][str(step)] for one in runs)
                for step in FLOOR_AT
                if step <= STEPS[preset]
            }
            shown[row]["maxvio"] = [
                round(statistics.fmean(values), 4) for values in zip(*(one["maxvio"] for one in runs), strict=True)
            ]
        by_count[str(count)] = shown
    return {
        "steps": STEPS[preset],
        "seeds": list(seeds),
        "tokens": tokens,
        "sampling_floor": sampling_floor(tokens, plan.shape.topk, plan.shape.num_experts),
        "git_revisions": sorted(map(str, revisions)),
        "by_micro_batches": by_count,
    }


def ratios(shown: Mapping[str, Any]) -> dict[str, float]:
    """Ours against the yardstick of the same M; losses and MaxVio_global as paired differences in standard errors."""
    ours, theirs = shown[OURS], shown[YARDSTICK]
    found = {
        name: ours[name]["mean"] / theirs[name]["mean"] for name in ("steps 10 to 60", "last quarter", "micro-batches")
    }
    floor = statistics.fmean(ours["floor"].values())
    found["sequence floors from step 10"] = statistics.fmean(ours["maxvio"][10:]) / floor
    for name in ("validation_loss", "maxvio_global"):
        both = min(len(of[name]["each"]) for of in (ours, theirs))
        apart = difference(ours[name]["each"][:both], theirs[name]["each"][:both])
        found[name] = apart["mean"]
        found[f"{name}, noise"] = NOISE * (apart["standard_error"] or math.nan)
    return found


def _apart(of: Mapping[str, float], name: str, digits: str) -> str:
    """A paired difference in words, against two standard errors."""
    apart, noise = of[name], of[f"{name}, noise"]
    said = "worse by more" if apart > noise else "better by more" if -apart > noise else "within it"
    return f"{apart:+{digits}} (noise, two standard errors, {noise:{digits}}: {said})"


def table(results: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for preset, found in results["presets"].items():
        for count, shown in found["by_micro_batches"].items():
            seeds = {row: len(figures["first"]["each"]) for row, figures in shown.items()}
            few = min(seeds.values(), default=0)
            lines += [
                f"`{preset}`, M = {count}: {found['steps']} steps of {found['tokens']:,} tokens, {few} "
                f"seed{'s' * (few > 1)} where no other number is said, mean ± standard deviation; sampling floor "
                f"{maxvio_text(found['sampling_floor'])}.",
                "",
                "| row | " + " | ".join(FIGURES.values()) + " | sequence floor |",
                "|---" * (len(FIGURES) + 2) + "|",
            ]
            for row, figures in shown.items():
                cells = []
                for name in FIGURES:
                    digits = ".4f" if name == "validation_loss" else ".2f"
                    mean, sd = figures[name]["mean"], figures[name]["sd"]
                    cells.append(f"{mean:{digits}}" + ("" if sd is None else f" ± {sd:{digits}}"))
                floor = statistics.fmean(figures["floor"].values())
                said = f"{row} ({seeds[row]} seeds)" if seeds[row] != few else row
                lines.append(f"| {said} | " + " | ".join(cells) + f" | {floor:.2f} |")
            if missing := [row for row in ROWS if row not in shown and not (count == "1" and "micro" in row)]:
                lines += ["", f"Not run: {'; '.join(missing)}."]
            if OURS in shown and YARDSTICK in shown:
                of = ratios(shown)
                lines += [
                    "",
                    f"{OURS} against {YARDSTICK}: MaxVio {of['steps 10 to 60']:.2f} of it in steps 10 to 60, "
                    f"{of['last quarter']:.2f} in the last quarter, of micro-batches {of['micro-batches']:.2f}; from "
                    f"step 10 on {of['sequence floors from step 10']:.2f} sequence floors. Validation loss "
                    f"{_apart(of, 'validation_loss', '.4f')}, MaxVio_global {_apart(of, 'maxvio_global', '.3f')}.",
                ]
            lines.append("")
    if "cost" in results:
        lines += [
            "What it costs on this CPU: forward and backward of 8 routers over 8 micro-batches and the update, as a "
            "ratio to once a global batch, and what a rank sends a global batch.",
            "",
            "| experts, K, tokens | "
            + " | ".join(f"{rule}, ratio | bytes (messages)" for rule in ("sign", "adaptive"))
            + " |",
            "|---|---|---|---|---|",
        ]
        for row in results["cost"]:
            cells = []
            for rule in ("sign", "adaptive"):
                sent = [row[f"{rule}, {every}"] for every in ("micro-batch", "global-batch")]
                text = " against ".join(f"{size:,} ({count})" for size, count in sent)
                cells += [f"{row[rule]:.3f}", text]
            lines.append(f"| {row['experts']}, {row['topk']}, {row['tokens']:,} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def figure(results: Mapping[str, Any]) -> Figure:
    """MaxVio by step of the rows at the middle number of micro-batches, and the sequence floor."""
    from matplotlib.figure import Figure

    from alflb_megatron.lab.display.plot_style import COLOURS, DPI, style_axes

    found = next(iter(results["presets"].values()))
    count, shown = max(found["by_micro_batches"].items(), key=lambda item: len(item[1]))
    drawn = Figure(figsize=(9, 4.2), dpi=DPI, layout="constrained")
    axes = drawn.add_subplot()
    for (row, figures), colour in zip(shown.items(), (*COLOURS, "grey", "brown", "olive"), strict=False):
        width = 2.0 if row in (OURS, YARDSTICK) else 1.0
        axes.plot(range(1, len(figures["maxvio"]) + 1), figures["maxvio"], label=row, linewidth=width, color=colour)
    floor = shown[OURS]["floor"]
    axes.plot([int(step) for step in floor], list(floor.values()), "k.--", label="sequence floor")
    axes.set_yscale("log")
    axes.set_xlabel(f"training step ({found['tokens']:,} tokens)")
    axes.set_ylabel(f"MaxVio, M = {count}, mean over layers and seeds")
    axes.legend(fontsize=8, ncols=2, frameon=False)
    style_axes(axes)
    return drawn


def command(doc: str | None, name: str, results: str) -> argparse.ArgumentParser:
    """The flags of a benchmark that has trainings, each started as a process of its own by `--one`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", name))
    parser.add_argument("--json", type=Path, default=machine.RESULTS / results)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # torchrun would take --run for one of its own, cut short
    return parser


def trains_one(
    flags: argparse.Namespace,
    train: Callable[[Mapping[str, Any], Path], None],
    folder: Callable[[Path, Mapping[str, Any]], Path] = folder,
) -> bool:
    """Trains the one run that this process was started for, and says whether it was."""
    if not flags.one:
        return False
    one = json.loads(flags.one)
    train(one, folder(flags.out, one))
    return True


def write_results(path: Path, found: Mapping[str, Any], table: Callable[[Mapping[str, Any]], str]) -> None:
    """Figures and what they were measured on, to a file; as a table to standard output."""
    results = {"machine": {**machine.describe(), "threads": 1}, **found}
    write_json(path, results)
    print(table(results))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "within_batch", machine.versioned("within_batch"))
    parser.add_argument("--presets", default="tiny")
    parser.add_argument("--micro-batches", default="8,2,4,16,1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default="|".join(ROWS), help="names of rows, with | between them")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--collect", action="store_true", help="take the runs that are there, and run none")
    parser.add_argument(
        "--cost", action="store_true", help="measure what it costs alone, into the results that are there"
    )
    flags = parser.parse_args(arguments)
    if trains_one(flags, train):
        return
    if flags.cost:
        results = json.loads(flags.json.read_text(encoding="utf-8"))
        write_json(flags.json, {**results, "cost": cost()})
        return
    presets, counts = flags.presets.split(","), [int(count) for count in flags.micro_batches.split(",")]
    seeds, rows = [FIRST_SEED + i for i in range(flags.seeds)], flags.rows.split("|")
    runs = [
        options(preset, row, count, seed)
        for preset in presets
        for count in counts
        for seed in seeds
        for row in rows
        if not ("micro-batch" in row and count == 1)
    ]
    if not flags.collect:
        run_all(runs, flags.out, flags.jobs)
    found = {preset: collect(flags.out, preset, counts, seeds, rows) for preset in presets}
    write_results(flags.json, {"presets": found}, table)


if __name__ == "__main__":
    main()
