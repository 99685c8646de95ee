"""What a step's record says of the MoE layers, from what the balancer saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alflb_megatron.balancer import Record


def layer_rows(last: Record | None) -> list[dict[str, Any]]:
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
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def of_layers(rows: Sequence[dict[str, Any]], floor: float) -> dict[str, Any]:
    """The keys of `record.STEP_KEYS` that are about the layers, and gain and bias where there are any.

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
    if rows[0]["bias"] is not None:
        found["bias"] = [row["bias"] for row in rows]
    if not all(math.isnan(row["gain"]) for row in rows):
        found["gain"] = [row["gain"] for row in rows]
    return found
