"""Trains the runs of a sweep: those that have finished stay, those that were broken off go on, the others start.

What has been done is read from the run folders alone (`run_state.py`), so that a sweep can be stopped at any moment, by
any signal, and started again. Here every run is a process; where NeMo-Run is installed it starts them, as it does for
Slurm and SkyPilot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from alflb_megatron.lab.display.text import DATA_NAMES
from alflb_megatron.lab.records.files import read_json, write_json
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.sweep.plan import Run, Sweep
from alflb_megatron.lab.sweep.processes import last_lines
from alflb_megatron.lab.sweep.run_state import DONE, SUBMITTED, RunState, state_of, submission_file
from alflb_megatron.settings import SettingError, from_mapping


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[int]:
    """Keeps a second sweep out of the folder; yields the file descriptor that holds the lock.

    Trainings inherit it: of a sweep that was killed the last one may still be writing. Raises `SettingError` where a
    sweep, or what one left, is running.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held = "another `alflb reproduce`, or a training that one left when it was killed, is at work here"
            raise SettingError("--out", out, held) from None
        yield file.fileno()


class _Processes:
    """The trainings that are running, to be ended together."""

    def __init__(self, lock: int) -> None:
        self._held = lock
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def run(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> int:
        """Runs a command with its output in `log`; returns its exit code, or -SIGTERM once all have been stopped."""
        with log.open("ab") as file:
            with self._lock:
                if self.stopped:
                    return -signal.SIGTERM
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=dict(env),
                    start_new_session=True,  # its ranks are ended with it
                    pass_fds=(self._held,),
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
            return code

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)


def training_command(run: Run, out: Path, resume: bool, threads: int) -> list[str]:
    """What trains the run on this machine."""
    launched = importlib.util.find_spec("nemo_run") is not None
    words = ["-m", "alflb_megatron.lab.cli", "train", *run.flags(out / run.name, resume, launched)]
    if not launched:
        return [sys.executable, *words]
    place = ["local", "--processes", str(run.plan.job.nproc), "--name", run.name]
    place += ["--env", f"OMP_NUM_THREADS={threads}"]
    return [sys.executable, "-m", "alflb_megatron.recipes.launch", *place, "--", *words]


