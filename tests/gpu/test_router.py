"""One router on a device: Megatron-Core's choice, the CPU's integers, no wait for the device, CUDA graphs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from alflb_megatron import margins, rules
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import LoadCounter
from alflb_megatron.routing import Gate, add_margins, margins_of, select
from alflb_megatron.rules import Stats

EXPERTS, TOPK, HIDDEN, TOKENS = 64, 6, 256, 16384
RATE = 2.0**-6
GROUPS = {"moe_router_num_groups": 8, "moe_router_group_topk": 3}

pytestmark = pytest.mark.usefixtures("groups")


def _config(**changes: Any) -> Any:
    from alflb_megatron.lab.training import build
    from alflb_megatron.lab.training.resolve import resolve

    plan = resolve({"rule": "none", "nproc": 1, "ep": 1}, {"num_experts": EXPERTS, "topk": TOPK}, {})
    fixed = {"hidden_size": HIDDEN, "moe_router_dtype": "fp32", "moe_router_bias_update_rate": RATE}
    return dataclasses.replace(build.transformer_config(plan), **{**fixed, **changes})


def _ours(config: Any, **alf: Any) -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from alflb_megatron.hosts.core import RouterBuilder

    router = RouterBuilder(ALFConfig(**alf))(config=config, pg_collection=get_default_pg_collection())
    router.set_layer_number(1)
    return router.cuda()


def _theirs(config: Any) -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    router = TopKRouter(config=config, pg_collection=get_default_pg_collection())
    router.set_layer_number(1)
    return router.cuda()


def _pair(config: Any, **alf: Any) -> tuple[Any, Any]:
    """Megatron-Core's router and ours, with the same weights and, where there is one, the same bias."""
    with_bias = config.moe_router_score_function == "sigmoid"
    theirs = _theirs(dataclasses.replace(config, moe_router_enable_expert_bias=with_bias))
    ours = _ours(config, **alf)
    ours.weight.data.copy_(theirs.weight.data)
    if with_bias:
        theirs.expert_bias.copy_(0.02 * torch.randn(EXPERTS, device="cuda"))
        ours.expert_bias.copy_(theirs.expert_bias)
    return theirs, ours


