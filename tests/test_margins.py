"""Histograms of margins: every sample in its bin, and the move that a load asks for, against exact order statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alflb_megatron import margins
from alflb_megatron.margins import BINS, SIDE, Threshold
from alflb_megatron.routing import Gate, add_margins, select


def histogram_of(values_TE: torch.Tensor, valid_T: torch.Tensor | None = None) -> torch.Tensor:
    histogram = torch.zeros(values_TE.shape[1], BINS, dtype=torch.int32)
    margins.add(histogram, values_TE, valid_T)
    return histogram


def choice(tokens: int = 500, experts: int = 12, topk: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ranked = torch.rand(tokens, experts, generator=generator)
    top, found = ranked.topk(topk + 1)
    return ranked, top, found[:, :topk], torch.zeros_like(ranked, dtype=torch.bool).scatter(1, found[:, :topk], True)


def test_bins_are_few_and_their_edges_ascend() -> None:
    edges = margins.edges()
    assert BINS <= 512
    assert len(edges) == BINS + 1
    assert (edges[2:-1] > edges[1:-2]).all()
    assert edges[SIDE] == 0
    widths = edges[SIDE + 2 : -1] / edges[SIDE + 1 : -2]
    assert 1.14 < widths.min() <= widths.max() <= 1.25


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
@settings(deadline=None)
def test_every_number_falls_into_the_bin_between_its_edges(values: list[float]) -> None:
    edges = margins.edges()
    for value in values:
        (place,) = histogram_of(torch.tensor([[value]]))[0].nonzero()[:, 0].tolist()
        above = place >= SIDE
        assert above == (not np.signbit(np.float32(value)))
        if place not in (0, BINS - 1):  # the outermost bins have no outer edge
            low, high = float(edges[place]), float(edges[place + 1])
            assert low <= value <= high
        else:
            assert abs(value) >= 2.0**margins.LARGEST


@pytest.mark.parametrize("threshold", Threshold)
def test_margins_are_the_distance_from_what_an_expert_must_beat(threshold: Threshold) -> None:
    ranked, top, chosen, map_TE = choice()
    found = margins.of_top(ranked, top, chosen, threshold)
    for token in range(50):
        order = sorted(ranked[token].tolist(), reverse=True)
        for expert in range(ranked.shape[1]):
            own = order[3] if map_TE[token, expert] else order[2]
            beat = own if threshold is Threshold.OWN else order[3]
            assert float(found[token, expert]) == pytest.approx(float(ranked[token, expert]) - beat, abs=1e-7)
    assert torch.equal(~torch.signbit(found), map_TE)
    assert torch.equal(found, margins.of_map(ranked, top, map_TE, threshold))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_margins_are_float32_whatever_the_gate_computes_in(dtype: torch.dtype) -> None:
    ranked = choice()[0].to(dtype)
    top, found = ranked.topk(4)
    map_TE = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, found[:, :3], True)
    margins_TE = margins.of_top(ranked, top, found[:, :3], Threshold.OWN)
    assert margins_TE.dtype == torch.float32
    assert torch.equal(~torch.signbit(margins_TE), map_TE)
    histogram_of(margins_TE)


def test_a_tie_stands_on_the_side_of_the_choice() -> None:
    ranked = torch.tensor([[0.5, 0.5, 0.5, 0.1]])
    top, found = ranked.topk(3)
    margins_TE = margins.of_top(ranked, top, found[:, :2], Threshold.OWN)
    map_TE = torch.zeros(1, 4, dtype=torch.bool).scatter(1, found[:, :2], True)
    assert torch.equal(~torch.signbit(margins_TE), map_TE)
    for pair in ([0, 1], [0, 2], [1, 2]):  # whichever two of the three it was
        map_TE = torch.zeros(1, 4, dtype=torch.bool).scatter(1, torch.tensor([pair]), True)
        assert torch.equal(~torch.signbit(margins.of_map(ranked, top, map_TE, Threshold.OWN)), map_TE)


def test_a_move_of_one_expert_under_group_limits_changes_its_choice_where_its_margin_says() -> None:
    from alflb_megatron.routing import group_limited_topk

    generator = torch.Generator().manual_seed(0)
    ranked = torch.rand(200, 16, generator=generator).double()

    def chosen(scores: torch.Tensor) -> torch.Tensor:
        found = group_limited_topk(scores, 4, num_groups=4, group_topk=2)[1]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, found, True)

    map_TE = chosen(ranked)
    found = margins.of_groups(ranked, map_TE, 4, 4, 2, Threshold.OWN)
    assert torch.equal(~torch.signbit(found), map_TE)
    exact = 0
    for expert in range(16):
        for beyond in (0.99, 1.01):  # not quite as far as the margin, and a little further
            moved = ranked.clone()
            moved[:, expert] -= beyond * found[:, expert].double()
            exact += int(((chosen(moved)[:, expert] != map_TE[:, expert]) == (beyond > 1)).sum())
    # One that lifts a group drives another's experts out, which may lower the K-th: a few margins are too long for it.
    assert exact > 0.95 * 200 * 16 * 2


def test_positive_bins_hold_the_loads_and_padding_is_not_counted() -> None:
    ranked, top, chosen, map_TE = choice()
    valid = torch.arange(len(ranked)) % 3 > 0
    found = margins.of_top(ranked, top, chosen, Threshold.OWN)
    histogram = histogram_of(found, valid)
    assert torch.equal(histogram[:, SIDE:].sum(1), map_TE[valid].sum(0))
    assert torch.equal(histogram.sum(1), valid.sum().expand(12))
    assert torch.equal(histogram, histogram_of(found[valid]))


@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 400),
    scale=st.sampled_from([1e-9, 1e-5, 1e-2, 1.0, 50.0]),
    share=st.floats(0.01, 0.99),
)
@settings(deadline=None)
def test_the_move_is_the_exact_quantile_within_a_bin(seed: int, tokens: int, scale: float, share: float) -> None:
    values = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed)) * scale
    load = max(1, round(share * tokens))
    moves = margins.move_to_load(histogram_of(values)[None], torch.tensor([[float(load)]]))[0]
    edges = margins.edges()
    exact = values.sort(dim=0, descending=True).values[load - 1].double()
    for expert, (move, margin) in enumerate(zip(moves.double(), exact, strict=True)):
        place = int((edges[1:-1] <= margin).sum())  # the bin between edges[place] and edges[place + 1]
        slack = 1e-6 * float(margin.abs())
        # the move lies in that bin, or on its edge where the load falls between two samples
        assert edges[place] - slack <= -move <= edges[place + 1] + slack or _neighbours(
            values[:, expert], -move, margin
        )


def _neighbours(values: torch.Tensor, found: torch.Tensor, margin: torch.Tensor) -> bool:
    """Whether no sample lies strictly between the edge that was found and the exact margin."""
    low, high = sorted([float(found), float(margin)])
    return not bool(((values.double() > low + 1e-12) & (values.double() < high - 1e-12)).any())


def test_the_move_gives_the_load() -> None:
    ranked, top, chosen, _ = choice(tokens=4000)
    histogram = histogram_of(margins.of_top(ranked, top, chosen, Threshold.OWN))
    wanted = 4000 * 3 / 12
    moves = margins.move_to_load(histogram[None], torch.tensor([[wanted]]))[0]
    for expert in range(12):
        moved = ranked.clone()
        moved[:, expert] += moves[expert]
        load = int((moved.topk(3).indices == expert).sum())
        assert load == pytest.approx(wanted, rel=0.02)


def test_doubling_every_sample_does_not_change_the_move() -> None:
    values = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    once, load = histogram_of(values)[None], torch.tensor([[30.0]])
    assert torch.equal(margins.move_to_load(once, load), margins.move_to_load(once * 2, load * 2))


def test_an_expert_that_no_token_can_take_stays_and_a_load_out_of_reach_goes_to_the_last_sample() -> None:
    values = torch.tensor([[float("-inf"), 0.5, -0.5], [float("-inf"), 0.25, float("-inf")]])
    moves = margins.move_to_load(histogram_of(values)[None], torch.tensor([[2.0]]))[0]
    assert moves[0] == 0
    assert moves[1] == 0, "it has all there are"
    assert 0.5 <= moves[2] <= 0.65, "to its only token that is in reach"


def test_no_choice_is_left_to_make_where_every_expert_is_chosen() -> None:
    ranked = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    top, chosen = ranked.topk(4)
    histogram = histogram_of(margins.of_top(ranked, top, chosen, Threshold.OWN))
    moves = margins.move_to_load(histogram[None], torch.tensor([[50.0]]))[0]
    assert moves.isfinite().all()
    assert int(histogram[:, :SIDE].sum()) == 0


def test_the_density_at_a_tie_is_the_mean_eigenvalue_of_the_theory() -> None:
    from scipy import stats

    from alflb_megatron.lab.theory.curvature import IndependentScores, laplacian

    experts, topk, tokens = 8, 2, 200_000
    spread = [0.8 + 0.05 * k for k in range(experts)]
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)) * torch.tensor(spread)
    bias = torch.linspace(-0.2, 0.2, experts)
    top = (scores + bias).topk(topk + 1, dim=1)
    histogram = torch.zeros(experts, margins.BINS, dtype=torch.int32)
    found = margins.of_top(scores + bias, top.values, top.indices[:, :topk], margins.Threshold.OWN)
    margins.add(histogram, found)
    density = float(margins.density_at_tie(histogram[None], share=0.02))
    hessian = laplacian(IndependentScores([stats.norm(0, s) for s in spread], topk).weights(bias))
    eigenvalues = torch.linalg.eigvalsh(hessian)[1:]
    assert density * experts / (experts - 1) == pytest.approx(float(eigenvalues.mean()), rel=0.05)


# -- the sample --------------------------------------------------------------------------------------------------------


@given(
    tokens=st.integers(1, 10**9),
    topk=st.integers(1, 16),
    experts=st.integers(2, 1024),
    run=st.integers(1, 10**6),
)
def test_a_sample_resolves_the_chance_in_a_load(tokens: int, topk: int, experts: int, run: int) -> None:
    stride = margins.sample_stride(tokens, topk, experts, run)
    load = tokens * topk / experts
    assert run % stride == 0 and stride & (stride - 1) == 0
    assert stride == 1 or load / stride >= margins.SAMPLE * math.sqrt(load) * (1 - 1e-9)
    # no more than it takes, where the run lets it
    assert run % (2 * stride) or load / (2 * stride) < margins.SAMPLE * math.sqrt(load) * (1 + 1e-9)


def test_of_few_tokens_all_are_measured() -> None:
    assert margins.sample_stride(213, 6, 64, 213) == 1
    assert margins.sample_stride(2**20, 6, 64, 4096) == 32
    assert margins.sample_stride(2**20, 6, 64, 4096 // 2 + 8) == 8, "a rank that holds 2,056 positions of each sequence"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_sample_turns_through_all_positions(batch: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, batch, 12, generator=generator)  # with one sequence: packed documents
    valid = torch.rand(32, batch, generator=generator) < 0.8 if padded else None
    gate, bias = Gate(3, "sigmoid", threshold=Threshold.OWN), torch.randn(12, generator=generator) * 0.1
    chosen = select(logits.view(-1, 12), gate, bias).map_TE.view_as(logits)
    whole, parts = (torch.zeros(12, BINS, dtype=torch.int32) for _ in range(2))
    add_margins(whole, logits, chosen, valid, bias, torch.arange(32), torch.tensor([5]), 1, gate)
    first = margins.positions(32, 4, logits.device)
    for n in range(7, 11):
        before = parts.clone()
        add_margins(parts, logits, chosen, valid, bias, first, torch.tensor([n]), 4, gate)
        held = 8 * batch if valid is None else int(valid[n % 4 :: 4].sum())
        assert torch.equal((parts - before).sum(1), torch.full((12,), held))
    assert torch.equal(parts, whole)
