"""`alflb doctor`: what of the hosts is installed, whether it was tested, which path each feature takes, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alflb_megatron.lab.display.text_table import aligned


@dataclass(frozen=True)
class Part:
    """A package that may be there: its distributions, the versions that our tests run with, and what it is for."""

    name: str
    distributions: tuple[str, ...]
    tested: tuple[str, ...]
    purpose: str


PARTS: tuple[Part, ...] = (
    Part("torch", ("torch",), ("2.13.0",), "everything"),
    Part("Megatron-Core", ("megatron-core",), ("0.16.1", "0.19.2"), "everything but replay and theory"),
    Part("Transformer Engine", ("transformer-engine", "transformer_engine_torch"), (), "fused layers and router"),
    Part("apex", ("apex",), (), "fused Adam and norms where Transformer Engine is missing"),
    Part("DeepEP", ("deep_ep",), (), "the flex token dispatcher"),
    Part("Megatron-Bridge", ("megatron-bridge",), ("0.3.1", "0.6.2"), "recipes/bridge.py"),
    Part("NeMo", ("nemo-toolkit",), ("2.7.3",), "recipes/nemo.py"),
    Part("NeMo-Run", ("nemo-run",), ("0.11.1",), "recipes/launch.py"),
    Part("nvidia-resiliency-ext", ("nvidia-resiliency-ext",), ("0.4.1",), "checkpoints of Bridge and NeMo"),
    Part("transformers", ("transformers",), (), "Hugging Face models and tokenizers"),
)


@dataclass(frozen=True)
class Finding:
    """A feature, the path that it takes here, and what to do for another one; `broken` where it cannot work."""

    feature: str
    path: str
    advice: str = ""
    broken: bool = False


@dataclass(frozen=True)
class Machine:
    """What the findings depend on: versions by part (absent where not installed), GPUs and the NCCL of this torch."""

    python: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    nccl: str

    def has(self, *parts: str) -> bool:
        return all(part in self.versions for part in parts)

    def below(self, part: str, *release: int) -> bool:
        """Whether `part` is installed in a version below `release`."""
        numbers = tuple(int(text) for text in re.findall(r"\d+", self.versions.get(part, ""))[: len(release)])
        return bool(numbers) and numbers < release


def look() -> Machine:
    """What is there. Of the parts torch alone is imported, to ask it for GPUs."""
    versions = {}
    for part in PARTS:
        for distribution in part.distributions:
            try:
                versions[part.name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    gpus: tuple[str, ...] = ()
    nccl = ""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Machine(platform.python_version(), versions, gpus, nccl)


# -- the features ------------------------------------------------------------------------------------------------------


def _core(machine: Machine) -> Finding:
    if not machine.has("torch", "Megatron-Core"):
        missing = "torch" if not machine.has("torch") else "megatron-core"
        return Finding("router", f"{missing} is missing", f"pip install {missing}", broken=True)
    if machine.below("Megatron-Core", 0, 16):
        version = machine.versions["Megatron-Core"]
        advice = "it builds its router by name; pip install 'megatron-core>=0.16'"
        return Finding("router", f"Megatron-Core {version} cannot take it", advice, broken=True)
    return Finding("router", "ALFRouter in place of TopKRouter")


def _device(machine: Machine) -> Finding:
    if machine.gpus:
        return Finding("collectives", f"NCCL {machine.nccl}")
    return Finding("collectives", "gloo, on CPUs", "no CUDA here; docs/without-cuda.md says what takes its place")


def _layers(machine: Machine) -> Finding:
    if machine.gpus and machine.has("Transformer Engine"):
        return Finding("layers, grouped GEMM", "Transformer Engine")
    advice = "pip install 'transformer-engine[pytorch]'" if machine.gpus else "needs a GPU"
    return Finding("layers, grouped GEMM", "Megatron-Core's own, one matrix product an expert", advice)


def _router_fusion(machine: Machine) -> Finding:
    if machine.gpus and machine.has("Transformer Engine"):
        return Finding("moe_router_fusion", "may be on with the sigmoid gate; refused with others")
    return Finding("moe_router_fusion", "must be off", "needs a GPU and Transformer Engine")


def _optimizer(machine: Machine) -> Finding:
    for part in ("Transformer Engine", "apex"):
        if machine.gpus and machine.has(part):
            return Finding("Adam", part)
    return Finding("Adam", "torch's")


def _dispatcher(machine: Machine) -> Finding:
    if machine.gpus and machine.has("DeepEP"):
        return Finding("token dispatcher", "alltoall, allgather or flex (DeepEP)")
    return Finding("token dispatcher", "alltoall or allgather", "flex needs a GPU and DeepEP")


def _resiliency(machine: Machine) -> Finding:
    old = machine.below("nvidia-resiliency-ext", 0, 6) and not machine.below("Megatron-Core", 0, 17)
    if old and machine.gpus:
        advice = "pip install 'nvidia-resiliency-ext>=0.6', or uninstall it"
        return Finding("checkpoints", "Megatron-Core stops at this nvidia-resiliency-ext", advice, broken=True)
    if old:
        return Finding("checkpoints", "torch_dist; nvidia-resiliency-ext below 0.6 is hidden from Megatron-Core")
    return Finding("checkpoints", "torch_dist")


def _bridge(machine: Machine) -> Finding:
    if not machine.has("Megatron-Bridge"):
        return Finding("Megatron-Bridge", "not installed", "make hosts, or docs/hosts/bridge.md")
    if machine.gpus and not machine.has("Transformer Engine"):
        advice = "it imports Transformer Engine: pip install 'transformer-engine[pytorch]'"
        return Finding("Megatron-Bridge", "cannot be imported", advice, broken=True)
    return Finding("Megatron-Bridge", "python -m alflb_megatron.recipes.bridge RECIPE")


def _nemo(machine: Machine) -> Finding:
    if not machine.has("NeMo"):
        return Finding("NeMo", "not installed", "make hosts, or docs/hosts/nemo.md")
    if not machine.below("NeMo", 3):
        advice = "NeMo 3 has none; nemo-toolkit>=2.7,<3, or Megatron-Bridge"
        return Finding("NeMo", "no LLM collection", advice, broken=True)
    if not machine.has("NeMo-Run"):
        return Finding("NeMo", "the callback ALFLB; no recipes", "pip install nemo-run")
    return Finding("NeMo", "nemo llm pretrain --factory RECIPE")


FEATURES: tuple[Callable[[Machine], Finding], ...] = (
    _core,
    _device,
    _layers,
    _router_fusion,
    _optimizer,
    _dispatcher,
    _resiliency,
    _bridge,
    _nemo,
)


def diagnose(machine: Machine) -> list[Finding]:
    """A finding for each feature."""
    return [feature(machine) for feature in FEATURES]


def _verdict(part: Part, version: str | None) -> str:
    if version is None:
        return ""
    if version.partition("+")[0] in part.tested:
        return "yes"
    return f"with {', '.join(part.tested)}" if part.tested else "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command to `parser`."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """Prints what there is; the exit code is 1 where something installed cannot work."""
    machine = look()
    findings = diagnose(machine)
    if flags.json:
        report: dict[str, Any] = {"machine": asdict(machine), "features": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_report(machine, findings)))
    return 1 if any(finding.broken for finding in findings) else 0


def _report(machine: Machine, findings: Sequence[Finding]) -> list[str]:
    gpus = ", ".join(f"{machine.gpus.count(name)} x {name}" for name in dict.fromkeys(machine.gpus)) or "no GPU"
    parts = [("part", "version", "tested", "for")]
    for part in PARTS:
        version = machine.versions.get(part.name)
        parts.append((part.name, version or "-", _verdict(part, version), part.purpose))
    features = [("feature", "path here", "to change it")]
    features += [(("! " if f.broken else "") + f.feature, f.path, f.advice) for f in findings]
    return [f"Python {machine.python}, {gpus}", "", *aligned(parts, left=True), "", *aligned(features, left=True)]
