"""What the trainers above Megatron-Core need more than it does, to run without CUDA: Megatron-LM, Bridge, NeMo 2.

Each `prepare_...` calls `cpu.prepare()`, so it has to come before anything imports `megatron.core`; where
`torch.cuda.is_available()` it changes nothing. Read against Megatron-LM core_v0.16.1 to 0.19.0, Megatron-Bridge 0.3.1
and 0.6.2, nemo-toolkit 2.7.3.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Collection, Iterable
from typing import Any

import torch

from alflb_megatron.hosts.cpu import prepare
from alflb_megatron.hosts.cpu.substitutions import Substitution, put


def _devices() -> None:
    put(torch.cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    put(torch.cuda, "set_device", lambda device: None)


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


UNGUARDED = (
    "megatron.bridge.peft.lora",
    "megatron.bridge.peft.lora_layers",
    "megatron.bridge.models.gpt_full_te_layer_autocast_spec",
)
"""Modules of Bridge that import Transformer Engine whether it is there or not; all others ask, and have to hear no."""


def _transformer_engine() -> None:
    if importlib.util.find_spec("transformer_engine") is not None or "megatron.bridge" in sys.modules:
        return
    engine, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    engine.pytorch = pytorch  # type: ignore[attr-defined]
    for name in ("Linear", "LayerNormLinear", "LayerNormMLP", "TransformerLayer", "GroupedLinear", "RMSNorm"):
        setattr(pytorch, name, type(name, (_NotInstalled,), {}))
    pytorch.ops = types.SimpleNamespace(Sequential=_NotInstalled)  # type: ignore[attr-defined]
    plain = builtins.__import__

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        asked = name in ("transformer_engine", "transformer_engine.pytorch")
        if asked and globals and globals["__name__"] in UNGUARDED:
            return pytorch if fromlist and name.endswith("pytorch") else engine
        return plain(name, globals, locals, fromlist, level)

    builtins.__import__ = import_
    try:
        for name in ("megatron.bridge", *UNGUARDED):
            importlib.import_module(name)
    finally:
        builtins.__import__ = plain


class _NotInstalled(torch.nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError(f"{type(self).__name__} is Transformer Engine's, which is not installed")


def _compile_helpers() -> None:
    put(importlib.import_module("megatron.bridge.training.initialize"), "compile_helpers", lambda: None)


def _pinned_memory() -> None:
    if getattr(torch.tensor, "_alflb_unpinned", False):
        return
    plain_tensor = torch.tensor
    plain_to: Any = torch.Tensor.to

    @functools.wraps(plain_tensor)
    def tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return plain_tensor(*args, **kwargs)

    @functools.wraps(plain_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return plain_to(self, *("cpu" if isinstance(arg, str) and arg == "cuda" else arg for arg in args), **kwargs)

    tensor._alflb_unpinned = True  # type: ignore[attr-defined]
    torch.tensor = tensor
    put(torch.Tensor, "to", to)


def _restored_tensors() -> None:
    put(importlib.import_module("nemo.lightning.io.pl"), "_fix_tensors_device", lambda checkpoint: checkpoint)


COMMON: tuple[Substitution, ...] = (
    Substitution(
        "devices",
        "megatron/training/initialize.py:_initialize_distributed, "
        "megatron/bridge/training/initialize.py:_initialize_distributed",
        "model parallel groups are made where devices are counted, and each rank takes one: there are as many as ranks",
        _devices,
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
        "megatron/bridge/peft/lora_layers.py, megatron/bridge/peft/lora.py, "
        "megatron/bridge/models/gpt_full_te_layer_autocast_spec.py",
        "Transformer Engine is imported whether it is there or not: these modules get its names, which raise when they "
        "are used",
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

NEMO: tuple[Substitution, ...] = (
    Substitution(
        "pinned_memory",
        "nemo/lightning/pytorch/strategies/megatron_strategy.py:training_step, "
        "nemo/lightning/pytorch/plugins/data_sampler.py:on_megatron_step_end",
        'what is logged goes through `torch.tensor(..., pin_memory=True).to("cuda")`: it stays where it is',
        _pinned_memory,
    ),
    Substitution(
        "restored_tensors",
        "nemo/lightning/io/pl.py:load_checkpoint",
        "asserts CUDA before it moves what was loaded to this rank's GPU: it stays where it is",
        _restored_tensors,
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


def prepare_nemo(*, skip: Collection[str] = ()) -> tuple[Substitution, ...]:
    """Makes NeMo 2 run without CUDA; returns the substitutions in force."""
    if not torch.cuda.is_available():
        # nemo/lightning/nemo_logger.py needs this class for every checkpoint, and `prepare` hides what it is built of.
        with contextlib.suppress(ImportError):
            importlib.import_module("nvidia_resiliency_ext.ptl_resiliency.local_checkpoint_callback")
    return _apply((*COMMON, *NEMO), skip)
