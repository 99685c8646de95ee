"""The router by itself: replay, softmax gates, precision, the warning of a forgotten update, loads after an update."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

from tests.distributed import jobs, ranks


def _router(alf: dict[str, Any] | None = None, **config: Any) -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from alflb_megatron.config import ALFConfig
    from alflb_megatron.hosts.core import RouterBuilder
    from alflb_megatron.lab.training import build

    plan = jobs.plan({"rule": "sign", "nproc": 1})
    config_ = dataclasses.replace(build.transformer_config(plan), **config)
    return RouterBuilder(ALFConfig(**(alf or {})))(
        config=config_, pg_collection=get_default_pg_collection(), is_mtp_layer=False
    )


def _hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 2, 32, generator=torch.Generator().manual_seed(seed))


def _balancer(router: Any) -> Any:
    from alflb_megatron.balancer import Balancer

    return Balancer([router], [1], router.tp_dp_cp_group)


def _replay() -> dict[str, Any]:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    router = _router(moe_enable_routing_replay=True)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    first = router(_hidden())[1]
    recorded = RouterReplay.get_recorded_data()
    router.expert_bias += torch.linspace(-1, 1, 8)  # another bias would choose otherwise
    RouterReplay.clear_global_router_replay_action()
    other = router(_hidden())[1]
    RouterReplay.set_replay_data(recorded)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    replayed = router(_hidden())[1]
    RouterReplay.clear_global_router_replay_instances()
    return {"replayed": torch.equal(first, replayed), "other": torch.equal(first, other)}


def _balances(unit: str, **config: Any) -> tuple[float, float]:
    """MaxVio before and after 150 updates on the same skewed tokens."""
    step_size = 0.05 if unit == "score" else 0.2
    router = _router({"rule": "sqrt", "step_size": step_size, "score_unit": unit}, **config)
    with torch.no_grad():
        router.weight[:2] += 0.1
    hidden, balancer = _hidden() + 0.5, _balancer(router)
    vio = []
    for _ in range(150):
        router(hidden)
        balancer.launch()
        vio.append(float(balancer.commit().max_vio()))
    return vio[0], vio[-1]


def _cast() -> dict[str, Any]:
    """What a cast of the whole model to bf16, as Float16Module does it, leaves of our state."""
    router = _router()
    bias = torch.linspace(0.1, 0.2, 8)
    router.expert_bias.copy_(bias)
    router.alf_n.fill_(2**20 + 1)
    router.bfloat16()
    half = router.weight.dtype
    router.half().float()
    return {
        "weights": half,
        "bias": (router.expert_bias.dtype, torch.equal(router.expert_bias, bias)),
        "n": (router.alf_n.dtype, int(router.alf_n)),
        "counts": router.load_counter.tokens_per_expert.dtype,
    }


def _forgotten() -> list[str]:
    from alflb_megatron import router as module

    kept, module.FORWARDS_BEFORE_WARNING = module.FORWARDS_BEFORE_WARNING, 5
    try:
        router = _router()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(12):
                router(_hidden())
        return [str(warning.message) for warning in caught if "without an update" in str(warning.message)]
    finally:
        module.FORWARDS_BEFORE_WARNING = kept


def _empty() -> tuple[torch.Tensor, int]:
    """Bias and n after an update of a layer that saw no token."""
    router = _router({"rule": "harmonic"})
    router.expert_bias.copy_(torch.linspace(-0.5, 0.5, 8) + 0.25)
    before, balancer = router.expert_bias.clone(), _balancer(router)
    balancer.launch()
    balancer.commit()
    return router.expert_bias - before, int(router.alf_n)


def _refused(**config: Any) -> str:
    alf = {name: config.pop(name) for name in ("score_unit", "update_every") if name in config}
    from alflb_megatron.settings import SettingError

    try:
        _router(alf, **config)
    except SettingError as error:
        return str(error)
    return ""


def _all() -> dict[str, Any]:
    with ranks.model_parallel():
        return {
            "replay": _replay(),
            "sigmoid": _balances("score"),
            "sigmoid, bias on logits": _balances("logit"),
            "softmax": _balances("score", moe_router_score_function="softmax"),
            "softmax first": _balances("score", moe_router_score_function="softmax", moe_router_pre_softmax=True),
            "softmax, bias on logits": _balances("logit", moe_router_score_function="softmax"),
            "cast": _cast(),
            "forgotten": _forgotten(),
            "empty": _empty(),
            "sinkhorn": _refused(moe_router_load_balancing_type="sinkhorn"),
        }


def test_the_router_by_itself() -> None:
    (found,) = ranks.run(1, _all)
    assert found["replay"] == {"replayed": True, "other": False}
    for gate in ("sigmoid", "sigmoid, bias on logits", "softmax", "softmax first", "softmax, bias on logits"):
        before, after = found[gate]
        assert before > 1.0, gate
        assert after < 0.3, f"{gate}: MaxVio {before} to {after}"
    assert found["cast"] == {
        "weights": torch.bfloat16,
        "bias": (torch.float32, True),
        "n": (torch.int64, 2**20 + 1),
        "counts": torch.int64,
    }
    assert len(found["forgotten"]) == 1
    moved, n = found["empty"]
    assert moved.abs().max() == 0
    assert n == 0
    assert found["sinkhorn"].startswith("--moe-router-load-balancing-type=sinkhorn: chooses experts by itself")


def _unsound(rule: str, gate: str, value: float, rank_with_it: int = 1) -> dict[str, Any]:
    """One rank's router is fed `value` in the third of four global batches."""
    router = _router({"rule": rule}, moe_router_score_function=gate)
    balancer, rank = _balancer(router), torch.distributed.get_rank()
    biases, rejected = [], []
    for step in range(4):
        hidden = _hidden(seed=10 * step + rank)
        if step == 2 and rank == rank_with_it:
            hidden[5, 1, 0] = value
        router(hidden)
        balancer.launch()
        rejected.append(balancer.commit().rejected.tolist())
        biases.append(router.expert_bias.tolist())
    state = {name: row.tolist() for name, row in router.read_state()[1].items()}
    return {
        "biases": biases,
        "rejected": rejected,
        "n": router.alf_n.tolist(),
        "state finite": all(torch.tensor(row).isfinite().all() for row in state.values()),
        "counted": int(balancer.rejections),
        "left over": int(router.load_counter.nonfinite),
    }


