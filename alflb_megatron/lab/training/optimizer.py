"""Megatron-Core's optimizer configuration and learning-rate scheduler of a job."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from alflb_megatron.lab.training.job import Job

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of `--dtype`."""


def optimizer_config(job: Job) -> OptimizerConfig:
    """Adam as the job sets it, in Megatron-Core's terms; betas are 0.9 and 0.95."""
    return OptimizerConfig(
        optimizer="adam",
        lr=job.lr,
        min_lr=job.min_lr,
        weight_decay=job.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=job.clip_grad,
        bf16=job.dtype == "bf16",
        fp16=job.dtype == "fp16",
        params_dtype=DTYPES[job.dtype],
        use_distributed_optimizer=job.optimizer == "distributed",
    )


class MultiStepScheduler(OptimizerParamScheduler):
    """Three rates: the peak to 80% of the steps, sqrt(0.1) of it to 90%, a tenth of it to the end.

    The form of DeepSeek LLM (arXiv 2401.02954, section 2.3), with which the rates Wang et al. state for their 3B model
    (7.8e-4, 2.47e-4, 7.8e-5) agree; where the steps lie is not stated there.
    """

    def get_lr(self, param_group: dict[str, Any]) -> float:
        peak = float(param_group.get("max_lr") or self.max_lr)
        if self.num_steps < self.lr_warmup_steps:
            return peak * self.num_steps / self.lr_warmup_steps
        share = self.num_steps / self.lr_decay_steps
        return peak * (1.0 if share < 0.8 else 0.1**0.5 if share < 0.9 else 0.1)


def optimizer_param_scheduler(job: Job, optimizer: Any) -> OptimizerParamScheduler:
    """The learning rate as a function of the step, Megatron-Core's own scheduler."""
    cls = MultiStepScheduler if job.lr_decay == "multistep" else OptimizerParamScheduler
    return cls(
        optimizer,
        init_lr=0.0,
        max_lr=job.lr,
        min_lr=job.min_lr,
        lr_warmup_steps=min(job.warmup_steps, job.steps - 1),
        lr_decay_steps=job.steps,
        lr_decay_style="constant" if job.lr_decay == "multistep" else job.lr_decay,
        start_wd=job.weight_decay,
        end_wd=job.weight_decay,
        wd_incr_steps=job.steps,
        wd_incr_style="constant",
    )
