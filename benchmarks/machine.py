"""What a benchmark ran on, for its results: versions, processor, threads, command line."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

OLDEST = "0.16.1"
"""The megatron-core whose results carry no version in their file's name."""


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versioned(name: str) -> str:
    """File name of a benchmark's results under the installed megatron-core."""
    core = installed("megatron-core")
    return f"{name}.json" if core == OLDEST else f"{name}-mcore-{core}.json"


def be_one_rank(seed: int = 0) -> None:
    """Makes of this process Megatron-Core's one rank, on one thread: groups made, weights seeded."""
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    from megatron.core import parallel_state

    from alflb_megatron.lab.training import build, launch

    torch.set_num_threads(1)
    launch.as_single_rank()
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel()
    build.seed_ranks(seed)


def describe() -> dict[str, Any]:
    """Versions and processor; the command without the folder of the interpreter."""
    return {
        "torch": torch.__version__,
        "megatron-core": installed("megatron-core"),
        "transformer-engine": installed("transformer-engine"),
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
