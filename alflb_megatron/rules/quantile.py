"""p_k <- p_k - (the L-th largest margin of expert k): the bias that would have balanced the batch, expert by expert.

Quantile balancing (Su, kexue.fm 11619; Megatron-Core 0.19, torchtitan, Kimi K3): one exact coordinate minimisation of
the dual, all experts at once. With ema = a, p <- p + (1 - a) (q - p), q being that solve. The margins come from one
pooled histogram (`alflb_megatron.margins`). Upstream measures them against the (K+1)-th largest score of the token
(`against=next`), which for a chosen expert is what it must beat and for the others a little less; `against=own` takes
the K-th for those. The solve follows the batch's sampling noise in full, which `adaptive` does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alflb_megatron.margins import Threshold
from alflb_megatron.rules import Rule, State, Stats, register
from alflb_megatron.settings import knob


@register("quantile")
@dataclass(frozen=True)
class Quantile(Rule):
    ema: float = knob(0.0, "share of the old bias that is kept in one update", minimum=0.0, maximum=1.0)
    against: str = knob(
        "next",
        "the score an expert must beat: the token's (K+1)-th largest (next, as upstream), or its own (own)",
        choices=[threshold.value for threshold in Threshold],
    )

    @property
    def threshold(self) -> Threshold:
        return Threshold(self.against)

    def share_of_move(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        move_LE = stats.move_to_balance
        return move_LE, torch.full_like(move_LE[:, :1], 1 - self.ema)

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        return bias + (1 - self.ema) * stats.move_to_balance, state
