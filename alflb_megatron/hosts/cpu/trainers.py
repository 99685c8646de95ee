"""What the trainers above Megatron-Core need more than it does, to run without CUDA: Megatron-LM, Bridge, NeMo 2.

Each `prepare_...` begins with `cpu.prepare()`, so it has to come before anything imports `megatron.core`; where
`torch.cuda.is_available()` it changes nothing. Read against Megatron-LM core_v0.16.1 to 0.19.0, Megatron-Bridge 0.3.1
and 0.6.2.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.distributed as dist

from alflb_megatron.hosts.cpu import Substitution, prepare, put


def _devices() -> None:
    put(torch.cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    put(torch.cuda, "set_device", lambda device: None)


def _without_devices(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(name, None)
        return plain(*args, **kwargs)

    return call


def _process_group() -> None:
    put(dist, "init_process_group", _without_devices(dist.init_process_group, "device_id"))
    put(dist, "barrier", _without_devices(dist.barrier, "device_ids"))


def _allow_no_cuda(trainer: str) -> None:
    module = importlib.import_module(trainer)
    plain = module.initialize_megatron

    @functools.wraps(plain)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **{**kwargs, "allow_no_cuda": True})

    put(module, "initialize_megatron", initialize_megatron)


def _fused_kernels() -> None:
    try:
        kernels = importlib.import_module("megatron.legacy.fused_kernels")
    except ModuleNotFoundError:  # gone from 0.18 on
        return
    put(kernels, "load", lambda args: None)


def _transformer_engine() -> None:
    if "megatron.bridge" in sys.modules:
        return
    # Whoever asks whether Transformer Engine is there has to have asked before it seems to be.
    for name in (
        "extensions.transformer_engine",
        "models.gpt.gpt_model",
        "models.gpt.gpt_layer_specs",
        "models.mamba.mamba_layer_specs",
        "transformer.attention",
        "transformer.multi_latent_attention",
        "transformer.moe.moe_layer",
        "transformer.moe.shared_experts",
        "transformer.moe.moe_utils",
        "fp8_utils",
        "optimizer",
        "transformer.cuda_graphs",
        "inference.engines",
    ):
        importlib.import_module(f"megatron.core.{name}")
    engine, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    for module in (engine, pytorch):
        module.__spec__ = ModuleSpec(module.__name__, None)
    engine.__path__ = []
    engine.pytorch = pytorch  # type: ignore[attr-defined]
    for name in ("Linear", "LayerNormLinear", "LayerNormMLP", "TransformerLayer", "GroupedLinear", "RMSNorm"):
        setattr(pytorch, name, type(name, (_NotInstalled,), {}))
    pytorch.ops = types.SimpleNamespace(Sequential=_NotInstalled)  # type: ignore[attr-defined]
    names = {module.__name__: module for module in (engine, pytorch)}
    sys.modules.update(names)
    try:
        importlib.import_module("megatron.bridge")
    finally:
        for module_name in names:
            del sys.modules[module_name]


class _NotInstalled(torch.nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError(f"{type(self).__name__} is Transformer Engine's, which is not installed")


def _compile_helpers() -> None:
    put(importlib.import_module("megatron.bridge.training.initialize"), "compile_helpers", lambda: None)


COMMON: tuple[Substitution, ...] = (
    Substitution(
        "devices",
        "megatron/training/initialize.py:_initialize_distributed, "
        "megatron/bridge/training/initialize.py:_initialize_distributed",
        "model parallel groups are made where devices are counted, and each rank takes one: there are as many as ranks",
        _devices,
    ),
    Substitution(
        "process_group",
        "megatron/bridge/training/initialize.py:_initialize_distributed, "
        "megatron/training/checkpointing.py:save_checkpoint",
        "devices are named to collectives, which gloo does not take: they are left out",
        _process_group,
    ),
)

MEGATRON_LM: tuple[Substitution, ...] = (
    Substitution(
        "allow_no_cuda",
        "megatron/training/training.py:pretrain",
        "`initialize_megatron` asserts CUDA unless its own switch `allow_no_cuda` is on: it is",
        functools.partial(_allow_no_cuda, "megatron.training.training"),
    ),
    Substitution(
        "fused_kernels",
        "megatron/training/initialize.py:_compile_dependencies",
        "CUDA kernels are compiled whether used or not: they are not",
        _fused_kernels,
    ),
)

BRIDGE: tuple[Substitution, ...] = (
    Substitution(
        "transformer_engine",
        "megatron/bridge/peft/lora_layers.py, megatron/bridge/peft/lora.py",
        "Transformer Engine is imported unconditionally: while Bridge is imported its names are there, and raise when "
        "they are used",
        _transformer_engine,
    ),
    Substitution(
        "allow_no_cuda",
        "megatron/bridge/training/setup.py:setup",
        "`initialize_megatron` asserts CUDA unless its own switch `allow_no_cuda` is on: it is",
        functools.partial(_allow_no_cuda, "megatron.bridge.training.setup"),
    ),
    Substitution(
        "compile_helpers",
        "megatron/bridge/training/initialize.py:initialize_megatron",
        "runs a Makefile that the wheel of Megatron-Core lacks, and exits; what it would compile is in the wheel",
        _compile_helpers,
    ),
)


def _apply(substitutions: Iterable[Substitution], skip: Collection[str]) -> tuple[Substitution, ...]:
    before = prepare(skip=skip)
    if torch.cuda.is_available():
        return ()
    applied = tuple(s for s in substitutions if s.name not in skip)
    for substitution in applied:
        substitution.apply()
    return (*before, *applied)


def prepare_megatron_lm(*, skip: Collection[str] = ()) -> tuple[Substitution, ...]:
    """Makes the Megatron-LM checkout on `sys.path` run without CUDA; returns the substitutions in force."""
    return _apply((*COMMON, *MEGATRON_LM), skip)


def prepare_bridge(*, skip: Collection[str] = ()) -> tuple[Substitution, ...]:
    """Makes Megatron-Bridge run without CUDA and Transformer Engine; returns the substitutions in force."""
    return _apply((*COMMON, *BRIDGE), skip)
