"""Megatron-Core: how a layer gets our router, and how the balancer is called once per global batch.

`with_alflb` puts the router into a layer spec and `install` wraps `config.finalize_model_grads_func`. One method of
Megatron's is replaced, where gradients are zeroed. `enable.py` does both for every model built afterwards.

What of Megatron-Core differs from version to version is told apart in this file. Read against 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import megatron.core
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from alflb_megatron.balancer import Balancer
from alflb_megatron.config import ALFConfig
from alflb_megatron.hosts import rerun
from alflb_megatron.hosts.patching import Patch
from alflb_megatron.hosts.routers import NamedRouter, bare, labels, named_routers
from alflb_megatron.loads import LoadCounter, reset
from alflb_megatron.router import ALFRouter
from alflb_megatron.within_batch import WithinBatch, attach_again, may_move

logger = logging.getLogger(__name__)

if "router" not in {field.name for field in dataclasses.fields(MoESubmodules)}:
    raise ImportError("alflb_megatron needs megatron-core >= 0.16: this one builds its router by name")


VERSION = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
EXPERT_GRADIENTS_OVER_TP = VERSION >= (0, 19)
"""Whether TP > 1 with ETP = 1 and EP = 1 sums expert gradients over TP. 0.16.1 does not, 0.19.2 does."""

FLOAT32_SCORES = VERSION >= (0, 18)
"""Up to 0.17 Megatron-Core rounds scores to the logits' dtype after each operation; from 0.18 on they stay float32."""


# -- the router in a layer spec ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RouterBuilder:
    """What `MoESubmodules.router` holds: builds an `ALFRouter` for each MoE layer."""

    alf: ALFConfig

    def __call__(self, *, config: Any, pg_collection: Any = None, **host_kwargs: Any) -> ALFRouter:
        known = inspect.signature(TopKRouter.__init__).parameters  # `is_mtp_layer` came with 0.17
        host_kwargs = {name: value for name, value in host_kwargs.items() if name in known}
        return ALFRouter(config, pg_collection, alf=self.alf, float32_scores=FLOAT32_SCORES, **host_kwargs)


def with_alflb(spec: Any, alf: ALFConfig | None = None, *, required: bool = True) -> Any:
    """A copy of `spec` in which every MoE layer has an `ALFRouter`.

    Args:
        spec: a layer spec, a decoder block (`TransformerBlockSubmodules`), an MTP block or any spec that holds MoE
            layers, as ModuleSpec (0.16) or functools.partial (from 0.17 on). It is left as it is.
        alf: how the bias moves; default `ALFConfig()`.
        required: whether there has to be an MoE layer in `spec` (a pipeline stage may have none).

    Raises:
        ValueError: no MoE layer in `spec` though one is required, or one has a router other than Megatron-Core's.
    """
    found: list[MoESubmodules] = []
    copy = _rebuild(spec, RouterBuilder(alf or ALFConfig()), found)
    if required and not found:
        raise ValueError(f"no MoE layer in this {type(spec).__name__}: with_alflb has nothing to balance")
    return copy


def is_replaceable(router: Any) -> bool:
    """Whether a spec's router is Megatron-Core's or ours, as a class, a partial or a ModuleSpec."""
    if isinstance(router, functools.partial):
        router = router.func
    if isinstance(router, ModuleSpec):
        router = router.module
    return router in (TopKRouter, ALFRouter) or isinstance(router, RouterBuilder)


