"""From the gate's logits to experts: scores, biased selection, gate weights. Pure tensors, nothing of Megatron.

Shapes: T tokens, E experts, K experts a token, G expert groups. The expert bias enters the *choice* of experts and
nothing else (Wang et al. 2024, arXiv 2408.15664, eq. 3): gate weights, and with them the gradient of the loss, come
from the unbiased scores. The choice is the primal step of the assignment problem in Han and Zhong (2025, arXiv
2512.03915): every token takes the K experts with the largest s + p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alflb_megatron import margins
from alflb_megatron.margins import Threshold


class TopK(Protocol):
    """How the K largest of `scores_TE` are found; returns (values, indices), both [T, K]."""

    def __call__(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Gate:
    """The gate's fixed choices, named as in Megatron-Core's `TransformerConfig` without the `moe_router_` prefix.

    `score_unit` says where the expert bias is added: `score` (what the gate's activation gives, as Wang et al. do) or
    `logit` (what enters the activation). `float32_scores` keeps scores and weights in float32 until they are returned;
    without it they are rounded to the logits' dtype after each operation, as Megatron-Core before 0.18 does.
    """

    topk: int
    score_function: str = "softmax"
    pre_softmax: bool = False
    scaling_factor: float | None = None
    num_groups: int | None = None
    group_topk: int | None = None
    score_unit: str = "score"
    float32_scores: bool = True
    threshold: Threshold | None = None
    """Against what margins can be asked for (`margins_of`)."""


class Choice(NamedTuple):
    """What the gate decided for T tokens."""

    experts_TK: Tensor  # int64 [T, K]
    probs_TE: Tensor  # [T, E], the logits' dtype: gate weights, zero where not chosen
    map_TE: Tensor  # bool [T, E]: True where chosen
    ranked_TK: Tensor  # [T, K]: the s + p that won; not finite where a token's scores were not


def group_limited_topk(
    scores_TE: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The K largest scores of each token, optionally from its `group_topk` best groups of experts only.

    A group's worth is the sum of its K / group_topk largest scores (node-limited routing, DeepSeek-V3, arXiv
    2412.19437, section 2.1.2). Groups left out are masked with minus infinity, so negative biased scores are safe.
    """
    if num_groups is None or not group_topk:
        return torch.topk(scores_TE, k=topk, dim=1)
    tokens = scores_TE.shape[0]
    grouped_TGM = scores_TE.view(tokens, num_groups, -1)
    worth_TG = grouped_TGM.topk(topk // group_topk, dim=-1).values.sum(dim=-1)
    best_TH = worth_TG.topk(group_topk, dim=-1, sorted=False).indices
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(1, best_TH, True)
    masked_TE = grouped_TGM.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).view_as(scores_TE)
    return torch.topk(masked_TE, k=topk, dim=-1)


def scores_of(logits: Tensor, gate: Gate) -> Tensor:
    """The gate's activation of logits [T, ...], computed in float32: float32, or the logits' dtype (see `Gate`)."""
    if gate.score_function == "sigmoid":
        scores = torch.sigmoid(logits.float())
    elif gate.score_function == "sqrtsoftplus":
        scores = torch.nn.functional.softplus(logits.float()).sqrt()
    else:
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return scores if gate.float32_scores else scores.type_as(logits)


def _ranked(logits_TE: Tensor, scores_TE: Tensor | None, gate: Gate, bias_E: Tensor | None) -> Tensor:
    """s + p, the numbers the choice is made on [T, E].

    Without a bias a softmax gate is ranked by its logits (softmax keeps the order) unless `pre_softmax` is set, which
    is Megatron-Core's order of operations and so breaks ties as Megatron-Core does.
    """
    if bias_E is not None and gate.score_unit == "logit":
        return logits_TE + bias_E
    if bias_E is None and gate.score_function == "softmax" and not gate.pre_softmax:
        return logits_TE
    if scores_TE is None:
        scores_TE = scores_of(logits_TE, gate)
    return scores_TE if bias_E is None else scores_TE + bias_E


def _gate_weights(logits_TE: Tensor, scores_TE: Tensor | None, experts_TK: Tensor, gate: Gate) -> Tensor:
    """The unbiased gate weights of the chosen experts [T, K], in the logits' dtype.

    sigmoid and sqrtsoftplus: the chosen scores, normalised to sum 1 when K > 1; softmax: over the chosen logits, or
    over all of them with `pre_softmax`. `scaling_factor` multiplies the result. As Megatron-Core defines them. Where
    the activation acts on each logit alone it is applied to the chosen ones only: its backward pass is K wide, not E.
    """
    if scores_TE is not None:
        weights_TK = scores_TE.gather(1, experts_TK)
    else:
        weights_TK = scores_of(logits_TE.gather(1, experts_TK), gate)
    if gate.score_function != "softmax" and gate.topk > 1:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if gate.scaling_factor:
        weights_TK = weights_TK * gate.scaling_factor
    return weights_TK.type_as(logits_TE)


@torch.no_grad()
def margins_of(logits_XE: Tensor, map_XE: Tensor, gate: Gate, bias_E: Tensor) -> Tensor:
    """Margins of X tokens against `gate.threshold`, float32 [X, E], given what was chosen under the bias p.

    A choice of all tokens is not burdened with the search for the (K+1)-th, and a fused kernel need not show its
    ranking.
    """
    assert gate.threshold is not None
    ranked_XE = _ranked(logits_XE, None, gate, bias_E)
    if gate.num_groups and gate.group_topk:
        return margins.of_groups(ranked_XE, map_XE, gate.topk, gate.num_groups, gate.group_topk, gate.threshold)
    top_XJ = torch.topk(ranked_XE, k=min(gate.topk + 1, ranked_XE.shape[1]), dim=1).values
    return margins.of_map(ranked_XE, top_XJ, map_XE, gate.threshold)


def add_margins(
    histogram_EB: Tensor,
    logits_SBE: Tensor,
    map_SBE: Tensor,
    valid_SB: Tensor | None,
    bias_E: Tensor,
    first_X: Tensor,
    n: Tensor,
    stride: int,
    gate: Gate,
) -> None:
    """Adds the margins of the sample at the positions `first_X`, int64 [X], moved by n modulo `stride`, in place.

    n, int64 [1], is read on the device: in a CUDA graph of the pass the sample goes on turning.
    """
    if stride > 1:
        rows_X = first_X + n % stride
        logits_SBE, map_SBE = logits_SBE.index_select(0, rows_X), map_SBE.index_select(0, rows_X)
        valid_SB = None if valid_SB is None else valid_SB.index_select(0, rows_X)
    margins_XE = margins_of(logits_SBE.flatten(0, 1), map_SBE.flatten(0, 1), gate, bias_E)
    margins.add(histogram_EB, margins_XE, None if valid_SB is None else valid_SB.flatten())


def select(
    logits_TE: Tensor,
    gate: Gate,
    bias_E: Tensor | None = None,
    topk: TopK | None = None,
) -> Choice:
    """Routes T tokens: the K experts with the largest s + p, weighted by the unbiased scores.

    Args:
        logits_TE: the gate's logits, floating point [T, E]. Gradients flow to them through the gate weights only.
        gate: the gate's fixed choices.
        bias_E: the expert bias p, float32 [E], or None for unbiased routing.
        topk: replaces the search for the K largest (router replay); default `group_limited_topk`.
    """
    normalised_over_all = gate.score_function == "softmax" and gate.pre_softmax
    scores_TE = scores_of(logits_TE, gate) if normalised_over_all else None
    with torch.no_grad():
        ranked_TE = _ranked(logits_TE, scores_TE, gate, bias_E)
        find = topk or group_limited_topk
        ranked_TK, experts_TK = find(ranked_TE, gate.topk, gate.num_groups, gate.group_topk)
    weights_TK = _gate_weights(logits_TE, scores_TE, experts_TK, gate)
    probs_TE = torch.zeros_like(logits_TE).scatter_(1, experts_TK, weights_TK)  # in place: no second [T, E]
    map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, experts_TK, True)
    return Choice(experts_TK, probs_TE, map_TE, ranked_TK)
