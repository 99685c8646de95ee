"""Balance inside the global batch: what its first micro-batches show holds for the rest, for all see the same weights.

Two time scales. The price p (`expert_bias`) is moved once a global batch, checkpointed, used in evaluation and export;
training routes with the batch's bias w (`batch_bias`), which begins at p and follows the micro-batches (`pool`). With
one micro-batch a global batch that is, bit for bit, what is done without this module.

A chunk's layers send one small all-reduce a micro-batch. It starts when the last of them has routed and is awaited
where the chunk begins the next, so that loss, backward passes and the other layers hide it. One more says that all
ranks had as many micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alflb_megatron.config import PREFIX
from alflb_megatron.pool import Pool
from alflb_megatron.settings import SettingError
from alflb_megatron.update import MicroBatches, Shown, alike, stacked_state

_LIVE: WeakSet[WithinBatch] = WeakSet()


def detach_all() -> None:
    """Leaves every router of this process to its price."""
    for within in list(_LIVE):
        within.detach()


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
        self._pools: list[Pool] = []
        self._moving: set[int] = set()
        self._routed: int | None = None  # the router that counted last, by id
        self._last: int | None = None  # the one that did so last in the micro-batch before
        self._launched = self._finished = False
        self._hook: RemovableHandle | None = None
        self._flags: list[Tensor] = []
        self._sum: tuple[Tensor, Any] | None = None
        for router in self.routers:
            router.within_batch = self
        _LIVE.add(self)

    def follow(self, chunk: nn.Module) -> WithinBatch:
        """Has every training pass of `chunk` begin a micro-batch: on every rank alike, whichever layers route in it."""

        def begin(module: nn.Module, *_: Any) -> None:
            if module.training and torch.is_grad_enabled():
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
        return (router.batch_bias if id(router) in self._moving else router.expert_bias).clone()

    @torch.no_grad()
    def end_pass(self, router: Any) -> None:
        """The router has counted its tokens; the message goes where the last one did so in the micro-batch before."""
        self._routed = id(router)
        if self._routed == self._last and self.micro_batches and not self._launched:
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
        self._take(is_last=True)
        self._refuse_uneven(1 if not dist.is_initialized() else dist.get_world_size(self.group))

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
        """The global batch is over, or was given up; what is under way is awaited and forgotten."""
        if self._sum is not None and self._sum[1] is not None:
            self._sum[1].wait()
        if committed:
            for pool in self._pools:
                for router in pool.routers:
                    router.alf_micro_batches.fill_(self.micro_batches)
        self.micro_batches = self.messages = self.bytes_sent = 0
        self._sum, self._launched, self._finished = None, False, False
        self._pools, self._flags = [], []
        self._moving = set()

    # -- one micro-batch -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        for config, rows in alike(self.routers):
            routers = [self.routers[row] for row in rows]
            price_LE, n_L1, state = stacked_state(routers)
            before_L1 = torch.stack([router.alf_micro_batches for router in routers]).clamp(min=1)
            pool = Pool(config, routers, price_LE, n_L1, state, before_L1, sent=torch.empty(0))
            pool.sent = pool.counted()
            self._pools.append(pool)
            for router in routers:
                router.batch_bias.copy_(router.expert_bias)
        self._moving = {id(router) for pool in self._pools for router in pool.routers}

    def _take_micro_batch(self, is_last: bool) -> None:
        """One message for each micro-batch, launched by now or not: every rank has sent as many."""
        if not self._launched:
            self._launch()
        self._take(is_last)
        self._last = self._routed

    def _launch(self, final: bool = False) -> None:
        parts = []
        for pool in self._pools:
            now = pool.counted()
            parts.append(now - pool.sent)
            pool.sent = now
        device = self.routers[0].expert_bias.device
        flat = torch.cat([*parts, torch.full((1,), int(final), dtype=torch.int32, device=device)])
        alone = not dist.is_initialized() or dist.get_world_size(self.group) == 1
        work = None if alone else dist.all_reduce(flat, group=self.group, async_op=True)
        self.messages += 1
        self.bytes_sent += flat.numel() * flat.element_size()
        self._sum, self._launched = (flat, work), True

    def _take(self, is_last: bool) -> None:
        assert self._sum is not None
        (flat, work), self._sum = self._sum, None
        if work is not None:
            work.wait()
        self._flags.append(flat[-1:])
        parts = flat[:-1].split([pool.sent.numel() for pool in self._pools])
        for pool, part in zip(self._pools, parts, strict=True):
            pool.take(part, is_last)

    def _refuse_uneven(self, expected: int) -> None:
        if int(torch.cat(self._flags).sum() if self._flags else 0) != expected:
            raise SettingError(
                f"--{PREFIX}update-every",
                "micro-batch",
                "needs as many micro-batches on every rank of a pipeline stage, and ranks differ in this global batch; "
                "with dynamic batch sizes use global-batch",
            )
