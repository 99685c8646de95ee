"""What the gates of a model's routers give, whichever router it is: Megatron-Core's own has no hook for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alflb_megatron.lab.replay.recording import Gating, Layout
from alflb_megatron.lab.replay.sequence_floor import sequence_floor
from alflb_megatron.routing import Gate, scores_of


@contextmanager
def gate_scores(routers: Sequence[Any], gate: str, most: float = math.inf) -> Iterator[list[list[Tensor]]]:
    """The scores of every forward pass inside the block, before any bias: for each router a list of float32 [T, E].

    On the CPU, and for each router no further pass once there are `most` tokens.
    """
    seen: list[list[Tensor]] = [[] for _ in routers]

    def recorded(plain: Callable[..., Tensor], kept: list[Tensor]) -> Callable[..., Tensor]:
        def gating(*args: Any) -> Tensor:
            logits = plain(*args)
            if sum(map(len, kept)) < most:
                flat_TE = logits.detach().reshape(-1, logits.shape[-1])
                kept.append(scores_of(flat_TE, Gate(topk=1, score_function=gate)).cpu())
            return logits

        return gating

    for router, kept in zip(routers, seen, strict=True):
        router.gating = recorded(router.gating, kept)
    try:
        yield seen
    finally:
        for router in routers:
            del router.gating


def sequence_floors(scores: Sequence[Sequence[Tensor]], gating: Gating, layout: Layout, batch: int) -> list[float]:
    """The sequence floor of each layer for a global batch of that many sequences; none of layers with fewer than two.

    `scores` are those of `gate_scores`, where a rank routes whole sequences.
    """
    found = []
    for parts in scores:
        sequences_NTE = layout.sequences(torch.cat(list(parts))) if parts else None
        if sequences_NTE is not None and len(sequences_NTE) > 1 and bool(sequences_NTE.isfinite().all()):
            found.append(sequence_floor(sequences_NTE, gating, batch))
    return found
