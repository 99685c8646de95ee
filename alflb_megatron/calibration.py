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
from alflb_megatron.loads import LoadWindow, measuring
from alflb_megatron.margins import Threshold
from alflb_megatron.routing import select
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


class _Kept:
    """A router's logits on some tokens, as a seat of a balancer of its own."""

    alf: ALFConfig | None = ALFConfig(rule="adaptive", check_every=0, alarm_after=0)

    def __init__(self, router: Any) -> None:
        self.router = router
        assert self.alf is not None
        self.gate = dataclasses.replace(router.gate, threshold=Threshold.OWN)
        experts, device = router.expert_bias.numel(), router.expert_bias.device
        self.load_window = LoadWindow(experts, device, with_margins=True)
        self.expert_bias: Tensor | None = router.expert_bias.clone()
        self.n = torch.zeros(1, dtype=torch.int64, device=device)
        self.state: State = {k: rows[0].to(device) for k, rows in self.alf.rule_knobs.init(1, experts).items()}
        self.logits: list[Tensor] = []
        self.held = 0

    def tap(self, logits_TE: Tensor) -> None:
        """Keeps the first tokens that come."""
        if self.held < TOKENS:
            part = logits_TE[: TOKENS - self.held].clone()
            self.held += part.shape[0]
            self.logits.append(part)

    def route(self) -> None:
        """Routes the kept tokens with the bias as it is."""
        for logits_TE in self.logits:
            choice = select(logits_TE, self.gate, self.expert_bias, with_margins=True)
            self.load_window.observe(choice.experts_TK, ranked_TK=choice.ranked_TK, margins_TE=choice.margins_TE)

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
    routers: list[Any] = [seat for seat in balancer.seats if seat.alf is not None]
    kept = [_Kept(router) for router in routers]
    for router, seat in zip(routers, kept, strict=True):
        router.logit_taps = (*router.logit_taps, seat.tap)
    try:
        with measuring([seat.load_window for seat in balancer.seats]):
            forward()
    finally:
        for router in routers:
            router.logit_taps = router.logit_taps[:-1]
    layers = tuple(layer for layer, seat in zip(balancer.layers, balancer.seats, strict=True) if seat.alf is not None)
    calibrating = Balancer([], layers, balancer.group)
    calibrating.seats = list(kept)
    vio = []
    for _ in range(UPDATES + 1):
        for seat in kept:
            seat.route()
        calibrating.launch()
        record = calibrating.commit()
        vio.append(torch.zeros(0) if record is None else record.max_vio())
    for router, seat in zip(routers, kept, strict=True):
        router.begin_with(seat.expert_bias)
    return Calibration(layers, vio[0], vio[-1])
