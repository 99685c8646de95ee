"""What every host's logger shows of the last global batch.

`log_line` has the few that go into a log line of text, `balance_metrics` all of them, for TensorBoard and W&B. Both are
over the MoE layers of all pipeline stages, by one small all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alflb_megatron import metrics
from alflb_megatron.balancer import Balancer
from alflb_megatron.hosts.core import balancer_of

LOG_LINE_KEYS = ("MaxVio", "MaxVio worst layer", "load max", "load min", "expert bias spread")
"""Figures that a trainer's log line of text has room for."""

DESCRIPTIONS = {
    "MaxVio": "mean over layers of (largest load - mean load) / mean load (Wang et al. 2024, eq. 4)",
    "MaxVio p50": "its median over layers",
    "MaxVio p90": "its ninth decile over layers",
    "MaxVio worst layer": "its largest",
    "MaxVio floor": "what luck alone gives where all experts are equally likely (metrics.floor_constant)",
    "load max": "tokens of the fullest expert, mean over layers",
    "load min": "tokens of the emptiest expert, mean over layers",
    "load variation": "standard deviation of the loads over their mean, mean over layers",
    "load evenness": "exp(entropy of the loads) / E, mean over layers: 1 is balance",
    "dead experts": "experts without a token in this global batch, sum over layers",
    "starved experts": "experts with less than a tenth of the mean load, dead ones included, sum over layers",
    "EP rank overload": "load of the fullest expert-parallel rank over the mean, of the worst layer: 1 is balance",
    "expert bias spread": "largest bias less smallest, score units, mean over layers",
    "expert bias spread worst layer": "its largest",
    "expert bias drift": "largest move of a bias in this update, score units, mean over layers",
    "gain": "the rule's gain, mean over layers, where it has one (adaptive)",
    "curvature": "mean eigenvalue of the dual's Hessian per token, smallest over layers, where margins are measured; "
    "the modulus of strong convexity is at most that",
    "updates refused": "since this start, for scores or a result that were not finite, sum over layers",
    "disagreements": "checks since this start that found ranks with different biases",
}
"""Every figure, at most 24 of them, and what it is. `gain` and `curvature` are left out where there is none."""

_COLUMNS = (
    "vio", "floor", "most", "least", "variation", "evenness", "dead", "starved", "overload", "spread", "drift", "gain",
    "curvature", "refused", "disagreements", "detail", "present",
)  # fmt: skip


def layer_table(model: Sequence[nn.Module], pipeline: dist.ProcessGroup | None = None) -> Tensor | None:
    """Figures of the last global batch, float64 [layers, columns], one row for each MoE layer of all pipeline stages.

    None before the first update. Every rank of `pipeline`, the pipeline-parallel group, has to call it.
    """
    balancer = balancer_of(model)
    last, config = balancer.last, _config_of(model)
    spread_over_stages = pipeline is not None and pipeline.size() > 1
    if last is None and not spread_over_stages:
        return None
    device = torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    every = config.num_layers + (config.mtp_num_layers or 0)
    table = torch.zeros(every, len(_COLUMNS), dtype=torch.float64, device=device)
    if last is not None and last.layers:
        rows, topk, ranks = last.loads, config.moe_router_topk, config.expert_model_parallel_size

        def floor(loads_LE: Tensor) -> Tensor:
            experts = loads_LE.shape[-1]
            tokens = loads_LE.sum(dim=-1, dtype=torch.float64) / topk
            return metrics.floor_constant(topk, experts) / tokens.clamp(min=1).sqrt()

        columns = {
            "vio": last.max_vio(),
            "floor": metrics.of_layers(floor, rows),
            "most": metrics.of_layers(lambda loads: loads.amax(-1), rows),
            "least": metrics.of_layers(lambda loads: loads.amin(-1), rows),
            "variation": metrics.of_layers(metrics.variation, rows),
            "evenness": metrics.of_layers(metrics.evenness, rows),
            "dead": metrics.of_layers(lambda loads: (loads == 0).sum(-1), rows),
            "starved": metrics.of_layers(lambda loads: metrics.starved(loads).sum(-1), rows),
            "overload": metrics.of_layers(lambda loads: metrics.overload(loads, ranks), rows),
            "spread": last.spread(),
            "drift": last.drift,
            "gain": last.gain,
            "curvature": last.curvature,
            "refused": torch.as_tensor(balancer.rejections).to(device).expand(len(rows)),
            "disagreements": torch.full((len(rows),), balancer.disagreements, device=device),
            "detail": torch.full((len(rows),), float(_wants_detail(balancer)), device=device),
            "present": torch.ones(len(rows), device=device),
        }
        found = torch.stack([columns[name].double() for name in _COLUMNS], dim=1)
        for layer, row in zip(last.layers, found, strict=True):
            if 1 <= layer <= every:  # a host may number its layers in a way that is not known here: left out, not fatal
                table[layer - 1] = row
    if spread_over_stages:
        dist.all_reduce(table, group=pipeline)
    return table


