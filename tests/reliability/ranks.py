"""Two ranks of a training job, forked from a parent that has imported everything, and killed.

Importing torch and Megatron-Core takes seconds, a start from here a fraction of one. The parent takes no part in any
collective and has no other thread; each rank leads a group of processes, so that its writers can be ended with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.moments import Fault, arm

RANKS = 2
QUEUES: dict[int, Any] = {}
"""For each rank the server that Megatron-Core's checkpoint writer hands its results to. A rank would start its own and
wait seconds for it; here it lives on with the parent, and each attempt gets a queue of its own."""

REFUSED = 2  # exit status of a rank that stops at a setting, as the command line has it


class Hung(RuntimeError):
    """An attempt that neither ended nor died."""


@dataclass(frozen=True)
class Ended:
    """How one attempt ended. statuses: of each rank, -9 for one that was killed. seconds: from the fork."""

    statuses: tuple[int, ...]
    seconds: float
    struck: bool
    step: int | None  # at which the fault fell, where the trap could tell

    @property
    def done(self) -> bool:
        return all(status == 0 for status in self.statuses)


def prepare() -> None:
    """Imports what a rank needs, once, so that a fork has it. Raises RuntimeError if that left a second thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    import torch
    from megatron.core import dist_checkpointing, parallel_state  # noqa: F401
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: F401

    from alflb_megatron.lab.data import open_data  # noqa: F401
    from alflb_megatron.lab.training import (  # noqa: F401
        build,
        checkpoint,
        train,
    )

    torch.set_num_threads(1)
    for rank in range(RANKS):
        QUEUES[rank] = filesystem_async.mp.get_context("spawn").Manager()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads in the parent: a fork would take their locks and not them")


def attempt(plan: Any, folder: Path, fault: Fault | None, grace: float = 0.0, limit: float = 120.0) -> Ended:
    """Starts the plan's ranks, lets the fault fall, and ends what is left `grace` seconds later.

    folder: for the ranks' output, the tokens they trained on and the trap's note. Raises Hung after `limit` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "struck.json"
    note.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = [QUEUES[rank].Queue() for rank in range(plan.job.nproc)]
    began = time.monotonic()
    alive = {_fork(plan, rank, port, folder, fault, note, results[rank]): rank for rank in range(plan.job.nproc)}
    pids, statuses = dict(alive), {}
    deadline = began + limit
    stroke = began + fault.delay if fault is not None and fault.moment == "blind" else None
    struck_from_outside = False
    try:
        while alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            now = time.monotonic()
            if pid in alive:
                rank = alive.pop(pid)
                statuses[rank] = os.waitstatus_to_exitcode(status)
                if statuses[rank] != 0:  # a launcher ends the others then; some of them live on for a moment
                    deadline = min(deadline, now + grace)
            if stroke is not None and now >= stroke:
                stroke = None
                (victim,) = [p for p, rank in pids.items() if rank == fault.rank]  # type: ignore[union-attr]
                if victim in alive:
                    os.killpg(victim, signal.SIGKILL)
                    struck_from_outside = True
            if now > deadline:
                if all(status == 0 for status in statuses.values()):
                    raise Hung(f"{plan.job.folder}: no end after {limit:.0f} s; {_tail(folder)}")
                break
            time.sleep(0.002 if stroke is not None else 0.005)
    finally:
        for pid, rank in pids.items():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # its writers too, where it is gone itself
            if pid in alive:
                statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    step = json.loads(note.read_text())["at_step"] if note.exists() else None
    in_order = tuple(statuses[rank] for rank in range(plan.job.nproc))
    return Ended(in_order, time.monotonic() - began, struck_from_outside or note.exists(), step)


def _tail(folder: Path) -> str:
    logs = sorted(folder.glob("rank*.log"))
    return "; ".join(f"{log.name}: ...{log.read_text(errors='replace')[-600:]}" for log in logs)


def output(folder: Path) -> str:
    """The last that the ranks of the latest attempt printed."""
    return _tail(folder)


def _fork(plan: Any, rank: int, port: int, folder: Path, fault: Fault | None, note: Path, results: Any) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.setpgid(pid, pid)  # here too: whoever comes first, no kill comes before
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        with open(folder / f"rank{rank}.log", "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(plan.job.nproc),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        filesystem_async._results_queue = results
        status = _train(plan, rank, folder, fault, note)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _train(plan: Any, rank: int, folder: Path, fault: Fault | None, note: Path) -> int:
    from alflb_megatron.lab.training import train
    from alflb_megatron.settings import SettingError

    _log_tokens(train.TrainingRun, folder / f"tokens{rank}.jsonl")
    arm(fault, note)
    for change in PLANTED:
        change()
    try:
        train.train(plan)
    except SettingError as error:
        print(f"refused: {error}")
        return REFUSED
    return 0


PLANTED: list[Callable[[], None]] = []
"""Changes for the worse, made in every rank: what shows that a defect would be seen."""


def _log_tokens(session: Any, path: Path) -> None:
    """Writes a hash of the tokens and labels that each global batch gave this rank: what data order means."""
    plain = session._batches

    def batches(self: Any, data: Any, step: int) -> Any:
        rows = list(plain(self, data, step))
        digest = hashlib.sha256()
        for row in rows:
            for part in (row.tokens, row.labels, row.loss_mask):
                digest.update(part.contiguous().numpy().tobytes())
        split = "validation" if data is self.validation else "training"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([split, step, len(rows), digest.hexdigest()]) + "\n")
        return iter(rows)

    session._batches = batches


def tokens(folder: Path) -> dict[tuple[str, str, int], set[str]]:
    """What was logged: (rank's file, split, step) to the hashes that were seen there, one if all attempts agree."""
    seen: dict[tuple[str, str, int], set[str]] = {}
    for path in sorted(folder.glob("tokens*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                split, step, _, digest = json.loads(line)
            except ValueError:
                continue  # its writer was killed
            seen.setdefault((path.name, split, step), set()).add(digest)
    return seen
