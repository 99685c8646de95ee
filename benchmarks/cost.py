"""What a rule costs: forward and backward of the routers and one update, against Megatron-Core's own TopKRouter.

LAYERS routers of the same shapes are built of each kind in one process with the same weights: Megatron-Core's with its
own expert bias (with the softmax gate, where it refuses a bias, its plain router, which has no update to do at all) and
ours with each rule; on megatron-core 0.19 also its quantile balancing, on logits as it has it. One round runs every
kind once on the same input: forward and backward of all its routers, then its update of all of them. Rounds are
interleaved, each ratio is taken inside a round, and the median over the rounds is reported. A global batch has
MICRO_BATCHES of these on each of RANKS ranks: each bears its share of the update, and margins are measured on the
sample that such a batch has (`margins.sample_stride`). A global batch of one micro-batch on one rank, given beside, is
the dearest: hardly any token is left out of its sample.
Megatron-Core's update calls an all-reduce on its one rank too, ours does not; the ratio of forward and backward alone
is given in brackets.

On a GPU the milliseconds are the host's, which waits for the device at the end of each part: what is launched counts
there more than what it computes. So what each kind launches, and for how long the device is busy with it, is taken
from torch.profiler over one round. With the sigmoid gate Transformer Engine's fused router is compared as well, where
it is installed, again with Megatron-Core's. Repeat with

    python -m benchmarks.cost            (about ten minutes on one thread; --quick for a look)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from alflb_megatron import rules

LAYERS = 4
MICRO_BATCHES, RANKS = 32, 8
HIDDEN = 1024
TOPK = {16: 2, 64: 6, 256: 8}
OURS = ("sign", "sqrt", "quantile", "adaptive")
FUSED = ", fused"
"""What the names of kinds with Transformer Engine's fused router end with."""
COUNTS_ALONE = 1.0
"""Ratio to reach for rules that need counts alone."""
WITH_MARGINS = 1.03
"""Ratio to reach for rules that need margins."""


class Kind:
    """LAYERS routers of one kind and the update that moves their biases."""

    def __init__(self, routers: Iterable[Any], update: Callable[[], Any]) -> None:
        self.routers, self.update = list(routers), update

    def forward_backward(self, hidden: torch.Tensor, upstream_TE: torch.Tensor) -> None:
        for router in self.routers:
            probs, _ = router(hidden)
            probs.backward(upstream_TE)

    def round(self, hidden: torch.Tensor, upstream_TE: torch.Tensor) -> tuple[float, float]:
        """Seconds of forward and backward through all routers, and of the update."""
        began = time.perf_counter()
        self.forward_backward(hidden, upstream_TE)
        _synchronise()
        between = time.perf_counter()
        self.update()
        _synchronise()
        return between - began, time.perf_counter() - between


def on_the_device(work: Callable[[], Any]) -> dict[str, float]:
    """What `work` launches on the device, copies and fills included, and for how many milliseconds that is busy."""
    _synchronise()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        _synchronise()
    spans = [
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return {"launches": len(spans), "busy_ms": sum(spans) / 1e3}


def _number(routers: Iterable[Any]) -> None:
    for layer, router in enumerate(routers, start=1):
        router.set_layer_number(layer)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _name(kind: str, fused: bool) -> str:
    return f"{kind}{FUSED}" if fused else kind


def kinds(config: Any, gate: str) -> dict[str, Kind]:
    """The kinds to compare, `megatron` first; all with the same weights."""
    import megatron.core.distributed  # noqa: F401  (loads the module below, whose name there is a function)
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    from alflb_megatron.balancer import Balancer
    from alflb_megatron.config import ALFConfig
    from alflb_megatron.hosts.core import RouterBuilder
    from alflb_megatron.lab.training import build

    finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]
    groups = get_default_pg_collection()
    kinds: dict[str, Kind] = {}

    def theirs(**changes: Any) -> tuple[torch.nn.ModuleList, Any]:
        changed = dataclasses.replace(config, **changes)
        model = torch.nn.ModuleList([TopKRouter(config=changed, pg_collection=groups) for _ in range(LAYERS)])
        _number(model)
        return model, changed

    fusions = [False, True] if gate == "sigmoid" and build.have_transformer_engine() else [False]
    for fused in fusions:
        model, changed = theirs(moe_router_enable_expert_bias=gate == "sigmoid", moe_router_fusion=fused)

        def update(model: Any = model, changed: Any = changed) -> None:
            if gate == "sigmoid":
                finalize._update_router_expert_bias([model], changed)
            finalize.reset_model_temporary_tensors(changed, [model])

        kinds[_name("megatron", fused)] = Kind(model, update)
    if hasattr(finalize, "_update_router_qb_beta"):
        model, changed = theirs(moe_router_load_balancing_type="quantile_balancing", moe_aux_loss_coeff=0.0)

        def update_qb(model: Any = model, changed: Any = changed) -> None:
            finalize._update_router_qb_beta([model], changed)
            finalize.reset_model_temporary_tensors(changed, [model])

        kinds["megatron quantile_balancing"] = Kind(model, update_qb)
    for rule, fused in itertools.product(OURS, fusions):
        builder = RouterBuilder(ALFConfig(rule=rule))
        changed = dataclasses.replace(config, moe_router_fusion=fused)
        routers = [builder(config=changed, pg_collection=groups) for _ in range(LAYERS)]
        _number(routers)
        balancer = Balancer(routers, range(1, LAYERS + 1), routers[0].tp_dp_cp_group)

        def commit(balancer: Balancer = balancer) -> None:
            balancer.launch()
            balancer.commit()

        kinds[_name(rule, fused)] = Kind(routers, commit)
    device = torch.cuda.current_device()
    for kind in kinds.values():
        kind.routers = [router.to(device) for router in kind.routers]
        for router, source in zip(kind.routers, kinds["megatron"].routers, strict=True):
            router.weight.data.copy_(source.weight.data)
    return kinds


