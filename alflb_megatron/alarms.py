"""When something about the balance has been wrong for long: one clear line, with what to do, now and then.

Counting is done on the device at every update and costs no synchronisation; every `READ_EVERY` updates the counts are
read, and a line is given for each kind of alarm, about its worst layer, at most once in `REPEAT_AFTER` updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alflb_megatron import metrics
from alflb_megatron.config import PREFIX, ALFConfig

READ_EVERY = 10
"""Updates between looks at the counts."""

REPEAT_AFTER = 1000
"""Updates before the same kind of alarm is given again."""

LARGEST_SCORE_GAP = 1.0
"""Sigmoid and softmax scores lie between 0 and 1: where biases differ by more, no score can outweigh them."""


@dataclass(frozen=True)
class Kind:
    """One thing that can be wrong with a layer: what is said of it, and what can be done."""

    name: str
    text: str
    advice: str


STARVED = Kind(
    "starved",
    f"expert {{expert}} has had less than {metrics.STARVED:.0%} of the mean load for {{count}} updates in a row",
    f"check that its gate weights are finite; with --{PREFIX}rule adaptive, or a larger --{PREFIX}step-size, its bias "
    "rises faster",
)
MAX_VIO = Kind(
    "MaxVio",
    "MaxVio has been above {limit:g} for {count} updates in a row and is {value:.2f}",
    f"use --{PREFIX}rule adaptive, or a larger --{PREFIX}step-size; if the bias spread grows as well, tokens have "
    "become alike to the gate: look at the learning rate and the data",
)
SPREAD = Kind(
    "bias",
    "the biases have been further apart than {limit:g} for {count} updates in a row, and are by {value:.2f}: "
    "more than scores can outweigh",
    "an expert is hardly ever chosen for its score any more: look at the gate's weights and learning rate, or start "
    "from an earlier checkpoint",
)
REFUSED = Kind(
    "refused",
    "updates refused since the last such line: {count}. Scores of some token were NaN or infinite on some rank, or the "
    "update itself was not finite",
    "the biases stayed as they were; look for the NaN in the layers before",
)


class Alarms:
    """Watches the layers of one balancer.

    Args:
        labels: what they are called.
        configs: their settings, None where a router is only watched.
        bounded: whether the scores of a layer lie between 0 and 1.
    """

    def __init__(self, labels: Sequence[str], configs: Sequence[ALFConfig | None], bounded: Sequence[bool]) -> None:
        self.labels, self.configs, self.bounded = tuple(labels), tuple(configs), tuple(bounded)
        self._starved: dict[int, Tensor] = {}  # number of experts -> updates in a row, int64 [layers of that width, E]
        self._widths: dict[int, list[int]] = {}
        self._vio_L = self._spread_L = self._refused_L = torch.zeros(0)
        self._now = self._vio_L, self._spread_L
        self._given: dict[str, int] = {}
        self._given_refused = [0] * len(self.labels)  # updates refused up to the last line about them

    def limit(self, kind: Kind, index: int) -> float:
        """Above which value the layer at `index` is in alarm; infinite for never, and for what has no limit."""
        config = self.configs[index]
        if config is None or not config.alarm_after or kind not in (MAX_VIO, SPREAD):
            return float("inf")
        if kind is MAX_VIO:
            return config.alarm_max_vio
        if config.alarm_spread is not None:
            return config.alarm_spread
        return LARGEST_SCORE_GAP if self.bounded[index] and config.score_unit == "score" else float("inf")

    @torch.no_grad()
    def count(self, loads: Sequence[Tensor], vio_L: Tensor, spread_L: Tensor, refused_L: Tensor) -> None:
        """One update: loads int64 [E] a layer; MaxVio, spread of the bias and bool refused, [L]."""
        if not self._starved:
            for index, load in enumerate(loads):
                self._widths.setdefault(load.numel(), []).append(index)
            self._starved = {width: loads[0].new_zeros(len(of), width) for width, of in self._widths.items()}
            self._vio_L, self._spread_L, self._refused_L = (
                torch.zeros_like(refused_L, dtype=torch.int64) for _ in range(3)
            )
            indices = range(len(self.labels))
            self._vio_limit_L = vio_L.new_tensor([self.limit(MAX_VIO, i) for i in indices])
            self._spread_limit_L = spread_L.new_tensor([self.limit(SPREAD, i) for i in indices])
        for width, of in self._widths.items():
            self._starved[width].add_(1).mul_(metrics.starved(torch.stack([loads[index] for index in of])))
        self._vio_L = (self._vio_L + 1) * (vio_L > self._vio_limit_L)
        self._spread_L = (self._spread_L + 1) * (spread_L > self._spread_limit_L)
        self._refused_L = self._refused_L + refused_L
        self._now = vio_L, spread_L

    def due_lines(self, update: int) -> list[str]:
        """The lines to be given after `update` updates; reads from the device. [] where all is well, or between looks.

        Every rank finds the same lines, since loads and biases are the same on all of them.
        """
        if update % READ_EVERY or not self._starved:
            return []
        starved_L, expert_L = torch.zeros_like(self._vio_L), torch.zeros_like(self._vio_L)
        for width, of in self._widths.items():
            longest = self._starved[width].max(dim=1)
            starved_L[of], expert_L[of] = longest.values, longest.indices
        counts = torch.stack([starved_L, expert_L, self._vio_L, self._spread_L, self._refused_L]).tolist()
        values = torch.stack([value.double() for value in self._now]).tolist()
        starved, experts, vio, spread, refused = counts
        newly = [now - before for now, before in zip(refused, self._given_refused, strict=True)]
        lines = [
            self._line(update, STARVED, starved, [{"expert": expert} for expert in experts]),
            self._line(update, MAX_VIO, vio, [{"value": value} for value in values[0]]),
            self._line(update, SPREAD, spread, [{"value": value} for value in values[1]]),
            self._line(update, REFUSED, newly, [{} for _ in newly], at_once=True),
        ]
        if lines[-1]:
            self._given_refused = refused
        return [line for line in lines if line]

    def is_due(self, name: str, update: int) -> bool:
        """Whether a line of this kind may be given now; if so, it counts as given."""
        due = update - self._given.get(name, -REPEAT_AFTER) >= REPEAT_AFTER
        if due:
            self._given[name] = update
        return due

    def _line(
        self, update: int, kind: Kind, counts: list[int], more: list[dict[str, float]], at_once: bool = False
    ) -> str:
        wrong = [
            index
            for index, (count, config) in enumerate(zip(counts, self.configs, strict=True))
            if config is not None and config.alarm_after and count >= (1 if at_once else config.alarm_after)
        ]
        if not wrong or not self.is_due(kind.name, update):
            return ""
        worst = max(wrong, key=lambda index: counts[index])
        said = kind.text.format(count=counts[worst], limit=self.limit(kind, worst), **more[worst])
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return f"{self.labels[worst]}{others}: {said}. {kind.advice[0].upper()}{kind.advice[1:]}."
