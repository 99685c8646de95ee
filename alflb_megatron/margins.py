"""How far each token is from changing its mind about an expert, as histograms, and the move that a load asks for.

The margin of token i at expert k is m_ik = s_ik + p_k - th_ik, the distance of k's biased score from the score it
must beat: m >= 0 where k was chosen, m <= 0 where not. If p_k alone moves by d, the load of k becomes #{i: m_ik > -d};
so the d that gives it the load L is minus the L-th largest margin. That is the exact minimum of the dual along p_k
(Han and Zhong 2025, arXiv 2512.03915: its slope there is A_k - L), known as quantile balancing (Su, kexue.fm 11619).

What k must beat is, by `Threshold`:
    own   the (K+1)-th largest biased score of the token if k was chosen, else the K-th: exactly what moves k in or out
    next  the (K+1)-th largest for every expert, as Megatron-Core's and torchtitan's quantile balancing have it

A histogram has the same BINS bins for every gate and expert: the exponent and the first bits of the mantissa of |m| as
float32 holds it, times the sign. Bins are finest at the boundary, a seventh to a quarter wide elsewhere, and need no
range: what lies beyond 2^8 falls in the outermost bins, minus infinity (a masked expert) included, and is never lost.
Shapes: T tokens, E experts, K experts a token, L layers, B = BINS.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache

import torch
from torch import Tensor

MANTISSA_BITS = 2  # bins an octave: 2 ** 2
SMALLEST, LARGEST = -23, 8  # exponents of the inner bins' range; float32 scores near 1 are 2^-24 apart
SIDE = ((LARGEST - SMALLEST) << MANTISSA_BITS) + 2  # bins on one side of zero: inner ones, below 2^-23, beyond 2^8
BINS = 2 * SIDE
"""Bins of a histogram."""

SAMPLE = 8
"""Tokens of an expert that a sample has, on average, in units of sqrt(L): of the chance in a load of L tokens."""

_SHIFT = 23 - MANTISSA_BITS
_FIRST_KEY = (127 + SMALLEST) << MANTISSA_BITS


class Threshold(StrEnum):
    """The score that an expert must beat for a token."""

    OWN = "own"
    NEXT = "next"


@cache
def edges(device: torch.device | str = "cpu") -> Tensor:
    """The BINS + 1 edges, ascending, float64; the outermost are the float32 limits the inner range ends at."""
    # on the CPU first, by name: a model may be under construction on another default device, the meta device too
    keys = torch.arange(SIDE - 1, dtype=torch.int32, device="cpu") + _FIRST_KEY
    inner = (keys << _SHIFT).view(torch.float32).double()  # lower edges of every bin but the first
    positive = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), inner, inner[-1:]])
    return torch.cat([-positive.flip(0), positive[1:]]).to(device)


def of_top(ranked_TE: Tensor, top_TJ: Tensor, experts_TK: Tensor, threshold: Threshold) -> Tensor:
    """Margins, float32 [T, E], of a choice that is the K largest of s + p.

    Args:
        ranked_TE: s + p.
        top_TJ: its K + 1 largest values, descending (K where K = E).
        experts_TK: the chosen experts.
        threshold: what an expert must beat.
    """
    topk = experts_TK.shape[1]
    last_T1, next_T1 = top_TJ[:, topk - 1 : topk], top_TJ[:, -1:]
    # a - b with a <= b gives +0 at a tie; minus (b - a) gives -0, which is the side of those not chosen
    margins_TE = ((last_T1 if threshold is Threshold.OWN else next_T1) - ranked_TE).float().neg_()
    return margins_TE.scatter_(1, experts_TK, (top_TJ[:, :topk] - next_T1).float())


def of_map(ranked_TE: Tensor, top_TJ: Tensor, map_TE: Tensor, threshold: Threshold) -> Tensor:
    """The same of a choice that is given as a map, bool [T, E].

    Between equal scores, or where a fused kernel rounds otherwise, it may be other than the K largest of `ranked_TE`:
    such an expert stands at zero, on the side of the choice.
    """
    last_T1, next_T1 = top_TJ[:, -2:-1], top_TJ[:, -1:]  # with K = E there is none outside
    outside_TE = ((last_T1 if threshold is Threshold.OWN else next_T1) - ranked_TE).clamp(min=0).neg()
    return torch.where(map_TE, (ranked_TE - next_T1).clamp(min=0), outside_TE).float()


def of_groups(
    ranked_TE: Tensor, map_TE: Tensor, topk: int, num_groups: int, group_topk: int, threshold: Threshold
) -> Tensor:
    """The same for group-limited routing (`routing.group_limited_topk`; `map_TE`: what it chose, bool [T, E]): there an
    expert can win or lose its group too.

    A group is worth the sum of its M = topk / group_topk largest. A chosen expert may fall by what it ranks above the
    next expert of the groups taken or, being among its group's M largest, by what the group is worth above the best one
    left out, whichever is less. An expert of a group left out must lift its group above the last one taken, and itself
    above the token's K-th.
    """
    grouped_TGX = ranked_TE.float().view(ranked_TE.shape[0], num_groups, -1)
    chosen_TGX = map_TE.view_as(grouped_TGX)
    best_TGM = grouped_TGX.topk(topk // group_topk, dim=-1).values
    worth_TG1, admitted_TG1 = best_TGM.sum(dim=-1, keepdim=True), best_TGM[..., -1:]
    taken_TG1 = chosen_TGX.any(dim=-1, keepdim=True)
    last_taken = worth_TG1.masked_fill(~taken_TG1, float("inf")).amin(dim=1, keepdim=True)
    best_left = worth_TG1.masked_fill(taken_TG1, float("-inf")).amax(dim=1, keepdim=True)
    last = grouped_TGX.masked_fill(~chosen_TGX, float("inf")).amin(dim=(1, 2), keepdim=True)
    next_ = grouped_TGX.masked_fill(chosen_TGX | ~taken_TG1, float("-inf")).amax(dim=(1, 2), keepdim=True)
    group_TGX = torch.where(grouped_TGX >= admitted_TG1, worth_TG1 - best_left, float("inf"))
    inside_TGX = torch.minimum(grouped_TGX - next_, group_TGX).clamp(min=0)
    short_TGX = (last if threshold is Threshold.OWN else next_) - grouped_TGX
    lift_TGX = last_taken - worth_TG1 + (admitted_TG1 - grouped_TGX).clamp(min=0)
    outside_TGX = -torch.where(taken_TG1, short_TGX, torch.maximum(short_TGX, lift_TGX)).clamp(min=0)
    return (
        torch.where(chosen_TGX, inside_TGX, outside_TGX)
        .nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        .view_as(map_TE)
    )


def add(histogram_EB: Tensor, margins_TE: Tensor, valid_T: Tensor | None = None) -> None:
    """Adds the margins of T tokens to int32 counts [E, B], in place; those not `valid_T` (bool [T]) are padding."""
    bits_TE = margins_TE.view(torch.int32)
    index_TE = (bits_TE & 0x7FFFFFFF) >> _SHIFT
    index_TE.sub_(_FIRST_KEY - 1).clamp_(0, SIDE - 1)
    index_TE.bitwise_xor_(bits_TE >> 31)  # j above zero, -1 - j below
    index_TE.add_(_middles(histogram_EB.shape[0], index_TE.device))
    weight_1 = one(torch.int32, index_TE.device) if valid_T is None else valid_T.to(torch.int32)[:, None]
    weight_TE = weight_1.expand(index_TE.shape)
    histogram_EB.view(-1).index_add_(0, index_TE.view(-1), weight_TE.reshape(-1))


@cache
def one(dtype: torch.dtype, device: torch.device) -> Tensor:
    """1, made once: on a device each new tensor is a launch."""
    return torch.ones((), dtype=dtype, device=device)


@cache
def _middles(experts: int, device: torch.device) -> Tensor:
    """Where the first bin above zero of each expert lies in a flat histogram, int32 [E]."""
    return torch.arange(SIDE, experts * BINS, BINS, dtype=torch.int32, device=device)


def sample_stride(tokens: int, topk: int, experts: int, run: int) -> int:
    """r, a power of two: margins are measured at every r-th position of each sequence.

    A load of L tokens is uncertain by about sqrt(L), so a move has to be found to that, whatever L is: the sample has
    at least SAMPLE sqrt(L) tokens of an expert, which makes r at most sqrt(L) / SAMPLE. r has to divide `run`, how many
    consecutive positions a rank holds: then every split of the sequences has the same sample.

    Args:
        tokens: of a global batch, on all ranks.
        topk: K.
        experts: E.
        run: positions.
    """
    stride = 1
    while (2 * stride * SAMPLE) ** 2 * experts <= tokens * topk and run % (2 * stride) == 0:
        stride *= 2
    return stride


@cache
def positions(sequence: int, stride: int, device: torch.device) -> Tensor:
    """The first of every `stride` positions, int64 [sequence / stride]."""
    return torch.arange(0, sequence, stride, device=device)


def sampled_loads(histogram_LEB: Tensor) -> Tensor:
    """How many of the tokens whose margins were measured chose each expert, int64 [L, E], whatever bins they are in."""
    return histogram_LEB[..., histogram_LEB.shape[-1] // 2 :].sum(-1, dtype=torch.int64)


def move_to_load(histogram_LEB: Tensor, load_LE: Tensor, edges_J: Tensor | None = None) -> Tensor:
    """By how much each expert's bias must move, alone, for its load to become `load_LE`: float32 [L, E].

    Exact up to the place inside one bin, where tokens are taken to lie evenly; of several moves that give the load, the
    smallest. No move reaches into the outermost bins: an expert that no token can be brought to (masked with minus
    infinity, say) stays where it is.

    Args:
        histogram_LEB: margins of one global batch, integer [L, E, B].
        load_LE: the wanted load, of the tokens whose margins these are; broadcast against [L, E].
        edges_J: the B - 1 edges of the inner bins, float64; where none are given, those of a histogram of BINS bins.
    """
    inner_LEB = histogram_LEB[..., 1:-1]
    above_LE = histogram_LEB[..., -1]
    if edges_J is None:
        edges_J = edges(histogram_LEB.device)[1:-1]
    # count_J[j]: how many inner margins are at or above edge j; descending in j, from all of them to none
    count_LEJ = torch.nn.functional.pad(inner_LEB.flip(-1).cumsum(-1).flip(-1), (0, 1))
    total_LE = count_LEJ[..., 0]
    wanted_LE = torch.minimum((load_LE.double() - above_LE).clamp(min=0), total_LE.double())
    over_LEJ, met_LEJ = count_LEJ > wanted_LE.unsqueeze(-1), count_LEJ == wanted_LE.unsqueeze(-1)
    first_LE1 = over_LEJ.sum(-1, keepdim=True)  # the first edge with no more than wanted above it
    last_LE1 = first_LE1 + met_LEJ.sum(-1, keepdim=True) - 1  # the last with just as many, where there is one
    # Between two samples: every place there gives the wanted load, and the nearest moves least.
    between_LE1 = torch.zeros_like(wanted_LE).unsqueeze(-1).clamp(edges_J[first_LE1], edges_J[last_LE1])
    bin_LE1 = (first_LE1 - 1).clamp(min=0)
    upper_LE1, lower_LE1 = count_LEJ.gather(-1, bin_LE1), count_LEJ.gather(-1, bin_LE1 + 1)
    share_LE1 = (upper_LE1 - wanted_LE.unsqueeze(-1)) / (upper_LE1 - lower_LE1).clamp(min=1)
    low_LE1, high_LE1 = edges_J[bin_LE1], edges_J[bin_LE1 + 1]
    inside_LE1 = low_LE1 + share_LE1 * (high_LE1 - low_LE1)
    margin_LE = torch.where(last_LE1 >= first_LE1, between_LE1, inside_LE1).squeeze(-1)
    return torch.where(total_LE > 0, -margin_LE, 0.0).float()


def density_at_tie(histogram_LEB: Tensor, share: float = 0.1) -> Tensor:
    """How much of its tokens an expert wins or loses with its bias, float64 [L], mean over experts, a unit of score.

    That is the density of margins at zero: the mean of the diagonal of the dual's Hessian per token
    (lab/theory/curvature).
    It is taken from the nearest bins around zero that hold `share` of the load; 0 where a layer saw no token.

    Args:
        histogram_LEB: margins of one global batch, integer [L, E, B].
        share: of the tokens that experts have, so many are looked at.
    """
    counts_LB = histogram_LEB.sum(dim=1, dtype=torch.int64)
    every_L = counts_LB.sum(dim=1)  # margins: one of each expert a token
    around_LS = (counts_LB[:, SIDE:] + counts_LB[:, :SIDE].flip(1)).cumsum(1)
    wanted_L1 = share * counts_LB[:, SIDE:].sum(dim=1, keepdim=True)
    inner_S = edges(histogram_LEB.device)[SIDE + 1 : -1]
    upper_S = torch.nn.functional.pad(inner_S, (0, 1), value=float("inf"))  # the outermost bin has no end
    nearest_L1 = (around_LS < wanted_L1).sum(dim=1, keepdim=True).clamp(max=SIDE - 1)
    held_L, width_L = around_LS.gather(1, nearest_L1).squeeze(1), 2 * upper_S[nearest_L1.squeeze(1)]
    return torch.where(every_L > 0, held_L / (width_L * every_L.clamp(min=1)), 0.0)


def exact_move(margins_TE: Tensor, mean_load: float) -> Tensor:
    """By how much each bias must move, alone, for its expert to carry the mean load, to the token: float32 [E].

    The order statistic itself, no histogram, for one batch that is at hand: half way between the margin of the last
    token an expert gets and that of the first it does not.
    """
    tokens, experts = margins_TE.shape
    if tokens == 1:
        return torch.zeros(experts)
    wanted = max(1, min(round(mean_load), tokens - 1))
    margins_ET = margins_TE.t().contiguous()
    last_E = margins_ET.kthvalue(tokens - wanted + 1, dim=1).values
    return -(last_E + margins_ET.kthvalue(tokens - wanted, dim=1).values) / 2
