"""Loads against counts that the test makes itself, in NumPy, from the gate's logits: equal integers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import jobs, ranks


def _chosen(logits: torch.Tensor, bias: torch.Tensor, topk: int) -> np.ndarray:
    """How often each expert is among the `topk` largest of sigmoid(logits) + bias, in NumPy [E]."""
    scores = (torch.sigmoid(logits.float()) + bias).reshape(-1, bias.numel()).numpy()
    experts = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
    return np.bincount(experts.ravel(), minlength=bias.numel())


class _Logits:
    """Keeps what the gates of a model gave, a list a router; recomputed passes are left out by the caller's choice."""

    def __init__(self, routers: list[Any], keep: Any) -> None:
        self.seen: dict[int, list[torch.Tensor]] = {id(router): [] for router in routers}
        for router in routers:
            router.gating = self._wrapped(router, router.gating, keep)

    def _wrapped(self, router: Any, gating: Any, keep: Any) -> Any:
        def gate(*args: Any) -> torch.Tensor:
            logits = gating(*args)
            if keep():
                self.seen[id(router)].append(logits.detach().clone())
            return logits

        return gate


def _counts(job: dict[str, Any], shape: dict[str, Any]) -> list[tuple[int, list[int], list[int]]]:
    """On a rank: layer, our loads and the test's own of three global batches in a row."""
    plan = jobs.plan({"rule": "sign", "nproc": 2, **job}, shape, step_size=0.05)
    rows = []
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        # The first forward pass of a recomputed layer runs without gradients; every token passes there exactly once.
        once = (lambda: not torch.is_grad_enabled()) if job.get("recompute", "none") != "none" else (lambda: True)
        routers = runner.setup.balancer.routers
        for step in range(3):
            before = [router.expert_bias.clone() for router in routers]
            logits = _Logits(routers, once)
            runner.step(step)
            for index, (layer, router) in enumerate(zip(runner.setup.balancer.layers, routers, strict=True)):
                mine = sum(_chosen(x, before[index], plan.shape.topk) for x in logits.seen[id(router)])
                everywhere = torch.from_numpy(np.asarray(mine))
                torch.distributed.all_reduce(everywhere, group=router.tp_dp_cp_group)
                rows.append((layer, runner.setup.balancer.last.loads[index].tolist(), everywhere.tolist()))
                del router.gating  # the class's own again
    return rows


@pytest.mark.parametrize(
    ("job", "shape"),
    [
        pytest.param({"ep": 2}, {}, id="ep2"),
        pytest.param({"ep": 2, "recompute": "full"}, {}, id="recompute-full"),
        pytest.param({"ep": 2, "recompute": "moe"}, {}, id="recompute-moe"),
        pytest.param({"ep": 2, "capacity_factor": 1.0}, {}, id="capacity: demand before any drop"),
        pytest.param({"ep": 2}, {"mtp_layers": 1}, id="mtp"),
        pytest.param({"pp": 2}, {"num_layers": 2}, id="a stage without an MoE layer"),
        pytest.param({"ep": 2, "dtype": "bf16"}, {}, id="bf16"),
    ],
)
def test_loads_are_the_tokens_that_chose_each_expert(job: dict[str, Any], shape: dict[str, Any]) -> None:
    results = ranks.run(2, _counts, job, shape)
    rows = [row for rank in results for row in rank]
    layers = {"mtp_layers": {2, 3, 4, 5}, "num_layers": {2}}.get(next(iter(shape), ""), {2, 3, 4})
    assert {layer for layer, *_ in rows} == layers
    for layer, ours, theirs in rows:
        assert ours == theirs, f"layer {layer}"
        assert sum(ours) == 8 * 32 * 2, f"layer {layer}: sequences x tokens x experts a token"


