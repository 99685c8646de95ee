"""A bias to begin with, from one pass over some batches: for a new data mix, or weights that never had a bias.

The pass is forward only and trains nothing. It keeps the router logits of some tokens a rank and layer; on these, which
stand still, the rule `adaptive` then balances in a few updates, each with the one all-reduce of a training step. Layers
behind a moved bias see other hidden states afterwards, so what is left to balance is not nothing; it is little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alflb_megatron.balancer import Balancer
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import LoadCounter, counting_all_passes
from alflb_megatron.margins import Threshold
from alflb_megatron.routing import margins_of, select
from alflb_megatron.rules import State

TOKENS = 8192
"""Tokens a rank and layer that are kept while it lasts: 8 MB a layer for 256 experts in float32."""

UPDATES = 30
"""Updates on them."""


@dataclass(frozen=True)
class Calibration:
    """MaxVio on the kept tokens of all ranks, float64 [layers], with the biases as they were and as they are now."""

    layers: tuple[int, ...]
    before: Tensor
    after: Tensor


class _RecordedRouter:
    """A router's logits on some tokens, served by a balancer of its own (`balancer.BalancedRouter`)."""

    alf: ALFConfig | None = ALFConfig(rule="adaptive", check_every=0, alarm_after=0)

    def __init__(self, router: Any) -> None:
        self.router = router
        assert self.alf is not None
        self.gate = dataclasses.replace(router.gate, threshold=Threshold.OWN)
        experts, device = router.expert_bias.numel(), router.expert_bias.device
        self.load_counter = LoadCounter(experts, device, with_margins=True)
        self.expert_bias: Tensor | None = router.expert_bias.clone()
        self.n = torch.zeros(1, dtype=torch.int64, device=device)
        self.state: State = {k: rows[0].to(device) for k, rows in self.alf.rule_knobs.init(1, experts).items()}
        self.logits: list[Tensor] = []
        self.held = 0

    def keep(self, logits_TE: Tensor) -> None:
        """Keeps the first tokens that come."""
        if self.held < TOKENS:
            part = logits_TE[: TOKENS - self.held].clone()
            self.held += part.shape[0]
            self.logits.append(part)

    def route(self) -> None:
        """Routes the kept tokens with the bias as it is."""
        for logits_TE in self.logits:
            assert self.expert_bias is not None
            choice = select(logits_TE, self.gate, self.expert_bias)
            self.load_counter.observe(choice.experts_TK, ranked_TK=choice.ranked_TK)
            self.load_counter.observe_margins(margins_of(logits_TE, choice.map_TE, self.gate, self.expert_bias))

    def read_state(self) -> tuple[Tensor, State]:
        return self.n, self.state

    def write_state(self, bias_E: Tensor, n: Tensor, state: State) -> None:
        self.expert_bias, self.n, self.state = bias_E.clone(), n, state


@torch.no_grad()
def warm_start(balancer: Balancer, forward: Callable[[], object]) -> Calibration:
    """Sets the biases of all `ALFRouter`s of `balancer` from one forward pass; n and rule state begin afresh.

    Every rank calls it, before the first step of training (`balancer_of(model)` gives the balancer). A frozen router
    gets a bias too, and keeps it. Where the scores were not finite, or no token came, a bias stays as it was.

    Args:
        balancer: of the model.
        forward: runs the model over some batches, as the trainer does in evaluation, and trains nothing. The more
            tokens, up to `TOKENS` a rank, the nearer the bias is to that of the data.
    """
    routers: list[Any] = [router for router in balancer.routers if router.alf is not None]
    recorded = [_RecordedRouter(router) for router in routers]
    for router, record in zip(routers, recorded, strict=True):
        router.logit_hooks = (*router.logit_hooks, record.keep)
    try:
        with counting_all_passes([router.load_counter for router in balancer.routers]):
            forward()
    finally:
        for router in routers:
            router.logit_hooks = router.logit_hooks[:-1]
    layers = tuple(layer for layer, router in zip(balancer.layers, balancer.routers, strict=True) if router.alf)
    calibrating = Balancer([], layers, balancer.group)
    calibrating.routers = list(recorded)
    vio = []
    for _ in range(UPDATES + 1):
        for router in recorded:
            router.route()
        calibrating.launch()
        last = calibrating.commit()
        vio.append(torch.zeros(0) if last is None else last.max_vio())
    for router, record in zip(routers, recorded, strict=True):
        router.start_from(record.expert_bias)
    return Calibration(layers, vio[0], vio[-1])
