"""The sequence floor: MaxVio that no bias set before a batch of whole sequences can be expected to go below.

Tokens come in sequences, and those of one sequence choose alike: a batch of few sequences is farther from balance than
one of as many independent tokens (`metrics.sampling_floor`), under the best of biases. The best is the one that
balances the distribution at these very weights. It is solved on some sequences of the run and judged on others, so that
it fits none of those that it is judged on. Shapes: N sequences, T tokens of each, E experts.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from alflb_megatron import metrics
from alflb_megatron.lab.replay.recording import Gating
from alflb_megatron.lab.replay.replayed_rules import HindsightBias, choose_experts

SPLITS, DRAWS = 4, 16
"""Times that the sequences are halved, and batches that are drawn from each half."""


def sequence_floor(scores_NTE: Tensor, gating: Gating, batch: int | None = None) -> float:
    """Expected MaxVio of a fresh batch under the bias that balances the distribution of sequences, of one layer.

    Two folds, several times: of each half of the sequences the bias is solved on the other half, and batches are
    drawn from the half.
    A bias that is solved on n sequences errs by what these differ from the distribution. So where sequences are
    independent, a load of g of them is off with 1/g + 1/n of the variance that one sequence has; of a whole batch under
    the best bias that is 1/batch. What is found is scaled by the root of the ratio, which makes up for the few
    sequences that there are. Enough are four batches of them: that is good to a tenth. From one batch alone the floor
    comes out up to a quarter too high (`tests/lab/replay/test_sequence_floor.py`).

    Args:
        scores_NTE: floating point [N, T, E], before any bias, all under the same weights. ValueError with fewer than 2.
        gating: how experts are chosen.
        batch: sequences of a global batch; by default N.
    """
    count, _, experts = scores_NTE.shape
    if count < 2:
        raise ValueError(f"sequences: {count}, must be at least 2, one to solve on and one to judge")
    batch = count if batch is None else batch
    generator = torch.Generator().manual_seed(count)
    splits = [torch.randperm(count, generator=generator).tensor_split(2) for _ in range(SPLITS)]
    found = []
    for solved_on, judged in (fold for halves in splits for fold in (halves, halves[::-1])):
        solved = HindsightBias(1, experts, gating)
        solved.step(scores_NTE[solved_on].reshape(1, -1, experts))
        ranked_XE = scores_NTE[judged].reshape(-1, experts) + solved.bias_LE[0]
        chosen_NX = choose_experts(ranked_XE, gating).experts_TK.reshape(len(judged), -1)
        loads_NE = torch.stack([torch.bincount(chosen_X, minlength=experts) for chosen_X in chosen_NX])
        drawn = min(batch, len(judged))
        for _ in range(DRAWS if drawn < len(judged) else 1):
            of_batch = torch.randperm(len(judged), generator=generator)[:drawn]
            scale = math.sqrt(1 / batch / (1 / drawn + 1 / len(solved_on)))
            found.append(scale * float(metrics.max_vio(loads_NE[of_batch].sum(0))))
    return statistics.fmean(found)
