"""Whole global batches of a GPTModel on a device, by Megatron-Core's own schedule: Transformer Engine's layers where
they are installed, bf16, NCCL with one rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.distributed import jobs

STEPS = 4
RATE = 2.0**-6
JOB = {"nproc": 1, "dtype": "bf16", "router_dtype": "fp32"}

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(autouse=True)
def same_sums_in_every_run() -> Any:
    """Adding in an order of its own, as atomics do, makes two equal runs differ before routers are compared."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "job", [{}, {"recompute": "full"}, {"recompute": "moe"}, {"optimizer": "distributed"}], ids=str
)
def test_sign_without_centring_is_megatron_cores_own_bias(job: dict[str, Any]) -> None:
    """Biases and maps of the first global batch bit for bit; later ones rest on weights whose gradients a device may
    sum in another order, so there the losses are compared."""
    theirs = jobs.trace(jobs.plan({**JOB, **job, "rule": "builtin"}, step_size=RATE), STEPS)
    ours = jobs.trace(jobs.plan({**JOB, **job, "rule": "sign"}, step_size=RATE, centring=False), STEPS)
    first = [
        dataclasses.replace(trace, losses=trace.losses[:1], biases=trace.biases[:1], maps=trace.maps[:1])
        for trace in (ours, theirs)
    ]
    assert first[0].differs_from(first[1]) == ""
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-2)
    assert any(bias.abs().max() > 2 * RATE for bias in ours.biases[-1].values())


@pytest.mark.parametrize("update_every", ["global-batch", "micro-batch"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_loads_are_of_every_token_once(rule: str, recompute: str, update_every: str) -> None:
    plan = jobs.plan({**JOB, "rule": rule, "recompute": recompute}, update_every=update_every)
    trace = jobs.trace(plan, STEPS)
    tokens = plan.job.global_batch_size * plan.shape.seq_length
    assert all(int(loads.sum()) == tokens * plan.shape.topk for step in trace.loads for loads in step.values())
    assert all(bias.dtype == torch.float32 and bias.abs().max() > 0 for bias in trace.biases[-1].values())


def test_fused_router_and_grouped_experts() -> None:
    from alflb_megatron.lab.training import build

    if not build.have_transformer_engine():
        pytest.skip("needs Transformer Engine")
    job = {**JOB, "router_fusion": True, "grouped_gemm": True}
    theirs = jobs.trace(jobs.plan({**job, "rule": "builtin"}, step_size=RATE), 1)
    ours = jobs.trace(jobs.plan({**job, "rule": "sign"}, step_size=RATE, centring=False), 1)
    assert ours.differs_from(theirs) == ""
    trace = jobs.trace(jobs.plan({**job, "rule": "adaptive"}), STEPS)
    assert all(bias.abs().max() > 0 for bias in trace.biases[-1].values())
