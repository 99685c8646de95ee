"""bf16: parity with Megatron-Core where its counts are exact, and the right answer where they are not."""

from __future__ import annotations

from typing import Any

import torch

from tests.distributed import jobs, ranks

RATE = 2.0**-10
"""A power of two: bf16 holds it exactly, and so every bias that is a multiple of it is the same in either precision."""


def _few_tokens() -> str:
    job = {"nproc": 2, "ep": 2, "dtype": "bf16"}
    theirs = jobs.trace(jobs.plan({**job, "rule": "builtin"}, step_size=RATE), 20)
    ours = jobs.trace(jobs.plan({**job, "rule": "sign"}, step_size=RATE, centring=False), 20)
    return ours.differs_from(theirs)


def test_few_tokens_and_an_exact_step_agree_with_megatron_core() -> None:
    for difference in ranks.run(2, _few_tokens):
        assert difference == ""


def _many_tokens(rule: str) -> list[dict[str, Any]]:
    """On a rank: of each layer the loads from the routing maps, and the bias after one update from zero."""
    job = {"nproc": 2, "ep": 2, "dtype": "bf16", "rule": rule, "global_batch_size": 64}
    settings: dict[str, Any] = {"step_size": 1e-3} | ({"centring": False} if rule == "sign" else {})
    plan = jobs.plan(job, **settings)
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        runner.step(0)
        layers, calls = runner.setup.balancer.layers, runner.trace.maps[0]
        rows = []
        for index, (layer, router) in enumerate(zip(layers, runner.routers, strict=True)):
            loads = torch.stack([routing_map.sum(dim=0) for routing_map in calls[index :: len(layers)]]).sum(dim=0)
            torch.distributed.all_reduce(loads, group=router.tp_dp_cp_group)
            exact = torch.sign(loads.sum() - loads * loads.numel()).float() * 1e-3
            counts = str(None if router.local_tokens_per_expert is None else router.local_tokens_per_expert.dtype)
            bias = router.expert_bias.clone()
            rows.append({"layer": layer, "loads": loads, "bias": bias, "exact": exact, "counts": counts})
        return rows


def test_many_tokens_are_counted_exactly_and_the_step_keeps_its_precision() -> None:
    for rows in ranks.run(2, _many_tokens, "sign"):
        for row in rows:
            assert row["loads"].max() > 256, "bf16 holds integers up to 256: this case would show nothing"
            assert row["bias"].dtype == torch.float32
            assert torch.equal(row["bias"], row["exact"]), row
    for rows in ranks.run(2, _many_tokens, "builtin"):
        for row in rows:
            if row["counts"] == "torch.bfloat16":  # megatron-core 0.16.1; later versions may keep float32
                assert not torch.equal(row["bias"], row["exact"]), "Megatron-Core's step is no longer rounded to bf16"
