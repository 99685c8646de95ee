"""What every host's logger shows of the last global batch.

`log_line` has the few that go into a log line of text, `balance_metrics` all of them, for TensorBoard and W&B. Both are
over the MoE layers of all pipeline stages, by one small all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alflb_megatron import metrics
from alflb_megatron.balancer import Balancer
from alflb_megatron.hosts.core import balancer_of
from alflb_megatron.hosts.routers import labels, of_all_stages

COUNTED = "MoE layers counted"

WITHIN_BATCH_KEYS = ("MaxVio of micro-batches", "MaxVio worst micro-batch", "EP rank overload worst micro-batch")
"""Figures that there are where micro-batches move the bias."""

LOG_LINE_KEYS = ("MaxVio", "MaxVio worst layer", "load max", "load min", "expert bias spread")
"""Figures that a trainer's log line of text has room for."""

DESCRIPTIONS = {
    COUNTED: "layers that saw a token; the others are in no figure. Where it is 0 it is the only figure",
    "MaxVio": "mean over layers of (largest load - mean load) / mean load (Wang et al. 2024, eq. 4)",
    "MaxVio p50": "its median over layers",
    "MaxVio p90": "its ninth decile over layers",
    "MaxVio worst layer": "its largest",
    "MaxVio of micro-batches": "its mean over the micro-batches of the global batch, where these move the bias",
    "MaxVio worst micro-batch": "its largest",
    "MaxVio floor": "what luck alone gives where all experts are equally likely (metrics.floor_constant)",
    "load max": "tokens of the fullest expert, mean over layers",
    "load min": "tokens of the emptiest expert, mean over layers",
    "load variation": "standard deviation of the loads over their mean, mean over layers",
    "load evenness": "exp(entropy of the loads) / E, mean over layers: 1 is balance",
    "dead experts": "experts without a token in this global batch, sum over layers",
    "starved experts": "experts with less than a tenth of the mean load, dead ones included, sum over layers",
    "EP rank overload": "load of the fullest expert-parallel rank over the mean, of the worst layer: 1 is balance",
    "EP rank overload worst micro-batch": "the same of its worst micro-batch, where these move the bias",
    "expert bias spread": "largest bias less smallest, score units, mean over layers",
    "expert bias spread worst layer": "its largest",
    "expert bias drift": "largest move of a bias in this update, score units, mean over layers",
    "gain": "the rule's gain, mean over layers, where it has one (adaptive)",
    "curvature": "mean eigenvalue of the dual's Hessian per token, smallest over layers, where margins are measured; "
    "the modulus of strong convexity is at most that",
    "updates refused": "since this start, for scores or a result that were not finite, sum over layers",
    "disagreements": "checks since this start that found ranks with different biases",
}
"""Every figure, at most 24 of them, and what it is. `gain`, `curvature` and those of micro-batches are left out where
there is none."""

_COLUMNS = (
    "layer", "vio", "floor", "most", "least", "variation", "evenness", "dead", "starved", "overload", "spread", "drift",
    "gain", "curvature", "refused", "disagreements", "detail", "counted", "present",
    "micro_mean", "micro_worst", "micro_overload",
)  # fmt: skip


