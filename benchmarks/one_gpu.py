"""What a rule costs a training on one device, and what balance it has: throughput, memory, and where the router's time
goes.

Each training is an `alflb train` process of one rank. In a round every rule is trained once, with the seed of the round
and in an order that turns from round to round, so that a machine that drifts favours none. Tokens a second are the
median over the steps after the first third; the ratio is taken to `builtin` (Megatron-Core's own expert bias) in the
same round; medians over the rounds are reported. MaxVio is the mean over the last quarter of the steps, MaxVio_global
that of the validation set.

One more process a rule, after the rounds, is `alflb train` with named ranges around functions of the router: peak
memory of its first WARM_UP steps, and torch.profiler over the PROFILED after them. The time of a part is that of the
kernels launched in it, its share that of all kernels of the step; without CUDA both are CPU time. Forward passes alone:
the backward pass is in the step only. `watching` is what `alflb train` does to record the loads of a router that is not
ours, beside that router's own counting, so `builtin` would be faster by that much without it.

The global batch of the DeepSeekMoE presets is GLOBAL_BATCH sequences: an update is shared by fewer micro-batches than
in a real run, which makes it dearer. Repeat with

    python -m benchmarks.one_gpu         (without CUDA: --preset tiny --steps 6)
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alflb_megatron.lab import cli
from alflb_megatron.lab.records.files import read_json, write_json
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.records.versions import git_revision
from alflb_megatron.lab.sweep.demo import TrainingFailed
from alflb_megatron.lab.training.command import plan_of
from alflb_megatron.lab.training.job import Job
from alflb_megatron.models import PRESETS
from alflb_megatron.settings import SettingError, given_flags
from benchmarks import in_training
from benchmarks.machine import RESULTS, describe

YARDSTICK = "builtin"
DEFAULTS = {"preset": "deepseek-moe-1b", "steps": "60", "rules": "builtin,sign,quantile,adaptive", "rounds": "3"}
LARGE = 10**8
"""Parameters from which on a preset needs CUDA, and a smaller global batch than its own."""
GLOBAL_BATCH = 16
WARM_UP, PROFILED = 3, 2
FIXED = ("preset", "rule", "steps", "nproc", "ep", "out", "save", "resume")
"""Settings of `alflb train` that are not to be given after `--`."""

PARTS = {
    "router": "router, forward",
    "gate": "gate GEMM",
    "selection": "selection, gate weights",
    "counting": "counting loads, margins",
    "update": "bias update",
    "watching": "watching",
}
"""Parts of a step; those from `gate` to `counting` are inside `router`, the last two after or beside it."""


# -- one process with named ranges ------------------------------------------------------------------------------------


def _range(part: str) -> Any:
    return torch.profiler.record_function(f"one_gpu.{part}")


def _put_range(owner: Any, name: str, part: str) -> None:
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with _range(part):
            return plain(*args, **kwargs)

    setattr(owner, name, ranged)


def _put_ranges(ours: bool) -> None:
    """Names the parts of the step, whichever router does them. Megatron-Core can be imported."""
    import megatron.core.distributed  # noqa: F401  (loads the module below, whose name there is a function)
    from megatron.core.transformer.moe import router as megatron_router

    from alflb_megatron import router
    from alflb_megatron.balancer import Balancer
    from alflb_megatron.loads import LoadCounter

    finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]
    theirs = megatron_router.TopKRouter
    for owner, part, names in (
        (theirs, "router", ["forward"]),
        (theirs, "gate", ["gating"]),
        (megatron_router, "selection", ["topk_routing_with_score_function"]),
        (router, "selection", ["select", "topk_routing_with_score_function"]),
        (theirs, "counting", ["_apply_expert_bias"]),
        (router.ALFRouter, "counting", ["_observe_margins"]),
        (LoadCounter, "counting" if ours else "watching", ["observe", "observe_map"]),
        (Balancer, "update" if ours else "watching", ["launch", "commit"]),
        (finalize, "update", [] if ours else ["_update_router_expert_bias", "reset_model_temporary_tensors"]),
    ):
        for name in names:
            _put_range(owner, name, part)


def measure(words: Sequence[str], result: Path) -> int:
    """Runs `alflb WORDS`, a training of WARM_UP + PROFILED steps, and writes its peak memory and profile."""
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    from alflb_megatron.lab.training.train import TrainingRun

    plan = plan_of(cli.parse(words))
    _put_ranges(ours=plan.alf is not None)
    cuda = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU])
    found: dict[str, Any] = {"peak_memory": None}
    plain_step, plain_gather_metrics = TrainingRun._step, TrainingRun._gather_metrics

    def first_half(self: Any, step: int) -> dict[str, Any]:
        if step == WARM_UP + 1:
            found["peak_memory"] = torch.cuda.max_memory_allocated() if cuda else None
            profiler.start()
        with _range("step"):
            return plain_step(self, step)

    def second_half(self: Any, record: dict[str, Any]) -> dict[str, Any]:
        with _range("step"):
            whole = plain_gather_metrics(self, record)
        if record["step"] == WARM_UP + PROFILED:
            profiler.stop()
        return whole

    TrainingRun._step, TrainingRun._gather_metrics = first_half, second_half  # type: ignore[method-assign]
    code = cli.main(words)
    if code == 0:
        write_json(result, {**found, "profile": profile_of(profiler.events(), cuda)})
    return code


def _outermost(events: Iterable[Any], part: str) -> Iterator[Any]:
    """The ranges of a part among `events` and all that they called, none inside another."""
    for event in events:
        if event.name == f"one_gpu.{part}":
            yield event
        else:
            yield from _outermost(event.cpu_children, part)


def profile_of(events: Sequence[Any], cuda: bool) -> dict[str, Any]:
    """Milliseconds of a step and of its parts, and their shares of it; a part without any time is left out."""
    annotations = {event.name for event in events if event.is_user_annotation}
    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]

    def time(event: Any) -> float:
        if not cuda:
            return float(event.cpu_time_total)
        # The span of a range on the device, gaps included, is listed like a kernel: it would count twice.
        own = sum(kernel.duration for kernel in event.kernels if kernel.name not in annotations)
        return float(own) + sum(map(time, event.cpu_children))

    roots = [event for event in on_cpu if event.cpu_parent is None]
    found = {part: list(_outermost(roots, part)) for part in (*PARTS, "step")}
    spent = {part: sum(map(time, ranges)) for part, ranges in found.items()}
    whole = spent.pop("step")
    if cuda:  # the backward pass runs on a thread of its own, outside the range of the step
        kernels = (event for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
        whole = sum(kernel.time_range.elapsed_us() for kernel in kernels if not kernel.is_user_annotation)
    parts = {name: {"ms": us / PROFILED / 1e3, "share": us / whole} for name, us in spent.items() if us > 0}
    return {"steps": PROFILED, "step_ms": whole / PROFILED / 1e3, "parts": parts}


# -- all rules, in rounds ---------------------------------------------------------------------------------------------


def settings(preset: str, rule: str, steps: int, seed: int) -> dict[str, Any]:
    """The settings of one run that differ from the preset's, by name; its folder is not among them."""
    batch = {"global_batch_size": GLOBAL_BATCH} if PRESETS[preset].parameters() >= LARGE else {}
    return {"preset": preset, "rule": rule, "steps": steps, "seed": seed, **batch, "nproc": 1, "ep": 1, "save": False}


