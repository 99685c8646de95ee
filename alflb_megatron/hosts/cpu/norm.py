"""PyTorch's norms under sequence parallelism, which Megatron-Core allows with Transformer Engine or apex only."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from typing import Any

import torch


class SequenceParallelNorm:
    """The norm of PyTorch that `config.normalization` names, allowed under sequence parallelism.

    transformer/torch_norm.py:WrappedTorchNorm refuses sequence parallelism although PyTorch's norms do well with
    it: each rank holds some of the tokens, so the gradients of weight and bias have to be summed over the tensor
    parallel ranks, which distributed/finalize_model_grads.py:_allreduce_non_tensor_model_parallel_grads does for
    parameters marked `sequence_parallel`.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        kinds: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in kinds or config.layernorm_zero_centered_gamma:
            raise ValueError(
                f"normalization={config.normalization}: must be LayerNorm or RMSNorm, gamma not zero-centred"
            )
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def use_plain_norm(block_spec: Any, config: Any) -> Any:
    """A copy of a decoder or MTP block spec with `SequenceParallelNorm` in place of its norms.

    `block_spec` is a `TransformerBlockSubmodules`, a `MultiTokenPredictionBlockSubmodules`, a `ModuleSpec`, or None
    (a stage without MTP layers), which is returned as it is. The spec handed in is not changed.
    """
    torch_norm = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm

    def replaced(part: Any) -> Any:
        if part is torch_norm:
            return SequenceParallelNorm
        if isinstance(part, list):
            return [replaced(item) for item in part]
        if isinstance(part, functools.partial):
            return functools.partial(
                part.func, *map(replaced, part.args), **{k: replaced(v) for k, v in part.keywords.items()}
            )
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            twin = copy.copy(part)
            for field in dataclasses.fields(part):
                object.__setattr__(twin, field.name, replaced(getattr(part, field.name)))
            return twin
        return part

    return replaced(block_spec)
