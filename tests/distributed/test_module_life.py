"""What frameworks do to modules leaves a router right: the meta device, `reset_parameters`, copies, casts."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import torch

from alflb_megatron import rules
from alflb_megatron.config import ALFConfig
from tests.distributed import ranks
from tests.distributed.test_router import _balancer, _hidden, _refused, _router

FACTORIES = ("device_literals", "tensor_type", "streams", "splits", "uneven_shards")
"""Left out here: with torch's factories replaced a router might be built where it would not be without."""


def _state_of(router: Any) -> dict[str, list[Any]]:
    names = ("expert_bias", "alf_n", "alf_rule", *(f"alf_{name}" for name in router._state_names))
    return {name: getattr(router, name).tolist() for name in names}


def _materialised(rule: str) -> dict[str, Any]:
    """A router built on the meta device and given memory as Megatron-FSDP does, module by module; one built plainly."""
    with ranks.model_parallel():
        plain = _router({"rule": rule})
        with torch.device("meta"):
            router = _router({"rule": rule})
        on_meta = router.weight.is_meta
        for module in router.modules():
            module.to_empty(device="cpu", recurse=False)
            for tensor in module.buffers(recurse=False):
                tensor.fill_(77)  # as memory that was somebody else's
            module.reset_parameters()
        counts = [part.abs().sum().item() for part in router.load_counter.local() if part is not None]
        moved = _moved(router)
        return {
            "on meta": on_meta,
            "state": _state_of_fresh(router, moved),
            "plain": _state_of(plain),
            "counts": counts,
        }


def _state_of_fresh(router: Any, moved: bool) -> dict[str, list[Any]]:
    assert moved, "it balances"
    router.reset_parameters()
    return _state_of(router)


def _moved(router: Any) -> bool:
    """Whether a global batch moves its bias by what was counted in that batch alone."""
    balancer = _balancer(router)
    router(_hidden())
    balancer.launch()
    record = balancer.commit()
    return int(record.loads[0].sum()) == 2 * 128 and bool(router.expert_bias.any()) and int(router.alf_n) == 1


@pytest.mark.parametrize("rule", rules.names())
def test_built_on_the_meta_device_and_materialised_it_is_as_if_built_plainly(rule: str) -> None:
    (found,) = ranks.run(1, _materialised, rule, without=FACTORIES)
    assert found["on meta"]
    assert found["counts"] == [0] * len(found["counts"])
    assert found["state"] == found["plain"]


def _copied() -> dict[str, bool]:
    """A router in the middle of its life, by state_dict, by a pickle of it, and moved and cast; each goes on alike."""
    with ranks.model_parallel():
        router = _router({"rule": "adaptive"})
        assert _moved(router)
        state = _state_of(router)
        by_state, by_pickle = _router({"rule": "adaptive"}), _router({"rule": "adaptive"})
        by_state.load_state_dict(router.state_dict())
        by_pickle.load_state_dict(pickle.loads(pickle.dumps(router.state_dict())))
        router.to("cpu").float()
        others = {"state_dict": by_state, "pickle": by_pickle, "to": router}
        same = {name: _state_of(other) == state for name, other in others.items()}
        with torch.no_grad():
            by_state.weight.copy_(router.weight)
        for other in (by_state, router):
            balancer = _balancer(other)
            other(_hidden(3))
            balancer.launch()
            balancer.commit()
        return {**same, "goes on": _state_of(by_state) == _state_of(router) != state}


def test_a_copy_goes_on_where_it_was() -> None:
    (found,) = ranks.run(1, _copied)
    assert found == {"state_dict": True, "pickle": True, "to": True, "goes on": True}


GROUPS = {
    "more groups than experts a token": (
        {"group_topk": 4, "num_groups": 8},
        "--moe-router-group-topk=4: must be at most",
    ),
    "groups too small": (
        {"group_topk": 1, "num_groups": 8},
        "--moe-router-group-topk=1: gives a token 1 groups of 1 experts",
    ),
    "groups that serve": ({"group_topk": 2, "num_groups": 4}, ""),
}


