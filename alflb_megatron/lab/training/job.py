"""One training job: every setting of `alflb train`, what the presets change in them, and the plan they come to.

`resolve.py` makes a plan of what was given, and checks it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alflb_megatron.config import ALFConfig
from alflb_megatron.models import PRESETS, PUBLISHED, ModelShape
from alflb_megatron.settings import knob

UNBALANCED = ("none", "builtin")
"""Values of `--rule` beside our own rules: no bias at all, and Megatron-Core's own expert bias."""


def _rules() -> list[str]:
    from alflb_megatron import rules

    return [*UNBALANCED, *rules.names()]


@dataclass(frozen=True)
class Job:
    """How a model is trained: data, schedule, split over ranks, what is written."""

    preset: str = knob("tiny", "model and schedule to start from", choices=tuple(PRESETS))
    rule: str = knob("adaptive", "none, builtin (Megatron-Core's own expert bias) or one of our rules", choices=_rules)
    steps: int = knob(300, "global batches to train on in all", minimum=1)
    global_batch_size: int = knob(16, "sequences in a global batch", minimum=1)
    micro_batch_size: int = knob(8, "sequences in one forward pass of one rank", minimum=1)
    lr: float = knob(1e-3, "peak learning rate", above=0.0)
    min_lr: float = knob(1e-4, "learning rate at the end of the cosine", minimum=0.0)
    lr_decay: str = knob("cosine", "how the learning rate falls", choices=("cosine", "linear", "constant", "multistep"))
    warmup_steps: int = knob(20, "steps of linear warm-up", minimum=0)
    weight_decay: float = knob(0.1, "weight decay of Adam", minimum=0.0)
    clip_grad: float = knob(1.0, "gradient norm above which gradients are scaled down; 0 for never", minimum=0.0)
    seed: int = knob(1234, "seed of weights and data order", minimum=0)
    aux_loss_coeff: float = knob(0.0, "coefficient of Megatron-Core's auxiliary load-balancing loss", minimum=0.0)
    aux_loss_type: str = knob("aux_loss", "its form", choices=("aux_loss", "seq_aux_loss", "global_aux_loss"))
    z_loss_coeff: float = knob(0.0, "coefficient of the router's z-loss", minimum=0.0)
    capacity_factor: float | None = knob(
        None, "expert capacity over the mean load; beyond it tokens are dropped", above=0.0
    )
    router_dtype: str = knob("fp32", "precision of the gate", choices=("fp32", "fp64", "model"))
    data: str = knob(
        "stdlib",
        "text to train on: stdlib, package:NAME, a file or folder, or the prefix of a Megatron .bin/.idx pair",
        metavar="SOURCE",
    )
    tokenizer: str = knob(
        "byte", "how it is cut into tokens (a .bin/.idx pair was cut already: name what cut it)", metavar="NAME"
    )
    validation_sequences: int = knob(
        64, "sequences the model is validated on, in whole global batches; at least one", minimum=1
    )
    eval_interval: int = knob(
        0,
        "steps between evaluations of the validation set, which metrics.jsonl holds; 0 for one at the end alone",
        minimum=0,
    )
    nproc: int = knob(2, "ranks to start on this machine", minimum=1)
    tp: int = knob(1, "tensor-parallel ranks (with sequence parallelism above 1)", minimum=1)
    pp: int = knob(1, "pipeline stages", minimum=1)
    vpp: int = knob(1, "model chunks a pipeline stage (interleaved schedule above 1)", minimum=1)
    ep: int = knob(2, "expert-parallel ranks", minimum=1)
    etp: int = knob(
        0, "tensor-parallel ranks inside an expert; 0 takes --tp where --ep is 1, and 1 elsewhere", minimum=0
    )
    dispatcher: str = knob("alltoall", "Megatron-Core's token dispatcher", choices=("alltoall", "allgather", "flex"))
    optimizer: str = knob("adam", "adam, or Megatron-Core's distributed optimizer", choices=("adam", "distributed"))
    overlap_grad_reduce: bool = knob(False, "reduce gradients while the backward pass runs")
    dtype: str = knob(
        "fp32",
        "precision of weights and activations; fp16 comes with Megatron-Core's dynamic loss scale",
        choices=("fp32", "bf16", "fp16"),
    )
    recompute: str = knob(
        "none", "activations to recompute: none, all, or those of MoE layers", choices=("none", "full", "moe")
    )
    router_fusion: bool = knob(False, "Transformer Engine's fused router")
    grouped_gemm: bool = knob(False, "experts as one grouped matrix product (needs Transformer Engine)")
    out: str = knob("", "run folder; default runs/PRESET-RULE-SEED", metavar="DIR")
    resume: bool = knob(False, "go on from the last checkpoint in the run folder")
    requeue: bool = knob(
        False, "go on from the last checkpoint if there is one, else begin: for schedulers that start a job again"
    )
    load: str = knob("", "start from this checkpoint folder of another run", metavar="DIR")
    bias: str = knob(
        "",
        "start from the expert biases of this run, .safetensors file or Hugging Face folder; the rule starts anew",
        metavar="SOURCE",
    )
    warm_start: int = knob(
        0, "global batches to calibrate the biases on, forward only, before a run's first step; 0 for none", minimum=0
    )
    save_every: int = knob(0, "steps between checkpoints; 0 for one at the end", minimum=0)
    save: bool = knob(True, "write checkpoints at all")
    record_scores: int = knob(
        0, "write the router scores of the first n global batches of this start, for `alflb replay`", minimum=0
    )
    certify: int = knob(
        0,
        "steps between certificates of every MoE layer (distance to the best bias, curvature, step sizes: "
        "docs/theory.md) in metrics.jsonl, and regret over the run in summary.json; 0 for none",
        minimum=0,
    )
    json: bool = knob(False, "print the summary as JSON on standard output")

    @property
    def model_parallel(self) -> int:
        return self.tp * self.pp

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.nproc // self.model_parallel

    @property
    def folder(self) -> str:
        return self.out or f"runs/{self.preset}-{self.rule}-{self.seed}"


