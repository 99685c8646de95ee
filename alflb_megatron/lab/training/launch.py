"""Starts the ranks of a job with torch's own launcher, or takes part in an outer torchrun."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from alflb_megatron.settings import SettingError


def under_a_launcher() -> bool:
    """Whether this process is a rank already (torchrun and the like set both variables)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Ranks of the outer launcher's job; SettingError where it says no number."""
    text = os.environ["WORLD_SIZE"]
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise SettingError("WORLD_SIZE", text, "must be the number of ranks, as a launcher sets it")
    return int(text)


def launch_config(nproc: int) -> Any:
    """torch's LaunchConfig for `nproc` ranks on this machine, on a free port, without restarts."""
    from torch.distributed.launcher.api import LaunchConfig

    # What a failed rank has to say it says itself; the launcher's report adds tables, not reasons.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Runs `alflb <arguments>` as `nproc` ranks on this machine; returns the exit code of the first that failed, or 0.

    Ranks share the cores: each gets cores / nproc threads unless OMP_NUM_THREADS is set.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    try:
        elastic_launch(launch_config(nproc), sys.executable)("-m", "alflb_megatron.lab.cli", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def as_single_rank() -> None:
    """Makes this process the one rank of a job of one."""
    import socket

    if not under_a_launcher():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
