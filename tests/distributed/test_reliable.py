"""What a run that lasts has to stand: skipped steps, schedules, a start from one pass, another rule on resume."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import jobs, ranks
from tests.distributed.test_agreement import _Lines
from tests.distributed.test_router import _balancer, _hidden, _router

# -- steps that the optimizer skips ------------------------------------------------------------------------------------


def _skipped(rule: str) -> dict[str, Any]:
    """fp16 from a loss scale of 2^32 on: the first steps overflow, and Megatron-Core's scaler skips them."""
    step_size = {} if rule == "adaptive" else {"step_size": 0.01}
    own = {"centring": False} if rule == "sign" else {}
    plan = jobs.plan({"rule": rule, "nproc": 2, "ep": 2, "dtype": "fp16"}, **step_size, **own)
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        first = [p.detach().clone() for p in runner.trainee.chunks[0].parameters()]
        for step in range(3):
            runner.step(step)
        same = all(torch.equal(a, b) for a, b in zip(first, runner.trainee.chunks[0].parameters(), strict=True))
        scale = float(runner.trainee.optimizer.get_loss_scale())
        biases = [[row.tolist() for row in step.values()] for step in runner.trace.biases]
        return {"weights stood still": same, "scale": scale, "biases": biases, "n": list(runner.trace.n.values())}


def test_the_bias_moves_with_the_loads_also_where_the_optimizer_skips_as_megatron_cores_own_does() -> None:
    by_rule = {rule: ranks.run(2, _skipped, rule) for rule in ("builtin", "sign", "adaptive")}
    for rule, (here, there) in by_rule.items():
        assert here["weights stood still"] and there["weights stood still"], rule
        assert here["biases"] == there["biases"], rule
        assert here["biases"][0] != here["biases"][2], rule
    # Megatron-Core's own bias has been rounded to fp16 on the way.
    ours, own = (torch.tensor(by_rule[rule][0]["biases"]) for rule in ("sign", "builtin"))
    torch.testing.assert_close(ours, own, rtol=2e-3, atol=1e-5)
    assert by_rule["sign"][0]["n"] == [3, 3, 3]


# -- schedules and frozen ----------------------------------------------------------------------------------------------


def _moves(alf: dict[str, Any], updates: int, again_after: int = 0) -> dict[str, Any]:
    """How far each update moves the bias; after `again_after` updates a new router goes on from the old one's state."""
    router = _router(alf)
    balancer, moves = _balancer(router), []
    for update in range(updates):
        if update and update == again_after:
            state = router.state_dict()
            router = _router(alf)
            router.load_state_dict(state)
            balancer = _balancer(router)
        before = router.expert_bias.clone()
        router(_hidden(update) + 0.3)
        balancer.launch()
        balancer.commit()
        moves.append(float((router.expert_bias - before).abs().max()))
    return {"moves": moves, "n": int(router.alf_n), "vio": float(balancer.last.max_vio())}


def _schedules() -> dict[str, Any]:
    sign = {"rule": "sign", "step_size": 0.25, "centring": False}
    with ranks.model_parallel():
        return {
            "stop": _moves({**sign, "stop_after": 6}, 9),
            "fade": _moves({**sign, "stop_after": 6, "fade": 3}, 9),
            "resumed": _moves({**sign, "stop_after": 6, "fade": 3}, 9, again_after=5),
            "frozen": _moves({"rule": "adaptive", "frozen": True}, 4),
        }


def test_the_step_goes_to_zero_when_it_should_and_a_frozen_bias_never_moves() -> None:
    (found,) = ranks.run(1, _schedules)
    assert found["stop"]["moves"] == [0.25] * 6 + [0.0] * 3
    assert found["stop"]["n"] == 6
    assert found["fade"]["moves"] == [0.25] * 3 + [0.1875, 0.125, 0.0625] + [0.0] * 3
    assert found["resumed"]["moves"] == found["fade"]["moves"] and found["resumed"]["n"] == 6
    assert found["frozen"]["moves"] == [0.0] * 4
    assert found["frozen"]["vio"] > 0, "it is still watched"


# -- warm start --------------------------------------------------------------------------------------------------------


