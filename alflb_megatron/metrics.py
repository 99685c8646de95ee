"""How unbalanced loads are. Every function states its definition; loads A have shape [..., E], L = mean of A over E.

All take integer or floating loads, compute in float64 and reduce the last dimension, so a stack of layers [L, E] gives
one figure a layer. A layer without any load counts as balanced.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


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


def bias_spread(bias: Tensor) -> Tensor:
    """max_k p_k - min_k p_k [...]: how far the bias reaches, in score units; constants added to p do not change it."""
    return bias.max(dim=-1).values - bias.min(dim=-1).values


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between rows of mean zero, as violations are: [..., 1]; 0 where either row is zero."""
    product = (a * b).sum(dim=-1, keepdim=True)
    length = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, product / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0)


@functools.cache
def sampling_floor(tokens: int, topk: int, experts: int, draws: int = 200, seed: int = 0) -> float:
    """Mean MaxVio of one layer if each of `tokens` tokens draws `topk` distinct of `experts` experts uniformly.

    Estimated from `draws` simulated batches with a fixed seed. A bias set before the batch is seen can equalise
    the probabilities of the experts, not the luck of the draw: this is where MaxVio stays on average when all
    probabilities are equal and tokens choose independently. ValueError unless 1 <= topk <= experts, tokens >= 1.
    """
    if not (tokens >= 1 and draws >= 1 and 1 <= topk <= experts):
        raise ValueError(f"no draw of {topk} distinct experts out of {experts} by {tokens} tokens")
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
