"""p <- p + g d + c v: the move that balances each expert, with gain and velocity learnt from the violations themselves.

d_k, the move that alone would give expert k the mean load, is the exact minimisation of the dual along p_k. A constant
of E and two numbers a layer, none of them a knob, make of it a filter that follows the optimum and not the noise of one
batch:

    (E-1)/E  all experts move at once. Where each competes equally with every other the dual's Hessian is
             h (E I - 1 1'), its diagonal h (E - 1): the joint minimum lies (E - 1) / E of the way.
    g        gain in [0.02, 1]. Violations r_n of successive batches are uncorrelated exactly when the gain is the best
             (whiteness of innovations: Kailath 1968, Mehra 1970), so g <- g exp(0.4 corr(r_n, r_n-1)): up while
             violations point the same way step after step, down while they alternate (after Kesten 1958).
    c        weight in [0, 0.95] of the velocity v, the average of recent moves; it grows while violations lie along v,
             that is, while the router drifts on in the same direction, and shrinks when they do not.

A violation far above its recent size (four times the mean square) is a shift of the data, not noise: the gain returns
towards 1 at once. While the violation falls fast, moves are a landing and not a drift: they enter v less.
Derivation and what was tried besides: docs/rules.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alflb_megatron.margins import Threshold
from alflb_megatron.metrics import correlation
from alflb_megatron.rules import Rule, State, Stats, register

TINY = torch.finfo(torch.float32).tiny


@register("adaptive")
@dataclass(frozen=True)
class Adaptive(Rule):
    # Constants of the filter, the same for every gate, size and stream; benchmarks/tried.py shows what others do.
    GAIN_RATE: ClassVar[float] = 0.4  # of log g per unit of correlation
    SMALLEST_GAIN: ClassVar[float] = 0.02
    LARGEST_GAIN: ClassVar[float] = 1.0
    VELOCITY_RATE: ClassVar[float] = 0.1  # of c per unit of correlation
    LARGEST_WEIGHT: ClassVar[float] = 0.95  # of the velocity
    VELOCITY_SHARE: ClassVar[float] = 0.2  # of the last move in the average of moves
    ENERGY_SHARE: ClassVar[float] = 0.1  # of the last mean square violation in its average
    SHIFT: ClassVar[float] = 4.0  # how many times the average mean square violation is no longer noise

    @property
    def threshold(self) -> Threshold:
        return Threshold.OWN

    def init(self, layers: int, experts: int) -> State:
        return {
            "gain": torch.ones(layers, 1),
            "velocity_weight": torch.zeros(layers, 1),
            "energy": torch.zeros(layers, 1),  # averaged mean square of the violation; 0 before the first update
            "violation": torch.zeros(layers, experts),
            "move": torch.zeros(layers, experts),
            "velocity": torch.zeros(layers, experts),
        }

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        violation_LE = stats.violation
        energy_L1, last_L1, mean_L1 = _mean_square(violation_LE), _mean_square(state["violation"]), state["energy"]
        begun_L1 = mean_L1 > 0

        drifting_L1 = torch.where(last_L1 > 0, energy_L1 / last_L1.clamp(min=TINY), 1.0).clamp(max=1.0)
        velocity_LE = state["velocity"] + self.VELOCITY_SHARE * drifting_L1 * (state["move"] - state["velocity"])

        gain_L1 = state["gain"] * torch.exp(self.GAIN_RATE * correlation(violation_LE, state["violation"]))
        gain_L1 = gain_L1.clamp(self.SMALLEST_GAIN, self.LARGEST_GAIN)
        along_L1 = correlation(violation_LE, velocity_LE)
        weight_L1 = state["velocity_weight"] + self.VELOCITY_RATE * drifting_L1 * along_L1
        weight_L1 = weight_L1.clamp(0.0, self.LARGEST_WEIGHT)

        shift_L1 = (1 - self.SHIFT * mean_L1 / energy_L1.clamp(min=TINY)).clamp(min=0.0) * begun_L1
        gain_L1 = torch.maximum(gain_L1, shift_L1)
        weight_L1 = weight_L1 * (1 - shift_L1)

        step_LE = gain_L1 * self._landing(stats) + weight_L1 * velocity_LE
        bounded_L1 = torch.minimum(energy_L1, self.SHIFT**2 * mean_L1)  # so that one wild batch is not the new normal
        return bias + step_LE, {
            "gain": gain_L1,
            "velocity_weight": weight_L1,
            "energy": torch.where(begun_L1, torch.lerp(mean_L1, bounded_L1, self.ENERGY_SHARE), energy_L1),
            "violation": violation_LE,
            "move": step_LE,
            "velocity": velocity_LE,
        }

    def share_of_move(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        return self._landing(stats), state["gain"]

    def _landing(self, stats: Stats) -> Tensor:
        move_LE = stats.move_to_balance
        return (move_LE - move_LE.mean(dim=-1, keepdim=True)) * self.joint(move_LE.shape[-1])

    @staticmethod
    def joint(experts: int) -> float:
        """How much of the single moves a joint move of E equally competing experts is."""
        return (experts - 1) / experts


def _mean_square(violation_LE: Tensor) -> Tensor:
    return violation_LE.square().mean(dim=-1, keepdim=True)
