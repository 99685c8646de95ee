"""Cluster scale on paper: our all-reduce against the step, and what balance is worth under expert parallelism (EP).

No cluster was used. Step time is model FLOPs over (GPUs x peak x utilisation): FLOPs from
`alflb_megatron.lab.sweep.flops`, the all-reduce from the alpha-beta model of `benchmarks.scale` with its constants. It
is one all-reduce a pipeline stage and global batch, over all ranks of the stage, of what `LoadAllReduce` really sends.

What balance is worth is a simulation of Megatron-Core's all-to-all dispatcher over recorded loads. Experts lie in order
on the EP ranks, E / EP each; every rank routes as many tokens, with the same shares over the experts. In an MoE layer
rank r multiplies the n_r copies of tokens it is sent (18 h d FLOPs each: three matrices of h x d, forward and twice
that backward), and receives and returns them in four exchanges a layer (dispatch and combine, forward and backward) of
h BF16 numbers a copy. An exchange lasts as long as the busiest port: what leaves the node goes through NETWORK, the
rest through NVLINK, both at once and both ways at once. The layer ends with its slowest rank; all else lasts the same
under all loads. So, with x = max n_r / mean n_r the overload of the fullest rank and s the share that experts and
exchanges have in an even step,

    step / even step = 1 + s (mean of x over the MoE layers - 1)

for the busiest sender is never busier than the fullest receiver: shares sum to 1, so 1 - min_r n_r / n is at most
(EP - 1) max_r n_r / n, and likewise for whole nodes. `price` simulates, `step_ratio` is this formula. At EP = E
overload is 1 + MaxVio; below, a rank's experts average out.

The recorded loads are those of `benchmarks.cluster_loads`. Repeat with

    python -m benchmarks.cluster         (some minutes a run on one core; --paper for the formulas alone, loads kept)
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alflb_megatron import agreement, metrics
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.sweep.flops import (
    H100_PEAK,
    UTILISATION,
    Attention,
    active_weights,
    flops_per_token,
    gpu_hours,
    multi_head,
)
from alflb_megatron.lab.training.job import SCHEDULES
from alflb_megatron.models import PRESETS, ModelShape
from benchmarks import cluster_loads, scale
from benchmarks.scale import NETWORK, NVLINK, RANKS_A_NODE

UTILISATIONS = (0.2, UTILISATION, 0.5)
"""Assumed, none measured; the share of the all-reduce grows in proportion, for a faster step leaves it less time."""

EP = cluster_loads.EP
EXCHANGES = 4
"""All-to-alls an MoE layer and micro-batch: dispatch and combine, and their backward."""
NUMBER = 2
"""Bytes of a BF16 number in an exchange. (DeepSeek-V3 dispatches in FP8.)"""


def latent(hidden: int, heads: int, query_rank: int, rank: int, plain: int, rotary: int, value: int) -> Attention:
    """Multi-head latent attention (arXiv 2412.19437, section 2.1.1) as it is trained, keys and values expanded."""
    queries = hidden * query_rank + query_rank * heads * (plain + rotary)
    keys_values = hidden * (rank + rotary) + rank * heads * (plain + value)
    return Attention(queries + keys_values + heads * value * hidden, heads * (plain + rotary + value) / 2)


@dataclass(frozen=True)
class Model:
    """A model, sequences of a global batch and of a rank's micro-batch, and the (GPUs, pipeline stages) to price."""

    name: str
    shape: ModelShape
    attention: Attention
    sequences: int
    micro: int
    splits: tuple[tuple[int, int], ...]
    source: str

    @property
    def tokens(self) -> int:
        return self.sequences * self.shape.seq_length

    @property
    def moe_layers(self) -> int:
        return self.shape.num_layers - self.shape.num_dense_layers + self.shape.mtp_layers

    @property
    def flops(self) -> float:
        """Training FLOPs a token."""
        return flops_per_token(self.shape, self.attention)

    def step_seconds(self, gpus: int, utilisation: float = UTILISATION) -> float:
        return self.tokens * self.flops / (gpus * H100_PEAK * utilisation)


