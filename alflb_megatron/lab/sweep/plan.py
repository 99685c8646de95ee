"""A sweep as code: its runs, each a plan of `alflb train`, what was published of them, and what it costs.

`plan_file.py` reads it from a YAML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alflb_megatron.lab.sweep.flops import gpu_hours
from alflb_megatron.lab.training.job import Plan
from alflb_megatron.settings import knobs

FULL = "full"
FIGURES = ("perplexity", "maxvio_global")
"""What a plan can give as published."""


@dataclass(frozen=True)
class Run:
    """One training of a sweep."""

    group: str
    """Its name without the seed."""
    label: str
    """What tells it from runs of the same model, gate, rule and step size; mostly empty."""
    u: float | None
    """As the plan names it; the run's own may be a multiple of it."""
    plan: Plan
    settings: Mapping[str, Any]
    """Every setting that is not a preset's, by the name of its flag without dashes."""

    @property
    def name(self) -> str:
        return f"{self.group}.s{self.plan.job.seed}"

    @property
    def tokens(self) -> int:
        return self.plan.job.steps * self.plan.job.global_batch_size * self.plan.shape.seq_length

    def flags(self, out: Path, resume: bool, launched: bool = False) -> list[str]:
        """What follows `alflb train`; without the number of ranks where a launcher gives it.

        torchrun would take `--nproc` for one of its own flags, cut short, wherever it stands.
        """
        words = []
        for name, value in {**self.settings, "out": str(out)}.items():
            if launched and name == "nproc":
                continue
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, str(value)]
        return [*words, *(["--resume"] if resume else [])]


@dataclass(frozen=True)
class Sweep:
    """A plan at one scale."""

    name: str
    scale: str
    about: str
    scale_about: str
    runs: tuple[Run, ...]
    published: Mapping[str, Mapping[str, float]]
    source: str
    compare: tuple[tuple[str, str], ...]
    utilisation: float
    full: Mapping[str, Plan]
    """By group: the same run at full size."""
    executor: Mapping[str, Any] = field(default_factory=dict)
    planned: int = 0
    """Runs of the whole plan, where `runs` are those that have finished."""

    def hours(self) -> float:
        """GPU-hours of all runs on H100s, by FLOPs and the stated utilisation."""
        return sum(map(self.hours_of, self.runs))

    def hours_of(self, run: Run) -> float:
        """Of one of its runs."""
        return gpu_hours(run.plan.shape, run.tokens, self.utilisation)

    def changes(self) -> dict[str, dict[str, tuple[Any, Any]]]:
        """For each model, what the scale changed: setting -> (full size, here)."""
        found: dict[str, dict[str, tuple[Any, Any]]] = {}
        for run in self.runs:
            preset = run.plan.job.preset
            if preset in found:
                continue
            full = self.full[run.group]
            changed: dict[str, tuple[Any, Any]] = {}
            for before, after in ((full.shape, run.plan.shape), (full.job, run.plan.job)):
                for one, *_ in knobs(type(before)):
                    values = getattr(before, one.name), getattr(after, one.name)
                    if values[0] != values[1] and one.name not in _SAME_TRAINING:
                        changed[one.name] = values
            found[preset] = changed
        return found


_SAME_TRAINING = {
    "seed", "nproc", "ep", "etp", "tp", "pp", "vpp", "micro_batch_size", "save_every", "certify", "eval_interval",
    "router_fusion", "grouped_gemm", "overlap_grad_reduce",
}  # fmt: skip
"""Settings that change where and how a model is trained, not what comes of it."""


def same_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs' `Plan.as_dict()` differ, but for where they are and how they were started."""
    different = []
    for part in ("job", "model", "alflb", "builtin_rate"):
        a, b = one.get(part), other.get(part)
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            different += [part] if a != b else []
            continue
        different += [
            f"{name} {a.get(name)!r} for {b.get(name)!r}"
            for name in sorted(a.keys() | b.keys())
            if a.get(name) != b.get(name) and not (part == "job" and name in _PLACE)
        ]
    return different


_PLACE = {"out", "resume", "requeue", "json", "load"}
