"""Balance inside the global batch: what its first micro-batches show holds for the rest, for all see the same weights.

Two time scales. The price p (`expert_bias`) is moved once a global batch, checkpointed, used in evaluation and export;
training routes with the batch's bias w (`batch_bias`), which begins at p and follows the micro-batches (`pool`). With
one micro-batch a global batch that is, bit for bit, what is done without this module.

A chunk's layers send one small all-reduce a micro-batch. It starts when the last of them has routed and is awaited
where the chunk begins the next, so that loss, backward passes and the other layers hide it. One more says that all
ranks had as many micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alflb_megatron.config import PREFIX
from alflb_megatron.pool import Pool
from alflb_megatron.recomputation import is_first_pass
from alflb_megatron.settings import SettingError
from alflb_megatron.update import MicroBatches, Shown, alike, stacked_state

_LIVE: WeakSet[WithinBatch] = WeakSet()
BEGUN = 1024
"""Global batches are told apart modulo this."""
MESSAGES_GIVEN_UP = 64
"""What a rank sends of a global batch that is given up, at least: others may have come further, and one that gave up
before its first micro-batch knows of their number no more than what it was told."""


_LEFT: WeakSet[Any] = WeakSet()


def detach_all() -> None:
    """Leaves every router of this process to its price, until it is attached again."""
    for within in list(_LIVE):
        _LEFT.update(router.load_counter for router in within.routers)
        within.detach()


def attach_again(routers: Iterable[Any] | None = None) -> None:
    """Takes `detach_all` back for some routers, or for all."""
    _LEFT.difference_update(list(_LEFT) if routers is None else [router.load_counter for router in routers])


def may_move(router: Any) -> bool:
    """Whether micro-batches are to move the bias of this router."""
    return bool(router.moves_within_batch) and router.load_counter not in _LEFT


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
        self._begun = 0  # global batches so far, given up or not
        self._open = False  # whether one was begun, or announced, that is not over
        self._told = 0  # micro-batches of this one, as far as Megatron-Core was told
        self._messages_before = 0  # of the last one that was whole
        self._given_up: list[tuple[Tensor, Any]] = []  # messages of one that was not
        self._pools: list[Pool] = []
        self._moving: set[int] = set()
        self._passes = 0  # of routers, in this micro-batch
        self._passes_before = 0  # in the one before
        self._launched = self._finished = self._whole = False
        self._hook: RemovableHandle | None = None
        self._flags: list[Tensor] = []
        self._sum: tuple[Tensor, Any] | None = None
        for router in self.routers:
            router.within_batch = self
        _LIVE.add(self)

    def follow(self, chunk: nn.Module) -> WithinBatch:
        """Has every training pass of `chunk` begin a micro-batch: on every rank alike, whichever layers route in it."""

        def begin(module: nn.Module, *_: Any) -> None:
            if is_first_pass(module.training):
                self.begin_micro_batch()

        self._hook = chunk.register_forward_pre_hook(begin)
        return self

    def detach(self) -> None:
        """Leaves the routers to the price, as once a global batch."""
        self.end(committed=False)
        if self._hook is not None:
            self._hook.remove()
        for router in self.routers:
            if router.within_batch is self:
                router.within_batch = None

    @torch.no_grad()
    def open(self) -> None:
        """A global batch is about to begin, on all ranks; one that was open has been given up."""
        self.end(committed=False)
        self._open, self._told = True, self.routers[0].micro_batches_told()

    # -- called in forward passes -------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_micro_batch(self) -> None:
        """A micro-batch begins: what the one before showed is awaited."""
        if self._finished:  # an update that never came
            self.end(committed=False)
        if not self.micro_batches:
            self._begin()
        else:
            self._take_micro_batch(is_last=False)
        self.micro_batches += 1
        self._launched = False

    def bias_of(self, router: Any) -> Tensor:
        """The bias that a router is to route with now, float32 [E]; a copy, which a second pass can be given."""
        return (router.batch_bias if self.moves(router) else router.expert_bias).clone()

    def moves(self, router: Any) -> bool:
        """Whether this global batch moves the bias of a router, which is settled when it begins."""
        return id(router.load_counter) in self._moving

    @torch.no_grad()
    def end_pass(self, router: Any) -> None:
        """A router has counted its tokens; the message goes after as many as there were in the micro-batch before."""
        self._passes += 1
        if self._passes == self._passes_before and self.micro_batches and not self._launched:
            self._launch()

    # -- called by the balancer ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self) -> None:
        """The last micro-batch is over: takes in what is left, and makes sure that all ranks had as many.

        Raises:
            SettingError: they had not; every rank of the group finds out.
        """
        if self._finished:
            return
        self._finished = True
        if self.micro_batches:
            self._take_micro_batch(is_last=True)
        else:
            self._begin()  # other ranks may have had some
        self._refuse_uneven(0)
        self._launch(final=True)
        self._take(is_last=True, left_over=True)
        self._refuse_uneven(1 if not dist.is_initialized() else dist.get_world_size(self.group))
        self._whole, self._messages_before = True, self.messages

    def shown(self, routers: Sequence[Any]) -> Shown | None:
        """What is to be said to the rule of these routers; None where one micro-batch was all, or none."""
        if self.micro_batches < 2:
            return None
        pool = next((pool for pool in self._pools if pool.routers == list(routers)), None)
        return None if pool is None else pool.shown()

    def figures(self) -> MicroBatches:
        """Of the routers, in their order."""
        found = torch.zeros(len(self.routers), 4, dtype=torch.float64, device=self.routers[0].expert_bias.device)
        for pool in self._pools:
            for router, row in zip(pool.routers, torch.stack(pool.figures, dim=1), strict=True):
                found[self.routers.index(router)] = row
        count, total, worst, overload = found.unbind(1)
        return MicroBatches(self.micro_batches, total / count.clamp(min=1), worst, overload)

    @torch.no_grad()
    def end(self, committed: bool) -> None:
        """The global batch is over, or was given up; what is under way is forgotten.

        Ranks may give one up at different micro-batches. Each goes on to the same number of messages, empty ones for
        those that it came not to: the next one finds all ranks at the same message.
        """
        if committed:
            for pool in self._pools:
                for router in pool.routers:
                    router.alf_micro_batches.fill_(self.micro_batches)
        elif self._open and not self._whole:
            if not self._pools:
                self._begin()
            self._given_up = [self._sum] if self._sum is not None else []  # held until they have arrived
            while self.messages < max(self._messages_before, self._told + 1, MESSAGES_GIVEN_UP):
                self._launch(empty=True)
                self._given_up += [self._sum] if self._sum is not None else []
        self.micro_batches = self.messages = self.bytes_sent = 0
        self._sum, self._launched, self._finished, self._whole = None, False, False, False
        self._pools, self._flags, self._open = [], [], False
        self._moving = set()

    # -- one micro-batch -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._begun += 1
        if not self._open:
            self._open, self._told = True, self.routers[0].micro_batches_told()
        for config, rows in alike(self.routers):
            routers = [self.routers[row] for row in rows]
            price_LE, n_L1, state = stacked_state(routers)
            before_L1 = torch.stack([router.alf_micro_batches for router in routers])
            before_L1 = torch.where(before_L1 > 0, before_L1, routers[0].micro_batches_told())
            pool = Pool(config, routers, price_LE, n_L1, state, before_L1, sent=torch.empty(0))
            pool.sent = pool.counted()
            self._pools.append(pool)
            for router in routers:
                router.batch_bias.copy_(router.expert_bias)
        self._moving = {id(router.load_counter) for pool in self._pools for router in pool.routers}

    def _take_micro_batch(self, is_last: bool) -> None:
        """One message for each micro-batch, launched by now or not: every rank has sent as many."""
        if not self._launched:
            self._launch()
        self._take(is_last)
        self._passes_before, self._passes = self._passes, 0

    def _launch(self, final: bool = False, empty: bool = False) -> None:
        parts = []
        for pool in self._pools:
            now = pool.sent if empty else pool.counted()
            parts.append(now - pool.sent)
            pool.sent = now
        device = self.routers[0].expert_bias.device
        said = (int(final), self._begun % BEGUN)
        flat = torch.cat([*parts, *(torch.full((1,), one, dtype=torch.int32, device=device) for one in said)])
        alone = not dist.is_initialized() or dist.get_world_size(self.group) == 1
        work = None if alone else dist.all_reduce(flat, group=self.group, async_op=True)
        self.messages += 1
        self.bytes_sent += flat.numel() * flat.element_size()
        self._sum, self._launched = (flat, work), True

    def _take(self, is_last: bool, left_over: bool = False) -> None:
        assert self._sum is not None
        (flat, work), self._sum = self._sum, None
        if work is not None:
            work.wait()
        self._flags.append(flat[-2:])
        parts = flat[:-2].split([pool.sent.numel() for pool in self._pools])
        for pool, part in zip(self._pools, parts, strict=True):
            pool.take(part, is_last, left_over)

    def _refuse_uneven(self, last: int) -> None:
        """Refuses unless so many ranks have said "the last", and all speak of the same global batch."""
        if not self._flags:
            return
        ranks = 1 if not dist.is_initialized() else dist.get_world_size(self.group)
        finals, begun = torch.stack(self._flags).unbind(1)
        if int((finals.sum() - last).abs() + (begun != ranks * (self._begun % BEGUN)).sum()):
            raise SettingError(
                f"--{PREFIX}update-every",
                "micro-batch",
                "needs as many micro-batches on every rank of a pipeline stage, and ranks differ in this global batch, "
                "or where they gave up one before; with dynamic batch sizes use global-batch",
            )
