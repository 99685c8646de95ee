"""`alflb reproduce PLAN` as a command: trains every run of a plan, and writes `results.csv`, tables and figures."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alflb_megatron.config import parse_options
from alflb_megatron.lab.records.files import write_atomically
from alflb_megatron.lab.sweep import collect, execute, figures, tables
from alflb_megatron.lab.sweep.plan import FULL, Sweep
from alflb_megatron.lab.sweep.plan_file import find_plan, read_plan
from alflb_megatron.lab.sweep.run_state import DONE, state_of
from alflb_megatron.settings import SettingError

EXECUTORS = ("local", "slurm", "skypilot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command to `parser`."""
    parser.add_argument("plan", metavar="PLAN", help="a YAML file, or the name of a plan that comes with the package")
    parser.add_argument("--scale", default=FULL, help="full, settled, mini or smoke (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="folder of runs and results (default: runs/PLAN-SCALE)")
    parser.add_argument("--data", help="training data of every run, instead of the plan's (as for `alflb train`)")
    parser.add_argument("--tokenizer", help="its tokenizer, likewise")
    parser.add_argument("--at-once", type=int, metavar="N", help="runs side by side here (default: as cores allow)")
    parser.add_argument(
        "--executor", choices=EXECUTORS, help="where to train (default: the plan's at full size, local)"
    )
    parser.add_argument(
        "--executor-options",
        default="",
        metavar="NAME=VALUE,...",
        help="settings of the executor over the plan's: account, partition, container_image, ...",
    )
    parser.add_argument(
        "--dryrun", action="store_true", help="show the runs, or what would be submitted; train nothing"
    )
    parser.add_argument(
        "--resubmit", action="store_true", help="hand over again what did not finish; only once its jobs have ended"
    )
    parser.add_argument(
        "--finished", action="store_true", help="train nothing: tables and figures of the runs that have finished"
    )
    parser.add_argument("--results", metavar="CSV", help="train nothing: tables and figures from this results.csv")


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """Returns the exit code: 0, or 1 if a run failed. Raises `SettingError` on what cannot work."""
    path = find_plan(flags.plan)
    given = {name: getattr(flags, name) for name in ("data", "tokenizer") if getattr(flags, name) is not None}
    sweep = read_plan(path, flags.scale, given)
    out = Path(flags.out or f"runs/{sweep.name}-{sweep.scale}")
    if flags.results:
        rows = collect.read_csv(Path(flags.results))
        sweep = _of_rows(sweep, rows, flags.results)
        out.mkdir(parents=True, exist_ok=True)
        write_results(sweep, rows, out)
        return 0
    if flags.finished:
        done = collect.finished(sweep, out)
        if not done.runs:
            raise SettingError("--out", out, f"holds no finished run of {sweep.name} at scale {sweep.scale}")
        _finish(done, out)
        return 0
    kind = flags.executor or sweep.executor.get("kind", "local")
    if kind not in EXECUTORS:
        raise SettingError(str(path), f"executor: kind: {kind}", f"must be one of {', '.join(EXECUTORS)}")
    say(estimate(sweep))
    if kind != "local":
        return _submit(sweep, out, kind, flags)
    if flags.dryrun:
        _print_commands(sweep, out)
        return 0
    with execute.lock_folder(out) as lock:
        failed = execute.train_locally(sweep, out, at_once(sweep, flags.at_once), lock, say)
        if failed:
            say(f"{len(failed)} of {len(sweep.runs)} runs failed: {', '.join(failed)}")
            return 1
        _finish(sweep, out)
    return 0


def _print_commands(sweep: Sweep, out: Path) -> None:
    for one in sweep.runs:
        print(shlex.join(["alflb", "train", *one.flags(out / one.name, resume=False)]))


def _submit(sweep: Sweep, out: Path, kind: str, flags: argparse.Namespace) -> int:
    options: dict[str, Any] = {name: value for name, value in sweep.executor.items() if name != "kind"}
    options |= parse_options(flags.executor_options, "--executor-options")
    if flags.dryrun and importlib.util.find_spec("nemo_run") is None:
        _print_commands(sweep, out)
        say("NeMo-Run, which makes the scripts of the cluster, is not installed here: these are the commands in them")
        return 0
    with contextlib.nullcontext() if flags.dryrun else execute.lock_folder(out):
        try:
            count = execute.submit(sweep, out, kind, options, flags.dryrun, flags.resubmit, say)
        except ImportError as error:
            say(f"alflb reproduce: {error}")
            return 1
        states = {one.name: state_of(one, out).kind for one in sweep.runs}
        done = [*states.values()].count(DONE)
        for name, state in states.items() if count == 0 else ():
            say(f"{name}: {state}")
        say(f"{done} of {len(states)} runs have finished, {count} {'would be' if flags.dryrun else 'were'} submitted")
        if done == len(states) and not flags.dryrun:
            _finish(sweep, out)
        elif not flags.dryrun:
            say("call this again to see how they stand, and for the tables once all have finished")
    return 0


def _finish(sweep: Sweep, out: Path) -> None:
    write_atomically(out / "results.csv", [collect.as_csv(collect.collect(sweep, out)).encode("utf-8")])
    write_results(sweep, collect.read_csv(out / "results.csv"), out)


def write_results(sweep: Sweep, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Tables and figures of the rows into `out`: PLAN.md and PLAN-*.png."""
    names = figures.draw_figures(sweep.name, rows, out)
    text = tables.sweep_page(sweep, rows, names)
    (out / f"{sweep.name}.md").write_text(f"# {sweep.name}, {sweep.scale}\n\n{text}", encoding="utf-8")
    print(f"{tables.results_table(rows)}\n\n{out / f'{sweep.name}.md'}")


def _of_rows(sweep: Sweep, rows: Sequence[dict[str, Any]], source: str) -> Sweep:
    """The runs of the sweep that the rows are of."""
    found = [row["run"] for row in rows]
    there = collect.part(sweep, found)
    if [one.name for one in there.runs] != found:
        other = sorted(set(found) - {one.name for one in there.runs}) or found
        held = f"its runs are not those of {sweep.name} at scale {sweep.scale} (first: {other[0]})"
        raise SettingError("--results", source, held)
    return there


def estimate(sweep: Sweep) -> str:
    """What the plan will take, in words."""
    tokens = sum(one.tokens for one in sweep.runs)
    head = f"{sweep.name} at scale {sweep.scale}: {len(sweep.runs)} runs, {tokens:.3g} tokens"
    if sweep.scale != FULL:
        return head
    return f"{head}, about {sweep.hours():,.0f} H100 GPU-hours at {sweep.utilisation:.0%} of the BF16 peak"


def at_once(sweep: Sweep, given: int | None) -> int:
    """Runs side by side on this machine. Raises `SettingError` for less than one."""
    if given is not None and given < 1:
        raise SettingError("--at-once", given, "must be at least 1")
    ranks = max(one.plan.job.nproc for one in sweep.runs)
    return given or max(1, (os.cpu_count() or 1) // ranks)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
