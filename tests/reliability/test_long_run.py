"""Many updates of one Balancer: memory flat, the zero sum kept, the ranks one. `ALFLB_LONG=1` for 20,000 of them."""

from __future__ import annotations

import os
from pathlib import Path

from alflb_megatron.lab.records.files import write_json
from tests.reliability import long_run

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "long_run.json"
LONG = bool(os.environ.get("ALFLB_LONG"))
SEEN_AS = {
    "leak": "memory grew by",
    "records": "tensors more than after warm-up",
    "bit": "ranks disagreed",
    "drift": "sign: the mean of a layer's bias drifted",
}


def test_updates_leave_memory_flat_the_sum_zero_and_the_ranks_one() -> None:
    planted = [(60, plant) for plant in long_run.PLANTS]
    found, *defective = long_run.run((20_000 if LONG else 500, ""), *planted)
    assert long_run.problems(found) == []
    for (_, plant), figures in zip(planted, defective, strict=True):
        assert any(line.startswith(SEEN_AS[plant]) for line in long_run.problems(figures)), (plant, figures)
    if LONG:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS, found)
