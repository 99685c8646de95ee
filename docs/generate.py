"""Writes the reference pages that the code itself states: `make docs`, or `python docs/generate.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from alflb_megatron import rules
from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.hosts import cpu
from alflb_megatron.hosts.cpu import trainers
from alflb_megatron.lab.data.prepare import Preparation
from alflb_megatron.lab.sweep import collect, figures, plan_file, tables
from alflb_megatron.lab.training.job import Job
from alflb_megatron.models import ModelShape
from alflb_megatron.settings import markdown_table

HERE = Path(__file__).parent


def settings() -> str:
    """Every flag, from the dataclasses that hold them."""
    knobs = "\n\n".join(
        f"`{name}` ({rules.get(name).__module__}):\n\n{markdown_table(rules.get(name))}" for name in rules.names()
    )
    return f"""# Settings

Written by `make docs` from the dataclasses; do not edit.

## How the expert bias moves: `ALFConfig`

In Python `ALFConfig()` or `ALFConfig(rule="sign", step_size=1e-3)`, `alflb_megatron.enable(rule="sign", ...)`; on the
command line of `alflb train` the flags below (`--rule` there takes the place of `--alflb-rule`).

{markdown_table(ALFConfig, PREFIX)}

### Knobs of the rules

`step_size` is set by `--alflb-step-size`, the others by `--alflb-rule-options name=value,...`.

{knobs}

## The model: `alflb train`

The defaults are those of the preset `tiny`; `--preset` changes them, a flag given beside it wins.

{markdown_table(ModelShape)}

## The job: `alflb train`

{markdown_table(Job)}

## Training data: `alflb data prepare SOURCE`

{markdown_table(Preparation)}
"""


def without_cuda() -> str:
    """What `hosts/cpu` does, from its own tables."""
    switches = "\n".join(f"| `{name}` | `{value}` |" for name, value in cpu.SWITCHES.items())
    return f"""# Megatron-Core without CUDA

Written by `make docs` from `alflb_megatron/hosts/cpu/`; do not edit.

Megatron-Core's own switches come first. Environment: {", ".join(f"`{k}={v}`" for k, v in cpu.ENVIRONMENT.items())}.
`TransformerConfig`:

| field | value |
|---|---|
{switches}

What no switch reaches is substituted. No entry has an effect where CUDA is there, but for
{" and ".join(f"`{s.name}`" for s in cpu.SUBSTITUTIONS if s.with_cuda)}, which stand in for Transformer Engine and
are put in place without it on a GPU too. A test leaves each one out and shows the failure upstream.

{cpu.markdown_table()}

## The trainers above it

Megatron-LM, Megatron-Bridge and NeMo 2 need more; `python -m alflb_megatron.hosts.cpu SCRIPT`,
`alflb_megatron.hosts.bridge` and `alflb_megatron.hosts.nemo` put it in place. An `nvidia-resiliency-ext` below 0.6 is
hidden from Megatron-Core, which from 0.17 on stops at it instead of doing without.

All of them:

{cpu.markdown_table(trainers.COMMON, "the host")}

Megatron-LM:

{cpu.markdown_table(trainers.MEGATRON_LM, "the host")}

Megatron-Bridge:

{cpu.markdown_table(trainers.BRIDGE, "the host")}

NeMo 2:

