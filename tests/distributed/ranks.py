"""Real process groups for the tests: a function, run as N gloo ranks by torch's own launcher."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from alflb_megatron.hosts import cpu


def run(nproc: int, function: Callable[..., Any], *args: Any, without: tuple[str, ...] = ()) -> list[Any]:
    """Calls `function(*args)` on `nproc` ranks with a process group; returns what each returned, by rank.

    `function` has to be importable. A rank's exception is raised here, with its traceback in the message. `without`
    names substitutions of `hosts/cpu.py` to leave out.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["OMP_NUM_THREADS"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    results = elastic_launch(config, _on_rank)(function, args, without)
    return [results[rank] for rank in range(nproc)]


def _on_rank(function: Callable[..., Any], args: tuple[Any, ...], without: tuple[str, ...]) -> Any:
    cpu.prepare(skip=without)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


@contextmanager
def model_parallel(**sizes: int | None) -> Iterator[None]:
    """Megatron-Core's process groups of the given sizes, with its random state seeded."""
    from megatron.core import parallel_state

    from alflb_megatron.runs import build

    parallel_state.initialize_model_parallel(**sizes)
    build.seed_ranks(1234)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
