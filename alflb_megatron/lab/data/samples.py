"""From a split's numbered samples to micro-batches: what every source shares."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from alflb_megatron.settings import SettingError

VALIDATION_SHARE = 0.05


class Sample(NamedTuple):
    """One sequence: tokens int64 [S], labels int64 [S] (the tokens one ahead), loss_mask float32 [S]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B sequences of S tokens, on the CPU until `to` moves it.

    tokens, labels, position_ids: int64 [B, S]; loss_mask: float32 [B, S]. No token is padding: sources fill sequences.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        return Batch(*(part.to(device) for part in (self.tokens, self.labels, self.loss_mask, self.position_ids)))


class TextData:
    """One split of a source: windows of S + 1 tokens with stride S, so that an epoch predicts no token twice.

    `fingerprint` is a SHA-256 of the content and of what decides the order, not of the path nor of the run's length:
    with equal fingerprints every index gives the same sample. `description` says in a line what was read and left out.
    """

    fingerprint: str
    description: str

    def __init__(self, seed: int, shuffled_from: int | None) -> None:
        # The first epoch whose windows are permuted; None leaves them as they lie in every epoch.
        self._seed, self._shuffled_from = seed, shuffled_from

    def __len__(self) -> int:
        """Samples in one epoch."""
        raise NotImplementedError

    def _window(self, index: int) -> Sample:
        """Window `index` of the split, below `len(self)`."""
        raise NotImplementedError

    def sample(self, index: int) -> Sample:
        """Sample `index` from 0 on. At `len(self)` the next epoch begins: training in a new order, validation not."""
        if index < 0:
            raise IndexError(f"sample {index}: samples are counted from 0")
        epoch, place = divmod(index, len(self))
        if self._shuffled_from is not None and epoch >= self._shuffled_from:
            place = int(_order(self._seed, epoch, len(self))[place])
        return self._window(place)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray[Any, Any]:
    """The permutation of `range(size)` that belongs to seed and epoch: int64 [size].

    It sorts the raw 64-bit stream of Philox, which NumPy keeps fixed across versions and platforms;
    for `Generator.permutation` it gives no such promise (NEP 19).
    """
    stream = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    return np.argsort(stream.random_raw(size), kind="stable")


def collate(data: TextData, indices: Iterable[int]) -> Batch:
    """The samples `indices` as one batch [B, S]; positions count from 0 in each sequence."""
    tokens, labels, loss_mask = (torch.stack(part) for part in zip(*map(data.sample, indices), strict=True))
    return Batch(tokens, labels, loss_mask, torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1))


def micro_batches(
    data: TextData, *, step: int, global_batch_size: int, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[Batch]:
    """The micro-batches of one data-parallel rank for the global batch of `step` (from 0), in order.

    Micro-batch m of rank r holds `micro_batch_size` consecutive samples, from
    step * global_batch_size + (m * dp_size + r) * micro_batch_size on, as Megatron-LM deals them
    (megatron/training/datasets/data_samplers.py:MegatronPretrainingSampler).

    Raises SettingError where the global batch does not divide into micro-batches over the ranks.
    """
    stride = micro_batch_size * dp_size
    if global_batch_size < 1 or global_batch_size % stride:
        raise SettingError(
            "--global-batch-size",
            global_batch_size,
            f"must be a multiple of --micro-batch-size={micro_batch_size} times the data-parallel size {dp_size}",
        )
    if step < 0 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"step {step}, data-parallel rank {dp_rank} of {dp_size}: out of range")
    first, end = step * global_batch_size + dp_rank * micro_batch_size, (step + 1) * global_batch_size
    return (collate(data, range(start, start + micro_batch_size)) for start in range(first, end, stride))


def check_vocabulary(tokenizer: str, size: int, vocab_size: int) -> None:
    """Raises SettingError where a tokenizer has more tokens than the model."""
    if size > vocab_size:
        need = f"its {size} tokens need a --vocab-size of {size} or more, not {vocab_size}"
        raise SettingError("--tokenizer", tokenizer, need)