def train_locally(sweep: Sweep, out: Path, at_once: int, lock: int, say: Callable[[str], None]) -> list[str]:
    """Trains what has not finished, `at_once` runs at a time; returns the names of those that failed.

    `lock` is what `lock_folder` yields.
    KeyboardInterrupt (and SIGTERM) ends the trainings that are running; they go on at the next start.
    """
    todo = [(run, state) for run in sweep.runs if (state := state_of(run, out)).kind != DONE]
    threads = max(1, (os.cpu_count() or 1) // at_once // max(run.plan.job.nproc for run in sweep.runs))
    env = {"NEMORUN_HOME": str(out.resolve() / ".nemo_run"), **os.environ}
    env.setdefault("OMP_NUM_THREADS", str(threads))
    processes, begun, failed = _Processes(lock), time.monotonic(), []
    say(f"{len(sweep.runs)} runs, {len(sweep.runs) - len(todo)} finished before, {at_once} at a time: {out}")

    def one(run: Run, state: RunState) -> int:
        command = training_command(run, out, state.checkpoint, threads)
        return processes.run(command, out / f"{run.name}.log", env)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    with ThreadPoolExecutor(at_once) as pool:
        try:
            waiting: dict[Future[int], Run] = {pool.submit(one, run, state): run for run, state in todo}
            done = 0
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    run, done = waiting.pop(future), done + 1
                    if future.result() or state_of(run, out).kind != DONE:
                        failed.append(run.name)
                        log = out / f"{run.name}.log"
                        text = last_lines(log.read_text(encoding="utf-8", errors="replace"))
                        say(f"[{done}/{len(todo)}] {run.name} failed (exit code {future.result()}): {log}\n{text}")
                        continue
                    left = (time.monotonic() - begun) / done * (len(todo) - done)
                    say(f"[{done}/{len(todo)}] {describe_run(run, out)}; about {left / 60:.0f} min left")
        except BaseException:
            processes.stop()
            for future in waiting:
                future.cancel()
            raise
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
    return failed


def describe_run(run: Run, out: Path) -> str:
    """A finished run in one line."""
    summary = read_json(out / run.name / "summary.json")
    loss = summary["validation_loss"]
    said = "diverged" if loss is None else f"validation loss {loss:.4f}"
    return f"{run.name}: {said}, MaxVio_global {maxvio_text(summary['maxvio_global_mean'])}"


def submit(
    sweep: Sweep,
    out: Path,
    kind: str,
    options: Mapping[str, Any],
    dryrun: bool,
    again: bool,
    say: Callable[[str], None],
) -> int:
    """Hands every run that has neither finished nor been handed over to Slurm or SkyPilot; returns how many.

    With `again` also those that were handed over and have not finished: they go on from their checkpoints. Whether such
    a job still waits or runs, the caller has to know. `dryrun` prints what would be submitted and submits nothing.

    Every path is made absolute, and a container sees run folders, data and tokenizer where they are here. Raises
    `SettingError` on an option that cannot work, and ImportError where NeMo-Run is missing.
    """
    from alflb_megatron.recipes import launch

    cls, make = launch.EXECUTORS[kind]
    count = 0
    out = out.resolve()
    for run in sweep.runs:
        state = state_of(run, out)
        if state.kind == DONE or (state.kind == SUBMITTED and not again):
            continue
        nodes, processes = _nodes_and_processes(run, options)
        run, seen = _with_absolute_paths(run)
        job = from_mapping(cls, {**options, "name": run.name, "nodes": nodes, "processes": processes})
        if kind == "slurm":
            _check_time_limit(sweep, run, job.time)
            if job.container_image:
                own = [f"{folder}:{folder}" for folder in sorted({str(out), *seen} - job.mounted.keys())]
                job = dataclasses.replace(job, mounts=",".join(filter(None, (job.mounts, *own))))
        elif not any(out.is_relative_to(inside) for inside in job.mounted.values()):
            held = f"must mount storage at {out} or above, the same as here: the run folders are read from there"
            raise SettingError("--executor-options mounts", job.mounts, held)
        words = ["-m", "alflb_megatron.lab.cli", "train", "--requeue", *run.flags(out / run.name, False, launched=True)]
        ticket = {"executor": kind, "experiment": None, "resumes": state.checkpoint}
        if not dryrun:
            # First: killed in between, the job must not be handed over twice.
            write_json(submission_file(run, out), ticket)
        said = launch.start(make(job), launch.script(words), run.name, dryrun=dryrun, wait=False)
        if dryrun:
            say(f"# {run.name}\n{said}")
        else:
            write_json(submission_file(run, out), {**ticket, "experiment": said})
            say(f"{run.name}: submitted as {said}")
        count += 1
    return count


def _with_absolute_paths(run: Run) -> tuple[Run, list[str]]:
    """The run with the paths of its data and tokenizer made absolute, and the folders they are in."""
    settings, seen = dict(run.settings), []
    data = run.plan.job.data
    if data not in DATA_NAMES:
        path = Path(os.path.abspath(Path(data).expanduser()))
        there = path.exists() or path.with_name(f"{path.name}.idx").exists()
        if not there and not os.path.isabs(data):  # an absolute one may be there on the cluster alone
            held = "is not there: make it with `alflb data prepare`, or name another with --data"
            raise SettingError("data", data, held)
        settings["data"], seen = str(path), [str(path.parent)] if there else []
    kind, _, name = run.plan.job.tokenizer.partition(":")
    path = Path(os.path.abspath(Path(name).expanduser()))
    if name and path.exists():  # else it is a name of the Hugging Face Hub
        settings["tokenizer"] = f"{kind}:{path}"
        seen.append(str(path if path.is_dir() else path.parent))
    return dataclasses.replace(run, settings=settings), seen


def _check_time_limit(sweep: Sweep, run: Run, limit: str) -> None:
    """Raises `SettingError` where a job's time limit is below the estimate for the run."""
    hours = sweep.hours_of(run) / run.plan.job.nproc
    days, _, clock = limit.rpartition("-")
    try:
        h, m, s = (int(part) for part in clock.split(":"))
        allowed = 24 * int(days or 0) + h + m / 60 + s / 3600
    except ValueError:
        raise SettingError("--executor-options time", limit, "must be HH:MM:SS or D-HH:MM:SS") from None
    if allowed < hours:
        held = f"{run.name} takes about {hours:.1f} hours at {sweep.utilisation:.0%} of the peak; give more time"
        raise SettingError("--executor-options time", limit, held)


def _nodes_and_processes(run: Run, options: Mapping[str, Any]) -> tuple[int, int]:
    """Nodes, and processes on each, for the run's ranks."""
    ranks = run.plan.job.nproc
    each = options.get("processes", min(ranks, 8))
    if not isinstance(each, int) or each < 1 or ranks % each:
        raise SettingError("--executor-options processes", each, f"must divide the {ranks} ranks of {run.name}")
    return ranks // each, each
