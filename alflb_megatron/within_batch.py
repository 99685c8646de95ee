"""Balance inside the global batch: what its first micro-batches show holds for the rest, for all see the same weights.

Two time scales. The price p (`expert_bias`) is moved once a global batch, checkpointed, used in evaluation and export;
training routes with the batch's bias w (`batch_bias`), which begins at p and follows the micro-batches. After j of M,
with the tokens of all j pooled as they would stand under w (`near_ties`),

    w = p + G d,    G = j / (j + M (1 - g) / g),

d being the move from p that balances them and g the share of a whole batch's move that the rule takes: a Kalman filter
with p as its prior, whose gain after all M is g, the rule's own (docs/rules.md). The price is then moved by the rule
itself, shown the tokens as they would have been routed under p. A rule on loads alone is stepped on each micro-batch,
and the last bias is the price. With one micro-batch a global batch both are, bit for bit, what is done without this.

A chunk's layers send one small all-reduce a micro-batch. It starts when the last of them has routed and is awaited
where the first routes again, so that loss, backward passes and the other layers hide it. One more says that all ranks
had as many micro-batches. Shapes: L layers of a stack, E experts, C coarse bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alflb_megatron import metrics, near_ties
from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.margins import SIDE
from alflb_megatron.rules import State, Stats, keep_where
from alflb_megatron.settings import SettingError
from alflb_megatron.update import MicroBatches, Shown, alike, centred, faded, stacked_state, step


@dataclass
class _Stack:
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
    pool_LEC: Tensor | None = field(init=False)
    seen_L1: Tensor = field(init=False)  # sound micro-batches so far
    figures: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.bias_LE, self.loads_LE = self.price_LE, torch.zeros_like(self.price_LE, dtype=torch.int64)
        margins_ = self.config.rule_knobs.threshold is not None
        self.pool_LEC = self.loads_LE.new_zeros(*self.loads_LE.shape, near_ties.BINS) if margins_ else None
        self.seen_L1 = torch.zeros_like(self.n_L1)
        self.figures = [self.price_LE.new_zeros(len(self.routers), dtype=torch.float64) for _ in range(4)]

    def counted(self) -> Tensor:
        """Everything that these routers have counted on this rank, flat, int32."""
        counters = [router.load_counter for router in self.routers]
        no = torch.zeros_like(counters[0].nonfinite)
        parts = [
            torch.stack([counter.tokens_per_expert for counter in counters]),
            torch.stack([counter.nonfinite for counter in counters]),
            torch.stack([no if counter.dictated is None else counter.dictated for counter in counters]),
        ]
        if self.pool_LEC is not None:
            parts.append(near_ties.coarsen(torch.stack([counter.histogram_EB for counter in counters])))
        return torch.cat([part.reshape(-1).to(torch.int32) for part in parts])

    def take(self, flat: Tensor, is_last: bool) -> None:
        """Takes in what all ranks counted in one micro-batch; where it is the last, nothing is routed after it."""
        (layers, experts), flat = self.price_LE.shape, flat.to(torch.int64)
        sizes = [layers * experts, layers, layers]
        loads, nonfinite, dictated, ties = flat.split([*sizes, flat.numel() - sum(sizes)])
        loads_LE = loads.view(layers, experts)
        some_L1 = loads_LE.sum(-1, keepdim=True) > 0
        sound_L1 = some_L1 & ((nonfinite + dictated).view(-1, 1) == 0)
        self._note(loads_LE, some_L1.squeeze(1))
        if self.pool_LEC is None:
            moved_LE, state = step(self.config, self.bias_LE, Stats(loads_LE, self.n_L1.squeeze(1), None), self.state)
            moved_LE = faded(self.config, self.bias_LE, moved_LE, self.n_L1)
            sound_L1 = sound_L1 & moved_LE.isfinite().all(-1, keepdim=True)
            self.bias_LE = torch.where(sound_L1, moved_LE, self.bias_LE)
            self.state = {name: keep_where(sound_L1, rows, self.state[name]) for name, rows in state.items()}
        else:
            self.pool_LEC = self.pool_LEC + ties.view_as(self.pool_LEC) * sound_L1.unsqueeze(-1)
            self.loads_LE = self.loads_LE + loads_LE * sound_L1
            self.seen_L1 = self.seen_L1 + sound_L1
            if not is_last:
                self._follow(self.pool_LEC, sound_L1)
        for router, bias_E in zip(self.routers, self.bias_LE, strict=True):
            router.batch_bias.copy_(bias_E)

    def _follow(self, pool_LEC: Tensor, sound_L1: Tensor) -> None:
        """Moves the batch's bias to where the pooled tokens ask for it, and the pool with it."""
        stats = Stats(self.loads_LE, self.n_L1.squeeze(1), near_ties.spread(pool_LEC, torch.zeros_like(self.bias_LE)))
        asked = self.config.rule_knobs.share_of_move(stats, self.state)
        assert asked is not None, "a rule that is shown margins says what share of their move it takes"
        move_LE, share_L1 = asked
        noise_L1 = self.micro_batches_L1 * (1 - share_L1) / share_L1.clamp(min=torch.finfo(share_L1.dtype).tiny)
        gain_L1 = self.seen_L1 / (self.seen_L1 + noise_L1).clamp(min=1)
        moved_LE = centred(self.config, self.price_LE + gain_L1 * (self.bias_LE + move_LE - self.price_LE))
        moved_LE = faded(self.config, self.price_LE, moved_LE, self.n_L1)
        moved_LE = torch.where(sound_L1 & moved_LE.isfinite().all(-1, keepdim=True), moved_LE, self.bias_LE)
        load_L1 = metrics.mean_load(self.loads_LE)
        self.pool_LEC = near_ties.moved(pool_LEC, near_ties.relative_move(pool_LEC, load_L1, moved_LE - self.bias_LE))
        self.bias_LE = moved_LE

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
        back_LE = near_ties.relative_move(self.pool_LEC, metrics.mean_load(self.loads_LE), self.price_LE - self.bias_LE)
        histogram_LEB = near_ties.spread(self.pool_LEC, back_LE)
        return Shown(Stats(histogram_LEB[..., SIDE:].sum(-1), self.n_L1.squeeze(1), histogram_LEB))


