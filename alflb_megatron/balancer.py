"""Once per global batch: gather the loads, sum them, move the biases by their rule, centre, commit, report.

`launch` starts one all-reduce for all layers; `commit` waits for it and writes the biases. Between the two the host
finishes its gradient reduction, which hides ours. Both are idempotent within a global batch, so a host may reach them
by more than one way.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alflb_megatron import metrics
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import LoadSum, LoadWindow, Seen
from alflb_megatron.rules import State, Stats, kept

logger = logging.getLogger(__name__)


class Seat(Protocol):
    """A router the balancer serves: `ALFRouter`, or any router that only has its loads watched (`alf` is None)."""

    load_window: LoadWindow
    alf: ALFConfig | None
    expert_bias: Tensor | None

    def read_state(self) -> tuple[Tensor, State]: ...
    def write_state(self, bias_E: Tensor, n: Tensor, state: State) -> None: ...


@dataclass(frozen=True)
class Record:
    """What the routers did in one global batch, on the device; reading a number from it synchronises.

    layers: layer numbers as Megatron-Core counts them, from 1; MTP layers go on after the decoder's last.
    loads: int64 [E] a layer, summed over the reduce group. bias: float32 [E] a layer after the update, None where
    the router has none. rejected: bool [layers], True where the update was refused and the bias stayed as it was.
    """

    layers: tuple[int, ...]
    loads: tuple[Tensor, ...]
    bias: tuple[Tensor | None, ...]
    rejected: Tensor

    def max_vio(self) -> Tensor:
        """MaxVio of each layer, float64 [layers]."""
        return torch.stack([metrics.max_vio(loads) for loads in self.loads])


class Balancer:
    """Serves the routers of one model: launch, commit, and the record of the last global batch."""

    def __init__(
        self, seats: Iterable[nn.Module], layers: Sequence[int], group: dist.ProcessGroup | None = None
    ) -> None:
        self.seats: list[Seat] = [cast(Seat, seat) for seat in seats]
        self.layers = tuple(layers)
        self.group = group
        self.last: Record | None = None
        self.updates = 0
        self.rejections: Tensor | int = 0  # updates refused so far, int64 [layers] once there was one to judge
        self._sum: LoadSum | None = None

    @torch.no_grad()
    def launch(self) -> None:
        """Starts the all-reduce of this global batch's loads. Nothing happens while one is under way."""
        if self._sum is None and self.seats:
            self._sum = LoadSum([seat.load_window for seat in self.seats], self.group)

    @torch.no_grad()
    def commit(self) -> Record | None:
        """Waits for the loads, moves every bias that is not frozen, empties the windows; None if none was launched."""
        if self._sum is None:
            return None
        seen, sent_from_here = self._sum.wait(), self._sum.sent
        self._sum = None
        refused = [torch.zeros_like(layer.unsound, dtype=torch.bool) for layer in seen]
        for config, seats in self._alike():
            rows = _update(config, [self.seats[i] for i in seats], [seen[i] for i in seats])
            for index, row in zip(seats, rows, strict=True):
                refused[index] = row
        rejected = torch.cat(refused)
        for seat, sent in zip(self.seats, sent_from_here, strict=True):
            seat.load_window.take(sent)
        self.updates += 1
        self.last = Record(
            layers=self.layers,
            loads=tuple(layer.loads_E for layer in seen),
            bias=tuple(None if seat.expert_bias is None else seat.expert_bias.clone() for seat in self.seats),
            rejected=rejected,
        )
        self.rejections = self.rejections + rejected
        self._log()
        return self.last

    def discard(self) -> None:
        """Forgets what was counted since the last commit, and an all-reduce under way; no bias moves."""
        if self._sum is not None:
            self._sum.wait()
            self._sum = None
        for seat in self.seats:
            seat.load_window.reset()

    def _alike(self) -> list[tuple[ALFConfig, list[int]]]:
        """Indices of the seats that can be stepped as one [L, E] stack: same settings, same width."""
        stacks: dict[tuple[ALFConfig, int], list[int]] = defaultdict(list)
        for index, seat in enumerate(self.seats):
            # `frozen_expert_bias` is how Megatron-LM freezes a router (--freeze-all-layers).
            frozen = seat.alf is None or seat.alf.frozen or getattr(seat, "frozen_expert_bias", False)
            if not frozen and seat.alf is not None:
                stacks[seat.alf, seat.load_window.counts_E.numel()].append(index)
        return [(config, indices) for (config, _), indices in stacks.items()]

    def _log(self) -> None:
        every = max((seat.alf.log_every for seat in self.seats if seat.alf), default=0)
        here = not dist.is_initialized() or dist.get_rank(self.group) == 0
        if here and every and self.updates % every == 0 and self.last is not None:
            vio = self.last.max_vio()
            logger.info("global batch %d: MaxVio mean %.4f max %.4f", self.updates, vio.mean(), vio.max())


def _update(config: ALFConfig, seats: Sequence[Seat], seen: Sequence[Seen]) -> Tensor:
    """One step of the rule for seats that share settings and width; bool [L, 1], True where it was refused.

    A layer that saw no token is left as it is. So is one whose step is refused: some token's scores were NaN or
    infinite on any rank, counts overflowed, or the rule itself gave a number that is not finite.
    """
    rows = [seat.read_state() for seat in seats]
    state: State = {name: torch.stack([row[1][name] for row in rows]) for name in rows[0][1]}
    bias_LE = torch.stack([cast(Tensor, seat.expert_bias) for seat in seats])
    loads_LE = torch.stack([layer.loads_E for layer in seen])
    histograms = [layer.histogram_EB for layer in seen if layer.histogram_EB is not None]
    histogram_LEB = torch.stack(histograms) if histograms else None
    some_L1 = loads_LE.sum(dim=-1, keepdim=True) > 0
    n_L1 = torch.stack([row[0] for row in rows]) + 1
    moved_LE, moved = config.rule_knobs.step(bias_LE, Stats(loads_LE, n_L1.squeeze(-1), histogram_LEB), state)
    if config.centring:
        moved_LE = moved_LE - moved_LE.mean(dim=-1, keepdim=True)
    unsound_L1 = torch.stack([layer.unsound for layer in seen]) > 0
    overflown_L1 = (loads_LE < 0).any(dim=-1, keepdim=True)
    refused_L1 = unsound_L1 | overflown_L1 | ~moved_LE.isfinite().all(dim=-1, keepdim=True)
    commit_L1 = some_L1 & ~refused_L1
    moved_LE = torch.where(commit_L1, moved_LE, bias_LE)
    n_L1 = n_L1 - 1 + commit_L1
    after = {name: kept(commit_L1, rows, state[name]) for name, rows in moved.items()}
    for row, seat in enumerate(seats):
        seat.write_state(moved_LE[row], n_L1[row], {name: rows[row] for name, rows in after.items()})
    return refused_L1
