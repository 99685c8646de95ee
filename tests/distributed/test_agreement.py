"""Ranks that hold different biases: found by a sum, located, healed or stopped on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alflb_megatron import agreement
from tests.distributed import jobs, ranks


@given(st.integers(0, 63), st.integers(0, 31), st.integers(1, 4096), st.integers(0, 2**31))
@settings(max_examples=300, deadline=None)
def test_one_flipped_bit_on_one_of_many_ranks_is_found(element: int, bit: int, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bias, n, gain = torch.randn(64, generator=generator), torch.tensor([7]), torch.rand(1, generator=generator)
    other = bias.clone()
    other.view(torch.int32)[element] ^= 1 << bit if bit < 31 else -(2**31)
    same, differs = (agreement.checksum([agreement.digest([row, n, gain])] * 3) for row in (bias, other))
    assert agreement.all_agree(same * world, world)
    assert not agreement.all_agree(same * world + differs, world + 1)
    # As it travels beside histograms, in 32 bits.
    assert not agreement.all_agree((same * world + differs).to(torch.int32), world + 1)


def _runner(rule: str, **alf: Any) -> jobs.Runner:
    return jobs.Runner(jobs.plan({"rule": rule, "nproc": 3, "ep": 1, "global_batch_size": 6}, **alf))


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _one_bit(rule: str, rank: int, on_disagreement: str) -> dict[str, Any]:
    """After four steps rank `rank` has one bit of the second router's bias flipped; checks come at steps 0, 3, 6."""
    lines = _Lines()
    logging.getLogger("alflb_megatron").addHandler(lines)
    with ranks.model_parallel():
        runner = _runner(rule, check_every=3, on_disagreement=on_disagreement)
        found: dict[str, Any] = {"counted": [], "stopped": ""}
        for step in range(8):
            if step == 4 and torch.distributed.get_rank() == rank:
                runner.routers[1].expert_bias.view(torch.int32)[5] ^= 1 << 20  # the lowest might be rounded away
            try:
                runner.step(step)
            except agreement.DisagreementError as error:
                found["stopped"] = str(error)
                break
            found["counted"].append(runner.setup.balancer.disagreements)
        found["bias"] = [router.expert_bias.tolist() for router in runner.routers]
        found["state"] = [{k: v.tolist() for k, v in router.read_state()[1].items()} for router in runner.routers]
    logging.getLogger("alflb_megatron").removeHandler(lines)
    return {**found, "lines": lines.lines}


@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_a_bit_that_flips_on_one_rank_is_healed_within_the_steps_that_were_set(rule: str) -> None:
    by_rank = ranks.run(3, _one_bit, rule, 1, "heal")
    for found in by_rank:
        assert found["counted"] == [0, 0, 0, 0, 0, 0, 1, 1]
        assert found["bias"] == by_rank[0]["bias"]
        assert found["state"] == by_rank[0]["state"]
    (line,) = by_rank[0]["lines"]
    assert "(layer 3: rank 1)" in line and "have taken over what most hold" in line
    assert by_rank[1]["lines"] == []


def test_or_every_rank_stops_and_says_where() -> None:
    for found in ranks.run(3, _one_bit, "sign", 2, "stop"):
        assert found["counted"] == [0] * 6
        assert "(layer 3: rank 2)" in found["stopped"]


def _unlike_from_the_start() -> list[Any]:
    """Every rank begins with a bias of its own, as if loaded from different files."""
    with ranks.model_parallel():
        runner = _runner("sign")
        for router in runner.routers:
            router.expert_bias += float(torch.distributed.get_rank())
        runner.step(0)
        return [runner.setup.balancer.disagreements, [router.expert_bias.tolist() for router in runner.routers]]


def test_biases_from_different_files_are_found_at_the_first_step() -> None:
    first, *others = ranks.run(3, _unlike_from_the_start)
    assert first[0] == 1
    assert others == [first, first]
    assert max(abs(value) for row in first[1] for value in row) < 0.5, "the lowest rank's count where all differ"


def _unchecked() -> list[Any]:
    traces = []
    for every in (0, 1):
        plan = jobs.plan({"rule": "adaptive", "nproc": 2, "ep": 2}, check_every=every)
        traces.append(jobs.trace(plan, steps=6))
    return [traces[0].differs_from(traces[1]), [loads[2].sum().item() for loads in traces[1].loads]]


def test_what_rides_along_changes_nothing_else() -> None:
    for differs, loads in ranks.run(2, _unchecked):
        assert differs == ""
        assert loads == [8 * 32 * 2] * 6


def _second_stage() -> dict[str, Any]:
    """Two pipeline stages of two ranks each; the last rank's last layer is off from the start."""
    lines = _Lines()
    logging.getLogger("alflb_megatron").addHandler(lines)
    plan = jobs.plan({"rule": "adaptive", "nproc": 4, "pp": 2, "ep": 2})
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        if torch.distributed.get_rank() == 3:
            runner.routers[-1].expert_bias += 0.5
        runner.step(0)
        biases = {k: v.tolist() for k, v in runner.trace.biases[0].items()}
        return {"counted": runner.setup.balancer.disagreements, "biases": biases, "lines": lines.lines}


def test_ranks_are_named_by_their_place_in_the_whole_job() -> None:
    first, _, third, fourth = ranks.run(4, _second_stage)
    assert first["counted"] == 0 and first["lines"] == []
    assert third["counted"] == fourth["counted"] == 1
    assert "(layer 4: rank 3)" in third["lines"][0]
    assert third["biases"] == fourth["biases"]
