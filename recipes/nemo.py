"""NeMo 2 recipes: the DeepSeekMoE models of Wang et al. 2024 (arXiv 2408.15664) and one for a laptop.

    nemo llm pretrain --factory "deepseek_moe_1b_alflb(rule='sign', num_nodes=2)"
    nemo llm pretrain --factory deepseek_moe_tiny_alflb --yes trainer.max_steps=20

The `nemo` command finds them through the entry-point group `nemo_run.cli`. In Python they are functions that return a
`run.Partial`, to be changed and given to `run.run` or to `alflb_megatron.recipes.launch`.

The models are in `recipes/nemo_model.py`, their shapes in `alflb_megatron.models`, batch, steps, learning rate and
optimizer in `recipes/training.py`. The data are made up (`recipes/nemo_data.py`) and the tokenizer does nothing, so
that nothing is downloaded, until `data` names a Megatron .bin/.idx pair and `tokenizer` one of Hugging Face; the
embedding keeps its 32,064 entries, unless `model.config.vocab_size` is set.

What follows the installation is decided where the recipe runs, not where it is built: on a GPU with Transformer Engine
its layers, grouped GEMM, permute fusion and RoPE fusion are used, else Megatron-Core's own layers; the optimizer is
TE's, apex's or torch's fused Adam, in the order in which Megatron-Core finds them. The tiny recipe alone is for the
machine that it is built on.
"""

# nemo_run reads the annotations of factories: it resolves them away from this module's names, so that there is no
# `from __future__ import annotations` here, and knows Optional[float] but not float | None.
# ruff: noqa: UP045
from collections.abc import Callable
from typing import Any, Optional

import torch

from alflb_megatron.hosts.nemo import ALFLB  # first: without CUDA it makes NeMo runnable
from alflb_megatron.models import PRESETS
from alflb_megatron.recipes.nemo_data import data_of
from alflb_megatron.recipes.nemo_model import (  # checkpoints name the model's parts by this module
    CUDA,
    DeepSeekMoEConfig,  # noqa: F401
    block_spec,  # noqa: F401
    deepseek_moe_1b_model,  # noqa: F401
    deepseek_moe_3b_model,  # noqa: F401
    deepseek_moe_tiny_model,  # noqa: F401
    model_of,
)
from alflb_megatron.recipes.training import training_of
from alflb_megatron.settings import SettingError

import nemo_run as run  # isort: skip
from megatron.core.distributed import DistributedDataParallelConfig  # isort: skip
from nemo import lightning as nl  # isort: skip
from nemo.collections.llm.api import pretrain  # isort: skip
from nemo.collections.llm.recipes import deepseek  # isort: skip
from nemo.collections.llm.recipes.log.default import default_log, default_resume, tensorboard_logger  # isort: skip
from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing  # isort: skip
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed  # isort: skip
from nemo.utils.exp_manager import TimingCallback  # isort: skip

PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32"}
"""The precisions that the recipes take, as NeMo's optimizer calls them."""


def _optimizer(preset: str, precision: str) -> run.Config[Any]:
    training = training_of(preset)
    optim = distributed_fused_adam_with_cosine_annealing(
        precision=PRECISIONS[precision],
        warmup_steps=training.warmup_steps,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        max_lr=training.lr,
        min_lr=training.min_lr,
        clip_grad=training.clip_grad,
    )
    optim.config.weight_decay, optim.config.adam_eps = training.weight_decay, training.eps
    return optim


def _recipe(
    preset: str,
    *,
    fn: Callable[..., Any],
    dir: str | None,
    name: str,
    trainer: run.Config[nl.Trainer],
    rule: str,
    step_size: float | None,
    gate: str,
    seq_length: int | None,
    global_batch_size: int | None,
    micro_batch_size: int | None,
    data: str | None,
    tokenizer: str | None,
    precision: str,
) -> run.Partial:
    shape, training = PRESETS[preset], training_of(preset)
    if precision not in PRECISIONS:
        raise SettingError("precision", precision, f"must be one of {', '.join(PRECISIONS)}")
    trainer.plugins = bf16_mixed() if precision == "bf16" else None
    trainer.strategy.pipeline_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ALFLB(rule=rule, step_size=step_size)  # a wrong knob is refused here, not in the job
    trainer.callbacks = [
        *(getattr(trainer, "callbacks", None) or []),
        run.Config(ALFLB, rule=rule, step_size=step_size),
        run.Config(TimingCallback),
    ]
    return run.Partial(
        fn,
        model=model_of(preset, gate, seq_length),
        trainer=trainer,
        data=data_of(
            data,
            tokenizer,
            vocab_size=shape.vocab_size,
            seq_length=seq_length or shape.seq_length,
            global_batch_size=training.global_batch_size if global_batch_size is None else global_batch_size,
            micro_batch_size=training.micro_batch_size if micro_batch_size is None else micro_batch_size,
            steps=max(training.steps, trainer.max_steps),
        ),
        log=default_log(dir=dir, name=name, tensorboard_logger=tensorboard_logger(name=name)),
        optim=_optimizer(preset, precision),
        resume=default_resume(),
    )


