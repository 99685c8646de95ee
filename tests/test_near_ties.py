"""Coarse histograms that follow a moving bias: nothing is lost, and they say what the fine ones say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alflb_megatron import margins, near_ties
from alflb_megatron.margins import SIDE, Threshold
from alflb_megatron.routing import Gate, margins_of, select


def _routed(experts: int, topk: int, tokens: int = 512, seed: int = 0, bias: torch.Tensor | None = None):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) + torch.linspace(-1, 1, experts)
    gate, bias = Gate(topk, "sigmoid", threshold=Threshold.OWN), torch.zeros(experts) if bias is None else bias
    choice = select(logits, gate, bias)
    histogram = torch.zeros(experts, margins.BINS, dtype=torch.int32)
    margins.add(histogram, margins_of(logits, choice.map_TE, gate, bias))
    return histogram[None], torch.bincount(choice.experts_TK.reshape(-1), minlength=experts)[None]


def test_merging_keeps_counts_and_the_tie() -> None:
    histogram, loads = _routed(16, 2)
    coarse = near_ties.coarsen(histogram)
    assert coarse.shape == (1, 16, near_ties.BINS) and coarse.dtype == torch.int32
    assert torch.equal(coarse.sum(-1), histogram.sum(-1))
    assert torch.equal(margins.sampled_loads(coarse), loads)


def test_what_does_not_move_is_the_same() -> None:
    coarse = near_ties.coarsen(_routed(16, 2)[0]).long()
    still = torch.zeros(1, 16)
    assert torch.equal(near_ties.moved(coarse, still), coarse)
    assert torch.equal(near_ties.coarsen(near_ties.spread(coarse, still)).long(), coarse)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.floats(-3, 3), st.integers(0, 5))
def test_nothing_is_lost_however_far_a_bias_moves(experts: int, by: float, seed: int) -> None:
    coarse = near_ties.coarsen(_routed(experts, 1, 64, seed)[0]).long()
    move = torch.linspace(-by, by, experts)[None]
    for counts in (near_ties.moved(coarse, move), near_ties.spread(coarse, move)):
        assert torch.equal(counts.sum(-1).long(), coarse.sum(-1))
        assert bool((counts >= 0).all())


@pytest.mark.parametrize(("experts", "topk"), [(2, 1), (8, 2), (64, 6)])
def test_a_move_is_the_same_in_either_bins(experts: int, topk: int) -> None:
    """Tokens lie evenly in coarse bins, and so in the fine ones that they are spread over: a load asks for one move."""
    histogram, loads = _routed(experts, topk, 4096)
    coarse = near_ties.UNIT * near_ties.coarsen(histogram).long()
    wanted = near_ties.UNIT * loads.double().mean(-1, keepdim=True).expand(1, experts)
    found = margins.move_to_load(coarse, wanted, near_ties.edges(coarse.device))
    spread = margins.move_to_load(near_ties.spread(coarse, torch.zeros(1, experts)), wanted)
    torch.testing.assert_close(found, spread, rtol=2e-3, atol=0)  # the fine counts are rounded to parts of a token
    assert bool((found[loads != loads.double().mean()] != 0).all())


def test_masked_experts_stay_out_of_reach() -> None:
    histogram = torch.zeros(1, 4, margins.BINS, dtype=torch.int32)
    histogram[..., 0] = 7  # margins of minus infinity
    histogram[0, 0, SIDE:] = 1
    coarse = near_ties.coarsen(histogram).long()
    after = near_ties.moved(coarse, torch.full((1, 4), 5.0))
    assert after[..., 0].tolist() == [[7, 7, 7, 7]]


@pytest.mark.parametrize(("experts", "topk"), [(2, 1), (8, 2), (64, 6)])
def test_the_moved_pool_says_what_a_second_routing_says(experts: int, topk: int) -> None:
    """Loads under another bias, read off the histogram: near those of the tokens routed again."""
    move = torch.linspace(-0.05, 0.05, experts)
    histogram, loads = _routed(experts, topk, 4096)
    _, again = _routed(experts, topk, 4096, bias=move)
    coarse = near_ties.coarsen(histogram).long()
    by = near_ties.relative_move(coarse, move[None])
    assert bool(by.isfinite().all())
    found = near_ties.spread(coarse, by)[..., SIDE:].sum(-1)
    mean = float(loads.double().mean())
    assert float((found - again).abs().max()) < 0.15 * mean
    assert float((found - again).abs().max()) < 0.6 * float((loads - again).abs().max())


def test_no_token_at_all_is_no_trouble() -> None:
    empty = torch.zeros(1, 8, near_ties.BINS, dtype=torch.int64)
    by = near_ties.relative_move(empty, torch.ones(1, 8))
    assert bool(by.isfinite().all())
    assert not near_ties.moved(empty, by).any()