ONE_B = Model(
    "deepseek-moe-1b",
    PRESETS["deepseek-moe-1b"],
    multi_head(PRESETS["deepseek-moe-1b"]),
    SCHEDULES["deepseek-moe-1b"]["global_batch_size"],
    SCHEDULES["deepseek-moe-1b"]["micro_batch_size"],
    ((8, 1), (64, 1), (512, 1)),
    "Wang et al. 2024, arXiv 2408.15664, appendix",
)
V3 = Model(
    "DeepSeek-V3",
    ModelShape(
        vocab_size=129_280,
        seq_length=4096,
        hidden_size=7168,
        num_layers=61,
        num_dense_layers=3,
        num_heads=128,
        ffn_hidden_size=18_432,
        moe_ffn_hidden_size=2048,
        num_experts=256,
        topk=8,
        num_shared_experts=1,
        mtp_layers=1,
    ),
    latent(7168, heads=128, query_rank=1536, rank=512, plain=128, rotary=64, value=128),
    15_360,
    1,  # not stated; the smallest
    ((2048, 16), (2048, 1)),
    "arXiv 2412.19437, sections 3.2 and 4.2, vocabulary and width of the dense layers from its config.json",
)
MODELS = (ONE_B, V3)

ONE_B_STEPS = SCHEDULES[ONE_B.name]["steps"]

V3_TOKENS, V3_GPU_HOURS = 14.8e12, 2.664e6
"""Pre-training of DeepSeek-V3 and its H800 hours (arXiv 2412.19437, table 1); an H800 computes as an H100 does."""


def v3_utilisation() -> float:
    """The share of BF16's peak that the hours of DeepSeek-V3 come to with our FLOPs; they computed mostly in FP8."""
    return V3_TOKENS * V3.flops / (V3_GPU_HOURS * 3600 * H100_PEAK)


# -- the all-reduce against the step ----------------------------------------------------------------------------------


def all_reduce_bytes(layers: int, experts: int, with_margins: bool) -> int:
    """What the balancer sends: the flat tensor of `scale`, and the digests of `agreement` that ride on it."""
    digests = agreement.CHECKSUM_SIZE * (torch.int32 if with_margins else torch.int64).itemsize
    return scale.all_reduce_bytes(layers, experts, with_margins) + digests