def _windows() -> dict[str, Any]:
    """On a rank: what the windows hold after evaluation, and what a frozen router does."""
    found: dict[str, Any] = {}
    plan = jobs.plan({"rule": "sign", "nproc": 2, "ep": 2}, step_size=0.05)
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        runner.step(0)
        windows = [router.load_counter for router in runner.setup.balancer.routers]
        for chunk in runner.setup.chunks:
            chunk.eval()
        runner.forward_backward(1, forward_only=True)  # with gradients enabled, as some trainers evaluate
        with torch.no_grad():
            runner.forward_backward(2, forward_only=True)
        found["after evaluation"] = sum(int(window.tokens_per_expert.sum()) for window in windows)
        for chunk in runner.setup.chunks:
            chunk.train()
        with torch.no_grad():
            runner.forward_backward(3, forward_only=True)
        found["after a forward pass without gradients"] = sum(int(window.tokens_per_expert.sum()) for window in windows)

        frozen = jobs.plan({"rule": "sign", "nproc": 2, "ep": 2}, frozen=True)
        watcher = jobs.Runner(frozen)
        watcher.step(0)
        found["frozen loads"] = [int(loads.sum()) for loads in watcher.setup.balancer.last.loads]
        found["frozen bias"] = max(float(bias.abs().max()) for bias in watcher.trace.biases[-1].values())
        found["frozen n"] = max(watcher.trace.n.values())
    return found


def test_evaluation_is_not_counted_and_a_frozen_router_only_watches() -> None:
    for found in ranks.run(2, _windows):
        assert found["after evaluation"] == 0
        assert found["after a forward pass without gradients"] == 0
        assert found["frozen loads"] == [512, 512, 512]
        assert found["frozen bias"] == 0.0
        assert found["frozen n"] == 0


def _alone(widths: list[int], padded: bool) -> list[tuple[list[int], list[int], list[float], list[float]]]:
    """On a rank: routers of the given widths, fed directly; our loads, the test's, the bias and its formula."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from alflb_megatron.balancer import Balancer
    from alflb_megatron.config import ALFConfig
    from alflb_megatron.lab.training import build
    from alflb_megatron.router import ALFRouter

    plan = jobs.plan({"rule": "sign", "nproc": 2, "ep": 2})
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    with ranks.model_parallel(**jobs.sizes(plan)):
        config = build.transformer_config(plan)
        groups = get_default_pg_collection()
        alf = ALFConfig(rule="sign", step_size=0.25, centring=False)
        routers = [ALFRouter(dataclasses.replace(config, num_moe_experts=width), groups, alf=alf) for width in widths]
        mine = [np.zeros(width, dtype=np.int64) for width in widths]
        for _ in range(2):
            hidden = torch.randn(16, 2, config.hidden_size, generator=generator)
            padding = torch.rand(16, 2, generator=generator) < 0.4 if padded else None
            for router, count in zip(routers, mine, strict=True):
                logits = router.gating(hidden).detach().reshape(-1, router.num_experts)
                count += _chosen(logits if padding is None else logits[~padding.reshape(-1)], router.expert_bias, 2)
                router(hidden, padding)
        balancer = Balancer(routers, range(1, len(widths) + 1), groups.tp_dp_cp)
        balancer.launch()
        record = balancer.commit()
        rows = []
        for router, count, loads in zip(routers, mine, record.loads, strict=True):
            total = torch.from_numpy(count)
            torch.distributed.all_reduce(total)
            expected = 0.25 * np.sign(total.double().mean().item() - total.numpy())
            rows.append((loads.tolist(), total.tolist(), router.expert_bias.tolist(), expected.tolist()))
        return rows


@pytest.mark.parametrize("widths", [[8, 8], [8, 4, 16]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_padding_is_not_counted_and_layers_may_differ_in_width(widths: list[int], padded: bool) -> None:
    for rows in ranks.run(2, _alone, widths, padded):
        for loads, expected, bias, moved in rows:
            assert loads == expected
            assert sum(loads) < 2 * 2 * 32 * 2 if padded else sum(loads) == 2 * 2 * 32 * 2
            assert bias == moved
