"""What travels in the one all-reduce: windows of different widths, with histograms and without."""

from __future__ import annotations

import pytest
import torch

from alflb_megatron.loads import LoadAllReduce, LoadCounter, counting_all_passes, reset, subtract
from alflb_megatron.margins import BINS, SIDE, Threshold
from alflb_megatron.routing import Gate, margins_of, scores_of, select


def observe(counter: LoadCounter, logits: torch.Tensor, gate: Gate, valid: torch.Tensor | None = None) -> None:
    bias = torch.zeros(logits.shape[1])
    choice = select(logits, gate, bias)
    counter.observe(choice.experts_TK, valid, ranked_TK=choice.ranked_TK)
    if gate.threshold is not None:
        counter.observe_margins(margins_of(logits, choice.map_TE, gate, bias), valid)


def some_logits(experts: int, tokens: int = 40) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts))


def filled(experts: int, threshold: Threshold | None) -> LoadCounter:
    counter = LoadCounter(experts, with_margins=threshold is not None)
    observe(counter, some_logits(experts), Gate(2, "sigmoid", threshold=threshold))
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
        subtract([counter], [sent])
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


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "gate", [Gate(2, "sigmoid"), Gate(2, "softmax"), Gate(2, "sigmoid", score_unit="logit")], ids=str
)
def test_a_score_that_is_no_number_is_found_once_and_not_at_padding(gate: Gate, broken: float) -> None:
    counter, logits = LoadCounter(8), some_logits(8)
    logits[3, 5] = broken
    wanted = int(not bool(scores_of(logits, gate).isfinite().all()))
    if gate.score_unit == "logit":
        wanted = int(broken != float("-inf"))  # which is a masked expert, and not chosen
    observe(counter, logits, gate)
    assert int(counter.nonfinite) == wanted and int(counter.nonfinite) == wanted, "a look finds nothing new"
    padding = torch.ones(40, dtype=torch.bool)
    padding[3] = False
    reset([counter])
    observe(counter, logits, gate, padding)
    assert int(counter.nonfinite) == 0, "what a padding token scores does not matter"


def test_what_came_after_the_sum_was_begun_stays() -> None:
    counter, logits = filled(8, Threshold.OWN), some_logits(8)
    together = LoadAllReduce([counter], None)
    logits[0, 0] = float("nan")
    observe(counter, logits, Gate(2, "sigmoid", threshold=Threshold.OWN))
    subtract([counter], together.sent)
    assert int(together.wait()[0].nonfinite) == 0
    assert int(counter.tokens_per_expert.sum()) == 80 and int(counter.nonfinite) == 1
