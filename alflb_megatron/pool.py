"""What the micro-batches of one global batch have shown of some routers, and the bias that follows from it.

After j of M micro-batches, with the tokens of all j pooled as they would stand under w (`near_ties`),

    w = p + G d,    G = j / (j + M (1 - g) / g),

d being the move from the price p that balances them and g the share of a whole batch's move that the rule takes: a
Kalman filter with p as its prior, whose gain after all M is g, the rule's own (docs/rules.md). The price is then moved
by the rule itself, shown the tokens as they would have been routed under p. A rule on loads alone takes an M-th of its
step on each micro-batch, and the last bias is the price. Shapes: L layers, E experts, C coarse bins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alflb_megatron import metrics, near_ties
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import local
from alflb_megatron.margins import sampled_loads
from alflb_megatron.rules import State, Stats, keep_where
from alflb_megatron.update import Shown, centred, faded, step


@dataclass
class Pool:
    """Routers of one chunk that are moved alike, during one global batch."""

    config: ALFConfig
    routers: list[Any]
    price_LE: Tensor
    n_L1: Tensor
    state: State
    micro_batches_L1: Tensor  # of the last global batch
    sent: Tensor  # counts that have been summed, flat
    bias_LE: Tensor = field(init=False)
    loads_LE: Tensor = field(init=False)
    sampled_LE: Tensor = field(init=False)  # of the tokens in the pool, as they were routed
    pool_LEC: Tensor | None = field(init=False)
    seen_L1: Tensor = field(init=False)  # sound micro-batches so far
    figures: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.bias_LE, self.loads_LE = self.price_LE, torch.zeros_like(self.price_LE, dtype=torch.int64)
        self.sampled_LE = self.loads_LE
        margins_ = self.config.rule_knobs.threshold is not None
        self.pool_LEC = self.loads_LE.new_zeros(*self.loads_LE.shape, near_ties.BINS) if margins_ else None
        self.seen_L1 = torch.zeros_like(self.n_L1)
        self.figures = [self.price_LE.new_zeros(len(self.routers), dtype=torch.float64) for _ in range(4)]

    def counted(self) -> Tensor:
        """Everything that these routers have counted on this rank, flat, int32."""
        counted = local([router.load_counter for router in self.routers])
        no = torch.zeros_like(counted[0].nonfinite)
        parts = [
            torch.stack([counts.loads_E for counts in counted]),
            torch.stack([counts.nonfinite for counts in counted]),
            torch.stack([no if counts.dictated is None else counts.dictated for counts in counted]),
        ]
        histograms = [counts.histogram_EB for counts in counted if counts.histogram_EB is not None]
        if self.pool_LEC is not None:
            parts.append(near_ties.coarsen(torch.stack(histograms)))
        return torch.cat([part.reshape(-1).to(torch.int32) for part in parts])

    def take(self, flat: Tensor, is_last: bool, left_over: bool = False) -> None:
        """Takes in what all ranks counted in one micro-batch; where it is the last, nothing is routed after it.

        `left_over`: what was counted after the message of the last one had gone. No rule on loads takes a step for it.
        """
        (layers, experts), flat = self.price_LE.shape, flat.to(torch.int64)
        sizes = [layers * experts, layers, layers]
        loads, nonfinite, dictated, ties = flat.split([*sizes, flat.numel() - sum(sizes)])
        loads_LE = loads.view(layers, experts)
        some_L1 = loads_LE.sum(-1, keepdim=True) > 0
        sound_L1 = some_L1 & ((nonfinite + dictated).view(-1, 1) == 0)
        if not left_over:
            self._note(loads_LE, some_L1.squeeze(1))
        if self.pool_LEC is None and not left_over:
            moved_LE, state = step(self.config, self.bias_LE, Stats(loads_LE, self.n_L1.squeeze(1), None), self.state)
            part_LE = self.bias_LE + (moved_LE - self.bias_LE) / self.micro_batches_L1
            moved_LE = torch.where(self.micro_batches_L1 > 1, part_LE, moved_LE)  # an M-th of the step
            moved_LE = faded(self.config, self.bias_LE, moved_LE, self.n_L1)
            sound_L1 = sound_L1 & moved_LE.isfinite().all(-1, keepdim=True)
            self.bias_LE = torch.where(sound_L1, moved_LE, self.bias_LE)
            self.state = {name: keep_where(sound_L1, rows, self.state[name]) for name, rows in state.items()}
        elif self.pool_LEC is not None:
            ties_LEC = near_ties.UNIT * ties.view_as(self.pool_LEC) * sound_L1.unsqueeze(-1)
            self.pool_LEC = self.pool_LEC + ties_LEC
            self.sampled_LE = self.sampled_LE + sampled_loads(ties_LEC)
            self.loads_LE = self.loads_LE + near_ties.UNIT * loads_LE * sound_L1
            self.seen_L1 = self.seen_L1 + sound_L1
            if not is_last:
                self._follow(self.pool_LEC, sound_L1)
        for router, bias_E in zip(self.routers, self.bias_LE, strict=True):
            router.batch_bias.copy_(bias_E)

    def _follow(self, pool_LEC: Tensor, sound_L1: Tensor) -> None:
        """Moves the batch's bias to where the pooled tokens ask for it, and the pool with it."""
        stats = self._stats(pool_LEC, near_ties.edges(pool_LEC.device))
        asked = self.config.rule_knobs.share_of_move(stats, self.state)
        assert asked is not None, "a rule that is shown margins says what share of their move it takes"
        move_LE, share_L1 = asked
        noise_L1 = self.micro_batches_L1 * (1 - share_L1) / share_L1.clamp(min=torch.finfo(share_L1.dtype).tiny)
        gain_L1 = self.seen_L1 / (self.seen_L1 + noise_L1).clamp(min=1)
        moved_LE = centred(self.config, self.price_LE + gain_L1 * (self.bias_LE + move_LE - self.price_LE))
        moved_LE = faded(self.config, self.price_LE, moved_LE, self.n_L1)
        moved_LE = torch.where(sound_L1 & moved_LE.isfinite().all(-1, keepdim=True), moved_LE, self.bias_LE)
        self.pool_LEC = near_ties.moved(pool_LEC, near_ties.relative_move(pool_LEC, moved_LE - self.bias_LE))
        self.bias_LE = moved_LE

    def _stats(self, histogram_LEB: Tensor, edges_J: Tensor | None = None) -> Stats:
        """What the pool shows under some bias: loads are those of its tokens, and what all tokens had beyond them."""
        share_L1 = self.sampled_LE.sum(-1, keepdim=True) / self.loads_LE.sum(-1, keepdim=True).clamp(min=1).double()
        moved_LE = (sampled_loads(histogram_LEB) - self.sampled_LE) / share_L1.clamp(
            min=torch.finfo(torch.float64).tiny
        )
        loads_LE = self.loads_LE + moved_LE.round().to(torch.int64)
        return Stats(loads_LE, self.n_L1.squeeze(1), histogram_LEB, edges_J)

    def _note(self, loads_LE: Tensor, some_L: Tensor) -> None:
        vio_L = metrics.max_vio(loads_LE)
        overload_L = metrics.overload(loads_LE, self.routers[0].config.expert_model_parallel_size)
        count, total, worst, overload = self.figures
        count += some_L
        total += vio_L
        torch.maximum(worst, vio_L, out=worst)
        torch.maximum(overload, overload_L * some_L, out=overload)

    def shown(self) -> Shown:
        """For the update of the price."""
        if self.pool_LEC is None:
            none = Stats(self.loads_LE, self.n_L1.squeeze(1))
            return Shown(none, (self.bias_LE, self.state))
        back_LE = near_ties.relative_move(self.pool_LEC, self.price_LE - self.bias_LE)
        return Shown(self._stats(near_ties.spread(self.pool_LEC, back_LE)))
