"""What travels in the one all-reduce: windows of different widths, with histograms and without."""

from __future__ import annotations

import torch

from alflb_megatron.loads import LoadAllReduce, LoadCounter, counting_all_passes, reset
from alflb_megatron.margins import BINS, SIDE, Threshold
from alflb_megatron.routing import Choice, Gate, select


def choice(experts: int, gate: Gate, tokens: int = 40) -> Choice:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts))
    return select(logits, gate, torch.zeros(experts), with_margins=True)


def filled(experts: int, threshold: Threshold | None) -> LoadCounter:
    counter = LoadCounter(experts, with_margins=threshold is not None)
    found = choice(experts, Gate(2, "sigmoid", threshold=threshold))
    counter.observe(found.experts_TK, ranked_TK=found.ranked_TK, margins_TE=found.margins_TE)
    return counter


def test_windows_of_all_kinds_travel_together_and_come_back_as_they_were() -> None:
    windows = [filled(8, Threshold.OWN), filled(12, None), filled(6, Threshold.NEXT)]
    together = LoadAllReduce(windows, None)
    assert together.nbytes == 4 * ((8 + 1 + 8 * BINS) + (12 + 1) + (6 + 1 + 6 * BINS))
    for counter, seen, sent in zip(windows, together.wait(), together.sent, strict=True):
        assert torch.equal(seen.loads_E, counter.tokens_per_expert)
        assert seen.loads_E.dtype == torch.int64
        assert int(seen.loads_E.sum()) == 80
        if counter.histogram_EB is None:
            assert seen.histogram_EB is None
        else:
            assert torch.equal(seen.histogram_EB, counter.histogram_EB)
            assert torch.equal(seen.histogram_EB[:, SIDE:].sum(1), seen.loads_E)
        counter.subtract(sent)
        assert not any(part.any() for part in counter.local() if part is not None)


def test_without_histograms_counts_travel_as_int64() -> None:
    together = LoadAllReduce([filled(8, None), filled(12, None)], None)
    assert together.nbytes == 8 * (8 + 1 + 12 + 1)


def test_measuring_leaves_the_histogram_and_what_was_counted_alone() -> None:
    counter = filled(8, Threshold.OWN)
    counts, histogram = counter.tokens_per_expert.clone(), counter.histogram_EB.clone()
    with counting_all_passes([counter]):
        assert not counter.wants_margins
        counter.observe(torch.zeros(5, 2, dtype=torch.int64))
        assert counter.tokens_per_expert.tolist() == [10, 0, 0, 0, 0, 0, 0, 0]
    assert torch.equal(counter.tokens_per_expert, counts)
    assert torch.equal(counter.histogram_EB, histogram)
    assert counter.wants_margins


def test_a_nan_among_those_not_chosen_is_unsound_too() -> None:
    counter = LoadCounter(8, with_margins=True)
    found = choice(8, Gate(2, "sigmoid", threshold=Threshold.OWN))
    broken = found.margins_TE.clone()
    broken[3, 5] = float("nan")
    counter.observe(found.experts_TK, ranked_TK=found.ranked_TK, margins_TE=broken)
    assert int(counter.nonfinite) == 1
    padding = torch.ones(40, dtype=torch.bool)
    padding[3] = False
    reset([counter])
    counter.observe(found.experts_TK, padding, ranked_TK=found.ranked_TK, margins_TE=broken)
    assert int(counter.nonfinite) == 0, "what a padding token scores does not matter"
