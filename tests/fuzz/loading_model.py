"""One real model with its optimizer in this process, into which checkpoints are loaded."""

from __future__ import annotations

import functools
from typing import Any

from alflb_megatron.lab.training.job import Plan
from alflb_megatron.lab.training.resolve import resolve
from tests.fuzz.seeds import JOB, SHAPE


@functools.cache
def plan_and_model() -> tuple[Plan, Any]:
    """The plan and the model with its optimizer, on process groups of one rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from alflb_megatron.lab.training import build

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    build.seed_ranks(1234)
    plan = resolve({**JOB, "steps": 2, "rule": "adaptive"}, SHAPE, {})
    return plan, build.setup_model_and_optimizer(plan)
