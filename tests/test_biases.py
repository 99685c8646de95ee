"""What may be done to biases: a shift that changes no choice, and the betas of quantile balancing converted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alflb_megatron.biases import GRID, Biases, bias_from_qb_beta, listed, threshold_of_qb_beta
from alflb_megatron.routing import Gate, select
from alflb_megatron.settings import SettingError

GATES = ("sigmoid", "softmax", "sqrtsoftplus")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=16))
def test_the_shift_needed_is_enough_and_no_more_than_a_grid_step(row: list[float]) -> None:
    biases = Biases({2: torch.tensor(row)})
    amount = biases.shift_needed()
    assert amount % GRID == 0 and biases.shifted(amount).lowest >= 0
    assert (amount == 0) == (min(row) >= 0)
    if amount:
        assert min(row) + amount - GRID <= 0 < min(row) + amount


@pytest.mark.parametrize("groups", [(None, None), (4, 2)])
def test_a_shift_moves_no_choice_that_its_rounding_does_not(groups: tuple[int | None, int | None]) -> None:
    generator = torch.Generator().manual_seed(3)
    biases = Biases({2: torch.randn(16, generator=generator)})
    logits = torch.randn(4096, 16, generator=generator)
    amount = biases.shift_needed()
    gate = Gate(4, "sigmoid", num_groups=groups[0], group_topk=groups[1])
    assert amount > 1
    plain, moved = (select(logits, gate, b.rows[2]) for b in (biases, biases.shifted(amount)))
    assert torch.equal(plain.map_TE, moved.map_TE)
    assert 0 < biases.rounding(amount) < 2 * torch.finfo(torch.float32).eps * (amount + 4)


@pytest.mark.parametrize("score_function", GATES)
def test_beta_is_exact_for_a_token_at_its_threshold(score_function: str) -> None:
    """A token's own threshold gives it quantile balancing's choice: the K largest of z - beta."""
    generator = torch.Generator().manual_seed(4)
    beta, logits = torch.randn(16, generator=generator), torch.randn(200, 16, generator=generator)
    differs = 0
    for token in logits.split(1):
        theirs = (token - beta).topk(4).indices.sort().values
        at = threshold_of_qb_beta(token, beta, 4, score_function)
        bias = bias_from_qb_beta(beta, score_function, at)
        ours = select(token, Gate(4, score_function), bias).experts_TK.sort().values
        assert torch.equal(theirs, ours)
        assert abs(float(bias.sum())) < 1e-5
        differs += not torch.equal(token.topk(4).indices.sort().values, theirs)
    assert differs > 100, "the betas decide nothing"


def test_beta_on_logits_is_its_negative() -> None:
    beta = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(bias_from_qb_beta(beta), -beta)


@pytest.mark.parametrize(
    ("score_function", "threshold", "said"),
    [("sigmoid", 1.0, "threshold=1.0"), ("softmax", 0.0, "threshold=0.0"), ("relu", 0.5, "score_function=relu")],
)
def test_a_threshold_that_is_no_score_is_refused(score_function: str, threshold: float, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        bias_from_qb_beta(torch.zeros(4), score_function, threshold)


def test_layers_are_listed_in_words() -> None:
    assert listed([4, 2, 3, 7, 9, 8, 12]) == "2 to 4, 7 to 9, 12"
    assert (listed([1, 2]), listed([])) == ("1, 2", "none")