def _on_gpus(
    preset: str,
    *,
    num_nodes: int,
    num_gpus_per_node: int,
    tensor_parallel: int,
    pipeline_parallel: int,
    expert_parallel: int,
    max_steps: int | None,
    **recipe: Any,
) -> run.Partial:
    trainer = deepseek.trainer(
        tensor_parallelism=tensor_parallel,
        pipeline_parallelism=pipeline_parallel,
        expert_parallelism=expert_parallel,
        sequence_parallelism=tensor_parallel > 1,  # Megatron-Core demands it of MoE layers under TP
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        max_steps=training_of(preset).steps if max_steps is None else max_steps,
    )
    return _recipe(preset, trainer=trainer, **recipe)


@run.cli.factory(target=pretrain, name="deepseek_moe_1b_alflb")
def deepseek_moe_1b_alflb(
    dir: Optional[str] = None,
    name: str = "deepseek_moe_1b_alflb",
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
    rule: str = "adaptive",
    step_size: Optional[float] = None,
    gate: str = "sigmoid",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 8,
    seq_length: Optional[int] = None,
    global_batch_size: Optional[int] = None,
    micro_batch_size: Optional[int] = None,
    max_steps: Optional[int] = None,
    data: Optional[str] = None,
    tokenizer: Optional[str] = None,
    precision: str = "bf16",
    fn: Callable = pretrain,
) -> run.Partial:
    """Pre-training of the 1B model of Wang et al., in bf16 unless told: sequences of 2048, batch 1152, 40,000 steps.

    Args:
        dir, name: where logs and checkpoints go, and under which name.
        num_nodes, num_gpus_per_node: the machines; their product has to be a multiple of the expert parallelism.
        rule, step_size: how the expert bias moves (`docs/rules.md`); no step size takes the rule's own.
        gate: sigmoid or softmax.
        tensor_parallel, pipeline_parallel, expert_parallel: the sizes of Megatron-Core's groups.
        seq_length, global_batch_size, micro_batch_size, max_steps: the paper's, but for the micro-batch, unless given.
        data: prefix of a Megatron .bin/.idx pair; without it the data are made up.
        tokenizer: one of Hugging Face, by name or folder, with at most as many entries as the embedding has.
        precision: bf16 or fp32.
        fn: what the recipe is for.

    Raises:
        SettingError: a rule, step size, gate or precision that cannot work.
    """
    return _on_gpus("deepseek-moe-1b", **locals())


@run.cli.factory(target=pretrain, name="deepseek_moe_3b_alflb")
def deepseek_moe_3b_alflb(
    dir: Optional[str] = None,
    name: str = "deepseek_moe_3b_alflb",
    num_nodes: int = 2,
    num_gpus_per_node: int = 8,
    rule: str = "adaptive",
    step_size: Optional[float] = None,
    gate: str = "sigmoid",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 8,
    seq_length: Optional[int] = None,
    global_batch_size: Optional[int] = None,
    micro_batch_size: Optional[int] = None,
    max_steps: Optional[int] = None,
    data: Optional[str] = None,
    tokenizer: Optional[str] = None,
    precision: str = "bf16",
    fn: Callable = pretrain,
) -> run.Partial:
    """Pre-training of the 3B model of Wang et al., in bf16 unless told: sequences of 2048, batch 1728, 56,514 steps.

    The arguments are those of `deepseek_moe_1b_alflb`.
    """
    return _on_gpus("deepseek-moe-3b", **locals())


@run.cli.factory(target=pretrain, name="deepseek_moe_tiny_alflb")
def deepseek_moe_tiny_alflb(
    dir: Optional[str] = None,
    name: str = "deepseek_moe_tiny_alflb",
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    rule: str = "adaptive",
    step_size: Optional[float] = None,
    gate: str = "sigmoid",
    seq_length: Optional[int] = None,
    global_batch_size: Optional[int] = None,
    micro_batch_size: Optional[int] = None,
    max_steps: Optional[int] = None,
    data: Optional[str] = None,
    tokenizer: Optional[str] = None,
    precision: str = "fp32",
    fn: Callable = pretrain,
) -> run.Partial:
    """A model for trying things out, in float32 unless told: about a second a step on two CPU cores.

    Without CUDA `num_gpus_per_node` counts processes, which talk over gloo. All of them share the experts. The other
    arguments are those of `deepseek_moe_1b_alflb`.
    """
    strategy = run.Config(
        nl.MegatronStrategy,
        expert_model_parallel_size=num_nodes * num_gpus_per_node,
        ddp=run.Config(DistributedDataParallelConfig, use_distributed_optimizer=False),
        ckpt_async_save=False,
    )
    if not CUDA:
        strategy.process_group_backend = "gloo"
    steps = training_of("tiny").steps if max_steps is None else max_steps
    recipe = _recipe(
        "tiny",
        fn=fn,
        dir=dir,
        name=name,
        trainer=run.Config(
            nl.Trainer,
            accelerator="gpu" if CUDA else "cpu",
            devices=num_gpus_per_node,
            num_nodes=num_nodes,
            max_steps=steps,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            strategy=strategy,
            use_distributed_sampler=False,
        ),
        rule=rule,
        step_size=step_size,
        gate=gate,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data=data,
        tokenizer=tokenizer,
        precision=precision,
    )
    recipe.optim.config.use_distributed_optimizer = False
    recipe.data.num_workers = 0
    recipe.data.pin_memory = CUDA
    recipe.log.ckpt.monitor = "reduced_train_loss"  # there is no validation
    recipe.log.ckpt.filename = "{step}"
    recipe.log.ckpt.save_top_k = 1
    return recipe
