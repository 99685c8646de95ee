"""The expert biases of any Megatron-Core model, out of it and into it: our router, Megatron's own, quantile balancing.

    from alflb_megatron.hosts.expert_bias import bias_of, load_bias
    from alflb_megatron.hosts.huggingface import save

    load_bias(model, "DeepSeek-V3")            # a Hugging Face folder or a .safetensors file; model: list of its chunks
    save(bias_of(model), "bias.safetensors")

Megatron-LM, Megatron-Bridge and NeMo hand such a list of chunks to their training loops.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alflb_megatron.biases import Biases, bias_from_qb_beta
from alflb_megatron.hosts.huggingface import read
from alflb_megatron.hosts.routers import of_all_stages, of_one_stack
from alflb_megatron.router import ALFRouter
from alflb_megatron.settings import SettingError


def bias_of(
    model: Sequence[nn.Module],
    group: dist.ProcessGroup | None = None,
    name: str = "the model's biases",
    stack: str | None = None,
) -> Biases:
    """The expert biases of `model`, copied to the CPU.

    Args:
        model: the chunks of this rank, bare or wrapped (DDP, Float16Module).
        group: the pipeline-parallel group, to have the layers of all stages; all its ranks call it. Without it, the
            layers of this stage.
        name: for messages.
        stack: path of the block whose layers are meant (`hosts.routers`), where a model holds several; by default the
            only one that trains.

    Raises:
        SettingError: no router has a bias, they are of several kinds, or several stacks train.
    """
    own = of_one_stack(model, stack, "model", name, group)
    routers = {layer: router for layer, router in own.items() if _is_biased(router)}
    rows = {layer: _bias(router) for layer, router in routers.items()}
    kinds = [(r.config.num_layers, _unit(r), r.score_function, _groups(r)) for r in routers.values()]
    parts = of_all_stages((rows, kinds), group)
    rows = {layer: row for part, _ in parts for layer, row in part.items()}
    found = {kind for _, some in parts for kind in some}
    if not found:
        raise SettingError("model", name, "has no router with an expert bias")
    if len(found) > 1:
        raise SettingError("model", name, "has routers that differ in gate, groups or unit of their bias")
    num_layers, unit, function, groups = found.pop()
    return Biases(rows, num_layers, unit, function, groups, name).require_sound("model")


@torch.no_grad()
def load_bias(
    model: Sequence[nn.Module],
    source: str | os.PathLike[str] | Biases,
    flag: str = "source",
    stack: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[int, int]:
    """Starts every router of `model` from the biases of `source`; the rule's state and its count of updates start anew.

    Each pipeline stage takes its layers, and finds a source that does not fit the model by itself. Nothing is written
    unless all fits. Call it after a checkpoint was loaded.

    Args:
        model: the chunks of this rank, bare or wrapped. Routers are ours, or Megatron-Core's with its expert bias.
        source: a .safetensors file, a Hugging Face folder (`hosts.huggingface.read`), or `Biases`.
        flag: what a SettingError names.
        stack: path of the block whose layers are meant (`hosts.routers`), where a model holds several; by default the
            only one that trains.
        group: the pipeline-parallel group, where stages may differ in which stacks they hold; all its ranks call it.

    Returns:
        The number of experts of each layer that was given its bias.

    Raises:
        SettingError: layers, experts, gate or unit do not fit; the text names both sides.
    """
    biases = (source if isinstance(source, Biases) else read(source, flag)).require_sound(flag)
    routers = of_one_stack(model, stack, flag, biases.name, group)
    for layer, router in routers.items():
        if getattr(router, "expert_bias", None) is None:
            raise SettingError(flag, biases.name, f"is for an expert bias; the router of layer {layer} has none")
        biases.require_gate(_unit(router), router.score_function, flag)
    if routers:
        config = next(iter(routers.values())).config  # one configuration makes all layers
        elsewhere = _moe_layers(config) if biases.rows.keys() - routers.keys() else []
        here = {layer: row for layer, row in biases.rows.items() if layer in routers or layer not in elsewhere}
        experts = {layer: router.num_experts for layer, router in routers.items()}
        dataclasses.replace(biases, rows=here).require_fit(experts, config.num_layers, flag)
    for layer, router in routers.items():
        _start(router, biases.rows[layer])
    return {layer: router.num_experts for layer, router in routers.items()}


def _is_biased(router: Any) -> bool:
    return any(getattr(router, buffer, None) is not None for buffer in ("expert_bias", "qb_beta"))


def _bias(router: Any) -> Tensor:
    if getattr(router, "expert_bias", None) is not None:
        return router.expert_bias.detach().float().cpu().clone()
    return bias_from_qb_beta(router.qb_beta.detach()).cpu()


def _unit(router: Any) -> str:
    if isinstance(router, ALFRouter):
        return router.alf.score_unit
    return "logit" if getattr(router, "expert_bias", None) is None else "score"


def _groups(router: Any) -> int | None:
    groups, chosen = router.config.moe_router_num_groups, router.config.moe_router_group_topk
    return groups if groups and chosen and chosen < groups else None


def _moe_layers(config: Any) -> Container[int]:
    """The layers of the whole model that may be MoE, from 1; those of MTP, which are as the decoder's last, follow."""
    if getattr(config, "is_hybrid_model", False):  # which are is in a pattern that only the model knows
        return range(1, 2**31) if config.pipeline_model_parallel_size > 1 else ()
    freq = config.moe_layer_freq
    pattern = [int(i % freq == 0) for i in range(config.num_layers)] if isinstance(freq, int) else list(freq)
    decoder = [i + 1 for i, moe in enumerate(pattern) if moe]
    mtp = range(config.num_layers + 1, config.num_layers + 1 + (config.mtp_num_layers or 0))
    return decoder + (list(mtp) if pattern[-1] else [])


def _start(router: Any, bias_E: Tensor) -> None:
    if isinstance(router, ALFRouter):
        router.start_from(bias_E)
        return
    router._maintain_float32_expert_bias()  # a cast of the whole model has rounded it, until its first forward pass
    router.expert_bias.copy_(bias_E)
