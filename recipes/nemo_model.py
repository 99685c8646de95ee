"""The models of the NeMo recipes: DeepSeekMoE as a configuration of NeMo's GPT, and a factory for each size.

The `nemo` command finds the factories as `model=NAME`; `recipes/nemo.py` imports them.
"""

# nemo_run reads the annotations of factories and resolves them away from this module's names: no
# `from __future__ import annotations` here.
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import alflb_megatron.hosts.nemo  # noqa: F401  (first: without CUDA it makes NeMo runnable)
from alflb_megatron.models import PRESETS
from alflb_megatron.settings import SettingError

import lightning.pytorch as pl  # isort: skip
import nemo_run as run  # isort: skip
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # isort: skip
from megatron.core.utils import is_te_min_version  # isort: skip
from nemo.collections.llm.gpt.data.mock import HAVE_TE  # isort: skip
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel  # isort: skip

CUDA = torch.cuda.is_available()
TE = HAVE_TE and CUDA


def block_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron-Core's decoder block, of Transformer Engine's layers where it is installed."""
    return get_gpt_decoder_block_spec(config, use_transformer_engine=TE, vp_stage=vp_stage)


@dataclass
class DeepSeekMoEConfig(GPTConfig):
    """What the recipes' models share: a GPT of SwiGLU experts, with the fusions that this machine has."""

    transformer_layer_spec: Any = block_spec
    activation_func: Callable = torch.nn.functional.silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    moe_token_dispatcher_type: str = "alltoall"
    moe_router_load_balancing_type: str = "none"
    moe_router_dtype: str | None = "fp32"
    moe_grouped_gemm: bool = TE
    moe_permute_fusion: bool = TE and is_te_min_version("2.1.0")
    apply_rope_fusion: bool = TE
    masked_softmax_fusion: bool = CUDA
    cross_entropy_loss_fusion: bool = CUDA
    bias_dropout_fusion: bool = CUDA


def model_of(preset: str, gate: str = "sigmoid", seq_length: int | None = None) -> run.Config[pl.LightningModule]:
    """The model of a preset; SettingError for a gate that there is not."""
    shape = PRESETS[preset]
    if gate not in ("sigmoid", "softmax"):
        raise SettingError("gate", gate, "must be one of sigmoid, softmax")
    fields = {**shape.transformer_fields(), **shape.embedding_fields(), "moe_router_score_function": gate}
    for name in ("normalization", "gated_linear_unit", "add_bias_linear"):
        if fields[name] == getattr(DeepSeekMoEConfig, name):
            del fields[name]
    fields["seq_length"] = seq_length or shape.seq_length
    config = run.Config(DeepSeekMoEConfig, vocab_size=shape.vocab_size, **fields)
    return run.Config(GPTModel, config=config)


@run.cli.factory(name="deepseek_moe_1b_alflb")
def deepseek_moe_1b_model(gate: str = "sigmoid") -> run.Config[pl.LightningModule]:
    """The 1B model: 9 MoE layers of 64 experts, 6 active, and 2 shared; `nemo llm pretrain model=...`."""
    return model_of("deepseek-moe-1b", gate)


@run.cli.factory(name="deepseek_moe_3b_alflb")
def deepseek_moe_3b_model(gate: str = "sigmoid") -> run.Config[pl.LightningModule]:
    """The 3B model: 11 MoE layers of 64 experts, 6 active, and 2 shared; `nemo llm pretrain model=...`."""
    return model_of("deepseek-moe-3b", gate)


@run.cli.factory(name="deepseek_moe_tiny_alflb")
def deepseek_moe_tiny_model(gate: str = "sigmoid") -> run.Config[pl.LightningModule]:
    """3 MoE layers of 16 experts, 2 active, and a shared one; `nemo llm pretrain model=...`."""
    return model_of("tiny", gate)