def _grouped() -> dict[str, str]:
    with ranks.model_parallel():
        return {
            name: _refused(**{f"moe_router_{key}": value for key, value in config.items()})
            for name, (config, _) in GROUPS.items()
        }


def test_groups_that_cannot_serve_are_refused_by_name_before_training() -> None:
    (found,) = ranks.run(1, _grouped)
    for name, (_, said) in GROUPS.items():
        assert found[name].startswith(said) and bool(found[name]) == bool(said), (name, found[name])


def _loaded_over_garbage() -> dict[str, Any]:
    """Materialised without `reset_parameters`, then a strict load of a checkpoint that Megatron-Core wrote."""
    with ranks.model_parallel():
        source, router = _router({"rule": "adaptive"}), _router({"rule": "adaptive"})
        for tensor in [*router.buffers(), *router.parameters()]:
            tensor.data.fill_(77)
        state = {name: value for name, value in source.state_dict().items() if not name.startswith("alf_")}
        router.load_state_dict(state)
        counts = sum(int(part.abs().sum()) for part in router.load_counter.local() if part is not None)
        cast = {
            name: value.bfloat16() if torch.is_tensor(value) else value for name, value in source.state_dict().items()
        }
        assigned = _router({"rule": "adaptive"})
        assigned.load_state_dict(cast, assign=True)
        return {
            "state": _state_of(router) == _state_of(source),
            "counts": counts,
            "types": {str(value.dtype) for value in assigned.read_state()[1].values()},
            "n": str(assigned.alf_n.dtype),
        }


def test_what_a_checkpoint_lacks_begins_afresh_and_keeps_its_type() -> None:
    (found,) = ranks.run(1, _loaded_over_garbage)
    assert found == {"state": True, "counts": 0, "types": {"torch.float32"}, "n": "torch.int64"}


def _deep_copied() -> dict[str, Any]:
    import copy

    with ranks.model_parallel(tensor_model_parallel_size=2):
        router = _router({"rule": "adaptive"}, sequence_parallel=True, tensor_model_parallel_size=2)
        assert _moved_somewhere(router)
        other = copy.deepcopy(router)
        block = torch.nn.ModuleList([router])
        block.config = router.config
        model = copy.deepcopy(block)
        return {
            "configuration": [other.config is router.config, model.config is router.config],
            "one configuration": model[0].config is model.config,
            "state": _state_of(other) == _state_of(router),
            "apart": other.expert_bias is not router.expert_bias and other.weight is not router.weight,
            "marks": vars(other.weight).get("sequence_parallel"),
            "group": other.tp_dp_cp_group is router.tp_dp_cp_group,
        }


def _moved_somewhere(router: Any) -> bool:
    balancer = _balancer(router)
    router(_hidden())
    balancer.launch()
    balancer.commit()
    return bool(router.expert_bias.any())


def test_a_deep_copy_has_a_state_of_its_own_and_the_marks_of_its_parameters() -> None:
    for found in ranks.run(2, _deep_copied):
        assert found.pop("configuration") == [True, False]
        assert all(found.values()), found


def _compiled(rule: str) -> list[int]:
    """Tokens counted of a compiled router: plainly, and in non-reentrant checkpoints."""
    import torch._dynamo
    from torch.utils.checkpoint import checkpoint

    os.environ.pop("TORCHDYNAMO_DISABLE")  # the tests' ranks have it
    torch._dynamo.config.disable = False
    found: list[int] = []
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with ranks.model_parallel():
        for recompute in (False, True):
            router = _router({"rule": rule})
            compiled = torch.compile(lambda hidden, router=router: router(hidden)[0] * 2, backend=backend)
            for seed in range(10):
                hidden = _hidden(seed).requires_grad_()
                output = checkpoint(compiled, hidden, use_reentrant=False) if recompute else compiled(hidden)
                output.square().sum().backward()
            found.append(int(router.load_counter.tokens_per_expert.sum()))
    assert graphs, "nothing was compiled"
    return found


