"""Coarse histograms of margins: what micro-batches send, small enough for each, and what follows a moving bias.

A histogram of `margins.BINS` bins is merged into BINS of this module: one bin an octave from 2^-20 to 2^4 on either
side of the tie, and the two outermost, where no bias can bring a token. Density is nearly even around a tie, so a place
inside a bin is as good as a finer one.

When a layer's bias moves by D, the margin of a token at expert k moves by D_k, less what the expert it must beat has
moved by. Of that the mean is taken over the experts that tokens are near to: D_k - sum_e h_e D_e / sum_e h_e, h_e being
the density of margins of e at the tie. Counts stay integers: their sums over ranks are exact, and equal at every split.
Callers may count in parts of a token (UNIT), which leaves less to rounding where an expert has few.
Shapes: L layers, E experts, C = BINS.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from alflb_megatron import margins, metrics

SMALLEST, LARGEST = -20, 4
"""Exponents of the range of the inner bins: scores of a softmax gate over many experts are small."""

_OCTAVES = [1 + ((exponent - margins.SMALLEST) << margins.MANTISSA_BITS) for exponent in range(SMALLEST, LARGEST + 1)]
_CUTS = ([0, 1] + [margins.SIDE - at for at in reversed(_OCTAVES)] + [margins.SIDE + at for at in (0, *_OCTAVES)]) + [
    margins.BINS - 1,
    margins.BINS,
]
BINS = len(_CUTS) - 1
UNIT = 256
"""Parts of a token that a pool counts in."""

_MIDDLE = BINS // 2


@cache
def _cuts(device: torch.device) -> Tensor:
    return torch.tensor(_CUTS, device=device)


@cache
def edges(device: torch.device) -> Tensor:
    """The BINS - 1 edges of the inner bins, float64."""
    return margins.edges(device)[_cuts(device)][1:-1].contiguous()


def coarsen(histogram_LEB: Tensor) -> Tensor:
    """A histogram of `margins` in this module's bins, of its own integer type, [L, E, C]."""
    below = torch.nn.functional.pad(histogram_LEB.cumsum(-1, dtype=histogram_LEB.dtype), (1, 0))
    return below.index_select(-1, _cuts(histogram_LEB.device)).diff(dim=-1)


def density_at_tie(counts_LEC: Tensor, share: float = 0.1) -> Tensor:
    """Margins at the tie of each expert, a unit of score, float64 [L, E].

    From the nearest bins around it that hold `share` of the mean load.
    """
    load_L1 = metrics.mean_load(margins.sampled_loads(counts_LEC))
    around = (counts_LEC[..., _MIDDLE:] + counts_LEC[..., :_MIDDLE].flip(-1)).cumsum(-1)[..., :-1]
    inner = edges(counts_LEC.device)[_MIDDLE:]  # upper edges of the bins at and above the tie
    nearest = (around < share * load_L1.unsqueeze(-1)).sum(-1, keepdim=True).clamp(max=inner.numel() - 1)
    return (around.gather(-1, nearest) / (2 * inner[nearest])).squeeze(-1)


def relative_move(counts_LEC: Tensor, move_LE: Tensor) -> Tensor:
    """By how much margins change with a bias: less what the experts to beat move by on average, float64 [L, E]."""
    density_LE = density_at_tie(counts_LEC)
    density_LE = density_LE / density_LE.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    move_LE = move_LE.double()
    return move_LE - (density_LE * move_LE).sum(-1, keepdim=True)


def moved(counts_LEC: Tensor, by_LE: Tensor) -> Tensor:
    """The counts after every margin changed by `by_LE`; the outermost bins stay."""
    return _resampled(counts_LEC, by_LE, edges(counts_LEC.device))


def spread(counts_LEC: Tensor, by_LE: Tensor) -> Tensor:
    """The same in the bins of `margins`, [L, E, B], for what reads those."""
    return _resampled(counts_LEC, by_LE, margins.edges(counts_LEC.device)[1:-1])


def _resampled(counts_LEC: Tensor, by_LE: Tensor, onto: Tensor) -> Tensor:
    """Counts between the edges `onto` of margins changed by `by_LE`, taken to lie evenly in their bins."""
    own = edges(counts_LEC.device)
    inner = counts_LEC[..., 1:-1]
    below = torch.nn.functional.pad(inner.cumsum(-1), (1, 0)).double()  # at each edge; at the last, all; exact
    place = (onto - by_LE.double().unsqueeze(-1)).clamp(own[0], own[-1])
    upper = torch.searchsorted(own, place, right=True).clamp(1, own.numel() - 1)
    low, high = own[upper - 1], own[upper]
    start, end = below.gather(-1, upper - 1), below.gather(-1, upper)
    at = end.sub_(start).mul_((place - low) / (high - low)).round_().add_(start)
    at[..., 0], at[..., -1] = below[..., 0], below[..., -1]  # what would leave at an end stays in the last bin
    return torch.cat([counts_LEC[..., :1], at.diff(dim=-1).to(counts_LEC.dtype), counts_LEC[..., -1:]], dim=-1)
