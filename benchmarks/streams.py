"""Score streams to replay rules on: simulated ones, and ones recorded from real trainings.

A simulated stream is a router at work without the model around it. Tokens lie around 200 cluster centres, the gate's
logits are their products with E router weights (of unit variance at temperature 1), and the weights drift from step to
step as a random walk or, as under an optimizer with momentum, along a direction that itself changes slowly. Everything
follows from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alflb_megatron.lab.replay.recording import Gating, Recording

CLUSTERS = 200
SPREAD = 0.5  # of tokens around their centre, whose coordinates have deviation 1


@dataclass(frozen=True)
class Stream:
    """A simulated stream.

    experts, topk, tokens: E, K, T a step. gate: sigmoid or softmax. steps: how many.
    drift: length of the router weights' move in one step, relative to their own.
    momentum: correlation of a move with the one before it; 0 is a random walk.
    annealed: the drift falls to nothing along a half cosine, as with a learning rate.
    skew: deviation of a constant in each expert's logit: a taste that all tokens share.
    shift: step at which all cluster centres are drawn anew; 0 for never.
    groups: number of expert groups, and how many of them a token may go to; None without a limit.
    kind: what it is counted as in the targets: slow (stationary included) or fast.
    """

    name: str
    experts: int = 64
    topk: int = 6
    tokens: int = 8192
    gate: str = "sigmoid"
    steps: int = 200
    drift: float = 0.0
    momentum: float = 0.0
    annealed: bool = False
    skew: float = 0.0
    shift: int = 0
    hidden: int = 32
    groups: tuple[int, int] | None = None
    kind: str = "slow"

    def scores(self, seed: int) -> Iterator[Tensor]:
        """The gate's scores, float32 [1, T, E] a step."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        centres_CH = normal(CLUSTERS, self.hidden)
        weights_EH = normal(self.experts, self.hidden) / math.sqrt(self.hidden * (1 + SPREAD**2))
        direction_EH = normal(self.experts, self.hidden) / math.sqrt(self.hidden * (1 + SPREAD**2))
        taste_E = self.skew * normal(self.experts)
        length = weights_EH.norm()  # of all weights together, which drift does not change
        for step in range(self.steps):
            if self.shift and step == self.shift:
                centres_CH = normal(CLUSTERS, self.hidden)
            cluster_T = torch.randint(CLUSTERS, (self.tokens,), generator=generator)
            tokens_TH = centres_CH[cluster_T] + SPREAD * normal(self.tokens, self.hidden)
            logits_TE = torch.addmm(taste_E, tokens_TH, weights_EH.t())
            yield (logits_TE.sigmoid() if self.gate == "sigmoid" else logits_TE.softmax(dim=-1))[None]
            rate = self.drift * (0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.annealed else 1.0)
            fresh_EH = normal(self.experts, self.hidden) / math.sqrt(self.hidden * (1 + SPREAD**2))
            direction_EH = self.momentum * direction_EH + math.sqrt(1 - self.momentum**2) * fresh_EH
            weights_EH = weights_EH + rate * direction_EH
            weights_EH = weights_EH * (length / weights_EH.norm())

    def recording(self, seed: int) -> Recording:
        return _of_one_layer(self, seed, Gating(self.topk, self.gate, *(self.groups or ())))


SIMULATED = (
    Stream("stationary"),
    Stream("slow drift", drift=0.003),
    Stream("annealed drift", drift=0.03, annealed=True),
    Stream("fast drift, random walk", drift=0.05, kind="fast"),
    Stream("fast drift, with momentum", drift=0.04, momentum=0.9, kind="fast"),
    Stream("sudden shift of the data", experts=16, topk=2, drift=0.003, shift=100),
    Stream("hard skew", drift=0.003, skew=3.0),
    Stream("softmax", gate="softmax", drift=0.003),
    Stream("softmax, hard skew", gate="softmax", drift=0.003, skew=2.0),
    Stream("softmax, E=256", experts=256, topk=8, tokens=4096, gate="softmax", drift=0.003),
    Stream("E=1024", experts=1024, topk=8, drift=0.003, steps=60),
    Stream("softmax, E=1024, skew", experts=1024, topk=8, gate="softmax", drift=0.003, skew=1.0, steps=60),
    Stream("softmax, E=1024, hard skew", experts=1024, topk=8, gate="softmax", drift=0.003, skew=2.0, steps=60),
    Stream("groups, hard skew", experts=64, topk=8, drift=0.003, skew=1.0, groups=(8, 4)),
    Stream("tiny batch, T K / E = 20", tokens=213, drift=0.003),
    Stream("huge batch, T K / E = 200,000", experts=16, topk=2, tokens=1_600_000, drift=0.001, steps=30, hidden=8),
    Stream("one of eight, K=1", experts=8, topk=1, drift=0.003),
)
BEYOND = (
    Stream("very fast drift, random walk", drift=0.1, kind="fast"),
    Stream("very fast drift, with momentum", drift=0.08, momentum=0.9, kind="fast"),
)
"""Outside the targets: what comes between two batches is more than chance, whatever was learnt before."""


@dataclass(frozen=True)
class Workload:
    """A workload of Megatron-LM #7488 as scores: unbiased, they choose experts by the law of that benchmark.

    The benchmark dictates the experts of each token, which no bias could move. Here a token that is to choose among
    the preferred experts scores them uniformly in [1/2, 1) and the others in [0, 1/2), any other token all of them in
    [0, 1/2). The preferred are the first E / 4 experts (at least K), for all steps or as `name` says.
    """

    name: str
    experts: int = 16
    topk: int = 2
    tokens: int = 4096
    steps: int = 120

    def preferred(self, step: int) -> tuple[range, int]:
        """The preferred experts at a step, and of how many tokens one does not prefer them (0: of none)."""
        width = max(self.topk, self.experts // 4)
        if self.name == "W5_zero_expert_rank":
            return range(self.experts // 2, self.experts), 0
        if self.name == "W6_rotating_hotspot":
            first = step // 3 * width % self.experts
            return range(first, first + width), 4
        if self.name == "W7_burst":
            return range(width if step % 4 == 3 else 0), 2
        return range(width), 4

    def scores(self, seed: int) -> Iterator[Tensor]:
        """float32 [1, T, E] a step."""
        generator = torch.Generator().manual_seed(seed)
        for step in range(self.steps):
            scores_TE = torch.rand(self.tokens, self.experts, generator=generator) / 2
            experts, others = self.preferred(step)
            prefers_T = torch.arange(self.tokens) % others != 0 if others else torch.ones(self.tokens, dtype=torch.bool)
            scores_TE[:, [expert % self.experts for expert in experts]] += prefers_T[:, None] / 2
            yield scores_TE[None]

    def recording(self, seed: int) -> Recording:
        return _of_one_layer(self, seed, Gating(self.topk, "sigmoid"))


def _of_one_layer(stream: Stream | Workload, seed: int, gating: Gating) -> Recording:
    return Recording((0,), stream.experts, stream.steps, lambda: stream.scores(seed), gating, stream.name)


WORKLOADS = tuple(map(Workload, ("W1_hot_expert_set", "W5_zero_expert_rank", "W6_rotating_hotspot", "W7_burst")))
"""W2 and W3 differ from W1 in which ranks hold the experts, W4 in how many tokens a rank has: not in balance."""