def router_table(model: Sequence[nn.Module], pipeline: dist.ProcessGroup | None = None) -> Tensor | None:
    """Figures of the last global batch, float64 [routers of all pipeline stages, columns].

    None before the first update. Every rank of `pipeline`, the pipeline-parallel group, has to call it.
    """
    balancer = balancer_of(model)
    last = balancer.last
    stages, stage = (1, 0) if pipeline is None else (pipeline.size(), pipeline.rank())
    if last is None and stages == 1:
        return None
    device = torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    before, total = 0, len(balancer.routers)
    if stages > 1:
        of_stage = torch.zeros(stages, dtype=torch.int64)
        of_stage[stage] = total
        sizes = of_stage.to(device)
        dist.all_reduce(sizes, group=pipeline)
        routers = sizes.tolist()
        before, total = sum(routers[:stage]), sum(routers)
    table = torch.zeros(total, len(_COLUMNS), dtype=torch.float64, device=device)
    if last is not None and last.layers:
        rows = last.loads
        configs = [cast(Any, router).config for router in balancer.routers]
        # floor_constant / sqrt(tokens), from sums of loads: tokens are loads / K
        floors = [
            metrics.floor_constant(config.moe_router_topk, len(loads)) * config.moe_router_topk**0.5
            for config, loads in zip(configs, rows, strict=True)
        ]
        sums = metrics.of_layers(lambda loads: loads.sum(-1, dtype=torch.float64), rows)
        ranks = [config.expert_model_parallel_size for config in configs]
        columns = {
            "layer": torch.tensor(last.layers, device=device),
            "vio": last.max_vio(),
            "floor": torch.tensor(floors, dtype=torch.float64, device=device) / sums.clamp(min=1).sqrt(),
            "most": metrics.of_layers(lambda loads: loads.amax(-1), rows),
            "least": metrics.of_layers(lambda loads: loads.amin(-1), rows),
            "variation": metrics.of_layers(metrics.variation, rows),
            "evenness": metrics.of_layers(metrics.evenness, rows),
            "dead": metrics.of_layers(lambda loads: (loads == 0).sum(-1), rows),
            "starved": metrics.of_layers(lambda loads: metrics.starved(loads).sum(-1), rows),
            "overload": _overload(rows, ranks),
            "spread": last.spread(),
            "drift": last.drift,
            "gain": last.gain,
            "curvature": last.curvature,
            "refused": torch.as_tensor(balancer.rejections).to(device).expand(len(rows)),
            "disagreements": torch.full((len(rows),), balancer.disagreements, device=device),
            "detail": torch.full((len(rows),), float(_wants_detail(balancer)), device=device),
            "counted": last.counted(),
            "present": torch.ones(len(rows), device=device),
        }
        if (micro := last.micro_batches) is not None:
            columns |= {
                "micro_mean": micro.vio_mean,
                "micro_worst": micro.vio_worst,
                "micro_overload": micro.overload,
            }
        zero = sums.new_zeros(len(rows))
        figures = [columns.get(name, zero).double() for name in _COLUMNS]
        table[before : before + len(rows)] = torch.stack(figures, dim=1)
    if stages > 1:
        dist.all_reduce(table, group=pipeline)
    return table


def _wants_detail(balancer: Balancer) -> bool:
    return any(router.alf is not None and router.alf.log_layers for router in balancer.routers)


def _overload(rows: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """`metrics.overload` of each row; stacks of a model may differ in their expert parallelism."""
    if len(set(ranks)) == 1:
        return metrics.of_layers(lambda loads: metrics.overload(loads, ranks[0]), rows)
    return torch.stack([metrics.overload(loads, of) for loads, of in zip(rows, ranks, strict=True)])


def balance_metrics(model: Sequence[nn.Module], pipeline: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """All of `DESCRIPTIONS` that there are, float32 scalars on the device; empty before the first update.

    With `--alflb-log-layers` also `MaxVio layer N` and `expert bias spread layer N`, or the router's path in place of
    `layer N` where a number stands for several. Every rank of `pipeline`, the
    pipeline-parallel group, has to call it.
    """
    table = router_table(model, pipeline)
    if table is None:
        return {}
    device, table = table.device, table.cpu()  # the one time that the device is waited for: what follows is small
    of = dict(zip(_COLUMNS, table.unbind(1), strict=True))
    if not of["present"].any():
        return {}
    counted = (of["counted"] > 0).nonzero().flatten()
    counted = counted[of["layer"][counted].argsort(stable=True)]
    if not len(counted):
        return {COUNTED: torch.zeros((), device=device)}
    of = {name: column[counted] for name, column in of.items()}
    vio, gain, curvature = of["vio"], of["gain"], of["curvature"]
    shown = {
        COUNTED: of["counted"].sum(),
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
    if of["micro_overload"].any():
        mean, worst, overload = (of[name] for name in ("micro_mean", "micro_worst", "micro_overload"))
        values = (mean[overload > 0].mean(), worst.max(), overload.max())
        shown.update(zip(WITHIN_BATCH_KEYS, values, strict=True))
    if gain.isfinite().any():
        shown["gain"] = gain[gain.isfinite()].mean()
    if curvature.isfinite().any():
        shown["curvature"] = curvature[curvature.isfinite()].min()
    if of["detail"].any():
        layers = of["layer"].int().tolist()
        paths = [""] * len(table)
        if len(set(layers)) < len(layers):  # on every rank alike: the table is the same on all
            paths = [path for stage in of_all_stages(balancer_of(model).paths, pipeline) for path in stage]
        for row, label in enumerate(labels(layers, [paths[index] for index in counted.tolist()])):
            shown[f"MaxVio {label}"] = vio[row]
            shown[f"expert bias spread {label}"] = of["spread"][row]
    return dict(zip(shown, torch.stack(list(shown.values())).float().to(device), strict=True))


def log_line(shown: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of `balance_metrics` a trainer's log line of text has room for, or that nothing was counted."""
    return {name: shown[name] for name in LOG_LINE_KEYS if name in shown} or shown


def writer_metrics(shown: dict[str, Tensor]) -> dict[str, float]:
    """The others, as numbers, under `alflb/...`; reading them waits for the device."""
    return {f"alflb/{name}": float(value) for name, value in shown.items() if name not in LOG_LINE_KEYS}
