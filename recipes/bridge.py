"""Megatron-Bridge recipes: the DeepSeekMoE models of Wang et al. 2024 (arXiv 2408.15664) and one for a laptop.

    torchrun --nproc-per-node 8 -m alflb_megatron.recipes.bridge deepseek_moe_1b_alflb rule=sign data=PREFIX ep=4
    torchrun --nproc-per-node 2 -m alflb_megatron.recipes.bridge deepseek_moe_tiny_alflb train.train_iters=20

What follows the recipe's name are words of ours, each short for several of Bridge's overrides (`SHORTCUTS`,
`PRECISIONS`), and Bridge's own overrides, by field of its `ConfigContainer`. In Python:

    cfg = deepseek_moe_1b_alflb_pretrain_config()
    pretrain(cfg, forward_step, callbacks=[ALFLBCallback()])

Shapes come from `alflb_megatron.models`, batch, steps and learning rate from `recipes/training.py`. The data are
Bridge's mock data until `data` names some, tokens those of a tokenizer that does nothing until `tokenizer` names one;
the embedding keeps its 32,064 entries, and Bridge refuses a tokenizer with more (`model.vocab_size`). How many GPUs is
torchrun's to say. On a GPU the layers are Transformer Engine's, with grouped GEMM and permute fusion, in bf16; apex is
used where Megatron-Core finds it. Without CUDA everything is Megatron-Core's own, in float32 on gloo.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch

from alflb_megatron.hosts.bridge import ALFGPTModelProvider, ALFLBCallback  # first: makes Bridge importable
from alflb_megatron.hosts.cpu import SWITCHES
from alflb_megatron.hosts.errors import exit_on_setting_error
from alflb_megatron.models import PRESETS
from alflb_megatron.recipes.training import preset_of, training_of
from alflb_megatron.settings import SettingError

from megatron.bridge.recipes.common import _pretrain_common  # isort: skip
from megatron.bridge.recipes.utils.optimizer_utils import distributed_fused_adam_with_cosine_annealing  # isort: skip
from megatron.bridge.training.config import ConfigContainer  # isort: skip
from megatron.bridge.training.gpt_step import forward_step  # isort: skip
from megatron.bridge.training.pretrain import pretrain  # isort: skip
from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides  # isort: skip
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # isort: skip


def deepseek_moe_1b_alflb_pretrain_config() -> ConfigContainer:
    """The 1B model of Wang et al.: 9 MoE layers of 64 experts, 6 active; recommended EP 8."""
    return _pretrain("deepseek-moe-1b")


def deepseek_moe_3b_alflb_pretrain_config() -> ConfigContainer:
    """The 3B model of Wang et al.: 11 MoE layers of 64 experts, 6 active; recommended EP 8."""
    return _pretrain("deepseek-moe-3b")


def deepseek_moe_tiny_alflb_pretrain_config() -> ConfigContainer:
    """3 MoE layers of 16 experts, 2 active: seconds a run on two CPU cores, for trying things out."""
    return _pretrain("tiny")


RECIPES = {
    "deepseek_moe_1b_alflb": deepseek_moe_1b_alflb_pretrain_config,
    "deepseek_moe_3b_alflb": deepseek_moe_3b_alflb_pretrain_config,
    "deepseek_moe_tiny_alflb": deepseek_moe_tiny_alflb_pretrain_config,
}


def _pretrain(preset: str) -> ConfigContainer:
    """The recipe of a preset."""
    shape, training = PRESETS[preset], training_of(preset)
    cuda = torch.cuda.is_available()

    cfg = _pretrain_common()
    cfg.model = ALFGPTModelProvider(
        **shape.transformer_fields(),
        **shape.embedding_fields(),
        vocab_size=shape.vocab_size,
        activation_func=torch.nn.functional.silu,
        transformer_layer_spec=functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=cuda),
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=cuda,
        moe_permute_fusion=cuda,
        expert_model_parallel_size=training.expert_parallel or int(os.environ.get("WORLD_SIZE", "1")),
        pipeline_dtype=torch.bfloat16 if cuda else torch.float32,
    )
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.vocab_size = "NullTokenizer", shape.vocab_size - 1  # and its end
    cfg.dataset.seq_length = shape.seq_length
    cfg.train.train_iters = training.steps
    cfg.train.global_batch_size, cfg.train.micro_batch_size = training.global_batch_size, training.micro_batch_size
    if preset == "tiny":
        getattr(cfg, "validation", cfg.train).eval_iters = 2  # 0.6 moved it out of `train`
        cfg.logger.log_interval = 1
    cfg.optimizer, cfg.scheduler = distributed_fused_adam_with_cosine_annealing(
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_iters=training.warmup_steps,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        adam_eps=training.eps,
        weight_decay=training.weight_decay,
        start_weight_decay=training.weight_decay,
        end_weight_decay=training.weight_decay,
        clip_grad=training.clip_grad,
    )
    return cfg if cuda else _without_cuda(cfg)


def _without_cuda(cfg: ConfigContainer) -> ConfigContainer:
    """The same on gloo, in float32, with what needs CUDA or Transformer Engine switched off."""
    fusions = ("bias_dropout_fusion", "bias_activation_fusion", "cross_entropy_loss_fusion")
    for field, value in {**SWITCHES, **dict.fromkeys(fusions, False), "params_dtype": torch.float32}.items():
        setattr(cfg.model, field, value)
    cfg.mixed_precision = None
    cfg.optimizer.bf16, cfg.optimizer.params_dtype = False, torch.float32
    cfg.ddp.overlap_grad_reduce = cfg.ddp.overlap_param_gather = cfg.ddp.average_in_collective = False
    cfg.optimizer.overlap_param_gather = False
    cfg.optimizer.use_distributed_optimizer = cfg.ddp.use_distributed_optimizer = False
    cfg.ddp.data_parallel_sharding_strategy = "no_shard"
    cfg.dist.distributed_backend, cfg.dist.use_gloo_process_groups = "gloo", True
    cfg.dist.disable_jit_fuser = True
    cfg.dataset.num_workers, cfg.dataset.pin_memory = 0, False
    cfg.rerun_state_machine.check_for_nan_in_loss = False  # asks CUDA which GPU was at fault
    return cfg


SHORTCUTS: dict[str, tuple[str, ...]] = {
    "rule": ("model.alflb.rule={}",),
    "step_size": ("model.alflb.step_size={}",),
    "gate": ("model.moe_router_score_function={}",),
    "data": ("dataset.blend=[[{}],null]",),
    "tokenizer": ("tokenizer.tokenizer_type=HuggingFaceTokenizer", "tokenizer.tokenizer_model={}"),
    "tp": ("model.tensor_model_parallel_size={}", "model.sequence_parallel=true"),
    "pp": ("model.pipeline_model_parallel_size={}",),
    "ep": ("model.expert_model_parallel_size={}",),
    "steps": ("train.train_iters={}",),
    "global_batch_size": ("train.global_batch_size={}",),
    "micro_batch_size": ("train.micro_batch_size={}",),
    "seq_length": ("model.seq_length={}", "dataset.sequence_length={}"),
}
"""What `NAME=VALUE` stands for among Bridge's overrides. Megatron-Core demands sequence parallelism of MoE under TP."""

