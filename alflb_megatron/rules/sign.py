"""p_k <- p_k + u sign(L - A_k): every expert moves by the same step, against its violation.

Wang et al. 2024 (arXiv 2408.15664, algorithm 1), DeepSeek-V3 and Megatron-Core's own expert bias. As a dual step its
size is eps_k = u / |L - A_k| (Han and Zhong 2025). It does not settle: at balance it keeps moving by u, so the band
in which the loads stay scales with u. With `mean_centred` the mean of the signs is taken out of the step, as torchtitan
and Moonlight do; where the biases are centred anyway (`--alflb-centring`, the default) that changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alflb_megatron.rules import Rule, State, Stats, register
from alflb_megatron.settings import knob


@register("sign")
@dataclass(frozen=True)
class Sign(Rule):
    step_size: float = knob(1e-3, "u: how far a bias moves in one update, in score units", minimum=0.0)
    mean_centred: bool = knob(False, "take the mean out of the step")

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        direction_LE = stats.sign
        if self.mean_centred:
            direction_LE = direction_LE - direction_LE.mean(dim=-1, keepdim=True)
        return bias + direction_LE * self.step_size, state
