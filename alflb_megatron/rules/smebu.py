"""d = u tanh(kappa (L - A_k) / L) - mean; m <- beta m + (1 - beta) d; p_k <- p_k + m: a soft sign with momentum.

SMEBU, Arcee Trinity (arXiv 2602.17004), with its published constants as defaults. Near balance it is `proportional`
with rate u kappa, far from it `sign` with rate u; the momentum averages the noise of successive batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alflb_megatron.rules import Rule, State, Stats, register
from alflb_megatron.settings import knob


@register("smebu")
@dataclass(frozen=True)
class Smebu(Rule):
    step_size: float = knob(5e-4, "u: largest move of a bias in one update, in score units", minimum=0.0)
    kappa: float = knob(2.0, "slope of the soft sign at balance", minimum=0.0)
    beta: float = knob(0.5, "share of the last move that is kept", minimum=0.0, maximum=1.0)

    def init(self, layers: int, experts: int) -> State:
        return {"momentum": torch.zeros(layers, experts)}

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        drive_LE = self.step_size * torch.tanh(self.kappa * stats.violation)
        drive_LE = drive_LE - drive_LE.mean(dim=-1, keepdim=True)
        momentum_LE = self.beta * state["momentum"] + (1 - self.beta) * drive_LE
        return bias + momentum_LE, {"momentum": momentum_LE}
