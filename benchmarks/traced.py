"""What a router launches and moves, counted from a trace: no GPU is needed, and none is measured.

The routers are those of `benchmarks.cost`. Every operation that reaches torch's dispatcher is counted, but those that
launch nothing (views, allocations); bytes are those of its tensors, read and written. torch runs one kernel, sometimes
two, for an operation. What Megatron-Core's `jit_fuser` compiles on a GPU is not compiled here: of the margins of a
sample, some twenty small operations, an H100 was left with about eight (docs/benchmarks.md, On a GPU). With the bytes
stands a roofline on paper for an H100: bytes over its bandwidth (3.35 TB/s, NVIDIA's data sheet of the H100 SXM) and
launches at LAUNCH_US each. Repeat with

    python -m benchmarks.traced     (a minute)
"""

from __future__ import annotations

import argparse
import dataclasses
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

EXPERTS, TOPK, TOKENS, HIDDEN = 64, 6, 16384, 2048
BANDWIDTH = 3.35e12
"""Bytes a second."""
LAUNCH_US = 3.8
"""Microseconds from a kernel to the next where the host is the bound (NVIDIA, "Getting Started with CUDA Graphs")."""
LAUNCHES_NOTHING = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "select", "slice", "split", "split_with_sizes", "unbind",
    "expand", "unsqueeze", "squeeze", "t", "transpose", "permute", "detach", "alias", "as_strided", "lift_fresh",
    "diagonal", "unfold", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_",
}  # fmt: skip
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2")
"""Operations whose result the host must have: on a device they wait for it."""
COPIES = ("_to_copy", "copy_")


class Trace(TorchDispatchMode):
    """Counts what is dispatched inside the block.

    operations: launches by name. bytes: read and written by them. collectives: (name, bytes) in their order.
    waits: places in `source` where the host asks for a value, or copies from a device or to it. With `answer` a value
    is what it says of the place, where it says anything: fake tensors have none.
    """

    def __init__(self, source: str = "alflb_megatron", answer: Callable[[str], int | None] | None = None) -> None:
        super().__init__()
        self.source, self.answer = f"{source}/", answer
        self.operations: Counter[str] = Counter()
        self.bytes = 0
        self.collectives: list[tuple[str, int]] = []
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        name = name.split(".")[0]
        if name in WAITS and any(isinstance(arg, Tensor) and arg.device.type != "cpu" for arg in args):
            self.waits[self._place()] += 1
        told = name == "_local_scalar_dense" and self.answer is not None
        if told and (value := self.answer(self._place())) is not None:  # type: ignore[misc]
            return value
        found = func(*args, **(kwargs or {}))
        if name in COPIES and not (kwargs or {}).get("non_blocking", False) and _between_devices(args, found):
            self.waits[self._place()] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        if space == "c10d":
            self.collectives.append(
                (name, sum(_bytes(tensor) for tensor in tree_leaves(args) if isinstance(tensor, Tensor)))
            )
        elif name not in LAUNCHES_NOTHING:
            self.operations[name] += 1
            self.bytes += sum(map(_bytes, tensors))
        return found

    def _place(self) -> str:
        """The innermost line of `source` on the stack: file and function."""
        for frame in reversed(traceback.extract_stack()):
            if self.source in frame.filename:
                return f"{frame.filename.rpartition(self.source)[2]} {frame.name}"
        return "elsewhere"

    @property
    def launches(self) -> int:
        return sum(self.operations.values())


def _between_devices(args: Sequence[Any], found: Any) -> bool:
    """Whether a copy comes from the host or goes there, for which torch waits unless it is told not to."""
    kinds = {leaf.device.type for leaf in (*args, found) if isinstance(leaf, Tensor)}
    return "cpu" in kinds and len(kinds) > 1


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def counted(work: Callable[[], Any]) -> dict[str, int]:
    with Trace() as trace:
        work()
    return {"launches": trace.launches, "bytes": trace.bytes}


def measure(experts: int = EXPERTS, topk: int = TOPK, tokens: int = TOKENS, hidden: int = HIDDEN) -> dict[str, Any]:
    """Launches and bytes of one router's forward and backward, and of one update of cost.LAYERS layers, by kind."""
    from benchmarks import cost, machine

    machine.be_one_rank()
    from megatron.core import num_microbatches_calculator as calculator

    from alflb_megatron.lab.training import build
    from alflb_megatron.lab.training.resolve import resolve

    plan = resolve({"rule": "none", "nproc": 1, "ep": 1}, {"num_experts": experts, "topk": topk}, {})
    config = dataclasses.replace(
        build.transformer_config(plan), hidden_size=hidden, moe_router_dtype="fp32", params_dtype=torch.bfloat16
    )
    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(0, None, 8 * cost.MICRO_BATCHES * cost.RANKS, 8, 1, False)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens // 8, 8, hidden, generator=generator).to(torch.bfloat16)
    upstream_TE = torch.randn(tokens, experts, generator=generator)
    rows = {}
    for name, kind in cost.kinds(config, "sigmoid").items():
        for _ in range(2):  # what is built or compared in the first update alone is not a step's
            kind.forward_backward(inputs, upstream_TE)
            kind.update()
        alone = cost.Kind(kind.routers[:1], kind.update)
        rows[name] = {"forward_backward": counted(partial(alone.forward_backward, inputs, upstream_TE))}
        kind.forward_backward(inputs, upstream_TE)
        rows[name]["update"] = counted(kind.update)
    torch.distributed.destroy_process_group()
    return {"experts": experts, "topk": topk, "tokens": tokens, "hidden": hidden, "layers": cost.LAYERS, "kinds": rows}


def microseconds(of: Mapping[str, int]) -> tuple[float, float]:
    """On paper: what the bytes take at the device's bandwidth, and what the launches take."""
    return 1e6 * of["bytes"] / BANDWIDTH, LAUNCH_US * of["launches"]


def table(results: Mapping[str, Any]) -> str:
    lines = [
        f"As traced, not run on a GPU: E = {results['experts']}, K = {results['topk']}, {results['tokens']:,} tokens a "
        f"micro-batch, hidden size {results['hidden']:,}, {results['layers']} layers in the update.",
        "",
        "| router | forward and backward: launches | megabytes | bytes, µs | launches, µs | "
        "update: launches | megabytes | launches, µs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results["kinds"].items():
        passes, update = row["forward_backward"], row["update"]
        by_bytes, by_launches = microseconds(passes)
        lines.append(
            f"| {name} | {passes['launches']} | {passes['bytes'] / 1e6:.1f} | {by_bytes:.0f} | {by_launches:.0f} | "
            f"{update['launches']} | {update['bytes'] / 1e6:.2f} | {microseconds(update)[1]:.0f} |"
        )
    base = results["kinds"]["megatron"]["forward_backward"]
    said = []
    for name, row in results["kinds"].items():
        if name != "megatron":
            more = row["forward_backward"]["launches"] - base["launches"]
            share = row["forward_backward"]["bytes"] / base["bytes"] - 1
            said.append(f"`{name}` {more:+d} launches, {share:+.1%} bytes")
    lines += ["", f"Against Megatron-Core's router, forward and backward: {'; '.join(said)}."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    from alflb_megatron.lab.records.files import write_json
    from benchmarks import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/traced[-VERSION].json")
    flags = parser.parse_args(arguments)
    results = {**measure(), "machine": machine.describe()}
    write_json(flags.out or machine.RESULTS / machine.versioned("traced"), results)
    print(table(results))


if __name__ == "__main__":
    main()
