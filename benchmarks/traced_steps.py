"""The collectives of a whole training step, as traced at any world size by one process, ours against Megatron-Core's.

The step is that of `alflb train`: the real GPTModel of Megatron-Core with its distributed optimizer, forward, backward,
finalize and update, on real process groups of torch's `fake` backend, which have any number of ranks and move nothing.
What arrives is what lay there, so no value means anything; shapes, groups and bytes are those of a cluster. It is the
step of one rank of a pipeline stage in the middle, and not of the first update, whose checks are seldom. Experts have a
capacity, for else Megatron-Core would take the sizes of its messages from values. Bytes are those of the tensors handed
to a collective. Sequences are short, and the widths of V3 reduced: the messages of the balancer depend on neither.
Repeat with

    python -m benchmarks.traced_steps     (two minutes)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MICRO_BATCHES, SEQUENCE = 4, 64
MODELS: dict[str, dict[str, Any]] = {
    "1B": {"preset": "deepseek-moe-1b"},
    "V3-shaped": {
        "preset": "tiny", "num_layers": 32, "num_dense_layers": 3, "num_experts": 256, "topk": 8, "num_groups": 8,
        "group_topk": 4,
    },
}  # fmt: skip
"""Shapes: DeepSeekMoE 1B as published, and as many experts in as many groups as DeepSeek-V3 in half its layers."""
CLUSTERS = (
    ("1B", 8, {"ep": 8}),
    ("1B", 64, {"tp": 2, "pp": 2, "ep": 8}),
    ("V3-shaped", 512, {"pp": 4, "ep": 32}),
    ("V3-shaped", 4096, {"tp": 2, "pp": 8, "ep": 64}),
)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "Megatron-Core's own": ("builtin", {}),
    "sign": ("sign", {}),
    "adaptive": ("adaptive", {}),
    "adaptive, once a micro-batch": ("adaptive", {"update_every": "micro-batch"}),
}


def step(model: Mapping[str, Any], world: int, sizes: Mapping[str, int], row: str) -> dict[str, Any]:
    """Traces the second step of a job in this process: collectives as [name, group's size, bytes], in their order."""
    pp = sizes.get("pp", 1)
    rank = world // pp * (pp // 2)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from alflb_megatron.lab.data import Batch
    from alflb_megatron.lab.training import build
    from alflb_megatron.lab.training.forward_backward import ForwardBackward
    from alflb_megatron.lab.training.resolve import resolve
    from benchmarks.traced import Trace

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    rule, balancer = ROWS[row]
    shape = {name: value for name, value in model.items() if name != "preset"} | {"seq_length": SEQUENCE}
    replicas = world // (sizes.get("tp", 1) * pp)
    job = {
        "preset": model["preset"], "rule": rule, "nproc": world, "micro_batch_size": 1, "optimizer": "distributed",
        "global_batch_size": replicas * MICRO_BATCHES, "dtype": "fp32", "save": False, **sizes,
    }  # fmt: skip
    plan = resolve(job, shape, balancer)
    _with_capacity(build)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.job.tp,
        pipeline_model_parallel_size=plan.job.pp,
        expert_model_parallel_size=plan.job.ep,
        expert_tensor_parallel_size=plan.job.etp,
        create_gloo_process_groups=False,
    )
    build.tell_micro_batches(plan.job)
    build.seed_ranks(1)
    setup = build.setup_model_and_optimizer(plan)
    for chunk in setup.chunks:
        chunk.ddp_config.check_for_nan_in_grad = False
        if rule == "builtin":  # `alflb train` watches its loads
            get_model_config(chunk).finalize_model_grads_func = finalize_model_grads
    forward_backward = ForwardBackward(plan, setup)
    tokens = torch.zeros(1, SEQUENCE, dtype=torch.long)
    batch = Batch(tokens, tokens, torch.arange(SEQUENCE)[None], torch.ones(1, SEQUENCE))
    group = dist.get_world_size(setup.balancer.group)

    def answer(place: str) -> int | None:
        """That ranks do not differ; all else is asked for."""
        return 0 if place == "within_batch.py _refuse_uneven" else None

    for _ in range(2):
        with Trace(answer=answer) as trace:
            for chunk in setup.chunks:
                chunk.zero_grad_buffer()
            setup.optimizer.zero_grad()
            forward_backward([batch] * MICRO_BATCHES, forward_only=False)
            setup.optimizer.step()
    return {
        "layers": len(setup.balancer.layers),
        "experts": plan.shape.num_experts,
        "group": group,
        "collectives": [list(found) for found in trace.collectives],
    }


def _with_capacity(build: Any) -> None:
    """Has models built whose messages' sizes no value decides, and an optimizer that needs no second backend."""
    plain, optimizer = build.transformer_config, build.get_megatron_optimizer
    fixed = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    build.transformer_config = lambda plan: dataclasses.replace(plain(plan), **fixed)
    build.get_megatron_optimizer = functools.partial(optimizer, use_gloo_process_groups=False)


def in_a_process(model: Mapping[str, Any], world: int, sizes: Mapping[str, int], row: str) -> dict[str, Any]:
    words = json.dumps({"model": model, "world": world, "sizes": sizes, "row": row})
    command = [sys.executable, "-m", "benchmarks.traced_steps", "--step", words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summed(found: Mapping[str, Any]) -> dict[str, list[int]]:
    """name -> how many, and their bytes."""
    count, size = Counter[str](), Counter[str]()
    for name, bytes_ in found["collectives"]:
        count[name] += 1
        size[name] += bytes_
    return {name: [count[name], size[name]] for name in sorted(count)}


def table(results: Mapping[str, Any]) -> str:
    lines = [
        "As traced, not run on a cluster: one step of a rank in the middle of the pipeline, "
        f"{results['micro_batches']} micro-batches of {results['sequence']} tokens.",
        "",
        "| model | ranks | split | its MoE layers | router | collectives | bytes | against Megatron-Core's own |",
        "|---|---:|---|---:|---|---:|---:|---|",
    ]
    for cluster in results["clusters"]:
        split = ", ".join(f"{name.upper()} {size}" for name, size in cluster["sizes"].items())
        base = [sum(column) for column in zip(*cluster["rows"]["Megatron-Core's own"]["summed"].values(), strict=True)]
        for row, found in cluster["rows"].items():
            count, size = (sum(column) for column in zip(*found["summed"].values(), strict=True))
            against = "" if row == "Megatron-Core's own" else f"{count - base[0]:+d}, {size - base[1]:+,} bytes"
            lines.append(
                f"| {cluster['model']} | {cluster['world']:,} | {split} | {found['layers']} | {row} | {count} | "
                f"{size:,} | {against} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    from alflb_megatron.lab.records.files import write_json
    from benchmarks import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/traced_steps[-VERSION].json")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.step:
        print(json.dumps(step(**json.loads(flags.step))))
        return
    clusters = []
    for model, world, sizes in CLUSTERS:
        rows = {}
        for row in ROWS:
            found = in_a_process(MODELS[model], world, sizes, row)
            rows[row] = {"layers": found["layers"], "summed": summed(found)}
            print(model, world, row, rows[row], file=sys.stderr, flush=True)
        clusters.append({"model": model, "world": world, "sizes": sizes, "rows": rows})
    results = {
        "machine": machine.describe(),
        "micro_batches": MICRO_BATCHES,
        "sequence": SEQUENCE,
        "clusters": clusters,
    }
    write_json(flags.out or machine.RESULTS / machine.versioned("traced_steps"), results)
    print(table(results))


if __name__ == "__main__":
    main()
