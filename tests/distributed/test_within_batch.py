"""Biases moved inside the global batch: equal to today's with one micro-batch, right in every schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alflb_megatron import rules
from tests.distributed import jobs, ranks

MICRO = {"update_every": "micro-batch"}


def _trace(job: dict[str, Any], steps: int, alf: dict[str, Any]) -> jobs.Trace:
    return jobs.trace(jobs.plan({"nproc": 1, "rule": "adaptive", **job}, **alf), steps)


def _one_micro_batch(rule: str) -> str:
    job = {"rule": rule, "nproc": 2, "ep": 2, "global_batch_size": 8, "micro_batch_size": 4}
    return _trace(job, 6, MICRO).differs_from(_trace(job, 6, {}))


@pytest.mark.parametrize("rule", rules.names())
def test_with_one_micro_batch_nothing_changes(rule: str) -> None:
    assert ranks.run(2, _one_micro_batch, rule) == ["", ""]


def _vio(trace: jobs.Trace, steps: slice) -> float:
    from alflb_megatron.metrics import max_vio

    return float(torch.stack([max_vio(load) for loads in trace.loads[steps] for load in loads.values()]).mean())


def _better(rule: str) -> tuple[float, float]:
    job = {"rule": rule, "global_batch_size": 16, "micro_batch_size": 2}
    return _vio(_trace(job, 8, MICRO), slice(None)), _vio(_trace(job, 8, {}), slice(None))


@pytest.mark.parametrize("rule", ["adaptive", "quantile"])
def test_several_micro_batches_are_balanced_better(rule: str) -> None:
    ((micro, whole),) = ranks.run(1, _better, rule)
    assert micro < 0.7 * whole


def _recomputed(recompute: str, job: dict[str, Any], rule: str) -> str:
    job = {"rule": rule, "global_batch_size": 16, "micro_batch_size": 2, **job}
    plain = _trace(job, 5, MICRO)
    again = _trace({**job, "recompute": recompute}, 5, MICRO)
    for trace in (plain, again):  # a recomputed layer routes twice, which differs_from would take for a difference
        trace.maps = []
    return again.differs_from(plain)


SPLITS = {
    "alone": {},
    "pipeline": {"nproc": 2, "pp": 2},
    "experts": {"nproc": 2, "ep": 2},
    "interleaved": {"nproc": 2, "pp": 2, "vpp": 2},
}


@pytest.mark.parametrize("recompute", ["full", "moe"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rule", ["adaptive", "sign"])
def test_recomputation_changes_nothing(rule: str, split: str, recompute: str) -> None:
    job = SPLITS[split]
    found = ranks.run(job.get("nproc", 1), _recomputed, recompute, job, rule)
    assert set(found) == {""}
