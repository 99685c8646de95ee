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
        first = [p.detach().clone() for p in runner.setup.chunks[0].parameters()]
        for step in range(3):
            runner.step(step)
        same = all(torch.equal(a, b) for a, b in zip(first, runner.setup.chunks[0].parameters(), strict=True))
        scale = float(runner.setup.optimizer.get_loss_scale())
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
        balancer = runner.setup.balancer
        for router in runner.routers:
            router.alf_n.fill_(5)
        weights = [p.detach().clone() for p in runner.setup.chunks[0].parameters()]
        for chunk in runner.setup.chunks:
            chunk.eval()
        with torch.no_grad():
            found = warm_start(balancer, lambda: runner.forward_backward(0, forward_only=True))
        for chunk in runner.setup.chunks:
            chunk.train()
        result = {
            "before": found.before.mean().item(),
            "after": found.after.mean().item(),
            "n": [int(router.alf_n) for router in runner.routers],
            "left": sum(int(router.load_counter.tokens_per_expert.sum()) for router in balancer.routers),
            "taps": [router.logit_hooks for router in runner.routers],
            "trained": any(
                not torch.equal(a, b) for a, b in zip(weights, runner.setup.chunks[0].parameters(), strict=True)
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
    from alflb_megatron.lab.training import checkpoint

    lines = _Lines()
    logging.getLogger("alflb_megatron").addHandler(lines)
    plans = [jobs.plan({"rule": rule, "nproc": 2, "ep": 2}) for rule in (writer, reader)]
    with ranks.model_parallel(**jobs.sizes(plans[0])):
        old = jobs.Runner(plans[0])
        for step in range(3):
            old.step(step)
        path = checkpoint.save(old.setup, plans[0], 3, folder / f"{writer}-{reader}", "")
        new = jobs.Runner(plans[1])
        fresh = [{k: v.clone() for k, v in router.read_state()[1].items()} for router in new.routers]
        checkpoint.load(new.setup, plans[1], checkpoint.find(path, "--load"))
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
        lines = found.pop("lines")
        assert len(lines) == (rank == 0)
        assert rank or lines[0].startswith("the checkpoint was written by rule adaptive: rule sign goes on from its")
        assert found == {"bias kept": True, "n": [0] * 3, "state fresh": True, "moved": True}


def test_the_same_rule_goes_on_where_it_was_and_nothing_is_said(tmp_path: Path) -> None:
    for found in ranks.run(2, _changed, tmp_path, "adaptive", "adaptive"):
        assert found == {"bias kept": True, "n": [3] * 3, "state fresh": False, "moved": True, "lines": []}


def _strict(folder: Path) -> dict[str, Any]:
    """What a plain, strict load_state_dict makes of another rule's state, and of weights without any bias."""
    lines = _Lines()
    logging.getLogger("alflb_megatron").addHandler(lines)
    with ranks.model_parallel():
        written = _router({"rule": "adaptive"}).state_dict()
        written["expert_bias"] = torch.linspace(-1, 1, 8)
        router = _router({"rule": "sign"})
        router.load_state_dict(written)
        bare = _router({"rule": "sign"})
        bare.load_state_dict({"weight": written["weight"]})
        found = {"bias": router.expert_bias.tolist(), "bare": bare.expert_bias.tolist()}
        graphs = ""
        try:
            _router(cuda_graph_impl="local", cuda_graph_scope="full_iteration")
        except Exception as error:
            graphs = str(error)
    return {**found, "lines": lines.lines, "graphs": graphs}


def test_a_strict_load_takes_another_rules_checkpoint_and_one_without_a_bias(tmp_path: Path) -> None:
    (found,) = ranks.run(1, _strict, tmp_path)
    assert found["bias"] == torch.linspace(-1, 1, 8).tolist()
    assert found["bare"] == [0.0] * 8
    assert "written by rule adaptive" in found["lines"][0] and "holds no expert bias" in found["lines"][1]
    assert "full_iteration: replays a whole step without Python" in found["graphs"]


# -- bad numbers in one layer and one micro-batch; the alarm of it -----------------------------------------------------


def _one_layer_bad() -> dict[str, Any]:
    """In step 3 of 10 rank 1's second router sees a NaN in one of its two micro-batches; the scaler skips the step.

    In float32 Megatron-Core would end the run at the NaN in the gradients.
    """
    lines = _Lines()
    logging.getLogger("alflb_megatron").addHandler(lines)
    plan = jobs.plan({"rule": "adaptive", "nproc": 2, "ep": 2, "dtype": "fp16"})
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        calls: list[int] = []

        def spoil(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            calls.append(1)
            hidden = inputs[0].clone()
            if len(calls) == 1 and torch.distributed.get_rank() == 1:
                hidden[3, 0, 0] = float("nan")
            return hidden, *inputs[1:]

        rejected, alarms, biases = [], [], []
        for step in range(10):
            hook = runner.routers[1].register_forward_pre_hook(spoil) if step == 3 else None
            runner.step(step)
            if hook is not None:
                hook.remove()
            rejected.append(runner.setup.balancer.last.rejected.tolist())
            alarms.append(list(runner.setup.balancer.last.alarms))
            biases.append([r.expert_bias.tolist() for r in runner.routers])
        found = {"rejected": rejected, "alarms": alarms, "biases": biases, "calls": len(calls)}
        return {**found, "lines": lines.lines, "n": [int(r.alf_n) for r in runner.routers]}


def test_one_bad_micro_batch_holds_one_layer_back_on_every_rank_and_is_said() -> None:
    here, there = ranks.run(2, _one_layer_bad)
    assert here["calls"] == 2
    assert {k: v for k, v in here.items() if k != "lines"} == {k: v for k, v in there.items() if k != "lines"}
    assert here["rejected"][3] == [False, True, True], "the layer behind it was fed what came out of it"
    assert [row for step, row in enumerate(here["rejected"]) if step != 3] == [[False] * 3] * 9
    before, after = here["biases"][2], here["biases"][3]
    assert after[1] == before[1] and after[0] != before[0]
    assert here["n"] == [10, 9, 9]
    (alarm,) = here["alarms"][9]
    assert alarm.startswith("layer 3 (and 1 more): ") and "updates refused since the last such line: 1" in alarm
    assert here["lines"] == [f"update 10: {alarm}"] and there["lines"] == []


# -- what the hosts' loggers show --------------------------------------------------------------------------------------


def _shown() -> tuple[dict[str, float], dict[int, list[int]], dict[int, list[float]]]:
    from megatron.core import parallel_state

    from alflb_megatron.hosts import log

    plan = jobs.plan({"rule": "adaptive", "nproc": 2, "ep": 1, "pp": 2}, {"num_layers": 4}, log_layers=True)
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        for step in range(3):
            before = {s: router.expert_bias.clone() for s, router in enumerate(runner.setup.balancer.routers)}
            runner.step(step)
        last = runner.setup.balancer.last
        shown = log.balance_metrics(runner.setup.chunks, parallel_state.get_pipeline_model_parallel_group())
        drift = {
            layer: [float((bias - before[index]).abs().max()), float(last.curvature[index])]
            for index, (layer, bias) in enumerate(zip(last.layers, last.bias, strict=True))
        }
        loads = {layer: row.tolist() for layer, row in zip(last.layers, last.loads, strict=True)}
        return {name: float(value) for name, value in shown.items()}, loads, drift


def test_the_logger_shows_the_layers_of_all_stages_on_every_rank() -> None:
    from alflb_megatron.hosts.log import DESCRIPTIONS, WITHIN_BATCH_KEYS

    (shown, here, drift_here), (other, there, drift_there) = ranks.run(2, _shown)
    assert shown == other
    loads, drift = {**here, **there}, {**drift_here, **drift_there}
    assert sorted(loads) == [2, 3, 4] and here and there
    vio = {layer: max(row) / (sum(row) / 8) - 1 for layer, row in loads.items()}
    assert shown["MaxVio"] == pytest.approx(sum(vio.values()) / 3, rel=1e-5)
    assert shown["MaxVio p50"] == pytest.approx(sorted(vio.values())[1], rel=1e-5)
    assert shown["MaxVio worst layer"] == pytest.approx(max(vio.values()), rel=1e-5)
    assert shown["load max"] == pytest.approx(sum(map(max, loads.values())) / 3, rel=1e-5)
    assert shown["starved experts"] == sum(load < 0.1 * sum(row) / 8 for row in loads.values() for load in row)
    assert shown["dead experts"] == sum(load == 0 for row in loads.values() for load in row)
    assert shown["expert bias drift"] == pytest.approx(sum(moved for moved, _ in drift.values()) / 3, rel=1e-4)
    assert shown["curvature"] == pytest.approx(min(curvature for _, curvature in drift.values()), rel=1e-5)
    assert shown["EP rank overload"] == 1.0, "one expert-parallel rank has all"
    assert {f"MaxVio layer {layer}": shown[f"MaxVio layer {layer}"] for layer in vio} == pytest.approx(
        {f"MaxVio layer {layer}": value for layer, value in vio.items()}, rel=1e-5
    )
    assert set(DESCRIPTIONS) - set(WITHIN_BATCH_KEYS) == {
        name for name in shown if " layer " not in f"{name} " or name.endswith("worst layer")
    }
    assert len(DESCRIPTIONS) <= 24