@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_a_compiled_router_counts_each_token_once(rule: str) -> None:
    assert ranks.run(1, _compiled, rule) == [[10 * 256, 10 * 256]]


def _another_rule_in_place() -> list[int]:
    """A distributed checkpoint of another rule: read into the buffers themselves, then handed in; then resumed."""
    from alflb_megatron.router_state import rule_id

    with ranks.model_parallel():
        sign, router, resumed = _router({"rule": "sign"}), _router({"rule": "adaptive"}), _router({"rule": "adaptive"})
        assert _moved_somewhere(sign)
        state = router.state_dict()  # the buffers themselves
        for name, value in sign.state_dict().items():
            if name in state and torch.is_tensor(value):
                state[name].copy_(value)
        router.load_state_dict({name: value for name, value in state.items() if name in sign.state_dict()})
        found = [int(router.alf_rule) == rule_id("adaptive"), int(router.alf_n)]
        assert _moved_somewhere(router)
        resumed.load_state_dict(router.state_dict())
        return [*found, int(resumed.alf_n)]


def test_a_checkpoint_of_another_rule_is_told_apart_once_and_not_at_every_resume() -> None:
    assert ranks.run(1, _another_rule_in_place) == [[True, 0, 1]]


def _partly_loaded() -> dict[str, Any]:
    """A router whose bias has moved takes weights alone: an average of parameters, and a file beside the bias's."""
    with ranks.model_parallel():
        router = _router({"rule": "adaptive"})
        assert _moved(router)
        state = _state_of(router)
        router.load_state_dict({"weight": router.weight.detach() / 2}, strict=False)
        kept = _state_of(router) == state
        fresh = _router({"rule": "adaptive"})
        saved = {name: value for name, value in router.state_dict().items() if torch.is_tensor(value)}
        for part in ({n: v for n, v in saved.items() if n != "weight"}, {"weight": saved["weight"]}):
            fresh.load_state_dict(part, strict=False)
        bias_alone = _router({"rule": "adaptive"})
        assert _moved(bias_alone)
        bias_alone.load_state_dict({"expert_bias": torch.zeros_like(router.expert_bias)}, strict=False)
        return {"kept": kept, "in parts": _state_of(fresh) == state, "n with another bias": int(bias_alone.alf_n)}


def test_a_bias_that_is_not_in_what_is_loaded_stays() -> None:
    assert ranks.run(1, _partly_loaded) == [{"kept": True, "in parts": True, "n with another bias": 0}]


def _changed_after_the_build() -> dict[str, list[float]]:
    """Experts of a token and the sum of its weights, of Megatron-Core's router and ours, as settings change."""
    import dataclasses

    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    with ranks.model_parallel():
        ours = _router({"rule": "sign"})
        plain = TopKRouter(config=dataclasses.replace(ours.config), pg_collection=get_default_pg_collection())
        plain.load_state_dict({"weight": ours.weight}, strict=False)
        found: dict[str, list[float]] = {}
        for router in (ours, plain):
            said = found[type(router).__name__] = []
            for name, value in (("topk", 3), ("topk", 1)):
                setattr(router, name, value)
                said.append(float(router(_hidden())[1].sum()))
            router.topk, router.config.moe_router_topk_scaling_factor = 2, 2.5
            said.append(round(float(router(_hidden())[0].sum()), 2))
    return found


def test_settings_that_change_after_the_build_count_as_for_megatron_core() -> None:
    (found,) = ranks.run(1, _changed_after_the_build)
    ours, plain = found.values()
    assert ours == plain and ours[:2] == [3 * 128, 128] and ours[2] == pytest.approx(2.5 * 128, rel=1e-3)