def _run(name: str, command: Sequence[str], log: Path) -> None:
    in_training.logged(name, command, log)
    print(f"{name}: done", file=sys.stderr, flush=True)


def figures_of(run: Path) -> dict[str, float]:
    """The figures of one run folder."""
    records = list(read_metrics(run))
    vio = [record["maxvio_mean"] for record in records]
    return {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in records[len(records) // 3 :]),
        "maxvio": statistics.fmean(vio[-math.ceil(len(vio) / 4) :]),
        "maxvio_global": read_json(run / "summary.json")["maxvio_global_mean"],
    }


def over_rounds(rounds: Sequence[Mapping[str, Mapping[str, float]]], rule: str) -> dict[str, Any]:
    """Medians of a rule's figures over the rounds, its ratio to `builtin` taken inside each; and each round."""
    ratios = [row[rule]["tokens_per_second"] / row[YARDSTICK]["tokens_per_second"] for row in rounds]
    each = [{**row[rule], "ratio": ratio} for row, ratio in zip(rounds, ratios, strict=True)]
    return {**{name: statistics.median(one[name] for one in each) for name in each[0]}, "each": each}


def run(preset: str, rules: Sequence[str], steps: int, rounds: int, flags: Sequence[str], runs: Path, out: Path) -> str:
    """Trains, profiles, writes `out` anew after every round, and returns the table; `TrainingFailed` if one fails."""

    def command(rule: str, count: int, number: int, folder: Path) -> list[str]:
        return [*in_training.command(settings(preset, rule, count, in_training.FIRST_SEED + number), folder), *flags]

    done: list[dict[str, dict[str, float]]] = []
    result: dict[str, Any] = {}
    profiled: dict[str, dict[str, Any]] = {rule: {"peak_memory": None, "profile": None} for rule in rules}

    def write() -> None:
        config = read_json(runs / f"{YARDSTICK}-0" / "config.json")
        job = config["settings"]["job"]
        result.update(
            machine=describe(),
            git_revision=git_revision(),
            device=config["parts"]["device"],
            layers=config["parts"]["layers"],
            **{name: job[name] for name in ("preset", "steps", "dtype", "recompute")},
            tokens=job["global_batch_size"] * config["settings"]["model"]["seq_length"],
            micro_batches=job["global_batch_size"] // job["micro_batch_size"],
            rounds=len(done),
            rules={rule: {**over_rounds(done, rule), **profiled[rule]} for rule in rules},
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)

    for number in range(rounds):
        turn = number % len(rules)
        for rule in [*rules[turn:], *rules[:turn]]:  # none always runs after the same other
            folder = runs / f"{rule}-{number}"
            _run(f"{rule}, round {number + 1}", command(rule, steps, number, folder), runs / f"{rule}-{number}.log")
        done.append({rule: figures_of(runs / f"{rule}-{number}") for rule in rules})
        write()
    for rule in rules:
        file = runs / f"{rule}-profile.json"
        words = command(rule, WARM_UP + PROFILED, 0, file.with_suffix(""))[3:]
        ranged = [sys.executable, "-m", "benchmarks.one_gpu", "--measure", str(file), "--", *words]
        _run(f"{rule}, profile", ranged, file.with_suffix(".log"))
        profiled[rule] = read_json(file)
    write()
    return one_gpu_table(result)


def one_gpu_table(result: Mapping[str, Any] | None) -> str:
    """Throughput, balance and memory of each rule, and below it the parts of a step; or how to measure them."""
    if result is None:
        flags = " ".join(f"--{name} {value}" for name, value in DEFAULTS.items())
        return f"Not measured. To measure, on a machine with a GPU: `python -m benchmarks.one_gpu {flags}`."
    rules = result["rules"]
    lines = [
        f"`{result['preset']}` on {result['device']}: {result['steps']} steps of {result['tokens']:,} tokens in "
        f"{result['micro_batches']} micro-batches, {result['dtype']}, layers: {result['layers']}; medians "
        f"over {result['rounds']} round{'s' * (result['rounds'] > 1)}.",
        "",
        "| rule | tokens a second | ratio to `builtin` | MaxVio, last quarter | MaxVio_global | peak memory, GiB |",
        "|---|" + "---:|" * 5,
    ]
    for rule, row in rules.items():
        memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f}"
        lines.append(
            f"| `{rule}` | {row['tokens_per_second']:,.0f} | {row['ratio']:.3f} | {maxvio_text(row['maxvio'])} | "
            f"{maxvio_text(row['maxvio_global'])} | {memory} |"
        )
    if not all(row["profile"] for row in rules.values()):
        return "\n".join(lines)
    kind = "CPU" if result["device"] == "CPU" else "device"
    lines += [
        "",
        f"Shares of a step's {kind} time, forward passes; the first is the whole router, the next three are inside it:",
        "",
        f"| rule | step, ms | {' | '.join(PARTS.values())} |",
        "|---|" + "---:|" * (len(PARTS) + 1),
    ]
    for rule, row in rules.items():
        parts = row["profile"]["parts"]
        cells = [f"{parts[part]['share']:.2%}" if part in parts else "-" for part in PARTS]
        lines.append(f"| `{rule}` | {row['profile']['step_ms']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _check(preset: str, rules: Sequence[str], steps: int, rounds: int, flags: Sequence[str], anyway: bool) -> None:
    """SettingError for what cannot work, before anything is run."""
    if PRESETS[preset].parameters() >= LARGE and not torch.cuda.is_available() and not anyway:
        raise SettingError("--preset", preset, "needs CUDA: here it would take hours; --anyway runs it all the same")
    if YARDSTICK not in rules:
        raise SettingError("--rules", ",".join(rules), f"must have {YARDSTICK}, to which the others are compared")
    for flag, value, least in (("--steps", steps, 3), ("--rounds", rounds, 1)):
        if value < least:
            raise SettingError(flag, value, f"must be at least {least}")
    given = given_flags(cli.parse(["train", *flags]), Job)
    for name in FIXED:
        if name in given:
            raise SettingError(f"--{name}", given[name], "is set by the benchmark and cannot be given after --")
    for rule in rules:
        words = in_training.command(settings(preset, rule, steps, in_training.FIRST_SEED), Path("unused"))[3:]
        plan_of(cli.parse([*words, *flags]))


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What follows -- is given to every `alflb train`.",
    )
    parser.add_argument("--preset", default=DEFAULTS["preset"], choices=list(PRESETS), help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"], help="global batches a run (%(default)s)")
    parser.add_argument("--rules", default=DEFAULTS["rules"], help=f"{YARDSTICK} among them (%(default)s)")
    parser.add_argument("--rounds", type=int, default=DEFAULTS["rounds"], help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "one_gpu.json", help="(%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/one_gpu"), help="folder of the runs (%(default)s)")
    parser.add_argument("--anyway", action="store_true", help="a DeepSeekMoE preset without CUDA too")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the process with named ranges
    flags, rest = parser.parse_args(words[:cut]), words[cut + 1 :]
    if flags.measure is not None:
        return measure(rest, flags.measure)
    rules = list(dict.fromkeys(flags.rules.split(",")))
    try:
        _check(flags.preset, rules, flags.steps, flags.rounds, rest, flags.anyway)
        print(run(flags.preset, rules, flags.steps, flags.rounds, rest, flags.runs, flags.out))
    except (SettingError, TrainingFailed) as error:
        print(f"one_gpu: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