def _hidden(dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS // 4, 4, HIDDEN, generator=generator).to("cuda", dtype)


def _balancer(*routers: Any) -> Any:
    from alflb_megatron.balancer import Balancer

    return Balancer(routers, range(1, len(routers) + 1), routers[0].tp_dp_cp_group)


def _passed(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gate weights, routing map and the gradient of the router's weights for a fixed gradient of the former."""
    router.zero_grad()
    probs, chosen = router(hidden)
    probs.backward(torch.linspace(-1, 1, probs.numel(), device="cuda", dtype=probs.dtype).view_as(probs))
    return probs.detach(), chosen, router.weight.grad.clone()


FORMS = [
    pytest.param({}, id="sigmoid"),
    pytest.param({"moe_router_topk_scaling_factor": 2.5}, id="scaled"),
    pytest.param(GROUPS, id="groups"),
    pytest.param({"moe_router_score_function": "softmax"}, id="softmax"),
    pytest.param({"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}, id="pre-softmax"),
    pytest.param({"moe_router_fusion": True}, id="fused"),
    pytest.param({"moe_router_fusion": True, **GROUPS}, id="fused-groups"),
]


def _needs(form: dict[str, Any]) -> None:
    from alflb_megatron.lab.training import build

    if form.get("moe_router_fusion") and not build.have_transformer_engine():
        pytest.skip("needs Transformer Engine's fused router")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_chooses_as_megatron_core_does(form: dict[str, Any], dtype: torch.dtype) -> None:
    _needs(form)
    config = _config(params_dtype=dtype, **form)
    theirs, ours = _pair(config, rule="sign", centring=False, step_size=RATE)
    for seed in range(2):
        hidden = _hidden(dtype, seed)
        for name, a, b in zip(
            ("weights", "map", "gradient"), _passed(theirs, hidden), _passed(ours, hidden), strict=True
        ):
            assert torch.equal(a, b), name
    assert ours.load_counter.tokens_per_expert.sum() == 2 * TOKENS * TOPK


@pytest.mark.parametrize("form", [form for form in FORMS if "softmax" not in form.id])
def test_moves_its_bias_as_megatron_core_does(form: dict[str, Any]) -> None:
    _needs(form)
    import megatron.core.distributed  # noqa: F401  (loads the module below, whose name there is a function)

    finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]
    config = _config(**form)
    theirs, ours = _pair(config, rule="sign", centring=False, step_size=RATE)
    balancer, before = _balancer(ours), ours.expert_bias.clone()
    for step in range(4):
        for router in (theirs, ours):
            _passed(router, _hidden(torch.float32, step))
        finalize._update_router_expert_bias([theirs], theirs.config)
        finalize.reset_model_temporary_tensors(theirs.config, [theirs])
        balancer.launch()
        balancer.commit()
        assert torch.equal(theirs.expert_bias, ours.expert_bias)
    assert (ours.expert_bias - before).abs().max() > 2 * RATE


@pytest.mark.parametrize("form", [form for form in FORMS if "softmax" not in form.id])
def test_every_rule_balances(form: dict[str, Any]) -> None:
    """MaxVio on the same tokens again: every rule's moves must have lowered it on the device, from a skewed router."""
    _needs(form)
    skew = torch.linspace(-1, 1, EXPERTS, device="cuda").outer(torch.ones(HIDDEN, device="cuda"))
    hidden = _hidden(torch.float32) + 0.01
    for rule in rules.names():
        router = _ours(_config(**form), rule=rule)
        router.weight.data += 0.02 * skew
        balancer = _balancer(router)
        vio = []
        for _ in range(30):
            _passed(router, hidden)
            balancer.launch()
            vio.append(float(balancer.commit().max_vio()))
        assert min(vio) < 0.97 * vio[0], f"{rule}: {vio[0]} to {min(vio)}"


def test_margins_of_the_fused_router_are_those_of_the_choice() -> None:
    _needs({"moe_router_fusion": True})
    fused, plain = (_ours(_config(moe_router_fusion=fusion), rule="adaptive") for fusion in (True, False))
    plain.weight.data.copy_(fused.weight.data)
    for router in (fused, plain):
        _passed(router, _hidden(torch.float32))
    assert torch.equal(fused.load_counter.tokens_per_expert, plain.load_counter.tokens_per_expert)
    assert torch.equal(fused.load_counter.histogram_EB, plain.load_counter.histogram_EB)


def test_compiled_margins_are_those_of_the_eager_function() -> None:
    compiled, router = torch.compile(add_margins), _ours(_config(), rule="adaptive")
    router.expert_bias.copy_(0.05 * torch.randn(EXPERTS, device="cuda"))
    logits = torch.randn(TOKENS // 4, 4, EXPERTS, device="cuda")
    chosen = select(logits.view(TOKENS, EXPERTS), router.gate, router.expert_bias).map_TE.view_as(logits)
    valid = torch.rand(TOKENS // 4, 4, device="cuda") < 0.9
    first = margins.positions(TOKENS // 4, 4, logits.device)
    for n in (0, 3):
        found = []
        for add in (compiled, add_margins):
            histogram = torch.zeros(EXPERTS, margins.BINS, dtype=torch.int32, device="cuda")
            add(histogram, logits, chosen, valid, router.expert_bias, first, router.alf_n + n, 4, router.gate)
            found.append(histogram)
        assert found[0].sum() == valid[n::4].sum() * EXPERTS
        # the compiled one may round a score's last bit otherwise, which moves a margin into the next bin
        assert (found[0] - found[1]).abs().sum() < 1e-3 * found[0].sum()


# -- the same integers as on the CPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, {"num_groups": 8, "group_topk": 3}], ids=["plain", "groups"])
@pytest.mark.parametrize("threshold", list(margins.Threshold))
def test_counts_and_margins_are_those_of_the_cpu(threshold: margins.Threshold, limits: dict[str, int]) -> None:
    # In float64 no two scores of a token are equal: which of two equal ones is chosen is the device's own.
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    bias = 0.2 * torch.randn(EXPERTS, generator=generator)
    valid = torch.rand(TOKENS, generator=generator) < 0.9
    gate = Gate(topk=TOPK, score_unit="logit", threshold=threshold, **limits)
    found = []
    for device in ("cpu", "cuda"):
        choice = select(logits.to(device), gate, bias.to(device))
        counter = LoadCounter(EXPERTS, device, with_margins=True)
        counter.observe(choice.experts_TK, valid.to(device), ranked_TK=choice.ranked_TK)
        counter.observe_margins(margins_of(logits.to(device), choice.map_TE, gate, bias.to(device)), valid.to(device))
        found.append([part.cpu() for part in counter.local() if part is not None])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("rule", rules.names())
def test_a_rule_moves_as_on_the_cpu(rule: str) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, TOKENS, EXPERTS, generator=generator) - 0.8
    histogram = torch.zeros(3, EXPERTS, margins.BINS, dtype=torch.int32)
    for layer in range(3):
        margins.add(histogram[layer], values[layer])
    loads = (values >= 0).sum(1)
    moved = []
    for device in ("cpu", "cuda"):
        made = rules.make(rule)
        state = {name: value.to(device) for name, value in made.init(3, EXPERTS).items()}
        bias = torch.zeros(3, EXPERTS, device=device)
        for n in (1, 2, 3):
            stats = Stats(loads.to(device), torch.full((3,), n, device=device), histogram.to(device))
            bias, state = made.step(bias, stats, state)
        moved.append(bias.cpu())
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-5, atol=1e-7)


# -- no wait for the device ------------------------------------------------------------------------------------------


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["sign", "quantile", "adaptive"])
def test_nothing_waits_for_the_device(rule: str, form: dict[str, Any]) -> None:
    """Forward, backward, launch and commit, but for every tenth update (docs/design.md)."""
    _needs(form)
    router = _ours(_config(**form), rule=rule)
    balancer, hidden = _balancer(router), _hidden(torch.float32)
    padding = torch.zeros(hidden.shape[:2], dtype=torch.bool, device="cuda")
    upstream = torch.ones(TOKENS, EXPERTS, device="cuda")
    for _ in range(11):  # the first update and the tenth are looked at
        router(hidden)[0].backward(upstream)
        balancer.launch()
        balancer.commit()
    with _no_waiting():
        for padded in (None, padding):
            router(hidden, padded)[0].backward(upstream)
        balancer.launch()
        balancer.commit()


class _Chunk(torch.nn.Module):
    def __init__(self, router: Any) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: Tensor) -> Tensor:
        return self.router(hidden)[0]


@pytest.mark.parametrize("rule", ["sign", "quantile", "adaptive"])
def test_micro_batches_that_move_the_bias_wait_for_nothing(rule: str) -> None:
    """Until the global batch is over: then ranks find out whether they had as many."""
    from alflb_megatron.hosts import core

    chunk = _Chunk(_ours(_config(), rule=rule, update_every="micro-batch"))
    balancer, hidden = core.balancer_of([chunk]), _hidden(torch.float32)
    upstream = torch.ones(TOKENS, EXPERTS, device="cuda")
    for step in range(3):
        with _no_waiting() if step else nullcontext():
            for _ in range(4):
                chunk(hidden).backward(upstream)
        balancer.launch()
        record = balancer.commit()
    assert record.micro_batches.count == 4 and chunk.router.batch_bias.abs().max() > 0


# -- CUDA graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_a_captured_router_counts_and_follows_its_bias(rule: str, form: dict[str, Any]) -> None:
    _needs(form)
    config = _config(**form)
    router, eager = _ours(config, rule=rule), _ours(config, rule=rule)
    eager.weight.data.copy_(router.weight.data)
    static, upstream = _hidden(torch.float32), torch.ones(TOKENS, EXPERTS, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            router(static)[0].backward(upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        probs, chosen = router(static)
        probs.backward(upstream)
    balancer, plain = _balancer(router), _balancer(eager)
    balancer.discard()  # what passes on dummy data left behind
    for seed in range(5):
        hidden = _hidden(torch.float32, seed)
        static.copy_(hidden)
        graph.replay()
        wanted = eager(hidden)
        assert torch.equal(chosen, wanted[1]) and torch.equal(probs, wanted[0])
        for one in (balancer, plain):
            one.launch()
            one.commit()
        assert torch.equal(router.expert_bias, eager.expert_bias)
    assert router.expert_bias.abs().max() > 0


@pytest.mark.parametrize("rule", ["sign", "quantile", "adaptive"])
def test_an_update_can_be_captured_with_its_global_batch(rule: str) -> None:
    """Where nothing is looked at between (`check_every`, `alarm_after`): a replay runs no Python."""
    quiet: dict[str, Any] = {"rule": rule, "check_every": 0, "alarm_after": 0}
    router, eager = _ours(_config(), **quiet), _ours(_config(), **quiet)
    eager.weight.data.copy_(router.weight.data)
    balancer, plain = _balancer(router), _balancer(eager)
    static, upstream = _hidden(torch.float32), torch.ones(TOKENS, EXPERTS, device="cuda")

    def global_batch(of: Any, with_: Any, hidden: Tensor) -> None:
        of(hidden)[0].backward(upstream)
        with_.launch()
        with_.commit()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            global_batch(router, balancer, static)
            global_batch(eager, plain, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        global_batch(router, balancer, static)
    for seed in range(5):
        static.copy_(_hidden(torch.float32, seed))
        graph.replay()
        global_batch(eager, plain, static)
        assert torch.equal(router.expert_bias, eager.expert_bias)
    assert int(router.alf_n) == int(eager.alf_n) == 8
