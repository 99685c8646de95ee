"""The sequence floor: the sampling floor where tokens are independent, above it where those of a sequence are alike."""

from __future__ import annotations

import pytest
import torch

from alflb_megatron.lab.replay.sequence_floor import sequence_floor
from alflb_megatron.metrics import sampling_floor


def _batches(alike: float, count: int = 12, sequences: int = 16, length: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        topics = torch.randn(sequences, 1, 16, generator=generator) * alike
        own = torch.randn(sequences, length, 16, generator=generator) + torch.linspace(-1, 1, 16)
        found.append(torch.sigmoid(topics + own).reshape(-1, 16))
    return found


def test_independent_tokens_have_the_sampling_floor() -> None:
    assert sequence_floor(_batches(0.0), 2) == pytest.approx(sampling_floor(16 * 32, 2, 16), rel=0.25)


def test_sequences_that_choose_alike_have_a_higher_one() -> None:
    assert sequence_floor(_batches(1.0), 2) > 2 * sequence_floor(_batches(0.0), 2)


def test_one_batch_cannot_be_solved_and_judged() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        sequence_floor(_batches(0.0, 1), 2)