def _warm(rule: str, frozen: bool, shape: dict[str, Any]) -> dict[str, Any]:
    from alflb_megatron.calibration import warm_start

    plan = jobs.plan({"rule": rule, "nproc": 2, "ep": 2, "lr": 1e-4}, shape, frozen=frozen)
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        balancer = runner.trainee.balancer
        for router in runner.routers:
            router.alf_n.fill_(5)
        weights = [p.detach().clone() for p in runner.trainee.chunks[0].parameters()]
        for chunk in runner.trainee.chunks:
            chunk.eval()
        with torch.no_grad():
            found = warm_start(balancer, lambda: runner.forward_backward(0, forward_only=True))
        for chunk in runner.trainee.chunks:
            chunk.train()
        result = {
            "before": found.before.mean().item(),
            "after": found.after.mean().item(),
            "n": [int(router.alf_n) for router in runner.routers],
            "left": sum(int(seat.load_window.counts_E.sum()) for seat in balancer.seats),
            "taps": [router.logit_taps for router in runner.routers],
            "trained": any(
                not torch.equal(a, b) for a, b in zip(weights, runner.trainee.chunks[0].parameters(), strict=True)
            ),
            "bias": [router.expert_bias.tolist() for router in runner.routers],
        }
        runner.step(0)
        return {**result, "first step": float(balancer.last.max_vio().mean())}


@pytest.mark.parametrize(
    ("rule", "frozen", "shape"),
    [("sign", False, {}), ("adaptive", True, {"gate": "sigmoid", "num_groups": 4, "group_topk": 2})],
    ids=["sign", "frozen, groups"],
)
def test_one_pass_over_some_batches_balances_them(rule: str, frozen: bool, shape: dict[str, Any]) -> None:
    here, there = ranks.run(2, _warm, rule, frozen, shape)
    assert here == there
    assert here["after"] < 0.2 * here["before"], here
    assert here["first step"] < 0.6 * here["before"], "the layers behind a moved bias see other tokens"
    assert here["n"] == [0, 0, 0]
    assert here["left"] == 0 and here["taps"] == [()] * 3 and not here["trained"]


# -- another rule on resume --------------------------------------------------------------------------------------------


def _changed(folder: Path, writer: str, reader: str) -> dict[str, Any]:
    from alflb_megatron.runs import checkpoint

    lines = _Lines()
    logging.getLogger("alflb_megatron").addHandler(lines)
    plans = [jobs.plan({"rule": rule, "nproc": 2, "ep": 2}) for rule in (writer, reader)]
    with ranks.model_parallel(**jobs.sizes(plans[0])):
        old = jobs.Runner(plans[0])
        for step in range(3):
            old.step(step)
        path = checkpoint.save(old.trainee, plans[0], 3, folder / f"{writer}-{reader}", "")
        new = jobs.Runner(plans[1])
        fresh = [{k: v.clone() for k, v in router.read_state()[1].items()} for router in new.routers]
        checkpoint.load(new.trainee, plans[1], checkpoint.find(path, "--load"))
        pairs = list(zip(old.routers, new.routers, strict=True))
        found = {
            "bias kept": all(torch.equal(a.expert_bias, b.expert_bias) for a, b in pairs),
            "n": [int(router.alf_n) for router in new.routers],
            "state fresh": all(
                torch.equal(row, first[name])
                for router, first in zip(new.routers, fresh, strict=True)
                for name, row in router.read_state()[1].items()
            ),
        }
        new.step(3)
        found["moved"] = not torch.equal(pairs[0][0].expert_bias, pairs[0][1].expert_bias)
    return {**found, "lines": lines.lines}


def test_another_rule_takes_the_bias_begins_its_state_afresh_and_says_so(tmp_path: Path) -> None:
    for rank, found in enumerate(ranks.run(2, _changed, tmp_path, "harmonic", "adaptive")):
        assert found.pop("lines") == [
            "the checkpoint was written by rule harmonic: rule adaptive goes on from its biases; n and rule state "
            "(alf_gain, alf_velocity_weight, alf_energy, alf_violation, alf_move, alf_velocity) begin afresh"
        ] * (rank == 0)
        assert found == {"bias kept": True, "n": [0] * 3, "state fresh": True, "moved": True}
    for rank, found in enumerate(ranks.run(2, _changed, tmp_path, "adaptive", "sign")):
        (line,) = found.pop("lines") or ([""] if rank else [])
        assert rank or line.startswith("the checkpoint was written by rule adaptive: rule sign goes on from its biases")
        assert found == {"bias kept": True, "n": [0] * 3, "state fresh": True, "moved": True}


def test_the_same_rule_goes_on_where_it_was_and_nothing_is_said(tmp_path: Path) -> None:
    for found in ranks.run(2, _changed, tmp_path, "adaptive", "adaptive"):
        assert found == {"bias kept": True, "n": [3] * 3, "state fresh": False, "moved": True, "lines": []}