PRECISIONS: dict[str, tuple[str, ...]] = {
    "bf16": ("mixed_precision=bf16_mixed", "model.pipeline_dtype=torch.bfloat16"),
    "fp32": (
        *("mixed_precision=null", "model.params_dtype=torch.float32", "model.pipeline_dtype=torch.float32"),
        *("model.bf16=false", "optimizer.bf16=false", "optimizer.params_dtype=torch.float32"),
    ),
}
"""What `precision=NAME` stands for."""

CHOICES = {"gate": ("sigmoid", "softmax"), "precision": tuple(PRECISIONS)}


def _in_bridges_words(override: str) -> list[str]:
    """An override as Bridge knows it, where it is one of ours; `SettingError` on a value that cannot work."""
    name, equals, value = override.partition("=")
    if not equals or name not in {*SHORTCUTS, "precision"}:
        return [override]
    if name in CHOICES and value not in CHOICES[name]:
        raise SettingError(name, value, f"must be one of {', '.join(CHOICES[name])}")
    if name == "precision":
        return list(PRECISIONS[value])
    if name in ("data", "tokenizer"):  # Hydra reads commas, spaces and the like of an unquoted path
        value = "'" + value.replace("'", "\\'") + "'"
    words = SHORTCUTS[name][:1] if (name, value) == ("tp", "1") else SHORTCUTS[name]
    return [word.format(value) for word in words]


def recipe_config(recipe: str, overrides: list[str]) -> ConfigContainer:
    """The recipe with our words and Bridge's overrides applied.

    Raises `SettingError` on an unknown recipe, on an override that Bridge refuses, and on one that it would skip
    without a word (`+field=`, `~field`).
    """
    preset_of(recipe)
    for override in overrides:
        if override[:1] in "+~":
            raise SettingError("override", override, "Bridge ignores it: fields are set by name=value, none is added")
    overrides = [word for override in overrides for word in _in_bridges_words(override)]
    cfg = RECIPES[recipe]()
    try:
        return process_config_with_overrides(cfg, cli_overrides=overrides) if overrides else cfg
    except OverridesError as error:
        raise SettingError("override", " ".join(overrides), str(error).splitlines()[0]) from error


def main(arguments: list[str]) -> None:
    """Trains a recipe on this rank; ends with one line on a setting that cannot work."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    exit_on_setting_error()
    cfg: Any = recipe_config(arguments[0], arguments[1:])
    cfg.model.finalize()
    pretrain(cfg, forward_step, callbacks=[ALFLBCallback()])


if __name__ == "__main__":  # the checkpoint writer starts processes that import this file
    main(sys.argv[1:])
