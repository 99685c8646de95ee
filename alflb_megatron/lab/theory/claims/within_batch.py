"""Dynamic regret where the comparator moves once in M rounds: what a bias gains by following the micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from alflb_megatron.lab.theory.claims import Claim, Finding, Progress, Row, holds_if, register
from alflb_megatron.lab.theory.curvature import moduli
from alflb_megatron.lab.theory.problem import zero_sum
from alflb_megatron.lab.theory.score_stream import Stream

MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class BatchFilter:
    """The Kalman filter of a batch of M micro-batches of T / M tokens, where p* walks once a batch.

    Of experts that are alike the Hessian per token is h (I - 11'/E), and a round's gradient at p* has the variance
    c / (T / M) an expert. So a round shows p* with the variance R = c M / (T h^2), and P, the variance of p* around the
    bias, becomes P R / (P + R) in a round and P + drift^2 from one batch to the next. `gain` multiplies the filter's
    own; a test plants another than 1.
    """

    micro_batches: int
    curvature: float  # h
    noise: float  # R
    drift: float
    gain: float = 1.0

    def settled(self) -> float:
        """P at the beginning of a batch, once it no longer changes: P = P R' / (P + R') + drift^2 with R' = R / M."""
        whole, walk = self.noise / self.micro_batches, self.drift**2
        return walk / 2 + math.sqrt(walk**2 / 4 + walk * whole)

    def variances(self) -> list[float]:
        """P before each round of a batch."""
        found = [self.settled()]
        for _ in range(self.micro_batches - 1):
            found.append(found[-1] * self.noise / (found[-1] + self.noise))
        return found

    def steps(self) -> list[float]:
        """By how much the bias moves against a round's gradient, score a unit of (A - L) / T."""
        return [self.gain * P / (P + self.noise) / self.curvature for P in self.variances()]


