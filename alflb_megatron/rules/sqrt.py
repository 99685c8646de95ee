"""p_k <- p_k + (u / sqrt(n)) (L - A_k) / L at update n: the step that needs convexity alone.

Online gradient descent with steps proportional to 1/sqrt(n) has regret O(sqrt N) for convex losses (Zinkevich 2003),
and the dual of Han and Zhong (2025, arXiv 2512.03915) is one; whose u this is: docs/theory.md, "What could not be
confirmed". It still moves late in training, more than u/n does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alflb_megatron.rules import register
from alflb_megatron.rules._decay import Decaying


@register("sqrt")
@dataclass(frozen=True)
class Sqrt(Decaying):
    power: ClassVar[float] = 0.5