def collective(model: Model, gpus: int, stages: int) -> dict[str, Any]:
    """Bytes and time of the all-reduce of the stage with most MoE layers, and the step it belongs to."""
    layers = min(math.ceil((model.shape.num_layers + model.shape.mtp_layers) / stages), model.moe_layers)
    kinds = {}
    for kind in ("counts", "margins"):
        time = scale.best(gpus // stages, all_reduce_bytes(layers, model.shape.num_experts, kind == "margins"))
        kinds[kind] = {
            **time,
            "share": {f"{u:g}": time["ms"] / 1e3 / model.step_seconds(gpus, u) for u in UTILISATIONS},
        }
    steps = {f"{u:g}": model.step_seconds(gpus, u) for u in UTILISATIONS}
    return {"model": model.name, "gpus": gpus, "stages": stages, "layers": layers, "step_seconds": steps, **kinds}


# -- what balance is worth --------------------------------------------------------------------------------------------


def exchange_seconds(model: Model, inside: Tensor, outside: Tensor) -> Tensor:
    """One exchange of copies inside and beyond the node: each its own port."""
    token = model.shape.hidden_size * NUMBER
    return torch.maximum(inside * token / NVLINK.bandwidth, outside * token / NETWORK.bandwidth)


def layer_seconds(model: Model, loads: Tensor, ep: int, utilisation: float = UTILISATION) -> tuple[Tensor, Tensor]:
    """Experts and exchanges of one MoE layer, seconds [...] a token of every rank, under loads [..., E] of any sum.

    Copies from each of the `ep` ranks are spread as the loads are. Each part ends with its slowest rank, which is the
    fullest one in both.
    """
    ranks = loads.to(torch.float64).unflatten(-1, (ep, -1)).sum(-1)
    share = ranks / ranks.sum(-1, keepdim=True)  # of all copies, to each rank
    copies = model.shape.topk * ep  # of one token of every rank
    node = min(ep, RANKS_A_NODE)
    at_node = share.unflatten(-1, (-1, node)).sum(-1).repeat_interleave(node, dim=-1)
    received = exchange_seconds(model, share * copies * (node - 1) / ep, share * copies * (ep - node) / ep)
    sent = exchange_seconds(model, (at_node - share) * copies / ep, (1 - at_node) * copies / ep)
    flops = 18 * model.shape.hidden_size * model.shape.moe_ffn_hidden_size * share * copies
    exchange = EXCHANGES * torch.maximum(received, sent).amax(-1)
    return flops.amax(-1) / (H100_PEAK * utilisation), exchange


def price(model: Model, loads: Tensor, ep: int, utilisation: float = UTILISATION) -> Tensor:
    """Step time over that of even loads [...], with loads [..., layers, E] repeated over the model's MoE layers."""
    experts, exchange = layer_seconds(model, loads, ep, utilisation)
    parts = shares(model, ep, utilisation)
    even = model.step_seconds(1, utilisation) / model.tokens / (1 - parts["exchange"])
    rest = even * (1 - parts["experts"] - parts["exchange"])
    return (rest + model.moe_layers * (experts + exchange).mean(-1)) / even


def shares(model: Model, ep: int, utilisation: float = UTILISATION) -> dict[str, float]:
    """Shares of an even step that routed experts and exchanges have, nothing hidden behind anything."""
    even_layer = layer_seconds(model, torch.ones(ep), ep, utilisation)
    experts, exchange = (model.moe_layers * float(seconds) for seconds in even_layer)
    step = model.flops / (H100_PEAK * utilisation) + exchange
    return {"experts": experts / step, "exchange": exchange / step}


def step_ratio(part: Mapping[str, float], overload: float) -> float:
    """Step time over that of even loads, from the shares of an even step and the mean overload of the MoE layers."""
    return 1 + (part["experts"] + part["exchange"]) * (overload - 1)


def luck(tokens: int, topk: int, experts: int, ep: int) -> float:
    """Mean overload of the fullest rank where each token draws its experts evenly: what no bias can take away.

    As `metrics.floor_constant` for MaxVio, to which it is equal at EP = E: a token sends a rank of E / EP experts
    K / EP copies on average, with the variance of a draw without replacement, K (EP - 1) / EP^2 (E - K) / (E - 1).
    """
    if topk == experts:
        return 1.0
    without_replacement = (experts - topk) / ((experts - 1) * topk)
    return 1 + metrics.floor_constant(1, ep) * math.sqrt(without_replacement / tokens)


# -- the results -------------------------------------------------------------------------------------------------------


def paper() -> dict[str, Any]:
    """Everything that follows from formulas."""
    described = [
        {
            "name": model.name,
            "source": model.source,
            "shape": asdict(model.shape),
            "sequences": model.sequences,
            "micro": model.micro,
            "tokens": model.tokens,
            "moe_layers": model.moe_layers,
            "active_weights": active_weights(model.shape, model.attention),
            "attention_flops": 6 * (model.shape.num_layers + model.shape.mtp_layers)
            * model.shape.seq_length * model.attention.width,
            "flops": model.flops,
        }
        for model in MODELS
    ]  # fmt: skip
    return {
        "peak": H100_PEAK,
        "utilisation": UTILISATION,
        "v3": {"tokens": V3_TOKENS, "gpu_hours": V3_GPU_HOURS, "utilisation": v3_utilisation()},
        "links": [asdict(NVLINK), asdict(NETWORK)],
        "models": described,
        "collective": [collective(model, *split) for model in MODELS for split in model.splits],
        "run_gpu_hours": {ONE_B.name: gpu_hours(ONE_B.shape, ONE_B.tokens * ONE_B_STEPS), V3.name: V3_GPU_HOURS},
        "shares": {model.name: {str(ep): shares(model, ep) for ep in EP} for model in MODELS},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=cluster_loads.STEPS, help="global batches a run (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/cluster"), help="folder of the runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=machine.RESULTS / "cluster.json", help="the figures")
    parser.add_argument("--paper", action="store_true", help="keep the loads of --results, make the rest anew")
    flags = parser.parse_args(arguments)
    if flags.paper:
        before = json.loads(flags.results.read_text(encoding="utf-8"))
        kept = {"machine": before["machine"], "loads": before["loads"]}
    else:
        try:
            kept = {"loads": cluster_loads.record(flags.out, flags.steps, flags.jobs)}
        except subprocess.CalledProcessError as error:
            print(f"cluster: {error}; see the logs in {flags.out}", file=sys.stderr)
            return 1
        kept["machine"] = {**machine.describe(), "threads": 1}
    write_json(flags.results, {"machine": kept["machine"], **paper(), "loads": kept["loads"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