def measure(experts: int, tokens: int, gate: str, micro_batches: int, ranks: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds and ratios of every kind for one shape."""
    from megatron.core import num_microbatches_calculator as calculator

    from alflb_megatron.lab.training import build
    from alflb_megatron.lab.training.resolve import resolve

    plan = resolve({"rule": "none", "nproc": 1, "ep": 1}, {"num_experts": experts, "topk": TOPK[experts]}, {})
    config = dataclasses.replace(
        build.transformer_config(plan),
        hidden_size=HIDDEN,
        moe_router_score_function=gate,
        moe_router_dtype="fp32",
        params_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(0, None, 8 * micro_batches * ranks, 8, 1, False)  # all on this one
    compared = kinds(config, gate)
    device = next(compared["megatron"].routers[0].parameters()).device
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens // 8, 8, HIDDEN, generator=generator).to(device, config.params_dtype)
    upstream_TE = torch.randn(tokens, experts, generator=generator).to(device)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    names = list(compared)
    for number in range(rounds + 2):
        for name in names[number % len(names) :] + names[: number % len(names)]:  # no kind always runs after another
            sample = compared[name].round(hidden, upstream_TE)
            if number >= 2:
                samples[name].append(sample)
    rows: dict[str, dict[str, Any]] = {}
    for name, pairs in samples.items():
        base = samples[_name("megatron", name.endswith(FUSED))]
        rows[name] = {
            "forward_backward_ms": 1e3 * statistics.median(pair[0] for pair in pairs) / LAYERS,
            "update_ms": 1e3 * statistics.median(pair[1] for pair in pairs) / LAYERS,
            "ratio": statistics.median(
                (passes + update / micro_batches) / (their_passes + their_update / micro_batches)
                for (passes, update), (their_passes, their_update) in zip(pairs, base, strict=True)
            ),
            "ratio_without_update": statistics.median(pair[0] / of[0] for pair, of in zip(pairs, base, strict=True)),
        }
        if device.type == "cuda":
            passes = functools.partial(compared[name].forward_backward, hidden, upstream_TE)
            rows[name] |= {"forward_backward": on_the_device(passes), "update": on_the_device(compared[name].update)}
    batch = {"micro_batches": micro_batches, "ranks": ranks}
    shape = {"experts": experts, "topk": TOPK[experts], "tokens": tokens, "gate": gate}
    return {**shape, **batch, "rounds": rounds, "kinds": rows}


def verdicts(rows: list[dict[str, Any]]) -> str:
    """Whether each rule's ratio is what it should reach with several micro-batches a global batch, and where not."""
    lines = []
    rows = [row for row in rows if row.get("micro_batches", 1) > 1] or rows
    for rule in OURS:
        limit = COUNTS_ALONE if rules.make(rule).threshold is None else WITH_MARGINS
        over = [row for row in rows if round(row["kinds"][rule]["ratio"], 2) > limit]
        where = "; ".join(f"{row['gate']}, E={row['experts']}, T={row['tokens']}" for row in over)
        lines.append(
            f"- `{rule}` at most {limit:.2f}: holds on {len(rows) - len(over)} of {len(rows)} shapes"
            + (f", not on {where}." if over else ".")
        )
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """Ratios, in brackets those of forward and backward alone, one row a shape; and what should be reached."""
    kinds = [kind for kind in results["rows"][0]["kinds"] if kind != "megatron"]
    lines = [
        "| gate | E | K | T | micro-batches x ranks | megatron, ms | " + " | ".join(kinds) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(kinds),
    ]
    for row in results["rows"]:
        own = row["kinds"]["megatron"]
        cells = [
            f"{row['kinds'][kind]['ratio']:.2f} ({row['kinds'][kind]['ratio_without_update']:.2f})"
            if kind in row["kinds"]
            else "-"
            for kind in kinds
        ]
        milliseconds = own["forward_backward_ms"] + own["update_ms"] / row.get("micro_batches", 1)
        lines.append(
            f"| {row['gate']} | {row['experts']} | {row['topk']} | {row['tokens']} | "
            f"{row.get('micro_batches', 1)} x {row.get('ranks', 1)} | "
            f"{milliseconds:.1f} | " + " | ".join(cells) + " |"
        )
    return "\n".join([*lines, "", verdicts(results["rows"])])


def run(quick: bool, rounds: int) -> dict[str, Any]:
    from benchmarks import machine

    machine.be_one_rank()
    batches = ((MICRO_BATCHES, RANKS), (1, 1))
    shapes = list(itertools.product(batches, ("sigmoid", "softmax"), TOPK, (4096, 16384)))
    if quick:
        shapes = [shape for shape in shapes if shape[-1] == 4096 and shape[-2] > 16 and shape[0] != (1, 1)]
    rows = []
    for batch, gate, experts, tokens in shapes:
        rows.append(measure(experts, tokens, gate, *batch, rounds=rounds))
        gc.collect()
        print(
            {kind: round(found["ratio"], 2) for kind, found in rows[-1]["kinds"].items()}, file=sys.stderr, flush=True
        )
    torch.distributed.destroy_process_group()
    return {"machine": machine.describe(), "layers": LAYERS, "hidden": HIDDEN, "rows": rows}


def main() -> None:
    from alflb_megatron.lab.records.files import write_json
    from benchmarks import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four shapes of 24")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cost[-VERSION].json")
    arguments = parser.parse_args()
    results = run(arguments.quick, arguments.rounds)
    out = arguments.out or machine.RESULTS / machine.versioned("cost")
    write_json(out, results)
    print(table(results))


if __name__ == "__main__":
    main()
