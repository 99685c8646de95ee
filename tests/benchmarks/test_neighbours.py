"""Rules of others as they are described, and the workloads of Megatron-LM #7488 as scores."""

import pytest
import torch

from alflb_megatron.lab.replay.recording import Gating, Layout, Recording
from alflb_megatron.lab.replay.replayed_rules import choose_experts
from alflb_megatron.rules import Stats
from benchmarks import neighbours
from benchmarks.neighbours import CausalDual, MovingQuantile, PhiBalancing
from benchmarks.streams import WORKLOADS

GATING = Gating(2, "sigmoid")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_without_a_bias_a_workload_chooses_as_the_benchmark_does(workload):
    for step, scores_LTE in zip((0, 1, 2, 3, 4), workload.recording(0), strict=False):
        experts, others = workload.preferred(step)
        chosen_TK = choose_experts(scores_LTE[0], GATING).experts_TK
        hot_T = torch.isin(chosen_TK, torch.tensor(list(experts))).all(dim=1)
        prefers_T = torch.arange(workload.tokens) % others != 0 if others else torch.ones_like(hot_T)
        assert hot_T[prefers_T].all() or not experts
        loads_E = torch.bincount(chosen_TK.flatten(), minlength=workload.experts)
        if workload.name == "W6_rotating_hotspot":  # it moves every three steps
            assert set(loads_E.topk(4).indices.tolist()) == set(range(4 * (step // 3), 4 * (step // 3) + 4))
        if workload.name == "W5_zero_expert_rank":
            assert not loads_E[:8].any()
        if workload.name == "W7_burst":  # one step in four
            assert (loads_E.max() > 1.5 * loads_E.float().mean()) == (step == 3)


def test_phi_balancing_rests_where_the_scores_are_lowered_by_the_gradient_of_the_potential():
    loads = torch.tensor([[30, 10, 10, 10]])
    for potential, gradient in (("quadratic", loads / 15.0), ("entropy", (loads / 15.0).log())):
        rule = PhiBalancing(potential, weight=2.0, rate=0.5)
        bias, state = torch.zeros(1, 4), rule.init(1, 4)
        for n in range(40):
            bias, state = rule.step(bias, Stats(loads, torch.tensor([n + 1])), state)
        torch.testing.assert_close(bias, -2.0 * gradient)


def recording(scores_NTE):
    count, tokens, experts = scores_NTE.shape
    scores_LTE = scores_NTE.transpose(0, 1).reshape(1, -1, experts)  # one micro-batch, position after position
    return Recording((1,), experts, 1, lambda: iter([scores_LTE]), GATING, layout=Layout(tokens, count))


@pytest.mark.parametrize("kind", [MovingQuantile, CausalDual])
def test_a_correction_depends_on_earlier_tokens_of_its_own_sequence_alone(kind):
    scores_NTE = torch.rand(3, 20, 8, generator=torch.Generator().manual_seed(0))
    routed = kind(neighbours.rules.make("quantile"), recording(scores_NTE), GATING)
    before = routed.correct(scores_NTE, torch.zeros(8))
    changed_NTE = scores_NTE.clone()
    changed_NTE[1, 10:] = torch.rand(10, 8, generator=torch.Generator().manual_seed(1))
    after = routed.correct(changed_NTE, torch.zeros(8))
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert torch.equal(after[1, :11], before[1, :11]) and not torch.equal(after[1, 11:], before[1, 11:])
    assert not before[:, 0].any()


def test_a_moving_quantile_is_that_of_the_scores_before():
    scores_NTE = torch.rand(2, 400, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.5, 0.2, 0.8])
    routed = MovingQuantile(neighbours.rules.make("quantile"), recording(scores_NTE), GATING)
    last_NE = -routed.correct(scores_NTE, torch.zeros(4))[:, -1]  # K / E is a half
    torch.testing.assert_close(last_NE, scores_NTE[:, :-1].median(dim=1).values, atol=0.1, rtol=0)


def test_scores_are_corrected_where_they_lie_and_kept_scores_are_the_gates():
    scores_NTE = torch.rand(4, 64, 8, generator=torch.Generator().manual_seed(0))
    scores_NTE[..., 0] += 1  # every token wants it
    made = recording(scores_NTE)
    plain = neighbours.Routed(neighbours.rules.make("sign"), made, GATING)
    dual = CausalDual(neighbours.rules.make("sign"), made, GATING)
    dual.step_size = 0.1
    for scores_LTE in made:
        loads_LE, kept = plain.step(scores_LTE)
        assert kept[0] == pytest.approx(float(scores_NTE.topk(2, dim=-1).values.sum()))
        assert loads_LE[0, 0] == 4 * 64
        below_LE, less = dual.step(scores_LTE)
        assert below_LE[0, 0] < 4 * 40 and less[0] < kept[0] and dual.inside[0] < plain.inside[0]