def _unsound_cases(cases: list[tuple[str, str, float]]) -> list[dict[str, Any]]:
    with ranks.model_parallel():
        return [_unsound(*case) for case in cases]


def test_a_score_that_is_no_number_on_one_rank_moves_no_bias_on_any() -> None:
    nan, inf = float("nan"), float("inf")
    # Infinite logits are scores of 0 and 1 to a sigmoid, NaN to a softmax.
    cases = [
        ("sign", "sigmoid", nan),
        ("adaptive", "sigmoid", nan),
        ("adaptive", "softmax", inf),
        ("sign", "softmax", -inf),
    ]
    by_rank = ranks.run(2, _unsound_cases, cases)
    assert by_rank[0][0]["biases"] == by_rank[1][0]["biases"]
    for found in (one for rank in by_rank for one in rank):
        assert found["rejected"] == [[False], [False], [True], [False]]
        assert found["biases"][2] == found["biases"][1] != found["biases"][0]
        assert found["biases"][3] != found["biases"][2], "the next sound batch moves it again"
        assert found["n"] == [3]
        assert found["state finite"]
        assert found["counted"] == 1
        assert found["left over"] == 0


def _grouped() -> tuple[float, float]:
    with ranks.model_parallel():
        return _balances_with("adaptive", moe_router_num_groups=4, moe_router_group_topk=2)


def _balances_with(rule: str, **config: Any) -> tuple[float, float]:
    """MaxVio of the first and mean of the last of 30 updates, on fresh skewed tokens each time."""
    router = _router({"rule": rule}, **config)
    with torch.no_grad():
        router.weight[:2] += 0.1
    balancer, vio = _balancer(router), []
    for step in range(30):
        router(
            _hidden(step).repeat(8, 1, 1)
            + 0.5 * torch.randn(512, 2, 32, generator=torch.Generator().manual_seed(step))
            + 0.5
        )
        balancer.launch()
        vio.append(float(balancer.commit().max_vio()))
    return vio[0], sum(vio[-10:]) / 10


def test_adaptive_balances_under_group_limited_routing() -> None:
    ((before, after),) = ranks.run(1, _grouped)
    assert before > 0.5
    assert after < 0.3


def _sums() -> dict[str, float]:
    """Largest mean of the bias that each rule leaves in 20 updates."""
    from alflb_megatron import rules

    found = {}
    with ranks.model_parallel():
        for rule in rules.names():
            router = _router({"rule": rule})
            balancer, means = _balancer(router), []
            for step in range(20):
                router(_hidden(step))
                balancer.launch()
                balancer.commit()
                means.append(abs(float(router.expert_bias.double().mean())))
            assert router.expert_bias.any()
            found[rule] = max(means)
    return found


def test_every_rule_leaves_a_bias_of_mean_zero() -> None:
    (found,) = ranks.run(1, _sums)
    assert found
    assert max(found.values()) < 1e-7, found
