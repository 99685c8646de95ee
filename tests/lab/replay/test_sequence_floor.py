"""The sequence floor: the sampling floor where tokens are independent, above it where those of a sequence are alike."""

from __future__ import annotations

import statistics

import pytest
import torch

from alflb_megatron.lab.replay.recording import Gating, Layout
from alflb_megatron.lab.replay.replayed_rules import HindsightBias, choose_experts
from alflb_megatron.lab.replay.sequence_floor import sequence_floor
from alflb_megatron.metrics import max_vio, sampling_floor

EXPERTS, BATCH, LENGTH = 16, 16, 32
GATING = Gating(topk=2)


def sequences(alike: float, count: int, seed: int = 3) -> torch.Tensor:
    """Scores [count, LENGTH, EXPERTS] of sequences whose tokens share a topic, the more the larger `alike`."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(count, 1, EXPERTS, generator=generator) * alike
    own = torch.randn(count, LENGTH, EXPERTS, generator=generator) + torch.linspace(-1, 1, EXPERTS)
    return torch.sigmoid(topics + own)


def of_many(alike: float) -> float:
    """MaxVio of fresh batches under the bias of a thousand other sequences."""
    solved = HindsightBias(1, EXPERTS, GATING)
    solved.step(sequences(alike, 1000, seed=1).reshape(1, -1, EXPERTS))
    fresh = sequences(alike, 100 * BATCH, seed=2).reshape(100, -1, EXPERTS) + solved.bias_LE[0]
    return statistics.fmean(float(max_vio(choose_experts(batch, GATING).loads())) for batch in fresh)


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_four_batches_of_sequences_are_enough_and_one_is_somewhat_high(alike: float) -> None:
    truth = of_many(alike)
    for batches, low, high in ((8, 0.9, 1.12), (4, 0.9, 1.12), (1, 0.95, 1.3)):
        found = [sequence_floor(sequences(alike, batches * BATCH, seed), GATING, BATCH) for seed in range(8)]
        assert low < statistics.fmean(found) / truth < high, batches


def test_independent_tokens_have_the_sampling_floor() -> None:
    floor = sequence_floor(sequences(0.0, 8 * BATCH), GATING, BATCH)
    assert floor == pytest.approx(sampling_floor(BATCH * LENGTH, 2, EXPERTS), rel=0.15)


def test_sequences_that_choose_alike_have_a_higher_one() -> None:
    assert sequence_floor(sequences(1.0, 64), GATING, BATCH) > 2 * sequence_floor(sequences(0.0, 64), GATING, BATCH)


def test_groups_are_kept_to() -> None:
    grouped = Gating(topk=2, num_groups=4, group_topk=1)
    assert sequence_floor(sequences(1.0, 64), grouped, BATCH) != sequence_floor(sequences(1.0, 64), GATING, BATCH)


def test_one_sequence_cannot_be_solved_and_judged() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        sequence_floor(sequences(0.0, 1), GATING)


def test_the_tokens_of_a_sequence_are_found_in_micro_batches() -> None:
    """Two micro-batches of two sequences of three positions, as Megatron-Core flattens [sequence, batch]."""
    tokens_TE = torch.tensor([[[10 * (2 * part + b) + s for b in range(2)] for s in range(3)] for part in range(2)])
    found = Layout(3, 2).sequences(tokens_TE.reshape(-1, 1))
    assert found is not None
    assert found.squeeze(-1).tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22], [30, 31, 32]]
    assert Layout(5).sequences(tokens_TE.reshape(-1, 1)) is None