def _frozen_after_the_build() -> dict[str, Any]:
    """What a router saves and loads strictly is what it was built with, whatever its settings became."""
    with ranks.model_parallel():
        router, other = _router({"rule": "adaptive"}), _router({"rule": "adaptive"})
        assert _moved(router)
        saved = router.state_dict()
        router.alf = other.alf = ALFConfig(rule="adaptive", frozen=True)
        other.load_state_dict(saved)
        other.load_state_dict(router.state_dict())
        return {"state": _state_of(other) == _state_of(router), "bfloat16": other.bfloat16().expert_bias.dtype}


def test_a_router_whose_settings_are_frozen_after_the_build_loads_its_own_checkpoint() -> None:
    assert ranks.run(1, _frozen_after_the_build) == [{"state": True, "bfloat16": torch.float32}]


class _InTurn(torch.nn.Module):
    """Routers of one layer, of which each forward pass takes the next."""

    def __init__(self, *routers: torch.nn.Module) -> None:
        super().__init__()
        self.routers, self.passes = torch.nn.ModuleList(routers), 0

    def forward(self, hidden: torch.Tensor) -> Any:
        self.passes += 1
        return self.routers[self.passes % len(self.routers)](hidden)


def _shallow_copied(alf: dict[str, Any], copies: int) -> tuple[list[int], Any]:
    """Loads and state after three global batches of four micro-batches."""
    import copy

    from alflb_megatron.hosts.core import balancer_of

    with ranks.model_parallel():
        router = _router(alf)
        model = _InTurn(router, *(copy.copy(router) for _ in range(copies)))
        loads = []
        for _ in range(3):
            balancer = balancer_of([model])
            for _ in range(4):
                model(_hidden())
            balancer.launch()
            loads.append(int(balancer.commit().loads[0].sum()))
        return loads, _state_of(model.routers[-1])


@pytest.mark.parametrize("every", ["global-batch", "micro-batch"])
@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_a_shallow_copy_and_its_original_are_one_router(rule: str, every: str) -> None:
    alone, beside = (ranks.run(1, _shallow_copied, {"rule": rule, "update_every": every}, n)[0] for n in (0, 1))
    assert beside == alone
    assert alone[0] == [4 * 2 * 128] * 3 and alone[1]["alf_n"] == [3]


def _with_fewer_experts() -> str:
    from alflb_megatron.settings import SettingError

    with ranks.model_parallel():
        router = _router({"rule": "sign"})
        router.num_experts //= 2  # as pruning does (ModelOpt's Minitron)
        router.weight = torch.nn.Parameter(router.weight[: router.num_experts])
        try:
            router(_hidden())
        except SettingError as error:
            return str(error)
        return ""


def test_a_router_that_lost_experts_after_the_build_is_refused_by_name() -> None:
    (said,) = ranks.run(1, _with_fewer_experts)
    assert said.startswith("num_moe_experts=4: must be 8, as the router was built"), said


def _assigned(rule: str, what: str) -> dict[str, Any]:
    """A router moved to the meta device that takes over the very tensors of a checkpoint."""
    with ranks.model_parallel():
        source, router = _router({"rule": "sign" if what == "another rule" else rule}), _router({"rule": rule})
        assert _moved(source)
        saved = source.state_dict()
        if what == "without state":
            saved = {name: value for name, value in saved.items() if not name.startswith("alf_")}
        router.to("meta").load_state_dict(saved, assign=True)
        return {
            "bias": torch.equal(router.expert_bias, source.expert_bias),
            "meta": [name for name, tensor in router.state_dict().items() if tensor is not None and tensor.is_meta],
            "n": int(router.alf_n),
            "moved": _moved(router) if what != "own" else bool(router(_hidden())[1].any()),
        }


@pytest.mark.parametrize("what", ["own", "without state", "another rule"])
def test_a_router_on_the_meta_device_that_is_assigned_a_checkpoint_routes_and_counts(what: str) -> None:
    (found,) = ranks.run(1, _assigned, "adaptive", what, without=FACTORIES)
    assert found == {"bias": True, "meta": [], "n": int(what == "own"), "moved": True}
