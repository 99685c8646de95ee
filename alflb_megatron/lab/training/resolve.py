"""From what was given to a plan that can run: settings over the preset's, or over a resumed run's, and all checks.

It is done before Megatron-Core is imported and any rank is started, so that a wrong setting costs a line and little
time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.lab.training.job import SCHEDULES, UNBALANCED, Job, Plan
from alflb_megatron.models import PRESETS, ModelShape
from alflb_megatron.settings import SettingError, check, from_mapping

BUILTIN_RATE = 1e-3
"""Step of Megatron-Core's own expert bias where none is given (its default, and Wang et al.'s)."""


def resolve(job: Mapping[str, Any], shape: Mapping[str, Any], alf: Mapping[str, Any]) -> Plan:
    """Puts the given settings over the preset's and checks the whole.

    Args:
        job: what was given, by field name of `Job`.
        shape: likewise of `ModelShape`.
        alf: likewise of `ALFConfig`.

    Raises:
        SettingError: one setting, its value and what is allowed.
    """
    preset = job.get("preset", "tiny")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise SettingError("--preset", preset, f"must be one of {', '.join(PRESETS)}")
    settings = from_mapping(Job, {**SCHEDULES[preset], **job})
    check(settings)
    if settings.etp == 0:
        settings = dataclasses.replace(settings, etp=settings.tp if settings.ep == 1 else 1)
    model = dataclasses.replace(PRESETS[preset], **shape)
    if settings.rule in UNBALANCED:
        plan = Plan(settings, model, None, _builtin_rate(settings, model, alf))
    else:
        plan = Plan(settings, model, from_mapping(ALFConfig, {**alf, "rule": settings.rule}, PREFIX), None)
    _check_split(plan.job, plan.shape)
    _check_combinations(plan.job, plan.shape)
    if plan.job.certify:
        _check_certify(plan)
    if plan.job.bias:
        _check_bias(plan)
    return plan


FIXED = ("global_batch_size", "seed", "data", "tokenizer")
"""Settings of a job that a resumed run must keep: with others its records would be of two different trainings."""


def resolve_resumed(
    saved: Mapping[str, Any], job: Mapping[str, Any], shape: Mapping[str, Any], alf: Mapping[str, Any]
) -> Plan:
    """The plan of a run that goes on: the settings it was started with, and what was given now over them.

    `saved` is what `Plan.as_dict` wrote. The split, the length, what is written and how the bias moves may change; with
    another rule its knobs are that rule's own. The model, the data and the global batch may not.
    """
    try:
        before = Plan.from_dict(saved)
    except SettingError as error:
        raise SettingError("--resume", True, f"its config.json holds {error}") from None
    except (TypeError, KeyError, AttributeError) as error:
        raise SettingError("--resume", True, f"its config.json holds no settings of a run ({error!r})") from None
    for given, kept, names in ((job, before.job, FIXED), (shape, before.shape, tuple(shape))):
        for name in names:
            if name in given and given[name] != getattr(kept, name):
                flag = f"--{name.replace('_', '-')}"
                raise SettingError(flag, given[name], f"must be {getattr(kept, name)}, as this run was started with")
    own = {} if before.alf is None else dataclasses.asdict(before.alf)
    if before.builtin_rate is not None:
        own["step_size"] = before.builtin_rate
    own.pop("rule", None)
    if job.get("rule", before.job.rule) != before.job.rule:
        own = {}
    this_time: dict[str, Any] = {
        "json": False,
        "load": "",
        "bias": "",
        "record_scores": 0,
        "resume": True,
        "requeue": False,
    }
    if {"tp", "ep"} & job.keys():
        this_time["etp"] = 0
    return resolve(
        {**dataclasses.asdict(before.job), **this_time, **job},
        {**dataclasses.asdict(before.shape), **shape},
        {**own, **alf},
    )


def _builtin_rate(job: Job, shape: ModelShape, alf: Mapping[str, Any]) -> float | None:
    given = [name for name in alf if not (job.rule == "builtin" and name == "step_size")]
    if given:
        raise SettingError(
            f"--{PREFIX}{given[0].replace('_', '-')}", alf[given[0]], f"has no meaning with --rule {job.rule}"
        )
    if job.rule == "none":
        return None
    if shape.gate != "sigmoid":
        raise SettingError(
            "--rule", "builtin", f"Megatron-Core's own expert bias needs --gate sigmoid, not {shape.gate}"
        )
    rate = ALFConfig(rule="sign", step_size=alf.get("step_size", BUILTIN_RATE)).step_size
    return rate


def _check_split(job: Job, shape: ModelShape) -> None:
    """Whether the ranks, the model and the batch divide as the split asks."""
    if job.nproc % job.model_parallel:
        raise SettingError("--nproc", job.nproc, f"must be a multiple of tp * pp = {job.model_parallel}")
    expert_ranks = job.etp * job.ep * job.pp
    if job.nproc % expert_ranks:
        raise SettingError(
            "--ep", job.ep, f"etp * ep * pp = {expert_ranks} must divide the {job.nproc} ranks of --nproc"
        )
    rows = [
        ("--ep", job.ep, shape.num_experts, "the experts (--num-experts)"),
        ("--tp", job.tp, shape.num_heads, "the attention heads (--num-heads)"),
        ("--tp", job.tp, shape.seq_length, "the sequence (--seq-length)"),
        ("--tp", job.tp, shape.vocab_size, "the vocabulary (--vocab-size)"),
        ("--tp", job.tp, shape.ffn_hidden_size, "the FFN's width (--ffn-hidden-size)"),
        ("--etp", job.etp, shape.moe_ffn_hidden_size, "an expert's width (--moe-ffn-hidden-size)"),
        ("--pp", job.pp, shape.num_layers, "the layers (--num-layers)"),
    ]
    for flag, parts, whole, what in rows:
        if whole % parts:
            raise SettingError(flag, parts, f"must divide {what}, {whole}")
    if shape.num_layers % (job.pp * job.vpp):
        raise SettingError(
            "--vpp", job.vpp, f"times --pp {job.pp} must divide the layers (--num-layers), {shape.num_layers}"
        )
    step = job.micro_batch_size * job.dp
    if job.global_batch_size % step:
        raise SettingError(
            "--global-batch-size",
            job.global_batch_size,
            f"must be a multiple of micro-batch size * data-parallel ranks = {step}",
        )
    if job.vpp > 1 and job.pp == 1:
        raise SettingError("--vpp", job.vpp, "needs --pp above 1")
    micro_batches = job.global_batch_size // step
    if job.vpp > 1 and micro_batches % job.pp:
        raise SettingError(
            "--vpp", job.vpp, f"needs the {micro_batches} micro-batches a rank to be a multiple of --pp {job.pp}"
        )


def _check_certify(plan: Plan) -> None:
    """Whether the dual of the assignment problem is that of this routing."""
    job, shape, alf = plan.job, plan.shape, plan.alf
    if alf is None:
        raise SettingError("--certify", job.certify, f"needs a rule of ours, not {job.rule}")
    if shape.group_topk:
        raise SettingError("--certify", job.certify, "needs routing over all experts, without --group-topk")
    if shape.topk == shape.num_experts:
        raise SettingError("--certify", job.certify, "needs --topk below --num-experts: there is nothing to choose")
    if alf.score_unit != "score":
        raise SettingError("--certify", job.certify, f"needs --{PREFIX}score-unit score, not {alf.score_unit}")
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise SettingError("--certify", job.certify, "needs SciPy (pip install 'alflb_megatron[lab]')") from None


def _check_bias(plan: Plan) -> None:
    """Whether the model can start from the biases of `--bias`: they are read here, before any rank is started."""
    from alflb_megatron.lab.tools.bias import initial_biases

    job = plan.job
    if job.rule == "none":
        raise SettingError("--bias", job.bias, "needs a rule, or builtin: with --rule none there is no expert bias")
    if job.resume:
        raise SettingError("--bias", job.bias, "cannot be given with --resume: the run goes on with its own")
    if Path(job.bias).resolve() == Path(job.folder).resolve():
        raise SettingError("--bias", job.bias, "is the folder this run is written to; name another with --out")
    initial_biases(job.bias, plan.shape, plan.score_unit)


def _check_combinations(job: Job, shape: ModelShape) -> None:
    """Settings that cannot work together."""
    if job.router_fusion and shape.gate == "softmax" and job.rule not in UNBALANCED:
        raise SettingError("--router-fusion", True, "the fused router takes a bias with --gate sigmoid only")
    if job.record_scores and job.rule in UNBALANCED:
        raise SettingError(
            "--record-scores",
            job.record_scores,
            f"needs a rule of ours, not {job.rule}; to record without balancing give one and --{PREFIX}frozen",
        )
    if job.warm_start and job.rule in UNBALANCED:
        raise SettingError("--warm-start", job.warm_start, f"needs a rule of ours, not {job.rule}")
    if shape.gate == "softmax" and shape.topk == 1 and not shape.pre_softmax:
        raise SettingError("--topk", 1, "needs --pre-softmax with --gate softmax: over one logit it gives 1 always")
    if job.aux_loss_coeff == 0 and job.aux_loss_type != "aux_loss":
        raise SettingError("--aux-loss-type", job.aux_loss_type, "needs --aux-loss-coeff above 0")
    if job.lr < job.min_lr:
        raise SettingError("--min-lr", job.min_lr, f"must be at most --lr {job.lr}")
    if job.resume and job.load:
        raise SettingError("--load", job.load, "cannot be given with --resume")
