"""Rules against a stream of batches, many seeds at once: what the claims on regret measure.

Every step draws T fresh tokens with independent normal scores; f_n(p) is the dual of that batch per token, (1/T) sum_i
TopKSum(s_i + p) - (K/E) sum p. Means m differ from seed to seed and only shift scores, so the expected dual is least at
p* = p0 - m, p0 that of the same experts without means, and its Hessian at p* is the same for every seed.

Regret against p* is measured as f_n(p_n) - f_n(p*) - g_n (p_n - p*), g_n a subgradient of f_n at p*. As p_n is set
before the batch is seen and E g_n = 0, the last term is zero on average: the same expectation without its noise, and
never negative, because f_n is convex. The best fixed p in hindsight does better than p*: to leading order in N by
(1/2) tr(H^+ Cov g_n) on average, which does not grow (`StreamOutcome.hindsight`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from alflb_megatron import margins
from alflb_megatron.lab.theory.curvature import IndependentScores, Moduli, laplacian, moduli
from alflb_megatron.lab.theory.problem import AssignmentProblem, zero_sum
from alflb_megatron.lab.theory.solvers import minimum_cost_flow
from alflb_megatron.margins import BINS
from alflb_megatron.rules import Rule, Stats


@dataclass(frozen=True)
class Stream:
    """T tokens a step for each of S seeds; drift is the standard deviation of each mean's step."""

    tokens: int = 64
    experts: int = 8
    topk: int = 2
    seeds: int = 24
    spread: float = 0.5
    """Standard deviation of the experts' means."""
    drift: float = 0.0
    widths: tuple[float, ...] = ()
    """Standard deviation of each expert's scores; 1 where none are given."""

    def model(self) -> IndependentScores:
        """The experts without their means."""
        return IndependentScores([norm(scale=width) for width in self.widths or (1.0,) * self.experts], self.topk)


@dataclass
class _RuleOnStream:
    """One rule on S streams, its biases [S, E] updated together, as layers are."""

    rule: Rule
    bias_SE: Tensor
    state: dict[str, Tensor]

    def step(self, scores_STE: Tensor, topk: int, n: int) -> tuple[Tensor, Tensor]:
        """Routes with the bias as it is and then moves it; f_n(p_n) and |g_n|^2 of each seed, float64 [S]."""
        seeds, tokens, experts = scores_STE.shape
        ranked_STE = scores_STE + self.bias_SE[:, None].double()
        wanted = min(topk + 1, experts)
        top_STJ, index_STJ = ranked_STE.topk(wanted, dim=-1)
        chosen_STK = index_STJ[..., :topk]
        loads_SE = _loads(chosen_STK, experts)
        value_S = top_STJ[..., :topk].sum((1, 2)) / tokens - topk / experts * self.bias_SE.double().sum(1)
        histogram_SEB = None
        if self.rule.threshold is not None:
            margins_NE = margins.of_top(
                ranked_STE.view(-1, experts),
                top_STJ.view(-1, wanted),
                chosen_STK.reshape(-1, topk),
                self.rule.threshold,
            )
            # seeds side by side, as if each had experts of its own
            margins_TX = margins_NE.view(seeds, tokens, experts).transpose(0, 1).reshape(tokens, -1)
            histogram_XB = torch.zeros(seeds * experts, BINS, dtype=torch.int32)
            margins.add(histogram_XB, margins_TX)
            histogram_SEB = histogram_XB.view(seeds, experts, BINS)
        stats = Stats(loads_SE, torch.full((seeds,), n, dtype=torch.int64), histogram_SEB)
        moved_SE, self.state = self.rule.step(self.bias_SE, stats, self.state)
        self.bias_SE = zero_sum(moved_SE)
        return value_S, (loads_SE / tokens - topk / experts).square().sum(1)


def _loads(chosen_STK: Tensor, experts: int) -> Tensor:
    """int64 [S, E]."""
    seeds = chosen_STK.shape[0]
    flat_SX = chosen_STK.reshape(seeds, -1)
    return torch.zeros(seeds, experts, dtype=torch.int64).scatter_add_(1, flat_SX, torch.ones_like(flat_SX))


