"""The collectives of a whole training step at world sizes that no test machine has, on groups that move nothing."""

from __future__ import annotations

import pytest

from alflb_megatron import near_ties
from alflb_megatron.margins import BINS
from benchmarks import traced_steps
from tests import forked

SMALL = {"preset": "tiny", "num_layers": 8, "num_experts": 64}
CLUSTERS = [(8, {"ep": 8}), (64, {"tp": 2, "pp": 2, "ep": 8}), (4096, {"tp": 2, "pp": 4, "ep": 64})]
OWN, SIGN, ADAPTIVE, WITHIN = traced_steps.ROWS


@pytest.mark.parametrize(("world", "sizes"), CLUSTERS, ids=[str(world) for world, _ in CLUSTERS])
def test_one_all_reduce_a_step_in_place_of_megatron_cores(world: int, sizes: dict[str, int]) -> None:
    """Where micro-batches move the bias each has one more, and one says that it was the last."""
    found = {row: forked.bare(traced_steps.step, SMALL, world, sizes, row) for row in traced_steps.ROWS}
    layers, experts = found[SIGN]["layers"], found[SIGN]["experts"]
    assert layers > 0 and experts == 64 and found[SIGN]["group"] == world // sizes.get("pp", 1)
    others = {row: [one for one in of["collectives"] if one[0] != "allreduce_"] for row, of in found.items()}
    assert all(of == others[OWN] for of in others.values()), "nothing else differs"

    def all_reduces(row: str, *but: int) -> list[int]:
        sizes = [size for name, size in found[row]["collectives"] if name == "allreduce_"]
        return [size for size in sizes if size not in but]

    theirs = 4 * layers * experts  # loads in float32
    loads = 8 * layers * (experts + 1)  # and whether a score was not finite
    margins = 4 * layers * (experts + 1 + experts * BINS)
    micro_batch = (
        4 * layers * (experts + 2 + experts * near_ties.BINS) + 8
    )  # dictated choices; which batch, whether last
    rest = all_reduces(OWN, theirs)
    assert len(all_reduces(OWN)) == len(rest) + 1
    for row, size in ((SIGN, loads), (ADAPTIVE, margins)):
        assert all_reduces(row, size) == rest and all_reduces(row).count(size) == 1
    assert all_reduces(WITHIN, micro_batch, loads) == rest
    assert all_reduces(WITHIN).count(micro_batch) == traced_steps.MICRO_BATCHES + 1
