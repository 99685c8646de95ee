"""What `sqrt` and `harmonic` share: a step u / n^power with an optional floor and restart.

n counts updates. Left alone, u / n^power freezes the bias while the router keeps learning, so:
    floor    the rate never falls below this;
    restart  n begins anew when violations of successive batches keep pointing the same way, which is what a bias that
             has fallen behind looks like: when their correlation, averaged over about ten updates, exceeds `restart`.
Both are ours and off by default: the bounds on regret are those of the plain decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alflb_megatron import metrics
from alflb_megatron.rules import Rule, State, Stats
from alflb_megatron.settings import knob

MEMORY = 0.9  # of the averaged correlation in one update


@dataclass(frozen=True)
class Decaying(Rule):
    power: ClassVar[float]

    step_size: float = knob(0.1, "u: move of a bias per unit of relative violation at update 1", minimum=0.0)
    floor: float = knob(0.0, "smallest rate that u / n^power decays to", minimum=0.0)
    restart: float = knob(
        0.0,
        "averaged correlation of successive violations above which n starts again; 0 for never",
        minimum=0.0,
        maximum=1.0,
    )

    def init(self, layers: int, experts: int) -> State:
        if not self.restart:
            return {}
        return {
            "age": torch.zeros(layers, 1),
            "persistence": torch.zeros(layers, 1),
            "violation": torch.zeros(layers, experts),
        }

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        age_L1 = stats.n.float().unsqueeze(-1)
        if self.restart:
            persistence_L1 = torch.lerp(
                metrics.correlation(stats.violation, state["violation"]), state["persistence"], MEMORY
            )
            behind_L1 = persistence_L1 > self.restart
            # an age of 0: the state is new although n may not be, as after another rule
            age_L1 = torch.where(state["age"] > 0, state["age"] + 1, age_L1)
            age_L1 = torch.where(behind_L1, 1.0, age_L1)
            state = {
                "age": age_L1,
                "persistence": torch.where(behind_L1, 0.0, persistence_L1),
                "violation": stats.violation,
            }
        rate_L1 = (self.step_size / age_L1**self.power).clamp(min=self.floor)
        return bias + stats.violation * rate_L1, state
