"""Whole global batches of a GPTModel on a device, by Megatron-Core's own schedule: Transformer Engine's layers where
they are installed, bf16, NCCL with one rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.distributed import jobs
from tests.distributed.ranks import model_parallel

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


@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_megatron_cores_cuda_graphs(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda_graph_impl=local` captures routers after the first global batch: later ones are replayed and count alike.

    Of a GPTModel's layers Megatron-Core 0.16.1 and 0.19.2 graph only whole ones, which experts of unknown load cannot
    be; the layer that graphs its router apart is the one of their hybrid models, so it is put in.
    """
    from megatron.core import tensor_parallel
    from megatron.core.transformer.cuda_graphs import CudaGraphManager
    from megatron.core.transformer.transformer_layer import MoETransformerLayer

    from alflb_megatron.lab.training import build

    if not build.have_transformer_engine():
        pytest.skip("needs Transformer Engine's random state")
    plain, seed, block = (
        build.transformer_config,
        tensor_parallel.model_parallel_cuda_manual_seed,
        build.get_gpt_decoder_block_spec,
    )

    def padded(plan: Any) -> Any:  # Megatron-Core graphs the first half of the dispatch too: its shapes must not vary
        return dataclasses.replace(plain(plan), moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)

    def graphed(plan: Any) -> Any:
        return dataclasses.replace(padded(plan), cuda_graph_impl="local", cuda_graph_scope=["moe_router"])

    def seeded(number: int, force_reset_rng: bool = True) -> None:
        seed(number, te_rng_tracker=True, force_reset_rng=force_reset_rng)

    def of_hybrid_models(*args: Any, **kwargs: Any) -> Any:
        spec = block(*args, **kwargs)
        layers = [
            dataclasses.replace(layer, module=MoETransformerLayer) if number else layer  # the first one is dense
            for number, layer in enumerate(spec.layer_specs)
        ]
        return dataclasses.replace(spec, layer_specs=layers)

    plan = jobs.plan({**JOB, "rule": rule})
    monkeypatch.setattr(build, "transformer_config", padded)
    eager = jobs.trace(plan, STEPS)
    monkeypatch.setattr(build, "transformer_config", graphed)
    monkeypatch.setattr(tensor_parallel, "model_parallel_cuda_manual_seed", seeded)
    monkeypatch.setattr(build, "get_gpt_decoder_block_spec", of_hybrid_models)
    with model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        for step in range(STEPS):
            runner.step(step)
        managers = [m for chunk in runner.setup.chunks for m in chunk.modules() if isinstance(m, CudaGraphManager)]
        captured = [run for manager in managers for run in manager.cudagraph_runners if run.fwd_graph is not None]
        assert captured, "nothing was captured: this shows nothing"
    tokens = plan.job.global_batch_size * plan.shape.seq_length
    for step, (mine, theirs) in enumerate(zip(runner.trace.loads, eager.loads, strict=True)):
        for layer in mine:
            assert int(mine[layer].sum()) == tokens * plan.shape.topk, (step, layer)
            assert (mine[layer] - theirs[layer]).abs().sum() <= 0.05 * tokens * plan.shape.topk, (step, layer)
    assert runner.trace.losses == pytest.approx(eager.losses, rel=1e-2)
