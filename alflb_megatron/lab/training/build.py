"""From a plan to Megatron-Core's objects: configuration, model chunks, and an optimizer with its schedule.

Nothing of them is rewritten here. Recomputation, dispatcher and parallel split are set in `transformer_config`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from alflb_megatron.balancer import Balancer
from alflb_megatron.hosts import core, cpu
from alflb_megatron.hosts.cpu.norm import use_plain_norm
from alflb_megatron.hosts.watch import watch_loads
from alflb_megatron.lab.training.job import Job, Plan
from alflb_megatron.lab.training.optimizer import DTYPES, optimizer_config, optimizer_param_scheduler
from alflb_megatron.settings import SettingError


@dataclass(frozen=True)
class ModelSetup:
    """A model ready to train: wrapped chunks as Megatron's schedules take them, optimizer, configuration, balancer."""

    chunks: list[Any]
    optimizer: Any
    scheduler: OptimizerParamScheduler
    config: TransformerConfig
    balancer: Balancer


def tell_micro_batches(job: Job) -> None:
    """Tells Megatron-Core how many micro-batches a global batch has, as its trainers do: routers ask for it."""
    num_microbatches_calculator.unset_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        dist.get_rank(), None, job.global_batch_size, job.micro_batch_size, job.dp, decrease_batch_size_if_needed=False
    )


def seed_ranks(seed: int) -> None:
    """Seeds this rank: within a stage as Megatron-Core does, pipeline stages 100 apart as Megatron-LM has them."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: installed, and CUDA is there."""
    from megatron.core.extensions import transformer_engine

    return bool(torch.cuda.is_available() and transformer_engine.HAVE_TE)


def implementations() -> dict[str, str]:
    """Which implementation each exchangeable part of the run has, for `config.json` and the first lines."""
    from megatron.core.optimizer import Adam

    te, cuda = have_transformer_engine(), torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "collectives": "nccl" if cuda else "gloo",
        "layers": "Transformer Engine" if te else "Megatron-Core, local",
        "adam": Adam.__module__.split(".")[0],
        "substitutions": ", ".join(one.name for one in cpu.prepare() or cpu.prepare_without_te()) or "none",
    }


def transformer_config(plan: Plan) -> TransformerConfig:
    """Megatron-Core's configuration of the plan's model on the plan's split."""
    job, shape = plan.job, plan.shape
    cuda, te = torch.cuda.is_available(), have_transformer_engine()
    if job.dispatcher == "flex" and not (cuda and importlib.util.find_spec("deep_ep")):
        raise SettingError("--dispatcher", "flex", "needs CUDA and DeepEP; use alltoall or allgather")
    if job.tp > 1 and job.etp == 1 and job.ep == 1 and not core.EXPERT_GRADIENTS_OVER_TP:
        raise SettingError(
            "--etp", 1, "this Megatron-Core leaves expert gradients unsummed over TP; use --etp 0 or --ep above 1"
        )
    for flag, wanted in (("--router-fusion", job.router_fusion), ("--grouped-gemm", job.grouped_gemm)):
        if wanted and not te:
            raise SettingError(flag, wanted, "needs CUDA and Transformer Engine")
    settings: dict[str, Any] = {
        **shape.transformer_fields(),
        "activation_func": torch.nn.functional.silu,
        "moe_router_dtype": None if job.router_dtype == "model" else job.router_dtype,
        "moe_router_enable_expert_bias": plan.builtin_rate is not None,
        "moe_router_bias_update_rate": plan.builtin_rate or 0.0,
        "moe_router_load_balancing_type": job.aux_loss_type if job.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": job.aux_loss_coeff,
        "moe_z_loss_coeff": job.z_loss_coeff or None,
        "moe_expert_capacity_factor": job.capacity_factor,
        "moe_router_fusion": job.router_fusion,
        "moe_grouped_gemm": job.grouped_gemm,
        "moe_token_dispatcher_type": job.dispatcher,
        "tensor_model_parallel_size": job.tp,
        "sequence_parallel": job.tp > 1,
        "pipeline_model_parallel_size": job.pp,
        "virtual_pipeline_model_parallel_size": job.vpp if job.vpp > 1 else None,
        "expert_model_parallel_size": job.ep,
        "expert_tensor_parallel_size": job.etp,
        "pipeline_dtype": DTYPES[job.dtype],
        "params_dtype": DTYPES[job.dtype],
        "bf16": job.dtype == "bf16",
        "fp16": job.dtype == "fp16",
    }
    if job.vpp > 1 and job.pp == 2:
        # Megatron-Core's own condition for two interleaved stages; without it the schedule trains wrongly.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if job.recompute == "full":
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif job.recompute == "moe":
        settings |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    try:
        return TransformerConfig(**settings if cuda and te else settings | cpu.SWITCHES)
    except (ValueError, AssertionError) as error:
        raise SettingError("TransformerConfig", "refused", " ".join(str(error).split())) from error


def gpt_model(plan: Plan, config: TransformerConfig, vp_stage: int | None = None) -> GPTModel:
    """One pipeline chunk of the model, its MoE layers with our router where the plan has a rule of ours."""
    te = have_transformer_engine()
    spec: Any = get_gpt_decoder_block_spec(
        config, use_transformer_engine=te, normalization="RMSNorm", vp_stage=vp_stage
    )
    if not te and config.sequence_parallel:
        spec = use_plain_norm(spec, config)
    if plan.alf is not None:
        spec = core.with_alflb(spec, plan.alf, required=False)  # a pipeline stage may hold dense layers alone
    mtp = None
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=te, vp_stage=vp_stage)
        if not te and config.sequence_parallel:
            mtp = use_plain_norm(mtp, config)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=plan.shape.vocab_size,
        max_sequence_length=plan.shape.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        position_embedding_type="rope",
        rotary_base=plan.shape.rope_base,
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp,
        vp_stage=vp_stage,
    )


def setup_model_and_optimizer(plan: Plan) -> ModelSetup:
    """Model, optimizer and balancer of the plan on this rank; the process groups exist already."""
    job = plan.job
    cpu.prepare_without_te()
    config = transformer_config(plan)
    stages: list[int | None] = list(range(job.vpp)) if job.vpp > 1 else [None]
    chunks: list[Any] = [gpt_model(plan, config, stage) for stage in stages]
    if torch.cuda.is_available():
        chunks = [chunk.cuda() for chunk in chunks]
    if job.dtype != "fp32":
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    distributed = job.optimizer == "distributed"
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=job.overlap_grad_reduce,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=job.dtype != "fp16",  # there a dynamic loss scale finds out by overflowing
    )
    chunks = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    balancer = watch_loads(chunks) if plan.alf is None else core.balancer_of(chunks)
    core.install(config)
    optimizer = get_megatron_optimizer(optimizer_config(job), chunks)
    config.grad_scale_func = optimizer.scale_loss
    if job.overlap_grad_reduce:
        config.no_sync_func = chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]
    return ModelSetup(chunks, optimizer, optimizer_param_scheduler(job, optimizer), config, balancer)
