"""Real process groups for the tests: a function, run as N gloo ranks by torch's own launcher."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import elastic_launch

from alflb_megatron.hosts import cpu
from alflb_megatron.lab.training.launch import launch_config


def run(nproc: int, function: Callable[..., Any], *args: Any, without: tuple[str, ...] = ()) -> list[Any]:
    """Calls `function(*args)` on `nproc` ranks with a process group; returns what each returned, by rank.

    `function` has to be importable. A rank's exception is raised here, with its traceback in the message. `without`
    names substitutions of `hosts/cpu.py` to leave out.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    results = elastic_launch(launch_config(nproc), _on_rank)(function, args, without)
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

    from alflb_megatron.lab.training import build

    parallel_state.initialize_model_parallel(**sizes)
    build.seed_ranks(1234)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
