"""The moments at which a rank is killed: each a call of the real code, counted, at which the process ends itself.

Nothing is replaced: a function of alflb_megatron, Megatron-Core or torch is wrapped so that SIGKILL falls before, after
or within it. `arm` is called in a rank's own process; what it wraps ends with that process.
"""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Moment:
    """Where a rank dies.

    text: how the table names it. ranks: on which it can be. saving: whether it is within the writing of a checkpoint.
    whole: whether the checkpoint being written has its final name by then. calls: the largest number of the call at
    which it dies, where there are several a step.
    """

    text: str
    ranks: tuple[int, ...] = (0, 1)
    saving: bool = False
    whole: bool = False
    calls: int = 1


MOMENTS = {
    "open": Moment("start: run folder opened"),
    "load": Moment("start: checkpoint half loaded"),
    "forward": Moment("forward pass, in a router", calls=4),
    "launch": Moment("all-reduce of loads, under way"),
    "wait": Moment("all-reduce of loads, before the wait"),
    "commit": Moment("commit, between two layers", calls=3),
    "step": Moment("optimizer's step done, not recorded"),
    "line": Moment("record of a step half written", ranks=(0,)),
    "folder": Moment("checkpoint: folder empty", saving=True),
    "common": Moment("checkpoint: between its files", saving=True),
    "file": Moment("checkpoint: within a file, all processes at once", saving=True, calls=12),
    "metadata": Moment("checkpoint: files written, no metadata.json", ranks=(0,), saving=True),
    "files": Moment("checkpoint: all of Megatron's files, no job.json", saving=True),
    "job": Moment("checkpoint: job.json half written", ranks=(0,), saving=True),
    "rename": Moment("checkpoint: before the rename", ranks=(0,), saving=True),
    "renamed": Moment("checkpoint: after the rename", ranks=(0,), saving=True, whole=True),
    "validation": Moment("validation after the last step"),
    "blind": Moment("any: killed from outside after a random time"),
}


@dataclass(frozen=True)
class Fault:
    """One kill, repeatable from its numbers.

    step: the first step (from 1) at which it can fall; a checkpoint's moment waits for the next checkpoint. call: at
    which call of the moment. delay: of a blind one, in seconds after the start of the ranks.
    """

    moment: str
    rank: int
    step: int
    call: int = 1
    delay: float = 0.0

    def __str__(self) -> str:
        where = f"after {self.delay:.3f} s" if self.moment == "blind" else f"from step {self.step}, call {self.call}"
        return f"rank {self.rank}, {where}, moment {self.moment!r} ({MOMENTS[self.moment].text})"


