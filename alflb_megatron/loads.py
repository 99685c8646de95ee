"""What a router saw since the last update, and the one all-reduce that sums it over all layers and ranks.

A load is *demand*: the number of valid tokens that chose an expert, before any capacity drop, each token once whatever
is recomputed. Counts are integers: exact at every batch size, and left alone by casts to bf16 that round float buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alflb_megatron import margins
from alflb_megatron.recomputation import is_first_pass


class LoadCounts(NamedTuple):
    """What one router saw in one global batch."""

    loads_E: Tensor  # int64 [E]
    nonfinite: Tensor  # int64 [1], how often scores that were NaN or infinite were found since the last look
    dictated: Tensor | None  # int64 [1], tokens whose experts somebody else chose, where routers can be replayed
    histogram_EB: Tensor | None  # int32 [E, B], margins of a sample, where the rule needs them


_LIVE: WeakSet[LoadCounter] = WeakSet()


def reset_all() -> None:
    """Empties every counter of this process: whatever was counted belongs to no global batch that will be committed."""
    reset(list(_LIVE))


@torch.no_grad()
def reset(counters: Sequence[LoadCounter]) -> None:
    """Empties counters, in one go."""
    if parts := [part for counter in counters for part in counter.buffers(recurse=False)]:
        torch._foreach_zero_(parts)
    for counter in counters:
        counter.passes = 0


class LoadCounter(nn.Module):
    """Counts of one router, in buffers that checkpoints do not hold.

    Args:
        num_experts: E.
        device: where the router is.
        with_margins: whether to count margins too (`margins.add`).
        with_replay: whether somebody else may choose the experts (router replay).
    """

    tokens_per_expert: Tensor
    found_nonfinite: Tensor
    spoilt: Tensor
    dictated: Tensor | None
    histogram_EB: Tensor | None

    def __init__(
        self,
        num_experts: int,
        device: torch.device | int | str | None = None,
        with_margins: bool = False,
        with_replay: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("tokens_per_expert", num_experts), ("found_nonfinite", 1), ("dictated", int(with_replay))):
            zeros = torch.zeros(size, dtype=torch.int64, device=device) if size else None
            self.register_buffer(name, zeros, persistent=False)
        # 0, or NaN once a score was NaN or infinite: two kernels a pass, where counting such tokens takes eight
        self.register_buffer("spoilt", torch.zeros(1, dtype=torch.float32, device=device), persistent=False)
        histogram = torch.zeros(num_experts, margins.BINS, dtype=torch.int32, device=device) if with_margins else None
        self.register_buffer("histogram_EB", histogram, persistent=False)
        if histogram is not None:
            margins.edges(histogram.device)  # copied to the device now, not while a CUDA graph is captured
        self.counting_all = False
        self.within_batch: Any = None  # what is shown these counts micro-batch by micro-batch (`WithinBatch`)
        self.passes = 0  # forward passes counted since the last reset; on the host, for diagnostics
        _LIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _LIVE.add(self)  # a deep copy, or one that was pickled

    def is_counting(self, training: bool) -> bool:
        """Whether a forward pass belongs to the global batch that is being counted (`recomputation.is_first_pass`)."""
        return self.counting_all or is_first_pass(training)

    @property
    def wants_margins(self) -> bool:
        """Whether the pass that is being counted should bring its margins."""
        return self.histogram_EB is not None and not self.counting_all

    @property
    def nonfinite(self) -> Tensor:
        """How often scores that were NaN or infinite were found since the last look at it, int64 [1]: the buffer."""
        return self.local().nonfinite

    @torch.no_grad()
    def observe(
        self,
        experts_TK: Tensor,
        valid_T: Tensor | None = None,
        *,
        ranked_TK: Tensor | None = None,
        dictated: bool = False,
    ) -> None:
        """Adds the choices of T tokens.

        Args:
            experts_TK: chosen experts, int64 [T, K].
            valid_T: bool [T], False at padding, which is not counted; None where all are tokens.
            ranked_TK: the scores that won: NaN ranks above all, so scores are sound where these are.
            dictated: whether somebody else chose these experts.
        """
        self.passes += 1
        device = experts_TK.device
        count_1 = margins.one(torch.int64, device) if valid_T is None else valid_T.to(torch.int64)[:, None]
        self.tokens_per_expert.scatter_add_(0, experts_TK.reshape(-1), count_1.expand_as(experts_TK).reshape(-1))
        self._observe_scores(ranked_TK, valid_T)
        if dictated and self.dictated is not None:
            self.dictated += experts_TK.shape[0] if valid_T is None else valid_T.sum()

    @torch.no_grad()
    def observe_map(self, map_TE: Tensor, valid_T: Tensor | None = None, *, weights_TE: Tensor | None = None) -> None:
        """The same from a routing map (bool [T, E]) and the gate weights, where a fused kernel gives no more."""
        self.passes += 1
        counted_TE = map_TE if valid_T is None else map_TE & valid_T[:, None]
        self.tokens_per_expert += counted_TE.sum(dim=0)
        self._observe_scores(weights_TE, valid_T)

    def _observe_scores(self, numbers_TX: Tensor | None, valid_T: Tensor | None) -> None:
        if numbers_TX is not None:
            if valid_T is not None:
                numbers_TX = numbers_TX.where(valid_T[:, None], 0.0)
            # a sum is finite only if all of its terms are, and 0 times what is not is NaN
            self.spoilt.add_(numbers_TX.sum(dtype=torch.float32), alpha=0.0)

    @torch.no_grad()
    def observe_margins(self, margins_XE: Tensor, valid_X: Tensor | None = None) -> None:
        """Adds the margins, float32 [X, E], of a sample of the tokens, those not `valid_X` (bool [X]) left out."""
        assert self.histogram_EB is not None
        margins.add(self.histogram_EB, margins_XE, valid_X)

    def local(self) -> LoadCounts:
        """What has been counted so far, on this rank: the buffers themselves."""
        return local([self])[0]

    def reset_parameters(self) -> None:
        """Counts begin at zero: what frameworks call on each module that they have given memory (`to_empty`)."""
        reset([self])


@torch.no_grad()
def local(counters: Sequence[LoadCounter]) -> list[LoadCounts]:
    """What each has counted so far, on this rank: the buffers themselves."""
    if counters:
        spoilt = [counter.spoilt for counter in counters]
        found = torch.cat(spoilt).ne(0).to(torch.int64).split(1)
        torch._foreach_add_([counter.found_nonfinite for counter in counters], found)
        torch._foreach_zero_(spoilt)
    return [LoadCounts(c.tokens_per_expert, c.found_nonfinite, c.dictated, c.histogram_EB) for c in counters]


@torch.no_grad()
def subtract(counters: Sequence[LoadCounter], sent: Sequence[LoadCounts]) -> None:
    """Takes out what has been summed, in one go; tokens that came meanwhile stay for the next global batch."""
    mine, gone = [], []
    for counter, counts in zip(counters, sent, strict=True):
        parts = (counter.tokens_per_expert, counter.found_nonfinite, counter.dictated, counter.histogram_EB)
        for part, out in zip(parts, counts, strict=True):
            if part is not None and out is not None:
                mine.append(part)
                gone.append(out)
        counter.passes = 0
    if mine:
        torch._foreach_sub_(mine, gone)


@contextmanager
def counting_all_passes(counters: Sequence[LoadCounter]) -> Iterator[None]:
    """Counts every forward pass inside the block from zero, evaluation included; what was counted before comes back.

    Loads alone: margins are not measured. Read `tokens_per_expert` before the block ends.
    """
    parts = [[part for part in counter.local()[:3] if part is not None] for counter in counters]
    kept = [([part.clone() for part in of], counter.passes) for of, counter in zip(parts, counters, strict=True)]
    for of, counter in zip(parts, counters, strict=True):
        for part in of:
            part.zero_()
        counter.counting_all = True
    try:
        yield
    finally:
        for of, counter, (before, seen) in zip(parts, counters, kept, strict=True):
            counter.counting_all = False
            counter.spoilt.zero_()
            for part, value in zip(of, before, strict=True):
                part.copy_(value)
            counter.passes = seen


class LoadAllReduce:
    """What several counters saw, being summed over a process group by one asynchronous all-reduce.

    Counters may differ in their number of experts, and have histograms or none: all travels as one flat tensor, int64
    without histograms and int32 with them, which holds global batches of up to 2^31 - 1 tokens. A `piggyback`, a few
    small integers that are to be summed as well, rides along.
    """

    def __init__(
        self,
        counters: Sequence[LoadCounter],
        group: dist.ProcessGroup | None,
        with_margins: bool = True,
        piggyback: Tensor | None = None,
    ) -> None:
        here = local(counters)
        if not with_margins:
            here = [seen._replace(histogram_EB=None) for seen in here]
        self._here = here
        histograms = [seen.histogram_EB.reshape(-1) for seen in here if seen.histogram_EB is not None]
        integers = [part for seen in here for part in seen[:3] if part is not None]
        self._piggybacked = 0 if piggyback is None else piggyback.numel()
        self._flat = torch.cat(integers if piggyback is None else [*integers, piggyback])
        if histograms:
            self._flat = torch.cat([self._flat.to(torch.int32), *histograms])
        self.sent = self._unpack(self._flat.clone())  # this rank's share
        alone = not dist.is_initialized() or dist.get_world_size(group) == 1
        self._work = None if alone else dist.all_reduce(self._flat, group=group, async_op=True)

    @property
    def nbytes(self) -> int:
        """Size of the one tensor that is summed."""
        return self._flat.numel() * self._flat.element_size()

    def wait(self) -> list[LoadCounts]:
        """What all ranks of the group saw, one for each counter, in their order."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._unpack(self._flat)

    @property
    def piggyback(self) -> Tensor:
        """The sum of what rode along, after `wait`."""
        end = sum(self._integers)
        return self._flat[end - self._piggybacked : end]

    @property
    def _integers(self) -> list[int]:
        """Sizes of what comes before the histograms."""
        return [part.numel() for seen in self._here for part in seen[:3] if part is not None] + [self._piggybacked]

    def _unpack(self, flat: Tensor) -> list[LoadCounts]:
        """Views of the histograms, int64 of the counts."""
        sizes = self._integers
        counts = iter(flat[: sum(sizes)].to(torch.int64).split(sizes))
        wide = [seen.histogram_EB.numel() for seen in self._here if seen.histogram_EB is not None]
        histograms = iter(flat[sum(sizes) :].split(wide))
        return [
            LoadCounts(
                loads_E=next(counts),
                nonfinite=next(counts),
                dictated=None if seen.dictated is None else next(counts),
                histogram_EB=None if seen.histogram_EB is None else next(histograms).view_as(seen.histogram_EB),
            )
            for seen in self._here
        ]
