"""Small training jobs for the tests, built by `lab.training.build` and run by Megatron's own schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alflb_megatron.lab.training.job import Plan
from alflb_megatron.lab.training.resolve import resolve
from tests.distributed.ranks import model_parallel

SMALL = {
    "vocab_size": 64,
    "seq_length": 32,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 2,
    "ffn_hidden_size": 64,
    "moe_ffn_hidden_size": 16,
    "num_experts": 8,
    "topk": 2,
}
"""One dense and three MoE layers, as small as Megatron-Core takes them."""


def plan(job: dict[str, Any], shape: dict[str, Any] | None = None, **alf: Any) -> Plan:
    """A plan of the small model; `job` names at least `rule` and `nproc`."""
    defaults = {"ep": 1, "steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-2, "warmup_steps": 0}
    return resolve({**defaults, **job}, {**SMALL, **(shape or {})}, alf)


@dataclass
class Trace:
    """What a rank saw of a run, a list entry a step."""

    losses: list[float] = field(default_factory=list)
    biases: list[dict[int, Tensor]] = field(default_factory=list)
    loads: list[dict[int, Tensor]] = field(default_factory=list)
    maps: list[list[Tensor]] = field(default_factory=list)
    n: dict[int, int] = field(default_factory=dict)

    def differs_from(self, other: Trace) -> str:
        """Names the first difference, bit for bit; empty where there is none."""
        if self.losses != other.losses:
            return f"losses {self.losses} and {other.losses}"
        for step, (mine, theirs) in enumerate(zip(self.biases, other.biases, strict=True)):
            for layer in mine:
                if mine[layer].dtype != theirs[layer].dtype or not torch.equal(mine[layer], theirs[layer]):
                    return f"bias of layer {layer} after step {step}: {mine[layer]} and {theirs[layer]}"
        for step, (mine, theirs) in enumerate(zip(self.maps, other.maps, strict=True)):
            if len(mine) != len(theirs):
                return f"{len(mine)} and {len(theirs)} router calls in step {step}"
            for call, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                if not torch.equal(a, b):
                    return f"routing map of call {call} in step {step}"
        return ""


def batches(plan_: Plan, step: int, dp_rank: int) -> list[Tensor]:
    """This rank's micro-batches of a global batch: tokens int64 [B, S + 1], the same whatever split and device.

    Sequences with a bias towards few tokens, so that routing is skewed and the bias has something to do.
    """
    job, shape = plan_.job, plan_.shape
    generator = torch.Generator().manual_seed(1000 + step)
    size = (job.global_batch_size, shape.seq_length + 1)
    tokens = (torch.rand(size, generator=generator) ** 3 * shape.vocab_size).long()
    of_rank = tokens.view(-1, job.dp, job.micro_batch_size, shape.seq_length + 1)[:, dp_rank]
    return list(of_rank.to(torch.cuda.current_device()))


class Runner:
    """Trains the plan's model step by step on the process groups that exist."""

    def __init__(self, plan_: Plan) -> None:
        from megatron.core import parallel_state
        from megatron.core.transformer.moe.router import TopKRouter

        from alflb_megatron.lab.training import build

        self.plan = plan_
        self.setup = build.setup_model_and_optimizer(plan_)
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.trace = Trace()
        self._maps: list[Tensor] = []
        self.routers = [m for c in self.setup.chunks for m in c.modules() if isinstance(m, TopKRouter)]
        for router in self.routers:
            router.register_forward_hook(lambda _, __, output: self._maps.append(output[1].clone()))

    def forward_backward(self, step: int, forward_only: bool = False) -> list[dict[str, Tensor]]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        job, shape, chunks = self.plan.job, self.plan.shape, self.setup.chunks
        rows = batches(self.plan, step, self.dp_rank)
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(rows),
            seq_length=shape.seq_length,
            micro_batch_size=job.micro_batch_size,
            forward_only=forward_only,
        )

    def _forward_step(self, rows: Any, model: Any) -> tuple[Tensor, Any]:
        tokens = next(rows)
        positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
        extra = (
            {"loss_mask": torch.ones(tokens[:, 1:].shape, device=tokens.device)} if self.plan.shape.mtp_layers else {}
        )
        output = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous(), **extra)

        def mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = losses.float().mean()
            return loss, {"loss": loss.detach().clone()}

        return output, mean_loss

    def step(self, step: int) -> None:
        self._maps = []
        for chunk in self.setup.chunks:
            chunk.zero_grad_buffer()
        self.setup.optimizer.zero_grad()
        losses = self.forward_backward(step)
        self.setup.scheduler.step(increment=1)
        self.setup.optimizer.step()
        trace, balancer = self.trace, self.setup.balancer
        trace.losses.append(sum(float(entry["loss"]) for entry in losses))
        routers = list(zip(balancer.layers, balancer.routers, strict=True))
        trace.biases.append({k: s.expert_bias.detach().clone() for k, s in routers if s.expert_bias is not None})
        record = balancer.last
        if record is not None:
            trace.loads.append(dict(zip(record.layers, record.loads, strict=True)))
        trace.maps.append(self._maps)
        trace.n = {k: int(s.alf_n) for k, s in routers if s.alf is not None}


def sizes(plan_: Plan) -> dict[str, int | None]:
    """The arguments of `initialize_model_parallel` for the plan's split."""
    job = plan_.job
    return {
        "tensor_model_parallel_size": job.tp,
        "pipeline_model_parallel_size": job.pp,
        "virtual_pipeline_model_parallel_size": job.vpp if job.vpp > 1 else None,
        "expert_model_parallel_size": job.ep,
        "expert_tensor_parallel_size": job.etp,
    }


def trace(plan_: Plan, steps: int = 20) -> Trace:
    """Trains on this rank, with process groups of its own, and returns what was seen."""
    with model_parallel(**sizes(plan_)):
        runner = Runner(plan_)
        for step in range(steps):
            runner.step(step)
        return runner.trace
