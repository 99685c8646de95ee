"""Settings of the host that cannot work with an expert bias, refused by name when a router is built."""

from __future__ import annotations

import re

from megatron.core.transformer.transformer_config import TransformerConfig

from alflb_megatron.config import ALFConfig
from alflb_megatron.settings import SettingError


def check_router_config(config: TransformerConfig, alf: ALFConfig) -> None:
    """Refuses settings of the host that cannot work with an expert bias; `SettingError` names the host's flag."""
    balancing = config.moe_router_load_balancing_type
    if {"sinkhorn", "quantile_balancing"} & ({balancing} if isinstance(balancing, str) else set(balancing)):
        raise SettingError(
            "--moe-router-load-balancing-type",
            config.moe_router_load_balancing_type,
            "chooses experts by itself; with ALF-LB use none, aux_loss, seq_aux_loss or global_aux_loss",
        )
    graphs = f"{getattr(config, 'cuda_graph_impl', '')} {getattr(config, 'cuda_graph_scope', '')}"
    if re.search(r"full_iteration\b(?!_inference)", graphs):
        raise SettingError(
            "--cuda-graph-impl",
            "full_iteration",
            "replays a whole step without Python, in which the bias is updated; use graphs of layers",
        )
    graphed = getattr(config, "cuda_graph_impl", None) not in (None, "none")
    if (
        alf.update_every == "micro-batch"
        and not alf.frozen
        and (graphed or getattr(config, "enable_cuda_graph", False))
    ):
        raise SettingError(
            "--alflb-update-every",
            alf.update_every,
            "needs Python in every forward pass, which a CUDA graph of a layer replays without; use global-batch",
        )
    if getattr(config, "overlap_moe_expert_parallel_comm", False) and alf.update_every == "micro-batch":
        raise SettingError(
            "--alflb-update-every",
            alf.update_every,
            "needs the model's own forward pass, which --overlap-moe-expert-parallel-comm takes apart; use "
            "global-batch",
        )
    if config.moe_router_topk > config.num_moe_experts:
        raise SettingError(
            "--moe-router-topk", config.moe_router_topk, f"must be at most the {config.num_moe_experts} experts"
        )
    if config.moe_router_num_groups and config.moe_router_group_topk:
        _check_groups(config)
    if config.moe_router_fusion and config.moe_router_score_function != "sigmoid":
        raise SettingError(
            "--moe-router-fusion",
            True,
            "Transformer Engine's fused router takes an expert bias with the sigmoid gate only; "
            f"switch it off for the {config.moe_router_score_function} gate",
        )
    if config.moe_router_fusion and config.moe_enable_routing_replay:
        raise SettingError(
            "--moe-enable-routing-replay",
            True,
            "has no effect in Transformer Engine's fused router; switch --moe-router-fusion off",
        )
    if config.moe_router_fusion and alf.score_unit != "score":
        raise SettingError(
            "--alflb-score-unit",
            alf.score_unit,
            "must be score with --moe-router-fusion, which adds the bias to scores",
        )


def _check_groups(config: TransformerConfig) -> None:
    """Whether the groups that are chosen have K experts to give; that they divide the experts, Megatron-Core checks."""
    flag, topk, experts = "--moe-router-group-topk", config.moe_router_topk, config.num_moe_experts
    groups, chosen = config.moe_router_num_groups, config.moe_router_group_topk
    if topk < chosen:
        raise SettingError(
            flag,
            chosen,
            f"must be at most --moe-router-topk, {topk}: a group's worth is that of its "
            "topk / group_topk best experts, which would be none",
        )
    if topk > chosen * (experts // groups):
        raise SettingError(
            flag,
            chosen,
            f"gives a token {chosen} groups of {experts // groups} experts, fewer than --moe-router-topk {topk}",
        )