class WithinBatch:
    """Moves the biases of one chunk's routers inside the global batch.

    Args:
        routers: of the chunk, those with `update_every="micro-batch"`.
        group: what loads are summed over.
    """

    def __init__(self, routers: Sequence[Any], group: dist.ProcessGroup | None) -> None:
        self.routers, self.group = list(routers), group
        self.micro_batches = 0  # begun in this global batch
        self.messages = self.bytes_sent = 0  # of this global batch
        self._stacks: list[_Stack] = []
        self._moving: set[int] = set()
        self._called: list[int] = []  # routers that have routed in this micro-batch, by id
        self._last: int | None = None  # the one that did so last in the micro-batch before
        self._unsent = self._finished = False
        self._flags: list[Tensor] = []
        self._sum: tuple[Tensor, Any] | None = None
        for router in self.routers:
            router.within_batch = self

    # -- called by routers, in forward passes that count -------------------------------------------------------------

    @torch.no_grad()
    def begin_pass(self, router: Any) -> Tensor:
        """The bias that a router is to route this micro-batch with, float32 [E], a copy."""
        if self._finished:  # an update that never came
            self.end(committed=False)
        if not self.micro_batches:
            self._begin()
        if not self._called or id(router) in self._called:
            self._next()
        self._called.append(id(router))
        return self.bias_of(router).clone()

    def bias_of(self, router: Any) -> Tensor:
        """What a pass that does not count is routed with: the bias as it is."""
        return router.batch_bias if id(router) in self._moving else router.expert_bias

    @torch.no_grad()
    def end_pass(self, router: Any) -> None:
        """The router has counted its tokens."""
        self._unsent = True
        if id(router) == self._last and self._sum is None:
            self._launch()

    # -- called by the balancer ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self) -> None:
        """The last micro-batch is over: takes in what is left, and makes sure that all ranks had as many.

        Raises:
            SettingError: they had not; every rank of the group finds out.
        """
        if not self.micro_batches or self._finished:
            return
        self._finished = True
        if self._sum is not None:
            self._take(is_last=True)
        self._refuse_uneven(0)
        self._last = self._called[-1] if self._called else self._last
        unsent = self._unsent
        self._launch(final=True)
        self._take(is_last=True, empty=not unsent)
        self._refuse_uneven(1 if not dist.is_initialized() else dist.get_world_size(self.group))

    def shown(self, routers: Sequence[Any]) -> Shown | None:
        """What is to be said to the rule of these routers; None where one micro-batch was all, or none."""
        if self.micro_batches < 2:
            return None
        stack = next((stack for stack in self._stacks if stack.routers == list(routers)), None)
        return None if stack is None else stack.shown()

    def figures(self) -> MicroBatches:
        """Of the routers, in their order."""
        found = torch.zeros(len(self.routers), 4, dtype=torch.float64, device=self.routers[0].expert_bias.device)
        for stack in self._stacks:
            for router, row in zip(stack.routers, torch.stack(stack.figures, dim=1), strict=True):
                found[self.routers.index(router)] = row
        count, total, worst, overload = found.unbind(1)
        return MicroBatches(self.micro_batches, total / count.clamp(min=1), worst, overload)

    @torch.no_grad()
    def end(self, committed: bool) -> None:
        """The global batch is over, or was given up; what is under way is awaited and forgotten."""
        if self._sum is not None and self._sum[1] is not None:
            self._sum[1].wait()
        if committed:
            for stack in self._stacks:
                for router in stack.routers:
                    router.alf_micro_batches.fill_(self.micro_batches)
        self.micro_batches = self.messages = self.bytes_sent = 0
        self._sum, self._unsent, self._finished = None, False, False
        self._stacks, self._called, self._flags = [], [], []
        self._moving = set()

    # -- one micro-batch -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        for config, rows in alike(self.routers):
            routers = [self.routers[row] for row in rows]
            price_LE, n_L1, state = stacked_state(routers)
            before_L1 = torch.stack([router.alf_micro_batches for router in routers]).clamp(min=1)
            stack = _Stack(config, routers, price_LE, n_L1, state, before_L1, sent=torch.empty(0))
            stack.sent = stack.counted()
            self._stacks.append(stack)
            for router in routers:
                router.batch_bias.copy_(router.expert_bias)
        self._moving = {id(router) for stack in self._stacks for router in stack.routers}

    def _next(self) -> None:
        if self.micro_batches:
            if self._sum is None:
                self._launch()
            self._take(is_last=False)
            self._last = self._called[-1]
        self.micro_batches += 1
        self._called.clear()

    def _launch(self, final: bool = False) -> None:
        parts = []
        for stack in self._stacks:
            now = stack.counted()
            parts.append(now - stack.sent)
            stack.sent = now
        device = self.routers[0].expert_bias.device
        flat = torch.cat([*parts, torch.full((1,), int(final), dtype=torch.int32, device=device)])
        alone = not dist.is_initialized() or dist.get_world_size(self.group) == 1
        work = None if alone else dist.all_reduce(flat, group=self.group, async_op=True)
        self.messages += 1
        self.bytes_sent += flat.numel() * flat.element_size()
        self._sum, self._unsent = (flat, work), False

    def _take(self, is_last: bool, empty: bool = False) -> None:
        assert self._sum is not None
        (flat, work), self._sum = self._sum, None
        if work is not None:
            work.wait()
        self._flags.append(flat[-1:])
        if not empty:
            parts = flat[:-1].split([stack.sent.numel() for stack in self._stacks])
            for stack, part in zip(self._stacks, parts, strict=True):
                stack.take(part, is_last)

    def _refuse_uneven(self, expected: int) -> None:
        if int(torch.cat(self._flags).sum() if self._flags else 0) != expected:
            raise SettingError(
                f"--{PREFIX}update-every",
                "micro-batch",
                "needs as many micro-batches on every rank of a pipeline stage, and ranks differ in this global batch; "
                "with dynamic batch sizes use global-batch",
            )