{cpu.markdown_table(trainers.NEMO, "the host")}
"""


def watching() -> str:
    """The page as it is, its table of keys from `hosts.log`."""
    cpu.prepare()  # before Megatron-Core is imported
    from alflb_megatron.hosts import log

    rows = ["| key | | meaning |", "|---|---|---|"]
    rows += [f"| `{k}` | {'line' if k in log.LOG_LINE_KEYS else ''} | {text} |" for k, text in log.DESCRIPTIONS.items()]
    text = (HERE / "watching.md").read_text(encoding="utf-8")
    between = "<!-- keys -->\n" + "\n".join(rows) + "\n<!-- /keys -->"
    return re.sub(r"<!-- keys -->.*<!-- /keys -->", lambda _: between, text, flags=re.S)


def reliability() -> str:
    """The page as it is, its figures from docs/results/*.json."""
    text = (HERE / "reliability.md").read_text(encoding="utf-8")
    between = f"<!-- figures -->\n\n{reliability_figures(HERE / 'results')}\n\n<!-- /figures -->"
    return re.sub(r"<!-- figures -->.*<!-- /figures -->", lambda _: between, text, flags=re.S)


def reliability_figures(results: Path) -> str:
    """What was tried and what came of it, in tables; a line for what was not measured."""
    found = {
        name: json.loads(path.read_text(encoding="utf-8")) if (path := results / f"{name}.json").exists() else None
        for name in ("faults", "fuzz", "long_run")
    }
    faults, fuzz, long_run = found["faults"], found["fuzz"], found["long_run"]
    lines = ["| what | tried | survived | lost |", "|---|---:|---:|---:|"]
    if faults:
        lines.append(f"| **SIGKILL of a rank, then restart** | {_counts(faults, '**')} |")
        for title in ("by_moment", "by_variant"):
            lines.append(f"| *{title.replace('_', ' ')}* | | | |")
            lines += [f"| {name} | {_counts(counts)} |" for name, counts in faults[title].items()]
    if fuzz:
        lines.append(f"| **damaged input, read or refused in one line** | {_counts(_of_fuzz(fuzz), '**')} |")
        lines += [f"| {name} | {_counts(_of_fuzz(counts))} |" for name, counts in fuzz["kinds"].items()]
    if long_run:
        drift = ", ".join(f"`{rule}` {value:.1e}" for rule, value in long_run["drift"].items())
        lines += [
            "",
            "| updates of one Balancer at two ranks | found | allowed |",
            "|---|---:|---:|",
            f"| updates applied in {long_run['seconds'] / 60:.0f} minutes | {long_run['applied']:,} "
            f"| {long_run['updates']:,} |",
            f"| growth of resident memory after warm-up, MiB of {long_run['resident_mib']} | {long_run['growth_mib']} "
            f"| {long_run['growth_bound_mib']} |",
            f"| tensors alive, more than after warm-up | {long_run['tensors_more']} | 0 |",
            f"| drift of the zero sum: {drift} | {max(long_run['drift'].values()):.1e} "
            f"| {long_run['drift_bound']:.0e} |",
            f"| checks of the Balancer that found ranks apart | {long_run['disagreements']} | 0 |",
            f"| comparisons of the ranks, differing | {long_run['compared'] - long_run['ranks_agreed']} of "
            f"{long_run['compared']} | 0 |",
        ]
    lines += [
        f"\nNot measured: `docs/results/{name}.json` is not there." for name, values in found.items() if not values
    ]
    if faults:
        lines.append(
            f"\nFaults: {faults['runs']} runs of {faults['steps_a_run']} steps, seed {faults['seed']}; "
            f"{faults['half_written_checkpoints_left']} half-written checkpoints were left behind, none was taken for "
            f"whole; {faults['seconds'] / 60:.0f} minutes; torch {faults['versions']['torch']}, megatron-core "
            f"{faults['versions']['megatron-core']}."
        )
    return "\n".join(lines)


def _of_fuzz(counts: dict[str, Any]) -> dict[str, int]:
    well = sum(counts["outcomes"].get(outcome, 0) for outcome in ("success", "refused"))
    return {"tried": counts["cases"], "survived": well, "lost": counts["cases"] - well}


def _counts(counts: dict[str, int], mark: str = "") -> str:
    return " | ".join(f"{mark}{counts[key]:,}{mark}" for key in ("tried", "survived", "lost"))


SWEEPS = {"wang2024": "mini", "han_zhong": "mini", "beyond": "mini", "settled": "settled"}
"""Plans and their scales."""


def sweep_rows(name: str) -> list[dict[str, Any]]:
    return collect.read_csv(HERE / "results" / f"{name}-{SWEEPS[name]}.csv")


def results() -> str:
    """The page as it is, its tables from docs/results/*.csv and the figures that `draw_results` draws."""
    text = (HERE / "results.md").read_text(encoding="utf-8")
    for name, scale in SWEEPS.items():
        rows = sweep_rows(name)
        sweep = collect.part(plan_file.read_plan(plan_file.find_plan(name), scale), [row["run"] for row in rows])
        block = tables.sweep_page(sweep, rows, figures.figure_files(name, rows), folder="results/")
        between = f"<!-- {name} -->\n\n{block}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*<!-- /{name} -->", lambda _, new=between: new, text, flags=re.S)
    return text


def draw_results() -> None:
    """Every figure of docs/results.md."""
    for name in SWEEPS:
        figures.draw_figures(name, sweep_rows(name), HERE / "results")


PAGES = {
    "settings.md": settings,
    "without-cuda.md": without_cuda,
    "reliability.md": reliability,
    "watching.md": watching,
    "results.md": results,
}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
    draw_results()