def _rebuild(node: Any, router: RouterBuilder, found: list[MoESubmodules]) -> Any:
    """Copies along the way to each `MoESubmodules`; whatever holds none is returned itself."""
    if isinstance(node, MoESubmodules):
        found.append(node)
        if is_replaceable(node.router):
            return dataclasses.replace(node, router=router)
        raise ValueError(
            f"the MoE layer has a router of its own, {node.router}; ALF-LB takes the place of TopKRouter only"
        )
    if isinstance(node, functools.partial):
        kwargs = {name: _rebuild(value, router, found) for name, value in node.keywords.items()}
        same = all(kwargs[name] is value for name, value in node.keywords.items())
        return node if same else functools.partial(node.func, *node.args, **kwargs)
    if isinstance(node, list | tuple):
        items = [_rebuild(item, router, found) for item in node]
        return node if all(a is b for a, b in zip(items, node, strict=True)) else type(node)(items)
    if isinstance(node, ModuleSpec) or (dataclasses.is_dataclass(node) and not isinstance(node, type)):
        changes = {}
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            new = _rebuild(value, router, found)
            if new is not value:
                changes[field.name] = new
        return dataclasses.replace(node, **changes) if changes else node
    return node


# -- the update, once per global batch ---------------------------------------------------------------------------------

_BALANCERS: WeakKeyDictionary[nn.Module, Balancer] = WeakKeyDictionary()
_GIVEN: WeakKeyDictionary[nn.Module, dist.ProcessGroup] = WeakKeyDictionary()
"""Of each model, by the first of its chunks, bare; and the group that its host gave."""


def balancer_of(model: Sequence[nn.Module], group: dist.ProcessGroup | None = None) -> Balancer:
    """The balancer of a model given as the list of its chunks, as Megatron's schedules hand it to `finalize`.

    `group` is what loads are summed over; by default the routers' own TP x CP x DP group: all ranks that train on the
    global batch, expert-parallel groups included. It counts when the balancer is made. Where routers have come or gone
    since then (adapters, a teacher), the model gets a new one.
    """
    found = [named for named in named_routers(model) if "load_counter" in named.router._modules]
    routers: list[Any] = [named.router for named in found]
    before = existing_balancer(model[0])
    if before is not None:
        if list(map(id, before.routers)) == list(map(id, routers)):
            return before
        before.withdraw()
    if group is not None:
        _GIVEN[bare(model[0])] = group
    group = _GIVEN.get(bare(model[0]))
    if group is None and routers:
        group = _one_group(found)
    for chunk in model:
        move_within_batch(chunk, group)
    layers, paths = [named.layer for named in found], [named.path for named in found]
    balancer = Balancer(routers, layers, group, paths, labels(layers, paths))
    _BALANCERS[bare(model[0])] = balancer
    for chunk in model:  # Megatron-FSDP's wrapper holds the method that its inner one had then
        if "zero_grad_buffer" in vars(chunk) and isinstance(inner := getattr(chunk, "module", None), nn.Module):
            vars(chunk)["zero_grad_buffer"] = inner.zero_grad_buffer
    return balancer


def _one_group(found: Sequence[NamedRouter]) -> dist.ProcessGroup | None:
    """The group over which these routers sum their loads; ValueError where they have several."""
    group = found[0].router.tp_dp_cp_group
    if dist.is_initialized():
        for named in found:
            if dist.get_process_group_ranks(named.router.tp_dp_cp_group) != dist.get_process_group_ranks(group):
                raise ValueError(
                    f"{found[0].path} and {named.path} sum their loads over other ranks: one group serves a model"
                )
    return group


