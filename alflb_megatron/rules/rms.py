"""p_k <- p_k + u e_k / RMS(e), e = (L - A) / L: a step of fixed length along the violation.

Su (kexue.fm 10757). Between `sign`, whose every component has length u, and `proportional`: an expert moves by its
share of the violation, but the root mean square of all moves stays u, so like `sign` it does not settle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alflb_megatron.rules import Rule, State, Stats, register
from alflb_megatron.settings import knob


@register("rms")
@dataclass(frozen=True)
class RMS(Rule):
    step_size: float = knob(1e-3, "u: root mean square of the moves in one update, in score units", minimum=0.0)

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        rms_L1 = stats.violation.square().mean(dim=-1, keepdim=True).sqrt()
        tiny = torch.finfo(rms_L1.dtype).tiny  # perfect balance: 0 / tiny = 0
        return bias + stats.violation / rms_L1.clamp(min=tiny) * self.step_size, state
