"""What every host's log line, TensorBoard and W&B show of the last global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from alflb_megatron.hosts.core import balancer_of


def log_line(model: Sequence[nn.Module], pipeline: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor]:
    """What a trainer logs of the last global batch, float32 scalars on the device; empty before the first update.

    `MaxVio`, and the largest and smallest `load` in tokens, each the mean over the MoE layers of all pipeline stages,
    the MaxVio of the worst layer, and the mean spread of the bias (largest less smallest, score units). Every rank of
    `pipeline`, the pipeline-parallel group, has to call it: its stages hold different layers.
    """
    last = balancer_of(model).last
    device = torch.cuda.current_device()
    sums, worst = torch.zeros(5, device=device), torch.zeros(1, device=device)
    if last is not None and last.layers:
        vio = last.max_vio().float()
        extremes = torch.stack([torch.stack([loads.max(), loads.min()]) for loads in last.loads]).float()
        spreads = [bias.max() - bias.min() for bias in last.bias if bias is not None]
        spread = torch.stack(spreads).sum() if spreads else vio.new_zeros(())
        sums = torch.stack([vio.sum(), *extremes.sum(dim=0), spread, vio.new_tensor(len(last.layers))])
        worst = vio.max().reshape(1)
    if pipeline is not None and pipeline.size() > 1:
        dist.all_reduce(sums, group=pipeline)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=pipeline)
    elif last is None:
        return {}
    vio_mean, load_max, load_min, spread_mean = sums[:4] / sums[4].clamp(min=1)
    return {
        "MaxVio": vio_mean,
        "MaxVio worst layer": worst[0],
        "load max": load_max,
        "load min": load_min,
        "expert bias spread": spread_mean,
    }
