"""How unbalanced loads are. Every function states its definition; loads A have shape [..., E], L = mean of A over E.

All take integer or floating loads, compute in float64 and reduce the last dimension, so a stack of layers [L, E] gives
one figure a layer. A layer without any load counts as balanced.
"""

from __future__ import annotations

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