SCHEDULES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"warmup_steps": 50, "steps": 500},
    "deepseek-moe-1b": {
        **dataclasses.asdict(PUBLISHED["deepseek-moe-1b"]),
        "micro_batch_size": 4,
        "dtype": "bf16",
        "optimizer": "distributed",
        "save_every": 1000,
    },
    "deepseek-moe-3b": {
        **dataclasses.asdict(PUBLISHED["deepseek-moe-3b"]),
        "micro_batch_size": 4,
        "lr_decay": "multistep",
        "dtype": "bf16",
        "optimizer": "distributed",
        "save_every": 1000,
    },
}
"""What a preset changes in `Job`."""


@dataclass(frozen=True)
class Plan:
    """A job that can run: its settings, the model's shape, and how the bias moves (None for `none` and `builtin`)."""

    job: Job
    shape: ModelShape
    alf: ALFConfig | None
    builtin_rate: float | None

    @property
    def score_unit(self) -> str:
        """Where the bias is added; Megatron-Core adds its own to the scores."""
        return "score" if self.alf is None else self.alf.score_unit

    def as_dict(self) -> dict[str, Any]:
        """Every resolved setting, for `config.json`."""
        return {
            "job": dataclasses.asdict(self.job),
            "model": dataclasses.asdict(self.shape),
            "alflb": None if self.alf is None else dataclasses.asdict(self.alf),
            "builtin_rate": self.builtin_rate,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Plan:
        """The plan that `as_dict` wrote; TypeError, KeyError, AttributeError or SettingError where it wrote none."""
        return Plan(
            Job(**values["job"]),
            ModelShape(**values["model"]),
            None if values["alflb"] is None else ALFConfig(**values["alflb"]),
            values["builtin_rate"],
        )
