"""How unbalanced loads are. Every function states its definition; loads A have shape [..., E], L = mean of A over E.

All take integer or floating loads, compute in float64 and reduce the last dimension, so a stack of layers [L, E] gives
one figure a layer. A layer without any load counts as balanced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def of_layers(figure: Callable[[Tensor], Tensor], rows: Sequence[Tensor]) -> Tensor:
    """`figure` of each row, stacked [layers, ...]; in one go where all layers have as many experts."""
    if len({row.numel() for row in rows}) == 1:
        return figure(torch.stack(list(rows)))
    return torch.stack([figure(row) for row in rows])


def mean_load(loads: Tensor) -> Tensor:
    """L = sum_k A_k / E, the load each expert has under perfect balance (float64, last dimension kept)."""
    return loads.to(torch.float64).mean(dim=-1, keepdim=True)


def violation(loads: Tensor) -> Tensor:
    """The relative violation (L - A_k) / L of each expert, float64 [..., E]; positive where an expert has too little.

    L - A_k is minus the gradient of the dual in p_k (Han and Zhong 2025, arXiv 2512.03915); dividing by L makes a step
    mean the same at every batch size.
    """
    mean = mean_load(loads)
    return torch.where(mean > 0, (mean - loads) / mean.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def max_vio(loads: Tensor) -> Tensor:
    """MaxVio = (max_k A_k - L) / L (Wang et al. 2024, arXiv 2408.15664, eq. 4), float64 [...].

    0 is perfect balance, E/K - 1 the worst (every token takes the same K experts). Wang's MaxVio_global is this
    function on the loads of a whole validation set, MaxVio_batch on those of one training batch; both are then averaged
    over layers.
    """
    return (-violation(loads)).max(dim=-1).values


STARVED = 0.1
"""An expert is starved below this share of the mean load."""


def variation(loads: Tensor) -> Tensor:
    """Coefficient of variation of the loads, their standard deviation over their mean; float64 [...]."""
    return violation(loads).square().mean(dim=-1).sqrt()


def evenness(loads: Tensor) -> Tensor:
    """exp(H) / E with H the entropy of the shares A_k / sum A, float64 [...]: the share of experts in effective use.

    1 is perfect balance, 1/E everything at one expert; 1 for a layer without any load.
    """
    total = loads.sum(dim=-1, keepdim=True).to(torch.float64)
    shares = torch.where(total > 0, loads / total.clamp(min=1), 1 / loads.shape[-1])
    return torch.special.entr(shares).sum(dim=-1).exp() / loads.shape[-1]


def starved(loads: Tensor) -> Tensor:
    """bool [..., E]: experts with less than `STARVED` of the mean load, those without any included."""
    return violation(loads) > 1 - STARVED


def overload(loads: Tensor, ranks: int) -> Tensor:
    """How much more than the mean the fullest of `ranks` expert-parallel ranks has to do: max / mean, float64 [...].

    Megatron-Core gives each rank the next E / ranks experts; 1 is balance, `ranks` everything at one rank.
    """
    per_rank = loads.unflatten(-1, (ranks, -1)).sum(dim=-1)
    return 1 + max_vio(per_rank)


def bias_spread(bias: Tensor) -> Tensor:
    """max_k p_k - min_k p_k [...]: how far the bias reaches, in score units; constants added to p do not change it."""
    return bias.max(dim=-1).values - bias.min(dim=-1).values


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between rows of mean zero, as violations are: [..., 1]; 0 where either row is zero."""
    product = (a * b).sum(dim=-1, keepdim=True)
    length = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, product / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0)


@functools.cache
def floor_constant(topk: int, experts: int) -> float:
    """c where the sampling floor of T tokens tends to c / sqrt(T) for large T.

    A load is then normal with relative variance (E/K - 1) / T, and loads are correlated by -1 / (E - 1): their largest
    lies sqrt(E / (E - 1)) times as far above the mean as that of E independent normals, whose mean is found by
    quadrature.
    """
    if not 1 <= topk <= experts:
        raise ValueError(f"no draw of {topk} distinct experts out of {experts}")
    if topk == experts:
        return 0.0
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    below = torch.special.ndtr(z) ** experts
    largest = float(torch.trapezoid(torch.where(z > 0, 1 - below, -below), z))  # E[X] of a distribution function
    return largest * math.sqrt((experts / topk - 1) * experts / (experts - 1))


DRAWN_UP_TO = 100_000
"""Tokens above which `sampling_floor` takes the limit for large T: drawing would take longer than it is worth."""


@functools.cache
def sampling_floor(tokens: int, topk: int, experts: int, draws: int = 200, seed: int = 0) -> float:
    """Mean MaxVio of one layer if each of `tokens` tokens draws `topk` distinct of `experts` experts uniformly.

    Estimated from `draws` simulated batches with a fixed seed, above `DRAWN_UP_TO` tokens as c / sqrt(T)
    (`floor_constant`). A bias set before the batch is seen can equalise
    the probabilities of the experts, not the luck of the draw: this is where MaxVio stays on average when all
    probabilities are equal and tokens choose independently. ValueError unless 1 <= topk <= experts, tokens >= 1.
    """
    if not (tokens >= 1 and draws >= 1 and 1 <= topk <= experts):
        raise ValueError(f"no draw of {topk} distinct experts out of {experts} by {tokens} tokens")
    if tokens > DRAWN_UP_TO:
        return floor_constant(topk, experts) / math.sqrt(tokens)
    generator = np.random.default_rng(seed)
    mean = tokens * topk / experts
    total = 0.0
    for _ in range(draws):
        # Floyd's algorithm: each token's set of experts is uniform over all sets of that size.
        chosen_TK = np.empty((tokens, topk), dtype=np.int64)
        for k, last in enumerate(range(experts - topk, experts)):
            draw_T = generator.integers(0, last + 1, size=tokens)
            taken_T = (chosen_TK[:, :k] == draw_T[:, None]).any(axis=1)
            chosen_TK[:, k] = np.where(taken_T, last, draw_T)
        total += np.bincount(chosen_TK.ravel(), minlength=experts).max() / mean - 1
    return total / draws
