"""How balanced an optimum is, and how far from it a constant sign step stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from alflb_megatron.lab.theory import curvature, iteration
from alflb_megatron.lab.theory.claims import Claim, Finding, Progress, Row, Verdict, holds_if, register
from alflb_megatron.lab.theory.problem import AssignmentProblem, Optimum, random_problem
from alflb_megatron.lab.theory.solvers import minimum_cost_flow

BAND = (16, 2)
"""Experts and K of the runs of a constant step."""


@register
@dataclass(frozen=True)
class ApproximateBalance(Claim):
    """At a minimiser of the dual, at most E - 1 tokens of a generic instance are tied, so max|A - L| <= E - 1.

    Join the experts that a tied token is tied between, by a path; a cycle through several tokens would be an equation
    between scores, which a generic instance does not satisfy; so the edges are a forest, at most E - 1 of them. Each
    expert's load differs from L by no more than the tokens tied at it, however ties are broken.
    """

    name: ClassVar[str] = "balance"
    title: ClassVar[str] = "Approximate balance"
    source: ClassVar[str] = "Han and Zhong 2025 claim approximate balance; the bound E - 1 and its proof are ours"

    shapes: tuple[tuple[int, int, int], ...] = ((400, 16, 3), (1024, 8, 1), (2048, 32, 4))
    instances: int = 4
    step_sizes: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
    batches: tuple[int, ...] = (1024, 4096)
    steps: int = 600
    oracle: Callable[[AssignmentProblem], Optimum] = minimum_cost_flow

    @classmethod
    def full(cls) -> Claim:
        return cls(
            shapes=((400, 16, 3), (1024, 8, 1), (2048, 32, 4), (4096, 64, 6), (16384, 64, 6)),
            instances=5,
            step_sizes=(3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4),
            batches=(1024, 4096, 16384),
            steps=4000,
        )

    def check(self, progress: Progress | None = None) -> Finding:
        work = len(self.shapes) * self.instances + len(self.step_sizes) * len(self.batches)
        done = itertools.count(1)
        optima, worst_gap = [], 0.0
        for (tokens, experts, topk), seed in itertools.product(self.shapes, range(self.instances)):
            problem = random_problem(tokens, experts, topk, seed)
            found = self.oracle(problem)
            least, most = problem.load_range(found.bias)
            worst = max(float((most - problem.load).max()), float((problem.load - least).max()))
            optima.append({"tokens": tokens, "experts": experts, "topk": topk, "tied": problem.tied(found.bias),
                           "worst": worst, "gap": found.gap / max(1.0, abs(found.dual))})  # fmt: skip
            worst_gap = max(worst_gap, optima[-1]["gap"])
            if progress is not None:
                progress(next(done), work)
        bands = []
        for tokens, step_size in itertools.product(self.batches, self.step_sizes):
            bands.append(self._band(tokens, step_size))
            if progress is not None:
                progress(next(done), work)
        swings = [b for b in bands if b["one_step"] > b["experts"] - 1]
        ratios = [b["band"] / b["one_step"] for b in swings]
        beyond = [b for b in bands if b["largest"] > b["experts"] - 1]
        over = max(b["worst"] / (b["experts"] - 1) for b in optima)
        return Finding(
            [
                Row(
                    "the optimum is proved: D(p) = value of a feasible x",
                    f"{len(optima)} instances, T up to {max(t for t, _, _ in self.shapes):,}",
                    f"largest gap {worst_gap:.1e} of D",
                    "1e-9",
                    holds_if(worst_gap <= 1e-9),
                ),
                Row(
                    "at most E - 1 tokens are tied at the optimum",
                    "generic scores",
                    "tied: " + ", ".join(_ranges(optima, "tied")),
                    "E - 1",
                    holds_if(all(b["tied"] <= b["experts"] - 1 for b in optima)),
                ),
                Row(
                    "max|A - L| <= E - 1 at the optimum",
                    "however ties are broken",
                    f"largest {over:.2f} of E - 1",
                    "1",
                    holds_if(over <= 1),
                ),
                Row(
                    "a constant sign step stays within E - 1 of balance",
                    f"E={bands[0]['experts']}, K={bands[0]['topk']}; u from {min(self.step_sizes):g} to "
                    f"{max(self.step_sizes):g}, T from {min(self.batches):,} to {max(self.batches):,}; last quarter",
                    f"largest max|A-L| {min(b['largest'] for b in bands):.1f} to "
                    f"{max(b['largest'] for b in bands):.0f}; "
                    f"beyond E - 1 in {len(beyond)} of {len(bands)}",
                    f"{bands[0]['experts'] - 1}",
                    Verdict.CONDITIONAL if beyond else Verdict.HOLDS,
                ),
                Row(
                    "its mean max|A - L| is at most what one step swings a load by, 2 u T H_kk",
                    "where that is more than E - 1; H from near ties",
                    f"{min(ratios):.2f} to {max(ratios):.2f} of it" if ratios else "nowhere",
                    "1",
                    holds_if(all(ratio <= 1 for ratio in ratios)),
                ),
            ],
            {"optima": optima, "bands": bands},
        )

    def _band(self, tokens: int, step_size: float) -> dict[str, float]:
        """max|A - L| of the last quarter of a run of the sign rule begun at the optimum, so that none is on its way."""
        experts, topk = BAND
        problem = random_problem(tokens, experts, topk, seed=0)
        best = self.oracle(problem)
        tail = []
        for step in iteration.iterate(problem, iteration.sign(step_size), best.bias, self.steps):
            if step.n > 3 * self.steps // 4:
                tail.append(float(step.gradient.abs().max()))
        h, _ = curvature.near_ties(problem, best.bias)
        busiest = float(torch.diag(curvature.laplacian(h)).max())
        return {
            "tokens": tokens,
            "experts": experts,
            "topk": topk,
            "step_size": step_size,
            "band": float(np.mean(tail)),
            "largest": max(tail),
            "one_step": 2 * step_size * tokens * busiest,
        }


def _ranges(rows: list[dict[str, float]], key: str) -> list[str]:
    shapes = {(row["tokens"], row["experts"], row["topk"]) for row in rows}
    said = []
    for shape in sorted(shapes):
        values = [row[key] for row in rows if (row["tokens"], row["experts"], row["topk"]) == shape]
        said.append(f"{min(values):.0f} to {max(values):.0f} (E={shape[1]})")
    return said
