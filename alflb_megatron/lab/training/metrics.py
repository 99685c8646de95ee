"""The metrics of a training: of a step, from what the balancer saw on every pipeline stage; of the whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from alflb_megatron import metrics
from alflb_megatron.balancer import Record


def layer_metrics(last: Record | None) -> list[dict[str, Any]]:
    """A row for each MoE layer of this pipeline stage, plain numbers that can be sent to others."""
    if last is None:
        return []
    columns = {
        "layer": list(last.layers),
        "loads": [loads.tolist() for loads in last.loads],
        "bias": [None if bias is None else bias.tolist() for bias in last.bias],
        "vio": last.max_vio().tolist() if last.layers else [],
        "spread": last.spread().tolist() if last.layers else [],
        "gain": last.gain.tolist(),
        "rejected": last.rejected.tolist(),
    }
    if (micro := last.micro_batches) is not None:
        columns |= {"micro_vio": micro.vio_mean.tolist(), "micro_worst": micro.vio_worst.tolist()}
        columns |= {"micro_overload": micro.overload.tolist()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def step_metrics(rows: Sequence[dict[str, Any]], floor: float) -> dict[str, Any]:
    """The keys of `metrics_file.STEP_KEYS` that are about the layers, and gain and bias where there are any.

    `rows` are those of all pipeline stages, `floor` is the sampling floor of MaxVio.
    """
    rows = sorted(rows, key=lambda row: row["layer"])
    found: dict[str, Any] = {
        "maxvio_mean": math.fsum(row["vio"] for row in rows) / len(rows),
        "maxvio_max": max(row["vio"] for row in rows),
        "maxvio_floor": floor,
        "bias_spread": max(row["spread"] for row in rows),
        "rejected": [row["layer"] for row in rows if row["rejected"]],
        "layers": [row["layer"] for row in rows],
        "loads": [row["loads"] for row in rows],
    }
    if "micro_vio" in rows[0]:
        found["maxvio_micro_mean"] = math.fsum(row["micro_vio"] for row in rows) / len(rows)
        found["maxvio_micro_worst"] = max(row["micro_worst"] for row in rows)
        found["overload_micro_worst"] = max(row["micro_overload"] for row in rows)
    if rows[0]["bias"] is not None:
        found["bias"] = [row["bias"] for row in rows]
    if not all(math.isnan(row["gain"]) for row in rows):
        found["gain"] = [row["gain"] for row in rows]
    return found


def gather_over_stages(rows: list[Any], group: dist.ProcessGroup) -> list[Any]:
    """The rows of all ranks of the pipeline-parallel `group`, stage after stage, on each of them."""
    stages = dist.get_world_size(group)
    if stages == 1:
        return rows
    everywhere: list[Any] = [None] * stages
    dist.all_gather_object(everywhere, rows, group=group)
    return [row for stage in everywhere for row in stage]


def validation_metrics(
    loss: float, loads: Sequence[Sequence[int]], sequence_floors: Sequence[float] = ()
) -> dict[str, Any]:
    """What summary.json says of the validation set: its loss, MaxVio of each MoE layer's loads over all of it, and the
    sequence floor of a global batch, mean over the layers, None where there is none.
    """
    vio = metrics.max_vio(torch.tensor(loads))
    return {
        "validation_loss": loss,
        "maxvio_global_mean": float(vio.mean()),
        "maxvio_global_max": float(vio.max()),
        "validation_loads": [list(row) for row in loads],
        "sequence_floor": math.fsum(sequence_floors) / len(sequence_floors) if sequence_floors else None,
    }
