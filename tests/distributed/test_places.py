"""Places where users put a router: recomputed by torch, replayed, frozen, evaluated, unevenly fed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.distributed import ranks
from tests.distributed.test_abandoned import Trainer, _left, _training
from tests.distributed.test_identity import _routers, _shown, running
from tests.distributed.test_router import _balancer, _hidden, _refused, _router

# -- recomputation by torch -------------------------------------------------------------------------------------------


def _once(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    return router(hidden)[0]


def _again(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    return checkpoint(_once, router, hidden, use_reentrant=False)


def _reentrantly(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    return checkpoint(_once, router, hidden, use_reentrant=True)


def _by_megatron(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    from megatron.core import tensor_parallel

    return tensor_parallel.checkpoint(lambda x: _once(router, x), False, hidden)


def _nested(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    return checkpoint(_by_megatron, router, hidden, use_reentrant=False)


def _nested_the_other_way(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    from megatron.core import tensor_parallel

    return tensor_parallel.checkpoint(lambda x: _again(router, x), False, hidden)


def _twice_nested(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    return checkpoint(_again, router, hidden, use_reentrant=False)


KINDS = [_once, _again, _reentrantly, _by_megatron, _nested, _nested_the_other_way, _twice_nested]


def _recomputed(rule: str) -> dict[str, list[Any]]:
    """Loads and margins counted of two micro-batches, each kind of recomputation; the second shares one backward."""
    found = {}
    with ranks.model_parallel():
        router = _router({"rule": rule})
        for kind in KINDS:
            router.load_counter.reset_parameters()
            one, two = (_hidden(seed).requires_grad_() for seed in range(2))
            kind(router, one).square().sum().backward()
            (kind(router, two).square().sum() + kind(router, one).square().sum()).backward()
            counter = router.load_counter
            margins = counter.histogram_EB
            found[kind.__name__] = [counter.tokens_per_expert.tolist(), margins is None or int(margins.sum())]
    return found


@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_a_token_counts_once_however_its_layer_is_recomputed(rule: str) -> None:
    (found,) = ranks.run(1, _recomputed, rule)
    plain = found["_once"]
    assert sum(plain[0]) == 3 * 128 * 2
    assert found == dict.fromkeys(found, plain)


def _mixed() -> int:
    """Some micro-batches recomputed, some not, in one global batch."""
    with ranks.model_parallel():
        router = _router()
        for kind in KINDS:
            kind(router, _hidden().requires_grad_()).square().sum().backward()
        return int(router.load_counter.tokens_per_expert.sum())


def test_kinds_of_recomputation_may_be_mixed_in_a_global_batch() -> None:
    assert ranks.run(1, _mixed) == [len(KINDS) * 128 * 2]


def _without_gradients(grad: bool) -> dict[str, int]:
    """Tokens counted of a pass in training mode, gradients off around each kind of recomputation."""
    found = {}
    with ranks.model_parallel():
        router = _router({"rule": "sign"})
        for kind in KINDS:
            with torch.no_grad():
                kind(router, _hidden().requires_grad_(grad))  # a later pipeline stage's input asks for gradients
            found[kind.__name__] = int(router.load_counter.tokens_per_expert.sum())
    return found


@pytest.mark.parametrize("grad", [False, True])
def test_passes_that_no_backward_pass_follows_are_not_counted(grad: bool) -> None:
    (found,) = ranks.run(1, _without_gradients, grad)
    assert found == {kind.__name__: 0 for kind in KINDS}


def _nan_while_evaluating() -> tuple[int, bool]:
    from alflb_megatron.loads import counting_all_passes

    with ranks.model_parallel():
        router = _router({"rule": "sign"})
        balancer = _balancer(router)
        router(_hidden())
        broken = _hidden()
        broken[3, 1] = float("nan")
        with counting_all_passes([router.load_counter]), torch.no_grad():
            router(broken)
        router(_hidden())
        balancer.launch()
        record = balancer.commit()
        return int(record.loads[0].sum()), bool(record.rejected.any())


def test_a_score_that_is_not_finite_in_an_evaluation_refuses_no_update() -> None:
    assert ranks.run(1, _nan_while_evaluating) == [(512, False)]


# -- router replay ----------------------------------------------------------------------------------------------------


def _replayed(rule: str, recompute: bool) -> dict[str, Any]:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    from alflb_megatron import router_state

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    router_state.logger.addHandler(handler)
    with ranks.model_parallel():
        router = _router({"rule": rule}, moe_enable_routing_replay=True)
        balancer = _balancer(router)
        dictated = torch.stack([torch.zeros(128, dtype=torch.int64), torch.ones(128, dtype=torch.int64)], dim=1)
        found: dict[str, Any] = {"loads": set()}
        for _ in range(30):
            RouterReplay.set_replay_data([dictated])
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            hidden = _hidden().requires_grad_()
            output = (_by_megatron if recompute else _once)(router, hidden)
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
            output.square().sum().backward()
            balancer.launch()
            found["loads"].add(tuple(balancer.commit().loads[0].tolist()))
        found |= {"bias": router.expert_bias.abs().max().item(), "n": int(router.alf_n), "said": said}
        # one dictated micro-batch among others: the loads are not all an answer to the bias
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        router(_hidden())
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        router(_hidden())
        balancer.launch()
        balancer.commit()
        found["half"] = int(router.alf_n)
        router(_hidden())
        balancer.launch()
        balancer.commit()
        found["ours again"] = int(router.alf_n)
        RouterReplay.clear_global_router_replay_instances()
    router_state.logger.removeHandler(handler)
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_a_bias_stands_still_while_replay_dictates_the_experts(rule: str, recompute: bool) -> None:
    (found,) = ranks.run(1, _replayed, rule, recompute)
    assert found["loads"] == {(128, 128, 0, 0, 0, 0, 0, 0)}
    assert found["bias"] == 0 and found["n"] == 0
    assert found["said"] == [
        "router replay dictates experts: loads are reported, biases stand still in such global batches"
    ]
    assert found["half"] == 0 and found["ours again"] == 1


def _dictated_on_one_rank() -> int:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    with ranks.model_parallel():
        router = _router({"rule": "sign"}, moe_enable_routing_replay=True)
        if torch.distributed.get_rank() == 1:
            RouterReplay.set_replay_data([torch.arange(256).view(128, 2) % 8])
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        balancer = _balancer(router)
        router(_hidden())
        balancer.launch()
        balancer.commit()
        return int(router.alf_n)


def test_what_one_rank_is_told_holds_the_bias_of_all() -> None:
    assert ranks.run(2, _dictated_on_one_rank) == [0, 0]


def _fused_replay() -> str:
    with ranks.model_parallel():
        return _refused(moe_enable_routing_replay=True, moe_router_fusion=True)


def test_replay_that_the_fused_router_would_not_follow_is_refused() -> None:
    (said,) = ranks.run(1, _fused_replay)
    assert said.startswith("--moe-enable-routing-replay=True: has no effect in Transformer Engine's fused router")


# -- what is saved -----------------------------------------------------------------------------------------------------


def _saved() -> dict[str, Any]:
    from alflb_megatron.router_state import rule_state_left_out

    with ranks.model_parallel():
        frozen, trained = _router({"rule": "adaptive", "frozen": True}), _router({"rule": "adaptive"})
        found = {"frozen": sorted(frozen.state_dict()), "trained": sorted(trained.state_dict())}
        with rule_state_left_out():
            found["left out"] = sorted(trained.state_dict())
        found["back"] = sorted(trained.state_dict())
        found["sharded"] = sorted(frozen.sharded_state_dict())
        trained.expert_bias.fill_(0.5)
        trained.alf_n.fill_(7)
        frozen.load_state_dict(trained.state_dict())
        found["loaded"] = float(frozen.expert_bias[0]), int(frozen.alf_n)
        trained.load_state_dict(frozen.state_dict())
        found["and back"] = float(trained.expert_bias[0]), int(trained.alf_n)
        return found


def test_a_frozen_router_has_no_state_beyond_its_bias() -> None:
    (found,) = ranks.run(1, _saved)
    plain = ["expert_bias", "weight"]
    assert [name for name in found["frozen"] if name != "_extra_state"] == plain
    assert [name for name in found["left out"] if name != "_extra_state"] == plain
    assert {name for name in found["trained"] if name.startswith("alf_")} > {"alf_n", "alf_rule"}
    assert found["back"] == found["trained"]
    assert not any("alf_" in key for key in found["sharded"])
    assert found["loaded"] == found["and back"] == (0.5, 0), "where it goes on, it begins afresh"


# -- evaluation, frozen weights, uneven ranks --------------------------------------------------------------------------


def _evaluated(log_every: int) -> dict[str, Any]:
    from alflb_megatron import balancer as module
    from alflb_megatron.hosts.log import balance_metrics, log_line

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    module.logger.addHandler(handler)
    module.logger.setLevel(logging.INFO)
    with running(lambda model, build: model, True, rule="sign", log_every=log_every) as runner:
        chunks = runner.setup.chunks
        for router in _routers(chunks[0]).values():
            router.eval()
        runner.step(0)
        shown = balance_metrics(chunks)
        return {"shown": _shown(chunks), "line": {key: float(v) for key, v in log_line(shown).items()}, "said": said}


def test_a_log_says_that_nothing_was_counted() -> None:
    (found,) = ranks.run(1, _evaluated, 1)
    assert found["shown"] == found["line"] == {"MoE layers counted": 0.0}
    assert any("no router counted a token" in line for line in found["said"])


def _untrained(change: Callable[[Any], None]) -> dict[str, Any]:
    with _training(True) as trainer:
        for router in _routers(trainer.chunks[0]).values():
            change(router)
        trainer.step(2)
        return {"loads": trainer.loads(), "n": trainer.n()}


def _freeze(router: Any) -> None:
    router.requires_grad_(False)


def _freeze_as_megatron_lm(router: Any) -> None:
    router.frozen_expert_bias = True


@pytest.mark.parametrize("change", [_freeze, _freeze_as_megatron_lm])
def test_a_router_that_is_not_trained_keeps_its_bias(change: Callable[[Any], None]) -> None:
    assert ranks.run(1, _untrained, change) == [{"loads": 256, "n": 0}]


def _unevenly(enabled: bool) -> dict[str, Any]:
    """Ranks with other numbers of micro-batches, as dynamic batching gives them."""
    with _training(enabled, nproc=2) as trainer:
        found: dict[str, Any] = {"loads": []}
        for mine, other in ((1, 3), (2, 1)):
            trainer.step(mine if torch.distributed.get_rank() == 0 else other)
            found["loads"].append(trainer.loads())
        bias = _bias(trainer)
        return {**found, "n": trainer.n(), "bias": bias.tolist(), "left": _left(trainer.chunks[0])}


def _bias(trainer: Trainer) -> torch.Tensor:
    (router,) = _routers(trainer.chunks[0]).values()
    return router.expert_bias


@pytest.mark.parametrize("enabled", [True, False])
def test_ranks_may_have_other_numbers_of_micro_batches(enabled: bool) -> None:
    first, second = ranks.run(2, _unevenly, enabled)
    assert first == second
    assert first["loads"] == [4 * 128, 3 * 128] and first["n"] == 2 and first["left"] == 0


def _two_models() -> list[Any]:
    """Two models in one process, each with a rule of its own, stepped in turn."""
    from alflb_megatron.hosts.core import balancer_of
    from tests.distributed import jobs

    with ranks.model_parallel():
        runners = [
            jobs.Runner(jobs.plan({"rule": rule, "nproc": 1, "global_batch_size": 4}, {"num_layers": 2}))
            for rule in ("sign", "adaptive")
        ]
        for step in range(2):
            for runner in runners:
                runner.step(step)
        balancers = [balancer_of(runner.setup.chunks) for runner in runners]
        return [(b.routers[0].alf.rule, int(b.routers[0].alf_n), int(b.last.loads[0].sum())) for b in balancers]


def test_two_models_in_one_process_have_rules_of_their_own() -> None:
    assert ranks.run(1, _two_models) == [[("sign", 2, 256), ("adaptive", 2, 256)]]
