"""`alflb doctor`: what of the hosts is installed, whether it was tested, which path each feature takes, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alflb_megatron.hosts.dataset_helpers import CONFIG, extension_suffix
from alflb_megatron.lab.display.text import align_rows


@dataclass(frozen=True)
class Package:
    """A package that may be there: its distributions, the versions that our tests run with, and what it is for."""

    name: str
    distributions: tuple[str, ...]
    tested: tuple[str, ...]
    purpose: str


PACKAGES: tuple[Package, ...] = (
    Package("torch", ("torch",), ("2.13.0",), "everything"),
    Package("Megatron-Core", ("megatron-core",), ("0.16.1", "0.19.2"), "everything but replay and theory"),
    Package("Transformer Engine", ("transformer-engine", "transformer_engine_torch"), (), "fused layers and router"),
    Package("apex", ("apex",), (), "fused Adam and norms where Transformer Engine is missing"),
    Package("DeepEP", ("deep_ep",), (), "the flex token dispatcher"),
    Package("Megatron-Bridge", ("megatron-bridge",), ("0.3.1", "0.6.2"), "recipes/bridge.py"),
    Package("NeMo", ("nemo-toolkit",), ("2.7.3",), "recipes/nemo.py"),
    Package("NeMo-Run", ("nemo-run",), ("0.11.1",), "recipes/launch.py"),
    Package("nvidia-resiliency-ext", ("nvidia-resiliency-ext",), ("0.4.1",), "checkpoints of Bridge and NeMo"),
    Package("transformers", ("transformers",), ("4.57.6", "5.12.1"), "Hugging Face models and tokenizers"),
)


@dataclass(frozen=True)
class Finding:
    """A feature, the path that it takes here, and what to do for another one; `broken` where it cannot work."""

    feature: str
    path: str
    advice: str = ""
    broken: bool = False


@dataclass(frozen=True)
class Installation:
    """What the findings depend on: versions by part (absent where not installed), GPUs and the NCCL of this torch."""

    python: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    nccl: str
    python_config: str = ""
    """Ending of what the first `python3-config` on the PATH compiles; empty where there is none."""

    def has(self, *parts: str) -> bool:
        return all(part in self.versions for part in parts)

    def below(self, part: str, *release: int) -> bool:
        """Whether `part` is installed in a version below `release`."""
        numbers = tuple(int(text) for text in re.findall(r"\d+", self.versions.get(part, ""))[: len(release)])
        return bool(numbers) and numbers < release


def inspect_installation() -> Installation:
    """What is there. Of the packages torch alone is imported, to ask it for GPUs."""
    versions = {}
    for package in PACKAGES:
        for distribution in package.distributions:
            try:
                versions[package.name] = importlib.metadata.version(distribution)
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
    suffix = extension_suffix(shutil.which(CONFIG))
    return Installation(platform.python_version(), versions, gpus, nccl, suffix)


# -- the features ------------------------------------------------------------------------------------------------------


def _core(installation: Installation) -> Finding:
    if not installation.has("torch", "Megatron-Core"):
        missing = "torch" if not installation.has("torch") else "megatron-core"
        return Finding("router", f"{missing} is missing", f"pip install {missing}", broken=True)
    if installation.below("Megatron-Core", 0, 16):
        version = installation.versions["Megatron-Core"]
        advice = "it builds its router by name; pip install 'megatron-core>=0.16'"
        return Finding("router", f"Megatron-Core {version} cannot take it", advice, broken=True)
    return Finding("router", "ALFRouter in place of TopKRouter")


def _device(installation: Installation) -> Finding:
    if installation.gpus:
        return Finding("collectives", f"NCCL {installation.nccl}")
    return Finding("collectives", "gloo, on CPUs", "no CUDA here; docs/without-cuda.md says what takes its place")


def _layers(installation: Installation) -> Finding:
    if installation.gpus and installation.has("Transformer Engine"):
        return Finding("layers, grouped GEMM", "Transformer Engine")
    advice = "pip install 'transformer-engine[pytorch]'" if installation.gpus else "needs a GPU"
    return Finding("layers, grouped GEMM", "Megatron-Core's own, one matrix product an expert", advice)


def _router_fusion(installation: Installation) -> Finding:
    if installation.gpus and installation.has("Transformer Engine"):
        return Finding("moe_router_fusion", "may be on with the sigmoid gate; refused with others")
    return Finding("moe_router_fusion", "must be off", "needs a GPU and Transformer Engine")


def _optimizer(installation: Installation) -> Finding:
    for part in ("Transformer Engine", "apex"):
        if installation.gpus and installation.has(part):
            return Finding("Adam", part)
    return Finding("Adam", "torch's")


def _dispatcher(installation: Installation) -> Finding:
    if installation.gpus and installation.has("DeepEP"):
        return Finding("token dispatcher", "alltoall, allgather or flex (DeepEP)")
    return Finding("token dispatcher", "alltoall or allgather", "flex needs a GPU and DeepEP")


def _resiliency(installation: Installation) -> Finding:
    old = installation.below("nvidia-resiliency-ext", 0, 6) and not installation.below("Megatron-Core", 0, 17)
    if old and installation.gpus:
        advice = "pip install 'nvidia-resiliency-ext>=0.6', or uninstall it"
        return Finding("checkpoints", "Megatron-Core stops at this nvidia-resiliency-ext", advice, broken=True)
    if old:
        return Finding("checkpoints", "torch_dist; nvidia-resiliency-ext below 0.6 is hidden from Megatron-Core")
    return Finding("checkpoints", "torch_dist")


def _bridge(installation: Installation) -> Finding:
    if not installation.has("Megatron-Bridge"):
        return Finding("Megatron-Bridge", "not installed", "make hosts, or docs/hosts/bridge.md")
    if installation.gpus and not installation.has("Transformer Engine"):
        advice = "it imports Transformer Engine: pip install 'transformer-engine[pytorch]'"
        return Finding("Megatron-Bridge", "cannot be imported", advice, broken=True)
    return Finding("Megatron-Bridge", "python -m alflb_megatron.recipes.bridge RECIPE")


def _nemo(installation: Installation) -> Finding:
    if not installation.has("NeMo"):
        return Finding("NeMo", "not installed", "make hosts, or docs/hosts/nemo.md")
    if not installation.below("NeMo", 3):
        advice = "NeMo 3 has none; nemo-toolkit>=2.7,<3, or Megatron-Bridge"
        return Finding("NeMo", "no LLM collection", advice, broken=True)
    if not installation.has("NeMo-Run"):
        return Finding("NeMo", "the callback ALFLB; no recipes", "pip install nemo-run")
    return Finding("NeMo", "nemo llm pretrain --factory RECIPE")


def _dataset_helpers(installation: Installation) -> Finding:
    feature = "Megatron-LM's dataset helpers"
    if installation.python_config == sysconfig.get_config_var("EXT_SUFFIX"):
        return Finding(feature, "compiled for this Python by a checkout")
    advice = "put this Python's python3-config first on the PATH; `-m alflb_megatron.hosts.cpu` does so itself"
    if not installation.python_config:
        return Finding(feature, "a checkout cannot compile them: no python3-config", advice)
    return Finding(feature, "a checkout would compile them for another Python", advice)


FEATURES: tuple[Callable[[Installation], Finding], ...] = (
    _core,
    _device,
    _layers,
    _router_fusion,
    _optimizer,
    _dispatcher,
    _resiliency,
    _dataset_helpers,
    _bridge,
    _nemo,
)


def diagnose(installation: Installation) -> list[Finding]:
    """A finding for each feature."""
    return [feature(installation) for feature in FEATURES]


def _verdict(package: Package, version: str | None) -> str:
    if version is None:
        return ""
    if version.partition("+")[0] in package.tested:
        return "yes"
    return f"with {', '.join(package.tested)}" if package.tested else "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command to `parser`."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """Prints what there is; the exit code is 1 where something installed cannot work."""
    installation = inspect_installation()
    findings = diagnose(installation)
    if flags.json:
        report: dict[str, Any] = {
            "machine": asdict(installation),
            "features": [asdict(finding) for finding in findings],
        }
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_report(installation, findings)))
    return 1 if any(finding.broken for finding in findings) else 0


def _report(installation: Installation, findings: Sequence[Finding]) -> list[str]:
    gpus = (
        ", ".join(f"{installation.gpus.count(name)} x {name}" for name in dict.fromkeys(installation.gpus)) or "no GPU"
    )
    parts = [("part", "version", "tested", "for")]
    for package in PACKAGES:
        version = installation.versions.get(package.name)
        parts.append((package.name, version or "-", _verdict(package, version), package.purpose))
    features = [("feature", "path here", "to change it")]
    features += [(("! " if f.broken else "") + f.feature, f.path, f.advice) for f in findings]
    return [
        f"Python {installation.python}, {gpus}",
        "",
        *align_rows(parts, left=True),
        "",
        *align_rows(features, left=True),
    ]
