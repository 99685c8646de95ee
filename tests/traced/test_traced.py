"""A GPU's view without a GPU: on tensors that say they are on a device and hold nothing (`FakeTensorMode`), whatever
mixes devices or needs a value raises. What waits for the device is enumerated; docs/design.md says where that may be.

Backward passes are left out: torch's autograd engine asks the driver for a device. They run nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alflb_megatron import rules
from tests import forked

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")

WORLD, EXPERTS, TOPK, HIDDEN = 64, 16, 2, 32
AGREEMENT, ALARMS = "balancer.py _check", "alarms.py due_lines"
ONCE = ["alarms.py count", "balancer.py _index"]
"""Small tables that the first update puts on the device."""
TABLE = "near_ties.py _cuts"
"""One that the first global batch does, where micro-batches move the bias."""
UNEVEN = "within_batch.py _refuse_uneven"
UPDATES = 11
"""One more than from one look at the alarms to the next."""
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
FORMS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax": {"moe_router_score_function": "softmax"},
    "pre-softmax": {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True},
    "sqrtsoftplus": {"moe_router_score_function": "sqrtsoftplus"},
    "scaled": {"moe_router_topk_scaling_factor": 2.5},
    "groups": GROUPS,
    "groups, softmax": {**GROUPS, "moe_router_score_function": "softmax"},
    "capacity": {"moe_expert_capacity_factor": 1.0},
    "replay": {"moe_enable_routing_replay": True},
    "auxiliary loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01},
    "z-loss": {"moe_z_loss_coeff": 1e-3},
}


def _answer(place: str) -> int:
    """What the device would say: yes, or one; and that ranks do not differ."""
    return 0 if place == UNEVEN else 1


def _on_a_device(work: Callable[..., Any], *args: Any) -> Any:
    """Calls `work` in a process whose new tensors are on a device that is not there, as rank 0 of `WORLD`."""
    return forked.bare(_faked, work, *args)


def _faked(work: Callable[..., Any], *args: Any) -> Any:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda *_: None
    parallel_state.initialize_model_parallel(expert_model_parallel_size=8, create_gloo_process_groups=False)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
        return work(*args)


def _routers(alf: dict[str, Any], form: dict[str, Any]) -> list[Any]:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from alflb_megatron.config import ALFConfig
    from alflb_megatron.hosts.core import RouterBuilder

    settings: dict[str, Any] = {
        "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 4, "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK, "moe_router_load_balancing_type": "none", "moe_router_score_function": "sigmoid",
        "moe_router_dtype": "fp32", "perform_initialization": False, "params_dtype": torch.bfloat16, "bf16": True,
    }  # fmt: skip
    config = TransformerConfig(**{**settings, **form})
    build = RouterBuilder(ALFConfig(**alf))
    found = [build(config=config, pg_collection=get_default_pg_collection()) for _ in range(2)]
    for number, router in enumerate(found, 1):
        router.set_layer_number(number)
    return found


def _hidden() -> torch.Tensor:
    return torch.randn(8, 4, HIDDEN, dtype=torch.bfloat16)


def _steps(alf: dict[str, Any], form: dict[str, Any], padded: bool = False) -> list[dict[str, Any]]:
    """What waits for the device in each of some global batches of two micro-batches, and where tensors lie then."""
    from alflb_megatron.balancer import Balancer
    from alflb_megatron.within_batch import WithinBatch
    from benchmarks.traced import Trace

    routers = _routers(alf, form)
    group = routers[0].tp_dp_cp_group
    within = WithinBatch(routers, group) if alf.get("update_every") == "micro-batch" else None
    balancer = Balancer(routers, [1, 2], group)
    padding = torch.zeros(4, 8, dtype=torch.bool) if padded else None
    found = []
    for _ in range(UPDATES):
        with Trace(answer=_answer) as passes:
            for _ in range(2):
                if within is not None:
                    within.begin_micro_batch()
                for router in routers:
                    probs, chosen = router(_hidden(), padding) if padded else router(_hidden())
                    assert probs.device.type == chosen.device.type == "cuda"
        with Trace(answer=_answer) as update:
            balancer.launch()
            balancer.commit()
        state = {**dict(routers[0].named_buffers()), "loads": routers[0].load_counter.tokens_per_expert}
        found.append({
            "passes": dict(passes.waits),
            "update": sorted(update.waits),
            "elsewhere": [name for name, tensor in state.items() if tensor.device.type != "cuda"],
        })  # fmt: skip
    return found


def _check(steps: list[dict[str, Any]], every: tuple[str, ...] = ()) -> None:
    assert not {*steps[0]["passes"]} - {TABLE}
    assert [step["passes"] for step in steps[1:]] == [{}] * (UPDATES - 1), "routing waits for the device"
    assert [step["elsewhere"] for step in steps] == [[]] * UPDATES
    waits = [sorted({*step["update"]} - {*every}) for step in steps]
    assert waits == [sorted([AGREEMENT, *ONCE]), *[[]] * 8, [ALARMS], [AGREEMENT]], "every tenth update, and no other"


@pytest.mark.parametrize("rule", rules.names())
def test_a_rule_waits_for_the_device_at_every_tenth_update_alone(rule: str) -> None:
    _check(_on_a_device(_steps, {"rule": rule}, {}))


@pytest.mark.parametrize("form", list(FORMS))
def test_no_form_of_a_router_waits_or_mixes_devices(form: str) -> None:
    _check(_on_a_device(_steps, {"rule": "adaptive"}, FORMS[form]))


@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_padding_is_left_out_on_the_device(rule: str) -> None:
    _check(_on_a_device(_steps, {"rule": rule}, {}, True))


def test_margins_against_the_next_expert() -> None:
    _check(_on_a_device(_steps, {"rule": "quantile", "rule_options": "against=next"}, {}))


@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_micro_batches_move_the_bias_without_a_wait(rule: str) -> None:
    """That ranks had as many of them is asked once a global batch."""
    steps = _on_a_device(_steps, {"rule": rule, "update_every": "micro-batch"}, {})
    assert all(UNEVEN in step["update"] for step in steps)
    _check(steps, (UNEVEN,))


def _frozen() -> dict[str, Any]:
    from benchmarks.traced import Trace

    routers = _routers({"rule": "adaptive", "frozen": True}, {})
    with Trace(answer=_answer) as trace:
        for router in routers:
            router(_hidden())
    return dict(trace.waits)


def test_a_frozen_router_routes_without_a_wait() -> None:
    assert _on_a_device(_frozen) == {}


def _logged() -> tuple[dict[str, int], str]:
    from alflb_megatron.hosts.core import balancer_of
    from alflb_megatron.hosts.log import router_table
    from benchmarks.traced import Trace

    model = [torch.nn.ModuleList(_routers({"rule": "adaptive"}, {}))]
    balancer = balancer_of(model)
    for router in balancer.routers:
        router(_hidden())
    with Trace(answer=_answer):
        balancer.launch()
        balancer.commit()
    torch.cuda.is_available = lambda: True
    with Trace(answer=_answer) as trace:
        table = router_table(model)
    assert table is not None
    return dict(trace.waits), table.device.type


def test_figures_for_the_log_are_worked_out_on_the_device() -> None:
    """Layers and floors come from the host; it fetches all figures at once, and goes on with plain numbers."""
    waits, device = _on_a_device(_logged)
    assert waits == {"hosts/log.py router_table": 2, "metrics.py floor_constant": 1} and device == "cuda"


def _loaded() -> dict[str, Any]:
    from benchmarks.traced import Trace

    ours, other = _routers({"rule": "adaptive"}, {})
    with Trace(answer=_answer) as trace:
        ours.load_state_dict(other.state_dict())
        ours.reset_parameters()
    return dict(trace.waits)


def test_state_is_loaded_and_begun_anew_on_the_device() -> None:
    """What is loaded is looked at; what it begins with comes from the host."""
    assert set(_on_a_device(_loaded)) == {"router_state.py _load_from_state_dict", "router_state.py start_from"}
