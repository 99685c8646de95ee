"""Where the expected dual is strongly convex, and where it cannot be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import stats

from alflb_megatron.lab.theory.claims import Claim, Finding, Progress, Row, Verdict, holds_if, register
from alflb_megatron.lab.theory.curvature import IndependentScores, Moduli, laplacian, moduli, near_ties
from alflb_megatron.lab.theory.problem import AssignmentProblem, zero_sum
from alflb_megatron.lab.theory.solvers import minimum_cost_flow


def normal_experts(
    experts: int, topk: int, means: Sequence[float] | None = None, width: float = 1.0
) -> IndependentScores:
    """Experts whose scores are normal(mean, width^2)."""
    means = [0.0] * experts if means is None else means
    return IndependentScores([stats.norm(loc=m, scale=width) for m in means], topk)


def heavy_preferences(experts: int, tail: float, seed: int) -> list[float]:
    """How much each expert is liked: Pareto with index `tail`, centred; below 2 its variance is infinite."""
    draws = np.random.default_rng(seed).pareto(tail, experts)
    return [float(d) for d in draws - draws.mean()]


def moduli_around(model: IndependentScores, radius: float, directions: int) -> list[Moduli]:
    """The moduli at points of the zero-sum sphere |p| = radius: one expert against the others, then random ones."""
    experts = len(model.experts)
    generator = torch.Generator().manual_seed(3)
    found = []
    for direction in range(directions if radius else 1):
        v = torch.randn(experts, generator=generator, dtype=torch.float64)
        if direction < 2:
            v = torch.zeros(experts, dtype=torch.float64)
            v[0] = 1.0 - 2.0 * direction
        v = zero_sum(v)
        found.append(moduli(model.weights(radius * v / v.norm())))
    return found


def modulus_within(model: IndependentScores, radius: float, directions: int = 24, spheres: int = 4) -> float:
    """The smallest modulus found within |p| <= radius: a search, so the true one may be a little less."""
    radii = [radius * at / spheres for at in range(spheres + 1)]
    return min(m.smallest for r in radii for m in moduli_around(model, r, directions))


@register
@dataclass(frozen=True)
class StrongConvexity(Claim):
    """On {sum p = 0, |p| <= R} the expected dual is mu(R)-strongly convex with mu(R) >= E min h_kl > 0, for densities
    without gaps; on the whole subspace it cannot be.

    Why not on the whole: shares lie in [0, 1], so the gradient is bounded, |g|^2 <= K (1 - K/E); strong convexity on a
    ball asks |g(p) - g(-p)| >= 2 mu |p|. So mu(R) <= sqrt(K (1 - K/E)) / R, whatever the scores.
    """

    name: ClassVar[str] = "convexity"
    title: ClassVar[str] = "Strong convexity"
    source: ClassVar[str] = (
        "Han and Zhong 2025 derive strong convexity; the bound E min h, the counter-example on the whole subspace and "
        "the heavy tails are ours"
    )

    experts: int = 8
    topk: int = 2
    radii: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
    directions: int = 6
    tails: tuple[float, ...] = (3.0, 1.5, 1.0)
    seeds: int = 2
    samples: int = 50_000

    @classmethod
    def full(cls) -> Claim:
        return cls(experts=16, topk=4, directions=20, tails=(5.0, 3.0, 2.0, 1.5, 1.0, 0.8), seeds=8, samples=500_000)

    def check(self, progress: Progress | None = None) -> Finding:
        work = len(self.radii) + len(self.tails) + 1
        balls = []
        for at, radius in enumerate(self.radii):
            balls.append(self._ball(radius))
            if progress is not None:
                progress(at + 1, work)
        heavy = []
        for at, tail in enumerate(self.tails):
            heavy.append(self._preferences(tail))
            if progress is not None:
                progress(len(self.radii) + at + 1, work)
        gated = [self._gated(preference) for preference in (0.0, 3.0, 6.0)]
        exact, sampled, ties = self._from_samples()
        if progress is not None:
            progress(work, work)
        below = max(b["excess"] for b in balls)
        over = max(b["modulus"] / b["ceiling"] for b in balls if b["radius"] > 0)
        worst = min(heavy, key=lambda row: row["without_bias"])
        fall = balls[0]["modulus"] / balls[-1]["modulus"]
        at_optimum = [row["at_optimum"] for row in heavy]
        near = abs(sampled.smallest / exact.smallest - 1) < 0.15 and abs(sampled.largest / exact.largest - 1) < 0.15
        return Finding(
            [
                Row(
                    "mu >= E min h_kl",
                    f"normal scores, |p| up to {max(self.radii):g}",
                    f"E min h above mu by {max(0.0, below):.1e} at most",
                    "1e-9",
                    holds_if(below <= 1e-9),
                ),
                Row(
                    "mu > 0 on a bounded set",
                    f"normal(0, 1) scores, {self.directions} directions",
                    ", ".join(f"{b['modulus']:.1e} at |p|={b['radius']:g}" for b in balls),
                    "above 0",
                    holds_if(all(b["modulus"] > 0 for b in balls)),
                ),
                Row(
                    "on |p| <= R mu is at most sqrt(K (1 - K/E)) / R: none holds on the whole subspace",
                    "the gradient is bounded; normal scores",
                    f"at most {over:.2f} of it; mu falls {fall:.0e} times to |p| = {max(self.radii):g}",
                    "1",
                    holds_if(over <= 1),
                ),
                Row(
                    "there is a lower bound on mu without a bias, whatever the experts' preferences",
                    f"p = 0; normal scores around Pareto({worst['tail']:g}) preferences that span {worst['span']:.0f}",
                    f"mu {_tiny(worst['without_bias'])}, E min h {_tiny(worst['bound_without_bias'])}",
                    "counter-example: as near 0 as one likes",
                    Verdict.CONDITIONAL if worst["without_bias"] < 1e-6 * balls[0]["modulus"] else Verdict.HOLDS,
                ),
                Row(
                    "at the optimum mu does not see preferences that only shift scores: p* cancels them",
                    f"the same scores at p*, |p*| up to {max(row['distance'] for row in heavy):.0f}",
                    f"mu(p*) from {min(at_optimum):.3f} to {max(at_optimum):.3f}",
                    f"{balls[0]['modulus']:.3f}, as without preferences",
                    holds_if(all(abs(mu / balls[0]["modulus"] - 1) < 0.01 for mu in at_optimum)),
                ),
                Row(
                    "nor preferences of any other kind",
                    "counter-example: they act before a sigmoid gate, the bias after it; largest eigenvalue / mu at p*",
                    ", ".join(f"{row['condition']:.1f} at preference {row['preference']:g}" for row in gated),
                    "1, as without preferences",
                    Verdict.CONDITIONAL if gated[-1]["condition"] > 2 * gated[0]["condition"] else Verdict.HOLDS,
                ),
                Row(
                    "near ties of a sample give mu",
                    f"T={self.samples:,}, 5% of the tokens",
                    f"{sampled.smallest:.3f}, largest eigenvalue {sampled.largest:.3f}",
                    f"exact {exact.smallest:.3f}, {exact.largest:.3f} (within 15%)",
                    holds_if(near),
                ),
            ],
            {"balls": balls, "heavy": heavy, "gated": gated, "ties": ties},
        )

    def _ball(self, radius: float) -> dict[str, float]:
        """The smallest modulus found at distance `radius` from the optimum of equal experts."""
        found = moduli_around(normal_experts(self.experts, self.topk), radius, self.directions)
        least = min(found, key=lambda m: m.smallest)
        ceiling = math.sqrt(self.topk * (1 - self.topk / self.experts)) / radius if radius else math.inf
        return {"radius": radius, "modulus": least.smallest, "bound": least.bound, "ceiling": ceiling,
                "excess": max(m.bound - m.smallest for m in found)}  # fmt: skip

    def _preferences(self, tail: float) -> dict[str, float]:
        """What preferences of that tail do to mu, before any bias and at the optimum; the worst of the seeds."""
        rows: list[dict[str, Any]] = []
        for seed in range(self.seeds):
            means = heavy_preferences(self.experts, tail, seed)
            model = normal_experts(self.experts, self.topk, means)
            best = model.optimum(-zero_sum(torch.tensor(means, dtype=torch.float64)))
            start = moduli(model.weights(torch.zeros(self.experts, dtype=torch.float64)))
            rows.append(
                {
                    "tail": tail,
                    "span": max(means) - min(means),
                    "without_bias": start.smallest,
                    "bound_without_bias": start.bound,
                    "at_optimum": moduli(model.weights(best)).smallest,
                    "distance": float(best.norm()),
                }
            )
        return min(rows, key=lambda row: row["without_bias"])

    def _gated(self, preference: float) -> dict[str, float]:
        """Sigmoid scores of experts whose logits are liked from -preference to preference."""
        generator = torch.Generator().manual_seed(5)
        logits = torch.randn(self.samples, self.experts, generator=generator, dtype=torch.float64)
        liked = preference * torch.linspace(-1, 1, self.experts, dtype=torch.float64)
        problem = AssignmentProblem(torch.sigmoid(logits + liked), self.topk)
        h, _ = near_ties(problem, minimum_cost_flow(problem).bias, share=0.05)
        found = moduli(h)
        return {
            "preference": preference,
            "modulus": found.smallest,
            "condition": found.largest / max(found.smallest, 1e-12),
        }

    def _from_samples(self) -> tuple[Moduli, Moduli, dict[str, Any]]:
        """mu exactly and from near ties, and how densely the gaps between K-th and (K+1)-th lie."""
        model = normal_experts(self.experts, self.topk, np.linspace(-0.5, 0.5, self.experts).tolist())
        best = model.optimum()
        problem, weights = model.sample(self.samples, seed=4), model.weights(best)
        h, near = near_ties(problem, best, share=0.05)
        counts, edges = np.histogram(problem.gaps(best).numpy(), bins=60, range=(0.0, 1.5))
        ties = {
            "gap": ((edges[:-1] + edges[1:]) / 2).tolist(),
            "density": (counts / problem.tokens / np.diff(edges)).tolist(),
            "at_zero": float(torch.trace(laplacian(weights))),  # of all pairs, in either order
            "near": near,
        }
        return moduli(weights), moduli(h), ties


def _tiny(value: float) -> str:
    return f"{value:.1e}" if value > 0 else "0 to rounding"
