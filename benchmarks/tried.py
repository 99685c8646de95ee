"""What was tried for `adaptive` and did not stay: each variant beside the rule, on a few simulated streams.

Every variant changes one thing. Figures are `mean_over_floor` and the steps from a cold start to twice the floor, as in
`benchmarks.balance`. Repeat with

    python -m benchmarks.tried         (about five minutes on one thread)
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.replay.replay import replay
from alflb_megatron.margins import BINS, SIDE, Threshold, move_to_load
from alflb_megatron.metrics import correlation
from alflb_megatron.rules import Rule, State, Stats
from alflb_megatron.rules.adaptive import Adaptive
from benchmarks import machine
from benchmarks.streams import BEYOND, SIMULATED

STREAMS = (
    "slow drift",
    "fast drift, random walk",
    "fast drift, with momentum",
    "sudden shift of the data",
    "hard skew",
    "softmax, hard skew",
    "softmax, E=1024, skew",
    "one of eight, K=1",
)
STEPS = 150


class GainAlone(Adaptive):
    """no velocity"""

    VELOCITY_RATE: ClassVar[float] = 0.0


class NoReturn(Adaptive):
    """the gain does not return at a shift of the data"""

    SHIFT: ClassVar[float] = 1e9


class GainAboveOne(Adaptive):
    """a gain of up to 2"""

    LARGEST_GAIN: ClassVar[float] = 2.0


class Single(Adaptive):
    """every expert moves as if alone: no (E-1)/E"""

    @staticmethod
    def joint(experts: int) -> float:
        return 1.0


class Next(Adaptive):
    """margins against the (K+1)-th largest for every expert"""

    @property
    def threshold(self) -> Threshold:
        return Threshold.NEXT


class LastMove(Adaptive):
    """the velocity is the last move (heavy ball)"""

    VELOCITY_SHARE: ClassVar[float] = 1.0


class LongVelocity(Adaptive):
    """the velocity is averaged over ten moves, not five"""

    VELOCITY_SHARE: ClassVar[float] = 0.1


class SlowGain(Adaptive):
    """the gain moves a third as fast"""

    GAIN_RATE: ClassVar[float] = 0.13


class GainPerExpert(Adaptive):
    """a gain of its own for every expert that stays far off on one side: half as much again each step, up to 8"""

    def init(self, layers: int, experts: int) -> State:
        return super().init(layers, experts) | {"own": torch.ones(layers, experts)}

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        deviation_L1 = stats.loads.double().mean(-1, keepdim=True).rsqrt().float()  # of a load, relative to its mean
        now_LE, before_LE = stats.violation / deviation_L1, state["violation"] / deviation_L1
        persistent_LE = (now_LE * before_LE > 0) & (now_LE.abs() > 2) & (before_LE.abs() > 2)
        own_LE = torch.where(persistent_LE, (state["own"] * 1.5).clamp(max=8.0), 1.0)
        moved_LE, after = super().step(bias, stats, {k: v for k, v in state.items() if k != "own"})
        return bias + (moved_LE - bias) * own_LE, after | {"own": own_LE}


@dataclass(frozen=True)
class AveragedHistogram(Adaptive):
    """margins averaged over steps with the weight g, exact loads where they are zero"""

    def init(self, layers: int, experts: int) -> State:
        return super().init(layers, experts) | {"margins": torch.zeros(layers, experts, BINS, dtype=torch.float64)}

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        assert stats.histogram is not None
        first = (state["energy"] == 0).unsqueeze(-1)
        weight = torch.where(first, 1.0, state["gain"].unsqueeze(-1).double())
        averaged = torch.lerp(state["margins"], stats.histogram.double(), weight)
        # the same move as with a mean load that is off by as much as the averaged load is
        loads_LE = stats.loads.double()
        wanted_LE = averaged[..., SIDE:].sum(-1) + loads_LE.mean(-1, keepdim=True) - loads_LE
        solved = Stats(stats.loads, stats.n, stats.histogram)
        solved.__dict__["move_to_balance"] = move_to_load(averaged, wanted_LE)
        moved_LE, after = super().step(bias, solved, {k: v for k, v in state.items() if k != "margins"})
        return moved_LE, after | {"margins": averaged}


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """an alpha-beta filter: velocity corrected by g^2 / 2 of each solve and always carried in full"""

    @property
    def threshold(self) -> Threshold:
        return Threshold.OWN

    def init(self, layers: int, experts: int) -> State:
        rows = torch.zeros(layers, experts)
        return {"gain": torch.ones(layers, 1), "velocity": rows, "violation": rows}

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        gain_L1 = state["gain"] * torch.exp(0.4 * correlation(stats.violation, state["violation"]))
        gain_L1 = gain_L1.clamp(0.02, 1.0)
        move_LE = stats.move_to_balance
        move_LE = move_LE - move_LE.mean(dim=-1, keepdim=True)
        velocity_LE = state["velocity"] + gain_L1.square() / 2 * move_LE
        after = {"gain": gain_L1, "velocity": velocity_LE, "violation": stats.violation}
        return bias + gain_L1 * move_LE + velocity_LE, after


@dataclass(frozen=True)
class Anderson(Adaptive):
    """while the gain is 1, one step of Anderson acceleration on successive solves"""

    def init(self, layers: int, experts: int) -> State:
        return super().init(layers, experts) | {"solve": torch.zeros(layers, experts)}

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        moved_LE, after = super().step(bias, stats, {k: v for k, v in state.items() if k != "solve"})
        move_LE = stats.move_to_balance
        solve_LE = (move_LE - move_LE.mean(dim=-1, keepdim=True)) * self.joint(bias.shape[-1])
        change_LE = stats.violation - state["violation"]
        share_L1 = (stats.violation * change_LE).sum(-1, keepdim=True) / change_LE.square().sum(-1, keepdim=True)
        mixed_LE = solve_LE - share_L1.clamp(-1.0, 0.5) * (state["move"] + solve_LE - state["solve"])
        mixed_L1 = (after["gain"] == 1.0) & (state["energy"] > 0)
        moved_LE = torch.where(mixed_L1, bias + mixed_LE, moved_LE)
        return moved_LE, after | {"move": moved_LE - bias, "solve": solve_LE}


VARIANTS = (
    GainAlone,
    NoReturn,
    GainAboveOne,
    SlowGain,
    Single,
    Next,
    LastMove,
    LongVelocity,
    AlphaBeta,
    Anderson,
    AveragedHistogram,
    GainPerExpert,
)


def table(results: dict[str, Any]) -> str:
    streams = [row["stream"] for row in results["rows"]]
    lines = ["| variant | " + " | ".join(streams) + " |", "|---|" + "---|" * len(streams)]
    for label in results["rows"][0]["rules"]:
        cells = []
        for row in results["rows"]:
            figures = row["rules"][label]
            steps = "-" if figures["steps_to_2x_floor"] is None else figures["steps_to_2x_floor"]
            cells.append(f"{figures['mean_over_floor']:.2f} / {steps}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    players: dict[str, Rule] = {"adaptive, as it is": Adaptive()}
    players |= {str(variant.__doc__): variant() for variant in VARIANTS}
    rows = []
    for stream in (*SIMULATED, *BEYOND):
        if stream.name in STREAMS:
            short = dataclasses.replace(stream, steps=min(stream.steps, STEPS))
            found = replay(short.recording(arguments.seed), players, hindsight=False)
            keys = ("mean_over_floor", "steps_to_2x_floor")
            figures = {label: {key: row[key] for key in keys} for label, row in found["rules"].items()}
            rows.append({"stream": stream.name, "rules": figures})
            print(stream.name, file=sys.stderr, flush=True)
    results = {"machine": machine.describe(), "seed": arguments.seed, "rows": rows}
    write_json(Path(machine.RESULTS / "tried.json"), results)
    print(table(results))


if __name__ == "__main__":
    main()