def _wants_detail(balancer: Balancer) -> bool:
    return any(router.alf is not None and router.alf.log_layers for router in balancer.routers)


def _config_of(model: Sequence[nn.Module]) -> Any:
    """Megatron-Core's configuration of the model, through whatever is wrapped around it."""
    for module in model[0].modules():
        if hasattr(module, "config") and hasattr(module.config, "moe_router_topk"):
            return module.config
    raise TypeError(f"{type(model[0]).__name__} holds no module of Megatron-Core's")


def balance_metrics(model: Sequence[nn.Module], pipeline: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """All of `DESCRIPTIONS` that there are, float32 scalars on the device; empty before the first update.

    With `--alflb-log-layers` also `MaxVio layer N` and `expert bias spread layer N`. Every rank of `pipeline`, the
    pipeline-parallel group, has to call it.
    """
    table = layer_table(model, pipeline)
    if table is None:
        return {}
    of = dict(zip(_COLUMNS, table.unbind(1), strict=True))
    there = of["present"] > 0
    layers = there.nonzero().flatten().tolist()
    if not layers:
        return {}
    of = {name: column[there] for name, column in of.items()}
    vio, gain, curvature = of["vio"], of["gain"], of["curvature"]
    shown = {
        "MaxVio": vio.mean(),
        "MaxVio p50": vio.quantile(0.5),
        "MaxVio p90": vio.quantile(0.9),
        "MaxVio worst layer": vio.max(),
        "MaxVio floor": of["floor"].mean(),
        "load max": of["most"].mean(),
        "load min": of["least"].mean(),
        "load variation": of["variation"].mean(),
        "load evenness": of["evenness"].mean(),
        "dead experts": of["dead"].sum(),
        "starved experts": of["starved"].sum(),
        "EP rank overload": of["overload"].max(),
        "expert bias spread": of["spread"].mean(),
        "expert bias spread worst layer": of["spread"].max(),
        "expert bias drift": of["drift"].mean(),
        "updates refused": of["refused"].sum(),
        "disagreements": of["disagreements"].max(),
    }
    if gain.isfinite().any():
        shown["gain"] = gain[gain.isfinite()].mean()
    if curvature.isfinite().any():
        shown["curvature"] = curvature[curvature.isfinite()].min()
    if of["detail"].any():
        for row, layer in enumerate(layers):
            shown[f"MaxVio layer {layer + 1}"] = vio[row]
            shown[f"expert bias spread layer {layer + 1}"] = of["spread"][row]
    return {name: value.float() for name, value in shown.items()}


def log_line(shown: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of `balance_metrics` a trainer's log line of text has room for."""
    return {name: shown[name] for name in LOG_LINE_KEYS if name in shown}


def writer_metrics(shown: dict[str, Tensor]) -> dict[str, float]:
    """The others, as numbers, under `alflb/...`; reading them waits for the device."""
    return {f"alflb/{name}": float(value) for name, value in shown.items() if name not in LOG_LINE_KEYS}
