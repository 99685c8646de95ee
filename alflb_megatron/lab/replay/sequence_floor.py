"""The sequence floor: MaxVio that no bias set before a batch of whole sequences can be expected to go below.

Tokens come in sequences, and those of one sequence choose alike: a batch of few sequences is farther from balance than
one of as many independent tokens (`metrics.sampling_floor`), under the best of biases. The best is the one that
balances the distribution at these very weights. It is solved on some batches of the run and judged on others, so that
it fits none of those that it is judged on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from alflb_megatron import metrics
from alflb_megatron.lab.theory.problem import AssignmentProblem
from alflb_megatron.lab.theory.solvers import near_optimum


def sequence_floor(batches: Sequence[Tensor], topk: int) -> float:
    """Mean MaxVio of a batch under the bias that balances the others of its run, of one layer.

    Args:
        batches: scores, floating point [T, E], of global batches of whole sequences, all under the same weights.
            Two folds: of each half of them the bias is solved on the other half. ValueError with fewer than two.
        topk: K.
    """
    if len(batches) < 2:
        raise ValueError(f"batches: {len(batches)}, must be at least 2, one to solve on and one to judge")
    halves = batches[::2], batches[1::2]
    found = []
    for solved_on, judged in (halves, halves[::-1]):
        bias_E = near_optimum(AssignmentProblem(torch.cat(list(solved_on)), topk))
        for scores_TE in judged:
            chosen_TK = (scores_TE.double() + bias_E).topk(topk, dim=1).indices
            found.append(float(metrics.max_vio(torch.bincount(chosen_TK.reshape(-1), minlength=scores_TE.shape[1]))))
    return statistics.fmean(found)