class Trap:
    """Counts the calls of the fault's moment in this process and ends it at the right one.

    note: a file that tells the parent that it was this trap, and at which step.
    """

    def __init__(self, fault: Fault, note: Path) -> None:
        self.fault, self.note, self.step, self.count = fault, note, 0, 0

    def spring(self, *, last: bool = False, everybody: bool = False) -> None:
        """Dies at the `fault.call`-th time it is called from `fault.step` on; with `last`, at once.

        everybody: the whole process group of the rank, as where a machine loses its power.
        """
        if self.step < self.fault.step:
            return
        self.count += 1
        if self.count < self.fault.call and not last:
            return
        with open(self.note, "w", encoding="utf-8") as file:
            json.dump({**asdict(self.fault), "at_step": self.step}, file)
        os.killpg(0, signal.SIGKILL) if everybody else os.kill(os.getpid(), signal.SIGKILL)

    def around(
        self,
        owner: Any,
        name: str,
        *,
        before: bool = False,
        last: bool = False,
        when: Callable[..., bool] = lambda *args, **kwargs: True,
    ) -> None:
        """Springs before or after the calls of `owner.name` for which `when(*args)` holds."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            here = when(*args, **kwargs)
            if before and here:
                self.spring(last=last)
            answer = plain(*args, **kwargs)
            if not before and here:
                self.spring(last=last)
            return answer

        setattr(owner, name, call)


def arm(fault: Fault | None, note: Path) -> None:
    """Sets this rank's trap; nothing where the fault is another rank's, or comes from outside."""
    from alflb_megatron.lab.training import checkpoint, train

    if fault is None or fault.moment == "blind" or fault.rank != int(os.environ["RANK"]):
        return
    trap = Trap(fault, note)
    _count_steps(trap, train, checkpoint)
    _place(trap, fault.moment)


def _count_steps(trap: Trap, train: Any, checkpoint: Any) -> None:
    """Lets the trap know the step; what comes before the first counts as the step that the fault waits for."""
    trap.step = trap.fault.step if trap.fault.moment in ("open", "load") else 0
    for owner, name, place in ((train.TrainingRun, "_step", 1), (checkpoint, "save", 2)):
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def call(*args: Any, _plain: Any = plain, _place: int = place, **kwargs: Any) -> Any:
            trap.step = args[_place]
            return _plain(*args, **kwargs)

        setattr(owner, name, call)


def _place(trap: Trap, moment: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

    from alflb_megatron.balancer import Balancer
    from alflb_megatron.lab.records import files, run_folder
    from alflb_megatron.lab.training import checkpoint, train
    from alflb_megatron.loads import LoadAllReduce
    from alflb_megatron.router import ALFRouter

    def to_job_json(_: Any, target: Any) -> bool:
        return Path(target).name == checkpoint.JOB

    def of_checkpoint(source: Path, target: Any) -> bool:
        return source.suffix == checkpoint.PARTIAL

    if moment == "open":
        trap.around(train.TrainingRun, "_run_folder")
    elif moment == "load":
        trap.around(dist_checkpointing, "load")
    elif moment == "forward":
        trap.around(ALFRouter, "forward")
    elif moment == "launch":
        trap.around(Balancer, "launch")
    elif moment == "wait":
        trap.around(LoadAllReduce, "wait", before=True)
    elif moment == "commit":
        trap.around(ALFRouter, "write_state")
        trap.around(Balancer, "commit", last=True)  # a stage with fewer layers than the call's number
    elif moment == "step":
        trap.around(train.TrainingRun, "_step")
    elif moment == "line":
        _half_a_line(trap, run_folder.RunFolder)
    elif moment == "folder":
        trap.around(checkpoint, "_model_state", before=True, when=lambda *_: trap.step > 0)
    elif moment == "common":
        trap.around(torch_strategy.TorchDistSaveShardedStrategy, "async_save", before=True)
    elif moment == "file":
        _within_a_file(trap, filesystem_async)
    elif moment == "metadata":
        trap.around(serialization, "save_config", before=True)
    elif moment == "files":
        trap.around(dist_checkpointing, "save")
    elif moment == "job":
        trap.around(files.os, "replace", before=True, when=to_job_json)
    elif moment == "rename":
        trap.around(checkpoint, "write_json")
    elif moment == "renamed":
        trap.around(Path, "rename", when=of_checkpoint)
    elif moment == "validation":
        trap.around(train.TrainingRun, "validate", before=True)
    else:
        raise ValueError(f"no moment {moment!r}")


def _half_a_line(trap: Trap, folder: Any) -> None:
    """Half of a step's record reaches the file, as where the write itself was interrupted."""
    plain = folder.append

    def append(self: Any, record: Any) -> None:
        plain(self, record)
        if trap.step >= trap.fault.step:
            whole = self.metrics.read_bytes()
            line = whole.rsplit(b"\n", 2)[-2]
            os.truncate(self.metrics, len(whole) - 1 - len(line) // 2)
        trap.spring()

    folder.append = append


def _within_a_file(trap: Trap, writer: Any) -> None:
    """In the process that writes a rank's file: part of it has left the buffer, the rest never will."""
    plain = writer._write_item

    @functools.wraps(plain)  # the writer reads its signature
    def write_item(transforms: Any, stream: Any, *args: Any, **kwargs: Any) -> Any:
        answer = plain(transforms, stream, *args, **kwargs)
        if trap.step >= trap.fault.step and trap.count + 1 >= trap.fault.call:
            stream.flush()
            os.truncate(stream.fileno(), max(1, stream.tell() - 7))
        trap.spring(everybody=True)
        return answer

    writer._write_item = write_item