@register
@dataclass(frozen=True)
class WithinBatch(Claim):
    """Weights stay what they are for the M micro-batches of a global batch, so p* moves once in M rounds. A bias that
    is set before the batch pays for the move in every round, one that follows the rounds in the first alone.
    """

    name: ClassVar[str] = "within_batch"
    title: ClassVar[str] = "Dynamic regret inside the global batch"
    source: ClassVar[str] = (
        "ours; the filter is Kalman's (1960), the bound that of Hazan, Agarwal and Kale 2007 by batch"
    )

    stream: Stream = field(default_factory=lambda: Stream(tokens=2048, seeds=12, drift=0.1))
    batches: int = 48
    gain: float = 1.0
    """Multiplies the steps of the filter; a test plants another than 1."""

    @classmethod
    def full(cls) -> Claim:
        return cls(stream=Stream(tokens=2048, seeds=32, drift=0.1), batches=256)

    def check(self, progress: Progress | None = None) -> Finding:
        shape = self.stream
        model = shape.model()
        curvature = moduli(model.weights(model.optimum())).smallest
        share = shape.topk / shape.experts
        variance = share * (1 - share) * shape.experts / (shape.experts - 1)  # of one token, an expert, around the mean
        filters = {
            M: BatchFilter(M, curvature, variance * M / shape.tokens / curvature**2, shape.drift, self.gain)
            for M in MICRO_BATCHES
        }
        steps = {f"{M}": one.steps() for M, one in filters.items()}
        u = 1 / curvature
        most = MICRO_BATCHES[-1]
        steps["u/j"] = [u / j for j in range(1, most + 1)]
        regret, squared, farthest = self._run(steps, progress)
        freedom = shape.experts - 1
        predicted = {M: curvature / 2 * freedom * sum(one.variances()) / M for M, one in filters.items()}
        measured = {M: regret[f"{M}"] for M in filters}
        off = max(abs(measured[M] / predicted[M] - 1) for M in filters)
        lowest = curvature / 2 * freedom * shape.drift**2
        bound = u / 2 * sum(g2 / j for j, g2 in enumerate(squared["u/j"], 1)) / most
        ratio = measured[most] / measured[1]
        condition = f"means walk by {shape.drift:g} a batch of {shape.tokens:,} tokens; M = "
        return Finding(
            [
                Row(
                    "with M rounds between two moves of the comparator, the dynamic regret a round is "
                    "(h/2) (E-1) (1/M) sum_{j<M} P R / (R + j P)",
                    condition + ", ".join(map(str, MICRO_BATCHES)),
                    ", ".join(f"{measured[M]:.2e}" for M in filters),
                    ", ".join(f"{predicted[M]:.2e}" for M in filters) + " (within 25%)",
                    holds_if(off <= 0.25),
                ),
                Row(
                    "a bias that is set before the batch pays at least (h/2) (E-1) drift^2 a round",
                    condition + "1, the best filter",
                    f"{measured[1]:.2e}",
                    f"at least {lowest:.2e}",
                    holds_if(measured[1] >= lowest),
                ),
                Row(
                    "one that follows the rounds pays less than that",
                    condition + f"{most}",
                    f"{measured[most]:.2e}, {ratio:.2f} of M = 1",
                    f"below {lowest:.2e}",
                    holds_if(measured[most] < lowest),
                ),
                Row(
                    "u/j begun anew in each batch has at most u sum_j E|g_j|^2 / (2 j M) <= u G^2 (1 + ln M) / (2 M) a "
                    "round, u >= 1/mu, however far the comparator moved between batches",
                    condition + f"{most}; u = 1/mu(p*) = {u:.2f}, farthest iterate {farthest['u/j']:.2f}",
                    f"{regret['u/j']:.2e}",
                    f"{bound:.2e}",
                    holds_if(regret["u/j"] <= bound),
                ),
            ],
            {
                "micro_batches": list(MICRO_BATCHES),
                "measured": list(measured.values()),
                "predicted": list(predicted.values()),
                "lowest": lowest,
                "harmonic": regret["u/j"],
                "bound": bound,
            },
        )

    @torch.no_grad()
    def _run(
        self, steps: dict[str, list[float]], progress: Progress | None
    ) -> tuple[dict[str, float], dict[str, list[float]], dict[str, float]]:
        """By label: mean dynamic regret a round, E|g|^2 of each round of a batch, the largest |p - p*| later on.

        All see the same batches. The first quarter of them is left out, in which biases arrive.
        """
        shape, generator = self.stream, torch.Generator().manual_seed(0)
        seeds, tokens, experts, topk = shape.seeds, shape.tokens, shape.experts, shape.topk
        base_E = shape.model().optimum()
        means_SE = torch.zeros(seeds, experts, dtype=torch.float64)
        biases = {label: (base_E - zero_sum(means_SE)).clone() for label in steps}
        regret = dict.fromkeys(steps, 0.0)
        squared = {label: [0.0] * len(of) for label, of in steps.items()}
        farthest = dict.fromkeys(steps, 0.0)
        arrived = self.batches // 4
        for batch in range(self.batches):
            means_SE = means_SE + shape.drift * torch.randn(seeds, experts, generator=generator, dtype=torch.float64)
            scores_STE = torch.randn(seeds, tokens, experts, generator=generator, dtype=torch.float64)
            scores_STE += means_SE[:, None]
            best_SE = base_E - zero_sum(means_SE)
            for label, of in steps.items():
                for j, (part_STE, step) in enumerate(zip(scores_STE.chunk(len(of), dim=1), of, strict=True)):
                    away_SE = biases[label] - best_SE
                    gradient_SE, value_S = _dual(part_STE, biases[label], topk)
                    at_best_SE, best_S = _dual(part_STE, best_SE, topk)
                    if batch >= arrived:
                        excess = float((value_S - best_S - (at_best_SE * away_SE).sum(1)).mean())
                        kept = self.batches - arrived
                        regret[label] += excess / len(of) / kept
                        squared[label][j] += float(gradient_SE.square().sum(1).mean()) / kept
                        farthest[label] = max(farthest[label], float(away_SE.norm(dim=1).max()))
                    biases[label] = biases[label] - step * gradient_SE
            if progress is not None:
                progress(batch + 1, self.batches)
        return regret, squared, farthest


def _dual(scores_STE: Tensor, bias_SE: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Gradient [S, E] and value [S] of the dual of each seed's tokens, per token."""
    tokens, experts = scores_STE.shape[1:]
    top_STK, chosen_STK = (scores_STE + bias_SE[:, None]).topk(topk, dim=-1)
    loads_SE = torch.zeros_like(bias_SE).scatter_add_(1, chosen_STK.flatten(1), torch.ones_like(top_STK.flatten(1)))
    value_S = top_STK.sum((1, 2)) / tokens - topk / experts * bias_SE.sum(1)
    return loads_SE / tokens - topk / experts, value_S
