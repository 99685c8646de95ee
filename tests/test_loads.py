"""What travels in the one all-reduce: windows of different widths, with histograms and without."""

from __future__ import annotations

import torch

from alflb_megatron.loads import LoadSum, LoadWindow, measuring
from alflb_megatron.margins import BINS, SIDE, Threshold
from alflb_megatron.routing import Choice, Gate, select


def choice(experts: int, gate: Gate, tokens: int = 40) -> Choice:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts))
    return select(logits, gate, torch.zeros(experts), with_margins=True)


def filled(experts: int, threshold: Threshold | None) -> LoadWindow:
    window = LoadWindow(experts, with_margins=threshold is not None)
    found = choice(experts, Gate(2, "sigmoid", threshold=threshold))
    window.observe(found.experts_TK, ranked_TK=found.ranked_TK, margins_TE=found.margins_TE)
    return window


def test_windows_of_all_kinds_travel_together_and_come_back_as_they_were() -> None:
    windows = [filled(8, Threshold.OWN), filled(12, None), filled(6, Threshold.NEXT)]
    together = LoadSum(windows, None)
    assert together.nbytes == 4 * ((8 + 1 + 8 * BINS) + (12 + 1) + (6 + 1 + 6 * BINS))
    for window, seen, sent in zip(windows, together.wait(), together.sent, strict=True):
        assert torch.equal(seen.loads_E, window.counts_E)
        assert seen.loads_E.dtype == torch.int64
        assert int(seen.loads_E.sum()) == 80
        if window.histogram_EB is None:
            assert seen.histogram_EB is None
        else:
            assert torch.equal(seen.histogram_EB, window.histogram_EB)
            assert torch.equal(seen.histogram_EB[:, SIDE:].sum(1), seen.loads_E)
        window.take(sent)
        assert not any(part.any() for part in window.now() if part is not None)


def test_without_histograms_counts_travel_as_int64() -> None:
    together = LoadSum([filled(8, None), filled(12, None)], None)
    assert together.nbytes == 8 * (8 + 1 + 12 + 1)


def test_measuring_leaves_the_histogram_and_what_was_counted_alone() -> None:
    window = filled(8, Threshold.OWN)
    counts, histogram = window.counts_E.clone(), window.histogram_EB.clone()
    with measuring([window]):
        assert not window.wants_margins
        window.observe(torch.zeros(5, 2, dtype=torch.int64))
        assert window.counts_E.tolist() == [10, 0, 0, 0, 0, 0, 0, 0]
    assert torch.equal(window.counts_E, counts)
    assert torch.equal(window.histogram_EB, histogram)
    assert window.wants_margins


def test_a_nan_among_those_not_chosen_is_unsound_too() -> None:
    window = LoadWindow(8, with_margins=True)
    found = choice(8, Gate(2, "sigmoid", threshold=Threshold.OWN))
    broken = found.margins_TE.clone()
    broken[3, 5] = float("nan")
    window.observe(found.experts_TK, ranked_TK=found.ranked_TK, margins_TE=broken)
    assert int(window.unsound) == 1
    padding = torch.ones(40, dtype=torch.bool)
    padding[3] = False
    window.reset()
    window.observe(found.experts_TK, padding, ranked_TK=found.ranked_TK, margins_TE=broken)
    assert int(window.unsound) == 0, "what a padding token scores does not matter"
