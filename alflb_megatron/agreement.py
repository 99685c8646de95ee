"""Whether all ranks hold the same bias and rule state, found out by numbers that ride on the all-reduce of the loads.

Ranks that share a layer compute the same update from the same sums, so what they hold can differ only if something went
wrong: different files were loaded, memory or a transfer flipped a bit. From then on they would route differently for
ever, and nothing in the loss would say so.

Every rank adds a digest of all it holds, as eight bytes b and their squares. Over W ranks W sum(b^2) = (sum b)^2 holds
exactly when all are equal (Cauchy and Schwarz), and every rank finds the same answer, since it follows from sums alone.
Only where they differ are digests gathered, layer by layer, to say where. A single flipped bit always changes a digest.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHECKSUM_SIZE = 16
"""int64 numbers that ride along: eight bytes and their squares; sums over up to 33,000 ranks fit 32 bits."""


class DisagreementError(RuntimeError):
    """Ranks hold different biases or rule state, and were told to stop on it."""


@dataclass(frozen=True)
class Disagreement:
    """Where ranks differ from the others. `layers`: index of the layer -> the ranks of the group that differ."""

    layers: dict[int, tuple[int, ...]]
    source: dict[int, int]  # index of the layer -> lowest rank that holds what most ranks hold


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """A digest of the bits of `tensors`, int64 scalar on their device; changing the bits of one byte changes it."""
    bytes_ = torch.cat([tensor.detach().contiguous().view(torch.uint8).reshape(-1) for tensor in tensors])
    return (bytes_.to(torch.int64) * _weights(bytes_.numel(), bytes_.device)).sum()  # wraps, as intended


@functools.cache
def _weights(count: int, device: torch.device) -> Tensor:
    """Odd numbers, int64 [count]: they have an inverse modulo 2^64, so no difference of one byte is lost."""
    index = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    return (index * -7046029254386353131) ^ (index << 17) | 1


def checksum(digests: Sequence[Tensor]) -> Tensor:
    """What rides along: int64 [CHECKSUM_SIZE], from one digest a layer."""
    stacked = torch.stack(list(digests))
    odd = 2 * torch.arange(stacked.numel(), device=stacked.device) + 1
    whole = (stacked * odd).sum()
    bytes_ = (whole >> torch.arange(0, 64, 8, device=stacked.device)) & 0xFF
    return torch.cat([bytes_, bytes_ * bytes_])


def all_agree(summed: Tensor, ranks: int) -> Tensor:
    """Whether `ranks` ranks whose `checksum`s sum to this (integer [CHECKSUM_SIZE]) had the same one; bool scalar."""
    bytes_, squares = summed.to(torch.int64).chunk(2)
    return (ranks * squares == bytes_ * bytes_).all()


def locate(digests: Sequence[Tensor], group: dist.ProcessGroup | None) -> Disagreement:
    """Gathers the digests of all layers from all ranks of `group`, each of which has to call it."""
    mine = torch.stack(list(digests))
    everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, mine, group=group)
    by_layer = torch.stack(everywhere).t().tolist()
    layers, source = {}, {}
    for index, values in enumerate(by_layer):
        counts = Counter(values)
        if len(counts) > 1:
            # most ranks are right; between equally many the side of the lowest rank
            right = max(counts, key=lambda value: (counts[value], -values.index(value)))
            layers[index] = tuple(rank for rank, value in enumerate(values) if value != right)
            source[index] = values.index(right)
    return Disagreement(layers, source)


def broadcast_from(tensors: Iterable[Tensor], source: int, group: dist.ProcessGroup | None) -> None:
    """Overwrites `tensors`, in place, with what rank `source` of `group` holds."""
    options: dict[str, Any] = {} if group is None else {"group": group}
    for tensor in tensors:
        dist.broadcast(tensor, src=source if group is None else dist.get_global_rank(group, source), **options)


def describe(found: Disagreement, labels: Sequence[str], group: dist.ProcessGroup | None) -> str:
    """In words: which layers (`labels`: what they are called, by index) and which ranks of the whole job differ."""

    def name(rank: int) -> int:
        return rank if group is None else dist.get_global_rank(group, rank)

    parts = []
    for index, ranks in found.layers.items():
        shown = ", ".join(str(name(rank)) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
        parts.append(f"{labels[index]}: rank{'s' * (len(ranks) > 1)} {shown}")
    more = f"; and {len(parts) - 8} more layers" if len(parts) > 8 else ""
    return "; ".join(parts[:8]) + more
