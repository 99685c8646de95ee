"""What a router saw since the last update, and the one all-reduce that sums it over all layers and ranks.

A load is *demand*: the number of valid tokens that chose an expert, before any capacity drop, each token once whatever
is recomputed. Counts are int64: exact at every batch size, and left alone by casts to bf16 that round float buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class LoadWindow(nn.Module):
    """Counts of one router, int64 [E], in a buffer that checkpoints do not hold."""

    counts_E: Tensor

    def __init__(self, num_experts: int, device: torch.device | int | str | None = None) -> None:
        super().__init__()
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("counts_E", counts, persistent=False)
        self.measuring = False
        self.seen = 0  # forward passes counted since the last reset; on the host, for diagnostics

    def is_open(self, training: bool) -> bool:
        """Whether a forward pass belongs to the global batch that is being counted.

        Recomputation runs a layer first without and then with gradients: only the second pass counts. Evaluation is
        left out by `training`, so a forward pass with gradients in evaluation mode does not leak in.
        """
        return self.measuring or (training and torch.is_grad_enabled())

    @torch.no_grad()
    def observe(self, experts_TK: Tensor, valid_T: Tensor | None = None) -> None:
        """Adds the chosen experts of T tokens (int64 [T, K]); those not `valid_T` (bool [T]) are padding."""
        self.seen += 1
        ones = (
            torch.ones_like(experts_TK) if valid_T is None else valid_T.to(torch.int64)[:, None].expand_as(experts_TK)
        )
        self.counts_E.scatter_add_(0, experts_TK.reshape(-1), ones.reshape(-1))

    @torch.no_grad()
    def observe_map(self, map_TE: Tensor, valid_T: Tensor | None = None) -> None:
        """The same from a routing map (bool [T, E]), where the chosen indices cannot be had."""
        self.seen += 1
        if valid_T is not None:
            map_TE = map_TE & valid_T[:, None]
        self.counts_E += map_TE.sum(dim=0)

    def take(self, counts_E: Tensor) -> None:
        """Takes out what has been summed; tokens that came meanwhile stay for the next global batch."""
        self.counts_E -= counts_E
        self.seen = 0

    def reset(self) -> None:
        self.counts_E.zero_()
        self.seen = 0


@contextmanager
def measuring(windows: Sequence[LoadWindow]) -> Iterator[None]:
    """Counts every forward pass inside the block from zero, evaluation included; what was counted before comes back.

    Read `counts_E` before the block ends.
    """
    kept = [(window.counts_E.clone(), window.seen) for window in windows]
    for window in windows:
        window.reset()
        window.measuring = True
    try:
        yield
    finally:
        for window, (counts, seen) in zip(windows, kept, strict=True):
            window.measuring = False
            window.counts_E.copy_(counts)
            window.seen = seen


class LoadSum:
    """The loads of several windows, being summed over a process group by one asynchronous all-reduce.

    Windows may have different numbers of experts: counts travel as one flat int64 tensor.
    """

    def __init__(self, windows: Sequence[LoadWindow], group: dist.ProcessGroup | None) -> None:
        self._widths = [window.counts_E.numel() for window in windows]
        flat = torch.cat([window.counts_E for window in windows])
        self.sent = flat.clone().split(self._widths)  # this rank's share, int64 [E] a window
        self._flat = flat
        alone = not dist.is_initialized() or dist.get_world_size(group) == 1
        self._work = None if alone else dist.all_reduce(self._flat, group=group, async_op=True)

    def wait(self) -> list[Tensor]:
        """The summed loads, int64 [E] for each window, in their order."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return list(self._flat.split(self._widths))
