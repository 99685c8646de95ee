"""The choice of experts against Megatron-Core's own function, bit for bit, and against what is promised of the bias."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from alflb_megatron.routing import Gate, select

TOKENS, EXPERTS = 257, 16


@pytest.fixture(scope="module")
def upstream():  # type: ignore[no-untyped-def]
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    return topk_routing_with_score_function


def logits(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, EXPERTS, generator=generator).to(dtype).requires_grad_()


def bias(seed: int = 1) -> torch.Tensor:
    return torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed)) * 0.1


def gates() -> list[Gate]:
    plain = [
        Gate(topk=topk, score_function=function, pre_softmax=pre, scaling_factor=factor)
        for topk, (function, pre), factor in itertools.product(
            (1, 4), (("sigmoid", False), ("softmax", False), ("softmax", True)), (None, 2.5)
        )
    ]
    grouped = [Gate(topk=4, score_function=function, num_groups=4, group_topk=2) for function in ("sigmoid", "softmax")]
    return plain + grouped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
# Megatron-Core has no biased softmax gate to compare with: it ignores the bias there.
@pytest.mark.parametrize(
    ("gate", "biased"),
    [(gate, biased) for gate in gates() for biased in (False, True) if not biased or gate.score_function == "sigmoid"],
    ids=str,
)
def test_select_is_megatron_cores_routing(upstream, gate: Gate, dtype: torch.dtype, biased: bool) -> None:  # type: ignore[no-untyped-def]
    from alflb_megatron.hosts.core import FLOAT32_SCORES

    ours_in, theirs_in = logits(dtype), logits(dtype)
    p = bias() if biased else None
    ours = select(ours_in, dataclasses.replace(gate, float32_scores=FLOAT32_SCORES), p)
    probs, routing_map = upstream(
        theirs_in,
        gate.topk,
        use_pre_softmax=gate.pre_softmax,
        num_groups=gate.num_groups,
        group_topk=gate.group_topk,
        scaling_factor=gate.scaling_factor,
        score_function=gate.score_function,
        expert_bias=p,
    )
    assert torch.equal(ours.map_TE, routing_map)
    assert torch.equal(ours.probs_TE, probs)
    assert ours.probs_TE.dtype == probs.dtype
    weights = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2)).to(dtype)
    (ours.probs_TE * weights).sum().backward()
    (probs * weights).sum().backward()
    assert torch.equal(ours_in.grad, theirs_in.grad)


@pytest.mark.parametrize("gate", gates(), ids=str)
def test_a_constant_in_the_bias_changes_nothing(gate: Gate) -> None:
    # Eighths: s + p and s + p + 1 stay a rounding away from each other, and no two scores are that close.
    with_bias, shifted = select(logits(), gate, bias()), select(logits(), gate, bias() + 1.0)
    assert torch.equal(with_bias.map_TE, shifted.map_TE)
    assert torch.equal(with_bias.probs_TE, shifted.probs_TE)


@pytest.mark.parametrize("unit", ["score", "logit"])
@pytest.mark.parametrize("gate", gates(), ids=str)
def test_gate_weights_come_from_unbiased_scores(gate: Gate, unit: str) -> None:
    gate = Gate(**{**vars(gate), "score_unit": unit})
    x = logits().detach().double()
    choice = select(logits(), gate, bias())
    scores = torch.sigmoid(x) if gate.score_function == "sigmoid" else torch.softmax(x, dim=-1)
    chosen = torch.where(choice.map_TE, scores, 0.0)
    if (gate.score_function == "sigmoid" and gate.topk > 1) or (
        gate.score_function == "softmax" and not gate.pre_softmax
    ):
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    expected = chosen * (gate.scaling_factor or 1.0)
    torch.testing.assert_close(choice.probs_TE.double(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(choice.map_TE, select(logits(), gate).map_TE), "this bias should have moved some tokens"


@pytest.mark.parametrize("gate", [gate for gate in gates() if not gate.num_groups], ids=str)
def test_the_choice_is_the_k_largest_biased_scores(gate: Gate) -> None:
    p = bias()
    choice = select(logits(), gate, p)
    scores = torch.sigmoid(logits()) if gate.score_function == "sigmoid" else torch.softmax(logits(), dim=-1)
    order = (scores + p).argsort(dim=-1, descending=True)[:, : gate.topk]
    assert torch.equal(choice.map_TE, torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, order, True))


def test_the_gradient_does_not_see_the_bias() -> None:
    p = bias().requires_grad_()
    x = logits()
    select(x, Gate(topk=2, score_function="sigmoid"), p).probs_TE.sum().backward()
    assert x.grad is not None
    assert p.grad is None


def test_groups_are_limited_whatever_the_sign_of_the_biased_scores() -> None:
    gate = Gate(topk=4, score_function="sigmoid", num_groups=4, group_topk=2)
    choice = select(logits(), gate, bias() - 5.0)
    groups = choice.map_TE.view(TOKENS, 4, 4).any(dim=-1).sum(dim=-1)
    assert groups.max() <= 2
    assert torch.equal(choice.map_TE.sum(dim=-1), torch.full((TOKENS,), 4))
