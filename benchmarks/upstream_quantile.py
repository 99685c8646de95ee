"""Megatron-Core's own quantile balancing, as it is, beside ours on the recorded streams. Needs megatron-core 0.19.

Each layer is a real `TopKRouter` with `moe_router_load_balancing_type="quantile_balancing"`, in training mode, that is
fed the logits behind the recorded scores and updated by Megatron-Core's own end-of-batch function. It biases logits, so
its choices are compared by loads and by the scores they keep. Logits of a softmax gate are known up to a constant a
token, which changes no choice. Repeat, in the environment of `make test-latest`, with

    .venv-latest/bin/python -m benchmarks.upstream_quantile        (after `python -m benchmarks.balance`)
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alflb_megatron import rules
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.replay.recording import Recording
from alflb_megatron.lab.replay.replay import replay
from alflb_megatron.lab.replay.scores import open_scores
from benchmarks import machine
from benchmarks.balance import RECORDED, SEED, record


class Upstream:
    """Routers of Megatron-Core with its quantile balancing, one a layer."""

    def __init__(self, recording: Recording) -> None:
        import megatron.core.distributed  # noqa: F401  (loads the module below, whose name there is a function)
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
        from megatron.core.transformer.moe.router import TopKRouter

        from alflb_megatron.lab.training import build
        from alflb_megatron.lab.training.resolve import resolve

        self.finalize: Any = sys.modules["megatron.core.distributed.finalize_model_grads"]
        self.gate, self.topk = recording.gating.score_function, recording.topk
        shape = {"num_experts": recording.experts, "topk": self.topk}
        plan = resolve({"rule": "none", "nproc": 1, "ep": 1}, shape, {})
        self.config = dataclasses.replace(
            build.transformer_config(plan),
            moe_router_score_function=self.gate,
            moe_router_load_balancing_type="quantile_balancing",
            moe_aux_loss_coeff=0.0,
        )
        groups = get_default_pg_collection()
        self.routers: list[Any] = [TopKRouter(config=self.config, pg_collection=groups) for _ in recording.layers]
        self.model = torch.nn.ModuleList(self.routers)
        self.seconds: list[float] = []

    def step(self, scores_LTE: Tensor) -> tuple[Tensor, list[float]]:
        loads, affinity = [], []
        logits_LTE = torch.logit(scores_LTE, eps=1e-7) if self.gate == "sigmoid" else scores_LTE.clamp(min=1e-30).log()
        began = time.perf_counter()
        for router, logits_TE, scores_TE in zip(self.routers, logits_LTE, scores_LTE, strict=True):
            _, map_TE = router.routing(logits_TE[:, None, :])
            loads.append(map_TE.sum(dim=0))
            affinity.append(float(scores_TE[map_TE].sum(dtype=torch.float64)))
        self.finalize._update_router_qb_beta([self.model], self.config)
        self.finalize.reset_model_temporary_tensors(self.config, [self.model])
        self.seconds.append((time.perf_counter() - began) / len(loads))  # its routing too: it solves while it routes
        return torch.stack(loads), affinity


def table(results: dict[str, Any]) -> str:
    labels = list(results["rows"][0]["rules"])
    lines = ["| stream | " + " | ".join(labels) + " |", "|---|" + "---|" * len(labels)]
    for row in results["rows"]:
        cells = []
        for label in labels:
            figures = row["rules"][label]
            cells.append(f"{figures['mean_over_floor']:.2f}, tail {figures['tail_over_floor']:.2f}")
        lines.append(f"| {row['stream']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/balance"))
    arguments = parser.parse_args()
    recorded = [open_scores(record(name, arguments.runs, SEED)) for name in RECORDED]
    machine.be_one_rank()
    rows = []
    for name, recording in zip(RECORDED, recorded, strict=True):
        players: dict[str, Any] = {"Megatron-Core quantile_balancing": Upstream(recording)}
        players |= {rule: rules.make(rule) for rule in ("quantile", "adaptive")}
        found = replay(recording, players, hindsight=False)
        keys = ("mean_over_floor", "tail_over_floor", "worst_over_floor", "steps_to_2x_floor", "affinity_kept")
        figures = {label: {key: row[key] for key in keys} for label, row in found["rules"].items()}
        rows.append({"stream": name, "floor": found["floor"], "rules": figures})
    torch.distributed.destroy_process_group()
    results = {"machine": machine.describe(), "rows": rows}
    write_json(machine.RESULTS / "upstream_quantile.json", results)
    print(table(results))


if __name__ == "__main__":
    main()
