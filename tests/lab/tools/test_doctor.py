"""`alflb doctor`: what it says is what is installed, what it calls tested is what the tests' environments pin."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from alflb_megatron.lab.cli import main
from alflb_megatron.lab.tools import doctor
from alflb_megatron.lab.tools.doctor import Installation, diagnose

ROOT = Path(__file__).parents[3]
GPU = ("NVIDIA H100 80GB HBM3",)
CORE = {"torch": "2.13.0", "Megatron-Core": "0.19.2"}


def machine(gpus: tuple[str, ...] = (), **versions: str) -> Installation:
    return Installation(
        "3.12.1", {**CORE, **{name.replace("_", " "): v for name, v in versions.items()}}, gpus, "2.29.7"
    )


def test_it_says_what_is_installed_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["machine"]["versions"]
    assert told["torch"] == importlib.metadata.version("torch")
    assert told["Megatron-Core"] == importlib.metadata.version("megatron-core")
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert all(part.name in table for part in doctor.PACKAGES) and told["Megatron-Core"] in table


def test_tested_is_what_the_environments_pin() -> None:
    pins = re.findall(r"^([\w.-]+)==(\S+)$", "\n".join(p.read_text() for p in ROOT.glob("requirements/*.txt")), re.M)
    makefile = (ROOT / "Makefile").read_text()
    pinned = {(name.lower().replace("_", "-"), version) for name, version in pins}
    pinned |= set(re.findall(r"(torch)==([\d.]+)", makefile))
    for part in doctor.PACKAGES:
        for version in part.tested:
            assert any((name.replace("_", "-"), version) in pinned for name in part.distributions), (part.name, version)
        wanted = {version for name, version in pinned if name in {d.replace("_", "-") for d in part.distributions}}
        assert wanted == set(part.tested), part.name


@pytest.mark.parametrize(
    ("here", "feature", "path", "broken"),
    [
        (machine(), "collectives", "gloo", False),
        (machine(GPU), "collectives", "NCCL 2.29.7", False),
        (machine(Transformer_Engine="2.9"), "layers, grouped GEMM", "Megatron-Core's own", False),
        (machine(GPU, Transformer_Engine="2.9"), "layers, grouped GEMM", "Transformer Engine", False),
        (machine(GPU, apex="0.1"), "Adam", "apex", False),
        (machine(GPU, DeepEP="1.2"), "token dispatcher", "alltoall, allgather or flex", False),
        (machine(), "Megatron-LM's dataset helpers", "no python3-config", False),
        (
            Installation("3.12.1", CORE, (), "", ".cpython-27.so"),
            "Megatron-LM's dataset helpers",
            "another Python",
            False,
        ),
        (Installation("3.12.1", {}, (), ""), "router", "torch is missing", True),
        (Installation("3.12.1", {**CORE, "Megatron-Core": "0.15.3"}, (), ""), "router", "0.15.3 cannot take it", True),
        (Installation("3.11.7", {**CORE, "NeMo": "3.0.0"}, (), ""), "NeMo", "no LLM collection", True),
        (Installation("3.11.7", {**CORE, "NeMo": "2.7.3"}, (), ""), "NeMo", "the callback ALFLB", False),
        (Installation("3.11.7", {**CORE, "Megatron-Bridge": "0.6.2"}, GPU, ""), "Megatron-Bridge", "cannot be", True),
        (
            Installation("3.12.1", {**CORE, "nvidia-resiliency-ext": "0.4.1"}, GPU, ""),
            "checkpoints",
            "stops at this",
            True,
        ),
        (Installation("3.12.1", {**CORE, "nvidia-resiliency-ext": "0.4.1"}, (), ""), "checkpoints", "is hidden", False),
        (
            Installation("3.12.1", {**CORE, "nvidia-resiliency-ext": "0.6.0"}, GPU, ""),
            "checkpoints",
            "torch_dist",
            False,
        ),
    ],
)
def test_each_feature_names_its_path(here: Installation, feature: str, path: str, broken: bool) -> None:
    (finding,) = (found for found in diagnose(here) if found.feature == feature)
    assert path in finding.path and finding.broken is broken
    assert finding.advice or not broken


def test_a_broken_part_is_in_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        doctor, "inspect_installation", lambda: Installation("3.11.7", {**CORE, "NeMo": "3.0.0"}, (), "")
    )
    assert main(["doctor"]) == 1
    assert "! NeMo" in capsys.readouterr().out
