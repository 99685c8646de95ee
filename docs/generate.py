"""Writes the reference pages that the code itself states: `make docs`, or `python docs/generate.py`."""

from __future__ import annotations

from pathlib import Path

from alflb_megatron import rules
from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.hosts import cpu
from alflb_megatron.hosts.cpu import trainers
from alflb_megatron.models import ModelShape
from alflb_megatron.runs.job import Job
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

What no switch reaches is substituted. Each entry has no effect where CUDA is there; a test leaves each one out and
shows the failure upstream.

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


PAGES = {"settings.md": settings, "without-cuda.md": without_cuda}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
