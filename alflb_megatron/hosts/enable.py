"""`enable` and `disable`: ALF-LB for every Megatron-Core model built afterwards, whoever builds it.

Attributes of Megatron-Core are replaced, marked, and put back; each is named here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

from alflb_megatron.config import ALFConfig
from alflb_megatron.hosts.absent_state import tolerating_absent_state
from alflb_megatron.hosts.core import (
    RouterBuilder,
    balancer_of,
    bare,
    existing_balancer,
    forget_with_gradients,
    forget_with_gradients_no_more,
    is_replaceable,
    with_alflb,
)
from alflb_megatron.hosts.patching import Patch
from alflb_megatron.loads import LoadAllReduce, reset_all
from alflb_megatron.within_batch import attach_again, detach_all

logger = logging.getLogger(__name__)

# `megatron.core.distributed.finalize_model_grads` is the function; the module of that name is in sys.modules.
_finalize_module = sys.modules["megatron.core.distributed.finalize_model_grads"]

_enabled: ALFConfig | None = None
_building: list[Patch] = []
_updating: list[Patch] = []
_finalizing: WeakKeyDictionary[nn.Module, LoadAllReduce | None] = WeakKeyDictionary()
"""What is summed of each model, by the first of its chunks, in whose finalize_model_grads it is: begun and not yet come
to its last step."""


def enable(alf: ALFConfig | None = None, **settings: Any) -> ALFConfig:
    """Turns ALF-LB on for every Megatron-Core model built after this call. Returns the settings in force.

    `enable(rule="sign", step_size=1e-3)` or `enable(ALFConfig(...))`. Calling it again with the same settings changes
    nothing. One attribute of Megatron-Core is replaced and marked `__alflb__`, `MoELayer.__init__` (the router it
    builds), and those of `update_everywhere`.

    Raises:
        SettingError: a setting that cannot work.
        RuntimeError: it is on already with other settings.
    """
    global _enabled
    wanted = alf if alf is not None and not settings else dataclasses.replace(alf or ALFConfig(), **settings)
    if _enabled is not None:
        if wanted != _enabled:
            raise RuntimeError(f"ALF-LB is enabled already with {_enabled}; call alflb_megatron.disable() first")
        return _enabled
    update_everywhere()
    _building.append(Patch(MoELayer, "__init__", _building_our_router))
    _enabled = wanted
    return wanted


def update_everywhere() -> None:
    """Has every `ALFRouter` of this process updated, whoever sets `finalize_model_grads_func`; twice is once.

    For trainers that set it themselves. Three attributes of Megatron-Core are replaced and marked `__alflb__`: two
    names that `finalize_model_grads` looks up when it begins and when gradients are reduced (so it does not matter
    who imported that function, or when), and the load of a torch_dist checkpoint (our state may be absent from it);
    and those of `forget_with_gradients`. A model without an `ALFRouter` is not touched.
    """
    if _updating:
        return
    reset_all()  # what routers counted while nothing updated them
    attach_again()
    try:
        forget_with_gradients("enable")
        for owner, name, wrap in (
            (_finalize_module, "get_model_config", _launching),
            (_finalize_module, "reset_model_temporary_tensors", _committing),
            (torch_dist.TorchDistLoadShardedStrategy, "load", tolerating_absent_state),
        ):
            _updating.append(Patch(owner, name, wrap))
    except BaseException:
        disable()
        raise


def disable() -> None:
    """Takes `enable` and `update_everywhere` back: Megatron-Core is as it was.

    Models built meanwhile keep their router, which stands still.
    """
    global _enabled
    forget_with_gradients_no_more("enable")
    _finalizing.clear()
    detach_all()
    for patches in (_building, _updating):
        while patches:
            patches.pop().undo()
    _enabled = None


def _building_our_router(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: MoELayer, config: Any, submodules: Any = None, *args: Any, **kwargs: Any) -> None:
        if submodules is not None and not isinstance(submodules.router, RouterBuilder):
            if is_replaceable(submodules.router):
                submodules = with_alflb(submodules, _enabled)
            else:
                logger.warning("an MoE layer has a router of its own, %s: ALF-LB leaves it alone", submodules.router)
        original(self, config, submodules, *args, **kwargs)

    return init


def _launching(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_model_config(model: nn.Module) -> Any:
        # Only the first chunk is seen here: in the very first global batch of several, their loads travel at commit.
        balancer = existing_balancer(model) or balancer_of([model])
        if balancer.under_way is not None and balancer.under_way is _finalizing.get(bare(model)):
            balancer.abandon()  # an earlier finalize raised, and the trainer went on
        balancer.launch()
        _finalizing[bare(model)] = balancer.under_way
        return original(model)

    return get_model_config


def _committing(original: Callable[..., Any]) -> Callable[..., Any]:
    def reset_model_temporary_tensors(config: Any, model: list[nn.Module]) -> Any:
        balancer = balancer_of(model)
        if bare(model[0]) in _finalizing:
            balancer.launch()
            balancer.commit()
        else:
            # Called by itself: transformer/cuda_graphs.py throws away what passes on dummy data left behind.
            balancer.discard()
        _finalizing.pop(bare(model[0]), None)
        return original(config, model)

    return reset_model_temporary_tensors
