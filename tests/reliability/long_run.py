"""Thousands of updates of one Balancer over two ranks: does memory grow, does the zero sum drift, do ranks part?

    python -m tests.reliability.long_run --updates 20000 --out long_run.json

Real ALFRouters, two for each rule, route random tokens through their own forward pass; the ranks see different tokens.
The routers' weights swing slowly, so that biases keep moving.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

RULES = ("adaptive", "sign", "harmonic", "sqrt")
LAYERS = 2  # routers of each rule
SAMPLES = 20  # of memory and of what all ranks hold, spread evenly over the run
WARM_UP = 0.1  # share of the updates before the first sample
POOL = 61  # batches of tokens that come round
MEMORY_BOUND = 2**20 * 4  # bytes by which a rank may grow after warm-up, however long the run
DRIFT_BOUND = 1e-6  # of the mean of a layer's bias, in score units
PLANTS = ("leak", "records", "bit", "drift")


def updates(count: int, plant: str = "") -> dict[str, Any]:
    """On a rank: `count` updates and what was measured.

    plant: a defect, to show that it would be seen: "leak" keeps bytes at every update, twice the bound in all;
    "records" keeps every record; "bit" changes the last bit of one bias of one rank once; "drift" leaves the biases of
    `sign` uncentred.
    """
    import torch
    import torch.distributed as dist

    from alflb_megatron.balancer import Balancer
    from tests.distributed.ranks import model_parallel

    with model_parallel():
        by_rule = {rule: [_router(rule, layer, plant == "drift") for layer in range(LAYERS)] for rule in RULES}
        routers = [router for pair in by_rule.values() for router in pair]
        weights = [router.weight.detach().clone() for router in routers]
        balancer = Balancer(routers, range(1, len(routers) + 1), routers[0].tp_dp_cp_group)
        generator = torch.Generator().manual_seed(dist.get_rank())
        pool_PTH = [torch.randn(16, 1, 32, generator=generator) + 0.5 for _ in range(POOL)]
        first, between = max(1, int(count * WARM_UP)), max(1, int(count * (1 - WARM_UP)) // SAMPLES)
        samples: list[dict[str, Any]] = []
        kept: list[Any] = []
        drift = torch.zeros(len(routers), dtype=torch.float64)
        gc.collect()
        gc.freeze()  # what is there now is neither searched nor counted: a million objects of imported modules
        began = time.monotonic()
        for update in range(1, count + 1):
            for router, weight in zip(routers, weights, strict=True):
                if update % 50 == 1:
                    router.weight.data.copy_(weight * (1 + math.sin(2 * math.pi * update / 5000)))
                router(pool_PTH[update % POOL])
            balancer.launch()
            record = balancer.commit()
            if plant == "leak":
                kept.append(b"x" * (2 * MEMORY_BOUND // count))
            if plant == "records":
                kept.append(record)
            if plant == "bit" and update == count // 2 and dist.get_rank() == 1:
                bias = routers[-1].expert_bias
                bias[0] = torch.nextafter(bias[0], torch.tensor(math.inf))
            drift = torch.maximum(drift, torch.stack([b.double().mean().abs() for b in record.bias]))
            if update == count or (update >= first and (update - first) % between == 0):
                samples.append({"update": update, **_memory(), "ranks_agree": _agree(routers)})
        gc.unfreeze()
        return {
            "samples": samples,
            "drift": {rule: float(drift[i * LAYERS : (i + 1) * LAYERS].max()) for i, rule in enumerate(RULES)},
            "disagreements": balancer.disagreements,
            "n": [int(router.alf_n) for router in routers],
            "spread": {
                rule: float(pair[0].expert_bias.max() - pair[0].expert_bias.min()) for rule, pair in by_rule.items()
            },
            "seconds": time.monotonic() - began,
        }


def _router(rule: str, layer: int, uncentred: bool) -> Any:
    """A router of Megatron-Core's with two favoured experts; the same on every rank."""
    import torch
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from alflb_megatron.config import ALFConfig
    from alflb_megatron.hosts.core import RouterBuilder
    from alflb_megatron.lab.training import build
    from tests.distributed import jobs

    config = build.transformer_config(jobs.plan({"rule": "sign", "nproc": 1}))
    alf = ALFConfig(rule=rule, centring=not (uncentred and rule == "sign"))
    router = RouterBuilder(alf)(config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False)
    router.set_layer_number(layer + 1)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(layer)) * 0.1)
        router.weight[:2] += 0.1
    return router


