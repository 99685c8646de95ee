"""Which switches a step can make: the preference rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from alflb_megatron.lab.theory import iteration
from alflb_megatron.lab.theory.claims import Claim, Finding, Progress, Row, holds_if, register
from alflb_megatron.lab.theory.iteration import Iterate
from alflb_megatron.lab.theory.problem import random_problem

CLASSES = ("overloaded to underloaded", "overloaded to balanced", "balanced to underloaded", "any other")


@register
@dataclass(frozen=True)
class Preference(Claim):
    """A token that gives up expert k for k' has p'_k' - p_k' >= p'_k - p_k.

    Before the step s_k + p_k >= s_k' + p_k', after it s_k' + p'_k' >= s_k + p'_k; add the two. Under the sign rule the
    bias of overloaded experts falls by u, that of underloaded ones rises by u, so tokens go from overloaded to
    underloaded experts, or one of the two is balanced. Equality, dp_k' = dp_k, needs a tie both before and after, so
    scores without exact ties.
    """

    name: ClassVar[str] = "preference"
    title: ClassVar[str] = "The preference rule"
    source: ClassVar[str] = "Han and Zhong 2025; the two-line proof in the docstring is ours"

    tokens: int = 1024
    experts: int = 8
    topk: int = 2
    step_size: float = 1e-3
    steps: int = 400
    seeds: int = 3
    iterate: Iterate = iteration.iterate

    @classmethod
    def full(cls) -> Claim:
        return cls(tokens=4096, experts=32, topk=4, steps=1000, seeds=5)

    def check(self, progress: Progress | None = None) -> Finding:
        counts = torch.zeros(len(CLASSES), dtype=torch.int64)
        against, switches = 0, 0
        switched_EE = torch.zeros(self.experts, self.experts, dtype=torch.int64)
        liked: list[float] = []
        for seed in range(self.seeds):
            problem = random_problem(self.tokens, self.experts, self.topk, seed)
            start_E = torch.zeros(self.experts, dtype=torch.float64)
            if seed == 0:
                liked = problem.gradient(start_E).tolist()
            for step in self.iterate(problem, iteration.sign(self.step_size), start_E, self.steps):
                moved_T = (step.before != step.after).any(dim=1)  # few of them
                before_TE, after_TE = step.before[moved_T], step.after[moved_T]
                dropped_TE, added_TE = before_TE & ~after_TE, after_TE & ~before_TE
                # every pair (dropped k, added k') of one token is a switch; [E, E] counts of them
                pairs_EE = (dropped_TE.double().t() @ added_TE.double()).round().long()
                rank = -torch.sign(step.gradient)  # 1: underloaded, -1: overloaded
                from_E1, to_1E = rank[:, None], rank[None, :]
                kinds = (
                    (from_E1 == -1) & (to_1E == 1),
                    (from_E1 == -1) & (to_1E == 0),
                    (from_E1 == 0) & (to_1E == 1),
                )
                found = torch.stack([pairs_EE[kind].sum() for kind in kinds])
                counts[:3] += found
                counts[3] += pairs_EE.sum() - found.sum()
                against += int(pairs_EE[step.move[None, :] < step.move[:, None]].sum())
                switches += int(pairs_EE.sum())
                if seed == 0:
                    switched_EE += pairs_EE
            if progress is not None:
                progress(seed + 1, self.seeds)
        shape = f"T={self.tokens}, E={self.experts}, K={self.topk}, u={self.step_size:g}"
        classes = dict(zip(CLASSES, counts.tolist(), strict=True))
        return Finding(
            [
                Row(
                    "a token that drops k for k' has dp_k' >= dp_k",
                    f"every switch of {self.seeds * self.steps} steps; {shape}",
                    f"{against} of {switches:,} switches otherwise",
                    "0",
                    holds_if(against == 0 and switches > 0),
                ),
                Row(
                    "under the sign rule tokens leave overloaded experts for underloaded ones",
                    "or one of the two is exactly balanced; scores without exact ties",
                    f"{counts[0]:,} over to under, {counts[1] + counts[2]:,} with a balanced one, {counts[3]:,} other",
                    "0 other",
                    holds_if(int(counts[3]) == 0 and switches > 0),
                ),
            ],
            {"switches": classes, "map": switched_EE.tolist(), "first_gradient": liked},
        )
