"""Megatron-Core's forward-backward schedule over global batches: training, calibration and validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from alflb_megatron.lab.replay.gate_scores import gate_scores, sequence_floors
from alflb_megatron.lab.replay.recording import Gating, Layout
from alflb_megatron.lab.training.build import ModelSetup
from alflb_megatron.lab.training.job import Plan
from alflb_megatron.loads import LoadAllReduce, counting_all_passes

FLOOR_BATCHES, FLOOR_TOKENS = 4, 2**15
"""What the sequence floor is made of: so many global batches at most, and so many tokens of this rank at most."""


class Validation(NamedTuple):
    """What was seen of the validation set, of the MoE layers of this pipeline stage."""

    loss: float
    loads: list[tuple[int, list[int]]]  # layer number, loads over the whole set
    sequence_floors: list[float]  # on the first rank, where it routes whole sequences


class ForwardBackward:
    """Runs the model of a plan over global batches on this rank; all ranks call it together."""

    def __init__(self, plan: Plan, setup: ModelSetup) -> None:
        self.plan, self.setup = plan, setup
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )

    def __call__(self, batches: Iterable[Any], forward_only: bool) -> float:
        """One global batch, of which `batches` are this rank's micro-batches; the mean loss over all its micro-batches.

        Without `forward_only` the gradients are left in the model's buffers.
        """
        # Every chunk of an interleaved stage walks through the same micro-batches by itself.
        chunks, job = self.setup.chunks, self.plan.job
        micro_batches = list(batches)
        losses = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in chunks] if len(chunks) > 1 else iter(micro_batches),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=job.global_batch_size // (job.micro_batch_size * job.dp),
            seq_length=self.plan.shape.seq_length,
            micro_batch_size=job.micro_batch_size,
            forward_only=forward_only,
        )
        # Only the last pipeline stage has losses; the sum over all ranks over their number is the mean either way.
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for entry in losses:
            total += torch.stack([entry["loss"].double(), torch.ones_like(entry["loss"], dtype=torch.float64)])
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _forward_step(self, batches: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches).to(self.device)
        extra: dict[str, Tensor] = {}
        if self.plan.shape.mtp_layers:
            extra["loss_mask"] = batch.loss_mask
        output = model(batch.tokens, batch.position_ids, None, labels=batch.labels, **extra)

        def mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (losses.float() * batch.loss_mask).sum() / batch.loss_mask.sum().clamp(min=1)
            return loss, {"loss": loss.detach().clone()}  # the schedule divides the first in place

        return output, mean_loss

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, without gradients."""
        for chunk in self.setup.chunks:
            chunk.eval()
        with torch.no_grad():
            yield
        for chunk in self.setup.chunks:
            chunk.train()

    def validate(self, batches: Iterable[Iterable[Any]]) -> Validation:
        """Over the global batches: the loss, and of this stage's MoE layers the loads and the sequence floor."""
        balancer, job, shape = self.setup.balancer, self.plan.job, self.plan.shape
        counters = [router.load_counter for router in balancer.routers]
        # Ranks of a stage see sequences of the same kind: the first one's are enough. With tp it has parts of them.
        tokens = min(FLOOR_TOKENS, FLOOR_BATCHES * job.global_batch_size // job.dp * shape.seq_length)
        most = tokens if job.tp == 1 and dist.get_rank(balancer.group) == 0 else 0
        with (
            self.evaluating(),
            counting_all_passes(counters),
            gate_scores(balancer.routers, shape.gate, most) as scores,
        ):
            losses = [self(batch, forward_only=True) for batch in batches]
            sums = LoadAllReduce(counters, balancer.group, with_margins=False).wait() if counters else []
        gating = Gating(shape.topk, shape.gate, shape.num_groups, shape.group_topk)
        layout = Layout(shape.seq_length, job.micro_batch_size)
        return Validation(
            math.fsum(losses) / len(losses),
            [(layer, loads.loads_E.tolist()) for layer, loads in zip(balancer.layers, sums, strict=True)],
            sequence_floors(scores, gating, layout, job.global_batch_size),
        )