def move_within_batch(chunk: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Has the micro-batches of a chunk move the biases of those of its routers that are set so, over `group`."""
    found = [named.router for named in named_routers([chunk])]
    routers = [router for router in found if isinstance(router, ALFRouter) and may_move(router)]
    before = {router.within_batch for router in routers if router.within_batch is not None}
    if len(before) == 1 and (one := next(iter(before))).routers == routers and group in (None, one.group):
        return
    for one in before:
        group = group or one.group
        one.detach()
    if routers:
        WithinBatch(routers, group or routers[0].tp_dp_cp_group).follow(bare(chunk))


def existing_balancer(chunk: nn.Module) -> Balancer | None:
    """The balancer of the model whose first chunk this is; None before its first update."""
    return _BALANCERS.get(bare(chunk))


# -- a global batch that ends early -----------------------------------------------------------------------------------

_zeroing: list[Patch] = []
_being_zeroed: list[nn.Module] = []
_wanting: set[str] = set()


def forget_with_gradients(mode: str) -> None:
    """Has loads forgotten where the gradients that came with them are zeroed; twice is once.

    Trainers call `zero_grad_buffer` of Megatron-Core's data-parallel wrappers where a global batch begins. Loads are
    left over there only if the one before was abandoned, or was dummy data. That method, and one of `rerun`, are
    replaced and marked `__alflb__`. `mode`: who asks, the one line or `install`.
    """
    _wanting.add(mode)
    if not _zeroing:
        wrappers = [_BaseDataParallel, DistributedDataParallel, getattr(mcore_fsdp_adapter, "MegatronFSDP", None)]
        _zeroing.extend(Patch(wrapper, "zero_grad_buffer", _forgetting) for wrapper in wrappers if wrapper is not None)
        _zeroing.append(rerun.put_back_with_a_rerun())


def forget_with_gradients_no_more(mode: str) -> None:
    """Takes `forget_with_gradients` back, once no mode wants it any more."""
    _wanting.discard(mode)
    while _zeroing and not _wanting:
        _zeroing.pop().undo()


def _forgetting(original: Callable[..., Any]) -> Callable[..., Any]:
    def zero_grad_buffer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _being_zeroed:  # else a wrapper calls the method of what it wraps
            _begin_global_batch(self)
        _being_zeroed.append(self)
        try:
            return original(self, *args, **kwargs)
        finally:
            _being_zeroed.pop()

    return zero_grad_buffer


def _begin_global_batch(chunk: nn.Module) -> None:
    counters = [module for module in chunk.modules() if isinstance(module, LoadCounter)]
    routers = [module for module in chunk.modules() if isinstance(module, ALFRouter)]
    for balancer in _BALANCERS.values() if counters else ():
        if any(router.load_counter is counter for router in balancer.routers for counter in counters):
            balancer.withdraw()
            balancer.forgotten |= any(counter.passes for counter in counters)
    reset(counters)
    for within in {router.within_batch for router in routers if router.within_batch is not None}:
        within.open()
    rerun.remember(routers)
    move_within_batch(chunk)  # before the first forward pass of the first global batch


# -- where a trainer lets itself be told what to call ----------------------------------------------------------------


def update_hook(
    finalize: Callable[..., Any] = finalize_model_grads, group: dist.ProcessGroup | None = None
) -> Callable[..., Any]:
    """Wraps `finalize_model_grads` (or a partial or wrapper of it): loads travel while it reduces the gradients.

    `group`: what loads are summed over, by default the routers' own TP x CP x DP group.
    """
    if getattr(finalize, "__alflb__", False):
        return finalize

    def alflb_finalize_model_grads(model: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
        attach_again(module for chunk in model for module in chunk.modules() if isinstance(module, ALFRouter))
        balancer = balancer_of(model, group)
        balancer.launch()
        try:
            result = finalize(model, *args, **kwargs)
        except BaseException:
            balancer.discard()  # a trainer may catch it and go on with the next global batch
            raise
        balancer.commit()
        return result

    alflb_finalize_model_grads.__alflb__ = True  # type: ignore[attr-defined]
    return alflb_finalize_model_grads


def install(config: Any, group: dist.ProcessGroup | None = None) -> None:
    """Wraps `config.finalize_model_grads_func`; where it is None, Megatron-Core's own function is put in and wrapped.

    Call it after the trainer has set the function and before the first step. Twice is once. Whoever runs forward and
    backward passes that train nothing zeroes the gradients after them, as Megatron-Core does, or calls
    `balancer_of(model).discard()`.
    `group`: what loads are summed over, by default the routers' own TP x CP x DP group. Also does
    `forget_with_gradients`.
    """
    forget_with_gradients("install")
    config.finalize_model_grads_func = update_hook(config.finalize_model_grads_func or finalize_model_grads, group)
