"""The loads of Megatron-Core's own routers, for measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from alflb_megatron.balancer import Balancer
from alflb_megatron.hosts.core import balancer_of
from alflb_megatron.loads import LoadCounter


def watch_loads(model: Sequence[nn.Module]) -> Balancer:
    """Counts the loads of Megatron-Core's own routers in `model`, for measurement; nothing of them is changed.

    Their routing map is what can be seen from outside, so under a capacity factor these are loads after dropping. An
    adapter of Megatron-Bridge (`LoRATopKRouter`) calls the router's `routing` past its `forward`: there the map is seen
    at the adapter.
    """
    for chunk in model:
        adapters = {id(module.to_wrap): module for module in chunk.modules() if hasattr(module, "to_wrap")}
        for router in [module for module in chunk.modules() if isinstance(module, TopKRouter)]:
            if "load_counter" in router._modules:
                continue
            router.alf = None
            router.load_counter = LoadCounter(router.num_experts, device=router.weight.device)
            adapters.get(id(router), router).register_forward_hook(_count_routing_map, with_kwargs=True)
    return balancer_of(model)


def _count_routing_map(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    router = getattr(module, "to_wrap", module)
    if router.load_counter.is_counting(router.training):
        padding = args[1] if len(args) > 1 else kwargs.get("padding_mask")
        router.load_counter.observe_map(output[1], None if padding is None else ~padding.reshape(-1))