@dataclass(frozen=True)
class StreamOutcome:
    """What a run of rules over one stream gave; all of it per token."""

    regret: dict[str, NDArray[np.float64]]
    """label -> cumulative regret against p* [S, N]."""
    hindsight: float
    """By how much, on average, the best fixed p in hindsight beats p*: to be added to every curve."""
    exact_hindsight: float | None
    """The same, measured: each seed's first `solved` steps as one assignment problem, its optimum proved."""
    solved: int
    gradient: dict[str, NDArray[np.float64]]
    """label -> E |g_n|^2 at p_n, mean over the seeds [N]."""
    farthest: dict[str, float]
    """label -> the largest |p_n - p*| of any seed and step."""
    moduli: Moduli
    """Of the expected dual at p*."""


@torch.no_grad()
def run_stream(
    stream: Stream,
    rules: Mapping[str, Rule],
    steps: int,
    solve: int = 0,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> StreamOutcome:
    """Runs every rule over the same `steps` batches of each seed.

    Args:
        solve: so many first steps are kept and solved as one problem, for the value of hindsight. Not with drift.
    """
    seeds, tokens, experts, topk = stream.seeds, stream.tokens, stream.experts, stream.topk
    generator = torch.Generator().manual_seed(seed)
    model = stream.model()
    base_E = model.optimum()
    weights_EE = model.weights(base_E)
    width_E = torch.tensor(stream.widths or (1.0,) * experts, dtype=torch.float64)
    means_SE = stream.spread * torch.randn(seeds, experts, generator=generator, dtype=torch.float64)
    on_stream = {
        label: _RuleOnStream(rule, torch.zeros(seeds, experts), rule.init(seeds, experts))
        for label, rule in rules.items()
    }
    excess = {label: torch.zeros(seeds, steps, dtype=torch.float64) for label in rules}
    farthest = dict.fromkeys(rules, 0.0)
    squared = {label: torch.zeros(steps, dtype=torch.float64) for label in rules}
    outer_EE = torch.zeros(experts, experts, dtype=torch.float64)
    kept: list[Tensor] = []
    best_value_S = torch.zeros(seeds, dtype=torch.float64)
    for n in range(1, steps + 1):
        noise_STE = torch.randn(seeds, tokens, experts, generator=generator, dtype=torch.float64)
        scores_STE = noise_STE * width_E + means_SE[:, None]
        best_SE = base_E - zero_sum(means_SE)
        top_STK, index_STK = (scores_STE + best_SE[:, None]).topk(topk, dim=-1)
        value_S = top_STK.sum((1, 2)) / tokens
        gradient_SE = _loads(index_STK, experts).double() / tokens - topk / experts
        outer_EE += gradient_SE.t() @ gradient_SE / (seeds * steps)
        for label, one in on_stream.items():
            bias_SE = one.bias_SE.double()
            played_S, squared_S = one.step(scores_STE, topk, n)
            squared[label][n - 1] = squared_S.mean()
            away_SE = bias_SE - best_SE
            excess[label][:, n - 1] = played_S - value_S - (gradient_SE * away_SE).sum(1)
            farthest[label] = max(farthest[label], float(away_SE.norm(dim=1).max()))
        if n <= solve:
            kept.append(scores_STE)
            best_value_S += value_S
        if stream.drift:
            means_SE = means_SE + stream.drift * torch.randn(seeds, experts, generator=generator, dtype=torch.float64)
        if progress is not None and (n % 16 == 0 or n == steps):
            progress(n, steps)
    inverse_EE = torch.linalg.pinv(laplacian(weights_EE), hermitian=True, rtol=1e-9)
    exact_hindsight = None
    if solve:
        gains = []
        for at in range(seeds):
            whole = AssignmentProblem(torch.cat([step_STE[at] for step_STE in kept]), topk)
            found = minimum_cost_flow(whole, best_SE[at])
            gains.append(float(best_value_S[at]) - found.value / tokens)
        exact_hindsight = float(np.mean(gains))
    return StreamOutcome(
        {label: rows.cumsum(1).numpy() for label, rows in excess.items()},
        float(torch.trace(inverse_EE @ outer_EE)) / 2,
        exact_hindsight,
        min(solve, steps),
        {label: row.numpy() for label, row in squared.items()},
        farthest,
        moduli(weights_EE),
    )