def _memory() -> dict[str, int]:
    """Resident bytes of this process, and the tensors that it holds beside the frozen ones."""
    import psutil
    import torch

    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return {"resident": psutil.Process().memory_info().rss, "tensors": tensors}


def _agree(routers: list[Any]) -> bool:
    """Whether all ranks hold the same biases, numbers of updates and rule state, bit for bit."""
    import torch
    import torch.distributed as dist

    own = []
    for router in routers:
        n, state = router.read_state()
        own += [router.expert_bias, n, *(state[name] for name in sorted(state))]
    mine = torch.cat([part.detach().contiguous().reshape(-1).view(torch.uint8) for part in own])
    everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, mine)
    return all(torch.equal(mine, other) for other in everywhere)


def _one_after_another(jobs: list[tuple[int, str]]) -> list[dict[str, Any]]:
    return [updates(count, plant) for count, plant in jobs]


def run(*jobs: tuple[int, str]) -> list[dict[str, Any]]:
    """Runs the jobs, each a number of updates and a defect to plant or "", on two ranks; the figures of each."""
    from tests.distributed import ranks

    by_rank = ranks.run(2, _one_after_another, list(jobs))
    return [_figures(count, [rank[i] for rank in by_rank]) for i, (count, _) in enumerate(jobs)]


def _figures(count: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What long_run.json holds: the worse of the ranks everywhere."""
    growth = [max(s["resident"] for s in rank["samples"]) - rank["samples"][0]["resident"] for rank in found]
    # A collective that is just over may hold its tensor for a moment: what stays is there in all of the later samples.
    later = [rank["samples"][len(rank["samples"]) // 2 :] for rank in found]
    tensors = [
        min(s["tensors"] for s in half) - rank["samples"][0]["tensors"] for rank, half in zip(found, later, strict=True)
    ]
    return {
        "updates": count,
        "applied": min(n for rank in found for n in rank["n"]),
        "ranks": len(found),
        "layers_a_rule": LAYERS,
        "resident_mib": round(max(rank["samples"][-1]["resident"] for rank in found) / 2**20, 1),
        "growth_mib": round(max(growth) / 2**20, 3),
        "growth_bound_mib": MEMORY_BOUND / 2**20,
        "tensors_more": max(tensors),
        "drift": {rule: max(rank["drift"][rule] for rank in found) for rule in RULES},
        "drift_bound": DRIFT_BOUND,
        "spread": {rule: max(rank["spread"][rule] for rank in found) for rule in RULES},
        "disagreements": max(rank["disagreements"] for rank in found),
        "compared": len(found[0]["samples"]),
        "ranks_agreed": sum(s["ranks_agree"] for s in found[0]["samples"]),
        "seconds": round(max(rank["seconds"] for rank in found)),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
    }


def problems(found: dict[str, Any]) -> list[str]:
    """What of the figures breaks a promise, a line each."""
    lines = []
    if found["growth_mib"] > found["growth_bound_mib"]:
        lines.append(f"memory grew by {found['growth_mib']} MiB, more than {found['growth_bound_mib']}")
    if found["tensors_more"] > 0:
        lines.append(f"tensors more than after warm-up: {found['tensors_more']}")
    for rule, drift in found["drift"].items():
        if not drift < found["drift_bound"]:
            lines.append(f"{rule}: the mean of a layer's bias drifted to {drift:.2e}")
    if found["disagreements"]:  # which the Balancer itself found, and healed
        lines.append(f"ranks disagreed at {found['disagreements']} checks of the Balancer")
    if found["ranks_agreed"] != found["compared"]:
        lines.append(f"ranks disagreed {found['compared'] - found['ranks_agreed']} times of {found['compared']}")
    if found["applied"] != found["updates"]:
        lines.append(f"{found['applied']} of {found['updates']} updates were applied")
    lines += [f"{rule}: the bias never moved" for rule, spread in found["spread"].items() if not spread > 0]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Many updates of one Balancer over two ranks.")
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--plant", choices=PLANTS, default="")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from alflb_megatron.lab.records.files import write_json

    (found,) = run((arguments.updates, arguments.plant))
    if arguments.out:
        write_json(arguments.out, found)
    print(json.dumps(found, indent=2))
    for line in problems(found):
        print(line, file=sys.stderr)
    return 1 if problems(found) else 0


if __name__ == "__main__":
    sys.exit(main())
