"""`rule=sign` without centring against Megatron-Core's own expert bias: biases, routing maps and loss, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import jobs, ranks

STEPS = 8
RATE = 2.0**-6
"""Large enough that experts change hands within 8 steps."""

CASES: dict[str, dict[str, Any]] = {
    "dp2": {},
    "ep2": {"ep": 2},
    "ep2-allgather": {"ep": 2, "dispatcher": "allgather"},
    "tp2-sequence-parallel": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2-interleaved": {"pp": 2, "vpp": 2},
    "recompute-full": {"ep": 2, "recompute": "full"},
    "recompute-moe": {"ep": 2, "recompute": "moe"},
    "one-micro-batch": {"ep": 2, "global_batch_size": 4},
    "overlapped-gradient-reduction": {"ep": 2, "overlap_grad_reduce": True},
    "distributed-optimizer": {"ep": 2, "optimizer": "distributed"},
    "auxiliary-and-z-loss": {"ep": 2, "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
    "sequence-auxiliary-loss": {"ep": 2, "aux_loss_coeff": 0.01, "aux_loss_type": "seq_aux_loss"},
    "global-auxiliary-loss": {"ep": 2, "aux_loss_coeff": 0.01, "aux_loss_type": "global_aux_loss"},
    "group-limited": {"ep": 2},
    "mtp": {"ep": 2},
    "mtp-sequence-parallel": {"tp": 2},
}
SHAPES: dict[str, dict[str, Any]] = {
    "group-limited": {"num_groups": 4, "group_topk": 2, "topk_scaling_factor": 2.5},
    "mtp": {"mtp_layers": 1},
    "mtp-sequence-parallel": {"mtp_layers": 1},
}
LAYOUTS = [
    ["dp2"],
    [name for name, job in CASES.items() if job.get("ep") == 2],
    ["tp2-sequence-parallel", "mtp-sequence-parallel"],
    ["pp2"],
    ["pp2-interleaved"],
]


def _compare(names: list[str]) -> dict[str, str]:
    """On a rank: the first difference between built-in and ours for each case, empty where there is none."""
    found = {}
    for name in names:
        job = {"nproc": 2, **CASES[name]}
        theirs = jobs.trace(jobs.plan({**job, "rule": "builtin"}, SHAPES.get(name), step_size=RATE), STEPS)
        ours = jobs.trace(jobs.plan({**job, "rule": "sign"}, SHAPES.get(name), step_size=RATE, centring=False), STEPS)
        found[name] = ours.differs_from(theirs)
        if not found[name] and not any(bias.abs().max() > 3 * RATE for bias in ours.biases[-1].values()):
            found[name] = "the biases hardly moved: this case shows nothing"
    return found


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_sign_without_centring_is_megatron_cores_own_bias(names: list[str]) -> None:
    for rank, found in enumerate(ranks.run(2, _compare, names)):
        for name, difference in found.items():
            assert difference == "", f"{name}, rank {rank}: {difference}"
