"""What is replayed over a recording: a rule (`ReplayedRule`), and the best that could have been (`HindsightBias`).

Shapes: L layers, T tokens, E experts, K experts a token, B = margins.BINS.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alflb_megatron import margins, metrics
from alflb_megatron.lab.replay.recording import Gating
from alflb_megatron.lab.theory.descent import descend
from alflb_megatron.margins import BINS, Threshold
from alflb_megatron.routing import group_limited_topk
from alflb_megatron.rules import Rule, Stats, keep_where


class ChosenExperts(NamedTuple):
    """What a router chose, and what it found on the way."""

    experts_TK: Tensor  # int64 [T, K]
    ranked_TE: Tensor  # float32 [T, E], s + p
    top_TJ: Tensor | None  # its K + 1 largest, where margins are wanted and every expert may be chosen
    groups: tuple[int, int] = (0, 0)  # how many, and how many a token may go to, where that is limited

    def loads(self) -> Tensor:
        """int64 [E]."""
        return torch.bincount(self.experts_TK.reshape(-1), minlength=self.ranked_TE.shape[1])

    def affinity(self, scores_TE: Tensor) -> float:
        """Sum of the chosen scores."""
        return float(scores_TE.gather(1, self.experts_TK).sum(dtype=torch.float64))

    def margins(self, threshold: Threshold) -> Tensor:
        """float32 [T, E]."""
        if self.top_TJ is not None:
            return margins.of_top(self.ranked_TE, self.top_TJ, self.experts_TK, threshold)
        map_TE = torch.zeros_like(self.ranked_TE, dtype=torch.bool).scatter_(1, self.experts_TK, True)
        topk, (groups, group_topk) = self.experts_TK.shape[1], self.groups
        return margins.of_groups(self.ranked_TE, map_TE, topk, groups, group_topk, threshold)


def choose_experts(ranked_TE: Tensor, gating: Gating, with_margins: bool = False) -> ChosenExperts:
    """The experts of the largest s + p, found as `routing.select` finds them, so that ties break alike."""
    topk = topk_of(gating)
    if gating.group_topk:
        experts_TK = group_limited_topk(ranked_TE, topk, gating.num_groups, gating.group_topk)[1]
        return ChosenExperts(experts_TK, ranked_TE, None, (gating.num_groups or 0, gating.group_topk))
    top_TJ, experts_TJ = ranked_TE.topk(min(topk + with_margins, ranked_TE.shape[1]), dim=1)
    return ChosenExperts(experts_TJ[:, :topk], ranked_TE, top_TJ if with_margins else None)


def topk_of(gating: Gating) -> int:
    """K, which a replay has settled before it begins."""
    assert gating.topk is not None
    return gating.topk


class ReplayedRouter(Protocol):
    """What can be replayed: it routes a step as it would have been routed then, and only afterwards learns from it."""

    seconds: list[float]  # one layer's share of each update

    def step(self, scores_LTE: Tensor) -> tuple[Tensor, list[float]]:
        """Loads int64 [L, E] and the sum of the chosen scores of each layer."""
        ...


class ReplayedRule:
    """One rule on its way through a recording of L layers with E experts.

    `bias_LE` is what the next step is routed with. Updates are those of `balancer.Balancer`; one that is not finite is
    refused, as there.
    """

    def __init__(self, rule: Rule, layers: int, experts: int, gating: Gating, centring: bool = True) -> None:
        self.rule, self.gating, self.centring = rule, gating, centring
        self.bias_LE = torch.zeros(layers, experts)
        self.n_L = torch.zeros(layers, dtype=torch.int64)
        self.state = rule.init(layers, experts)
        self.seconds: list[float] = []  # one layer's share of each update

    @torch.no_grad()
    def step(self, scores_LTE: Tensor) -> tuple[Tensor, list[float]]:
        """Routes one step with the bias as it is, then moves it: loads int64 [L, E], chosen scores of each layer."""
        layers, tokens, experts = scores_LTE.shape
        threshold = self.rule.threshold
        histogram_LEB = None if threshold is None else torch.zeros(layers, experts, BINS, dtype=torch.int32)
        stride = margins.sample_stride(tokens, topk_of(self.gating), experts, run=tokens)
        loads, affinity, seconds = [], [], 0.0
        for layer, scores_TE in enumerate(scores_LTE):
            ranked_TE = scores_TE + self.bias_LE[layer]
            chosen = choose_experts(ranked_TE, self.gating)
            loads.append(chosen.loads())
            affinity.append(chosen.affinity(scores_TE))
            if threshold is not None and histogram_LEB is not None:
                began = time.perf_counter()
                sample_XE = ranked_TE[int(self.n_L[layer]) % stride :: stride]
                sampled = choose_experts(sample_XE, self.gating, with_margins=True)
                margins.add(histogram_LEB[layer], sampled.margins(threshold))
                seconds += time.perf_counter() - began
        loads_LE = torch.stack(loads)
        began = time.perf_counter()
        self._update(Stats(loads_LE, self.n_L + 1, histogram_LEB))
        self.seconds.append((seconds + time.perf_counter() - began) / layers)
        return loads_LE, affinity

    def _update(self, stats: Stats) -> None:
        moved_LE, state = self.rule.step(self.bias_LE, stats, self.state)
        if self.centring:
            moved_LE = moved_LE - moved_LE.mean(dim=-1, keepdim=True)
        sound_L1 = moved_LE.isfinite().all(dim=-1, keepdim=True)
        self.bias_LE = torch.where(sound_L1, moved_LE, self.bias_LE)
        self.state = {name: keep_where(sound_L1, rows, self.state[name]) for name, rows in state.items()}
        self.n_L = self.n_L + sound_L1.squeeze(-1)


class HindsightBias:
    """The bias that balances each very batch: the dual of the assignment problem, solved on the batch itself.

    From the last batch's solution on, every expert's bias is moved to where it alone would carry the mean load: the
    exact order statistic, no histogram. All move at once, so a move that did not lower MaxVio is halved
    (`theory.descent`). The best bias of at most 30 is kept.
    """

    def __init__(self, layers: int, experts: int, gating: Gating) -> None:
        self.gating = gating
        self.bias_LE = torch.zeros(layers, experts)
        self.sweeps: list[int] = []  # of each step and layer

    @torch.no_grad()
    def step(self, scores_LTE: Tensor) -> tuple[Tensor, list[float]]:
        """Loads int64 [L, E] and the chosen scores of each layer under the best bias found."""
        loads, affinity = [], []
        for layer, scores_TE in enumerate(scores_LTE):
            chosen, self.bias_LE[layer] = self._solve(scores_TE, self.bias_LE[layer])
            loads.append(chosen.loads())
            affinity.append(chosen.affinity(scores_TE))
        return torch.stack(loads), affinity

    def _solve(self, scores_TE: Tensor, bias_E: Tensor) -> tuple[ChosenExperts, Tensor]:
        mean = scores_TE.shape[0] * topk_of(self.gating) / scores_TE.shape[1]

        def balance_under(bias_E: Tensor) -> tuple[float, ChosenExperts]:
            chosen = choose_experts(scores_TE + bias_E, self.gating, with_margins=True)
            return float(metrics.max_vio(chosen.loads())), chosen

        best = descend(
            balance_under,
            move=lambda chosen: margins.exact_move(chosen.margins(Threshold.OWN), mean),
            bias_E=bias_E,
            enough=math.ceil(mean) / mean - 1,  # loads are whole tokens
        )
        self.sweeps.append(best.sweeps)
        return best.found, best.bias - best.bias.mean()
