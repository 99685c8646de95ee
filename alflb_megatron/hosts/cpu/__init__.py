"""Runs the real Megatron-Core without CUDA, on gloo: the one place that knows how.

Megatron-Core's own switches come first (`ENVIRONMENT` and `SWITCHES`). What no switch reaches is covered by
`SUBSTITUTIONS`, each with the upstream function that needs it. Call `prepare()` once, before anything imports
`megatron.core`; where `torch.cuda.is_available()` it changes nothing.

One of Megatron-Core's switches is left alone on purpose: `use_cpu_initialization=True` gives every expert-parallel
rank the same experts (tensor_parallel/layers.py:_initialize_affine_weight_cpu draws from a generator that all of them
have seeded alike).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Collection
from typing import Any

import torch

from alflb_megatron.hosts.cpu.substitutions import SUBSTITUTIONS, Substitution, markdown_table

__all__ = [
    "ENVIRONMENT",
    "SUBSTITUTIONS",
    "SWITCHES",
    "Substitution",
    "markdown_table",
    "prepare",
    "prepare_without_te",
]

ENVIRONMENT: dict[str, str] = {
    # jit.py:enable_jit_fuser turns every fused function into a torch.compile, which on a CPU needs a C++ compiler and
    # costs about as long as a short training run.
    "TORCHDYNAMO_DISABLE": "1",
}

SWITCHES: dict[str, Any] = {
    # tensor_parallel/layers.py:ColumnParallelLinear raises without the CUDA kernel of apex or TE.
    "gradient_accumulation_fusion": False,
    # fusions/fused_softmax.py:get_batch_per_block imports a CUDA extension, in 16 bits.
    "masked_softmax_fusion": False,
    # transformer/torch_norm.py:WrappedTorchNorm refuses it: the persistent kernel is apex's.
    "persist_layer_norm": False,
    # The rest come from Transformer Engine. transformer/transformer_config.py:__post_init__ raises without it,
    "apply_rope_fusion": False,
    "moe_permute_fusion": False,
    # and so does transformer/moe/moe_utils.py:topk_routing_with_score_function.
    "moe_router_fusion": False,
}
"""Fields of `TransformerConfig` that have to be off without CUDA and Transformer Engine."""


def prepare(*, skip: Collection[str] = ()) -> tuple[Substitution, ...]:
    """Makes Megatron-Core run without CUDA; returns the substitutions in force, none where CUDA is there.

    May be called again. `skip` names substitutions to leave out, which is for the tests that show each is needed.
    Raises RuntimeError when `megatron.core` was imported before and has compiled its fused functions already,
    and ModuleNotFoundError when it is not installed.
    """
    if torch.cuda.is_available():
        return ()
    for name, value in ENVIRONMENT.items():
        if os.environ.get(name) != value and "megatron.core" in sys.modules:
            raise RuntimeError(
                f"megatron.core was imported before alflb_megatron.hosts.cpu.prepare(): "
                f"call prepare() first, or set {name}={value} in the environment"
            )
        os.environ[name] = value
    _hide_old_resiliency()
    # The generator of the CPU is the tracked one, so upstream's hint that it moved in a fork says nothing here.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    applied = tuple(s for s in SUBSTITUTIONS if s.name not in skip)
    for substitution in applied:
        substitution.apply()
    return applied


def prepare_without_te() -> tuple[Substitution, ...]:
    """With CUDA, puts in place what stands in for a missing Transformer Engine, and returns it; else changes nothing.

    For trainings of our own, before a model is built: Megatron-Core 0.16 cannot route in float32 without Transformer
    Engine, on a GPU either. Without CUDA `prepare` has done it.
    """
    if not torch.cuda.is_available() or importlib.import_module("megatron.core.extensions.transformer_engine").HAVE_TE:
        return ()
    applied = tuple(s for s in SUBSTITUTIONS if s.with_cuda)
    for substitution in applied:
        substitution.apply()
    return applied


def _hide_old_resiliency() -> None:
    """Makes Megatron-Core do without an nvidia-resiliency-ext that is too old for it.

    From 0.17 on dist_checkpointing/strategies/nvrx.py:has_nvrx_async_support stops at a version below 0.6 instead, and
    0.4.1 is the newest that Debian 12's C library can load.
    """
    try:
        version = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 6):
        sys.modules["nvidia_resiliency_ext.checkpointing.async_ckpt.core"] = None  # type: ignore[assignment]
