"""The forks that other tests rest on: exit codes, tracebacks, time limits, and nothing carried from one to the next."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import pytest
import torch.distributed as dist

from tests import forked


def _leave_something() -> bool:
    before = hasattr(sys, "left_by_a_fork")
    sys.left_by_a_fork = True  # type: ignore[attr-defined]
    return before


def test_a_fork_has_what_was_preloaded_and_nothing_of_another() -> None:
    assert forked.call(_modules) is True
    assert [forked.call(_leave_something) for _ in range(2)] == [False, False]


def _modules() -> bool:
    return "megatron.core" in sys.modules


def _rank(fails: int) -> list[Any]:
    if dist.get_rank() == fails:
        raise ValueError(f"rank {fails} has enough")
    if fails >= 0:
        time.sleep(60)
    return [dist.get_rank(), dist.get_world_size(), os.environ["RANK"]]


def test_ranks_answer_in_order() -> None:
    assert forked.run(2, _rank, -1) == [[0, 2, "0"], [1, 2, "1"]]


def test_the_first_that_fails_ends_all_with_its_traceback() -> None:
    began = time.monotonic()
    with pytest.raises(forked.RankError, match=r"rank 1:\n(.|\n)*ValueError: rank 1 has enough"):
        forked.run(2, _rank, 1)
    assert time.monotonic() - began < 50


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed_is_told() -> None:
    with pytest.raises(forked.RankError, match="rank 0 ended with exit code -9"):
        forked.call(_killed)


def test_no_answer_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "SECONDS", 1.0)
    with pytest.raises(forked.RankError, match="no answer within 1 seconds"):
        forked.call(time.sleep, 60)


def test_a_command_has_its_output_and_its_exit_code() -> None:
    done = forked.alflb("train", "--nproc", "2", "--ep", "4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "alflb: --ep=4: etp * ep * pp = 4 must divide the 2 ranks of --nproc\n"
    running = forked.Command(["-c.py"], program=_sleeps)
    running.kill()
    assert running.finish().returncode == -signal.SIGKILL


def _sleeps(words: list[str]) -> None:
    time.sleep(60)
