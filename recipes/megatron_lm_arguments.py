"""What a Megatron-LM recipe is given, and the arguments of `pretrain_gpt.py` that it comes to; nothing of ALF-LB.

The command line is in `recipes/megatron_lm.py`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.models import PRESETS, ModelShape
from alflb_megatron.recipes.training import Training, preset_of, training_of
from alflb_megatron.settings import SettingError, check, flag_of, knob

OFF = ("none", "builtin")
"""Values of `--rule` beside our own rules: no bias at all, and Megatron-LM's own expert bias."""


def _rules() -> list[str]:
    from alflb_megatron import rules  # imports torch

    return [*OFF, *rules.names()]


@dataclass(frozen=True)
class Launch:
    """What a run is given beside the recipe's name; None takes the recipe's. Raises `SettingError`."""

    megatron_lm: str = knob("", "a checkout of Megatron-LM; needed", metavar="DIR")
    rule: str = knob("adaptive", "none, builtin (Megatron-LM's own expert bias) or one of our rules", choices=_rules)
    step_size: float | None = knob(None, "u of the rule, in score units; none takes the rule's own", minimum=0.0)
    gate: str = knob("sigmoid", "activation of the routing scores", choices=("sigmoid", "softmax"))
    data: str = knob("", "prefix of a Megatron .bin/.idx pair; empty for Megatron-LM's mock data", metavar="PREFIX")
    tokenizer: str = knob("", "Hugging Face tokenizer, by name or folder; empty for one that does nothing")
    vocab_size: int | None = knob(None, "entries of the embedding, at least as many as the tokenizer has", minimum=2)
    tp: int = knob(1, "tensor-parallel ranks (with sequence parallelism above 1)", minimum=1)
    pp: int = knob(1, "pipeline stages", minimum=1)
    ep: int | None = knob(None, "expert-parallel ranks", minimum=1)
    nodes: int | None = knob(None, "machines", minimum=1)
    gpus: int | None = knob(None, "processes on each machine, one for each of its GPUs", minimum=1)
    rendezvous: str = knob("", "where several machines meet; needed for them", metavar="HOST:PORT")
    device: str = knob("auto", "what it runs on; auto takes what this machine has", choices=("auto", "cuda", "cpu"))
    precision: str | None = knob(None, "none takes bf16 on GPUs, fp32 without", choices=("bf16", "fp32"))
    steps: int | None = knob(None, "global batches to train on; the learning rate ends with them", minimum=2)
    global_batch_size: int | None = knob(None, "sequences in a global batch", minimum=1)
    micro_batch_size: int | None = knob(None, "sequences in one forward pass of one rank", minimum=1)
    seq_length: int | None = knob(None, "tokens in a sequence", minimum=2)
    out: str = knob("", "folder for checkpoints, where a run goes on, and TensorBoard; empty for none", metavar="DIR")

    def __post_init__(self) -> None:
        check(self)
        if not self.megatron_lm:
            raise SettingError("--megatron-lm", "", "needs the folder of a checkout of Megatron-LM")


@dataclass(frozen=True)
class Recipe:
    """A recipe and what it was given, put together. Raises `SettingError` where the two do not fit."""

    name: str
    launch: Launch
    alf: ALFConfig | None
    shape: ModelShape
    training: Training
    cuda: bool

    @property
    def ranks(self) -> int:
        """All processes."""
        return self.training.nodes * self.training.gpus

    @property
    def expert_parallel(self) -> int:
        """Expert-parallel ranks: those given, else as many of the recipe's as these ranks allow."""
        if self.launch.ep:
            return self.launch.ep
        free = max(1, self.ranks // (self.launch.tp * self.launch.pp))
        return math.gcd(free, self.training.expert_parallel or free)

    @property
    def bf16(self) -> bool:
        """Whether weights and activations are in bfloat16."""
        return self.launch.precision == "bf16" if self.launch.precision else self.cuda

    def check(self) -> None:
        """Whether model, batch and split divide; what Megatron-LM asserts later, in one line before anything starts."""
        launch, shape, training = self.launch, self.shape, self.training
        model_parallel = launch.tp * launch.pp
        rows = (
            ("--num-experts", shape.num_experts, self.expert_parallel, "must be a multiple of --ep"),
            ("--num-heads", shape.num_heads, launch.tp, "must be a multiple of --tp"),
            ("--vocab-size", shape.vocab_size, launch.tp, "must be a multiple of --tp"),
            ("--num-layers", shape.num_layers, launch.pp, "must be a multiple of --pp"),
            (
                "--global-batch-size",
                training.global_batch_size,
                training.micro_batch_size * (self.ranks // model_parallel),
                "must be a multiple of micro-batch size * data-parallel ranks =",
            ),
        )
        # An expert's tensor parallelism is tp, Megatron-LM's default.
        if self.ranks % (split := model_parallel * self.expert_parallel):
            text = f"times --nodes, {self.ranks} ranks, must be a multiple of tp * pp * ep = {split}"
            raise SettingError("--gpus", training.gpus, text)
        for flag, whole, part, text in rows:
            if whole % part:
                raise SettingError(flag, whole, f"{text} {part}")
        if launch.tp > 1 and not self.cuda:
            raise SettingError("--tp", launch.tp, "needs CUDA: Megatron-Core's own norms refuse sequence parallelism")


def outer_ranks() -> int | None:
    """The ranks of the launcher that this process runs under, if it does."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


def recipe_of(name: str, launch: Launch, alf: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe with what was given put over it; `alf` are further knobs of `ALFConfig`."""
    preset, further = preset_of(name), dict(alf or {})
    shape, training = PRESETS[preset], training_of(preset)
    over = {field: value for field, value in dataclasses.asdict(launch).items() if value is not None}
    shape = dataclasses.replace(shape, **{f: over[f] for f in ("gate", "vocab_size", "seq_length") if f in over})
    kept = ("nodes", "gpus", "steps", "global_batch_size", "micro_batch_size")
    training = dataclasses.replace(training, **{f: over[f] for f in kept if f in over})
    training = dataclasses.replace(training, warmup_steps=min(training.warmup_steps, training.steps - 1))
    if launch.rule not in OFF:
        knobs_ = ALFConfig(rule=launch.rule, step_size=launch.step_size, **further)
    else:
        knobs_ = None
        if further:
            flag = flag_of(next(iter(further)), PREFIX)
            raise SettingError(flag, next(iter(further.values())), f"has no meaning with --rule {launch.rule}")
        if launch.rule == "none" and launch.step_size is not None:
            raise SettingError("--step-size", launch.step_size, "has no meaning with --rule none")
        if launch.rule == "builtin" and launch.gate != "sigmoid":
            raise SettingError("--rule", "builtin", "needs --gate sigmoid: Megatron-Core's own bias takes no other")
    recipe = Recipe(name, launch, knobs_, shape, training, _cuda(launch.device))
    recipe.check()
    if (ranks := outer_ranks()) is not None and ranks != recipe.ranks:
        raise SettingError("--gpus", training.gpus, f"times --nodes must be the launcher's {ranks} ranks")
    return recipe


def _cuda(device: str) -> bool:
    if device != "auto":
        return device == "cuda"
    import torch

    return torch.cuda.is_available()


# -- the arguments of pretrain_gpt.py --------------------------------------------------------------------------------

RENAMED = {"num_moe_experts": "num_experts", "layernorm_epsilon": "norm_epsilon"}
"""Fields of Megatron-Core's configuration that have another name on Megatron-LM's command line."""

ON_GPUS = """
    --transformer-impl transformer_engine --moe-grouped-gemm --moe-permute-fusion
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
"""
WITHOUT_CUDA = """
    --transformer-impl local --distributed-backend gloo --no-gradient-accumulation-fusion --no-bias-dropout-fusion
    --no-bias-swiglu-fusion --no-masked-softmax-fusion --no-rope-fusion --no-persist-layer-norm --disable-jit-fuser
    --no-check-for-nan-in-loss-and-grad --num-workers 0
"""


def arguments(recipe: Recipe) -> list[str]:
    """What `pretrain_gpt.py` is told of model, training, data, split and machine; nothing of ALF-LB."""
    launch, training = recipe.launch, recipe.training
    words = [*_model(recipe.shape), *_flags(_training(training))]
    words += ["--lr-decay-style", "cosine", "--moe-router-load-balancing-type", "none", "--moe-router-dtype", "fp32"]
    words += ["--moe-token-dispatcher-type", "alltoall"]
    words += ["--data-path", launch.data] if launch.data else ["--mock-data"]
    if launch.tokenizer:
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", launch.tokenizer]
    else:
        words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(recipe.shape.vocab_size - 1)]  # and its end
    words += _flags(
        {
            "padded_vocab_size": recipe.shape.vocab_size,
            "tensor_model_parallel_size": launch.tp,
            "sequence_parallel": launch.tp > 1,
            "pipeline_model_parallel_size": launch.pp,
            "expert_model_parallel_size": recipe.expert_parallel,
            "bf16": recipe.bf16,
        }
    )
    words += (ON_GPUS if recipe.cuda else WITHOUT_CUDA).split()
    tiny = recipe.name == "deepseek_moe_tiny_alflb"
    words += ["--log-interval", "1" if tiny else "10", "--eval-interval", "1000", "--eval-iters", "2" if tiny else "32"]
    if launch.out:
        words += ["--save", f"{launch.out}/checkpoints", "--load", f"{launch.out}/checkpoints"]
        words += ["--ckpt-format", "torch_dist", "--save-interval", "1000", "--tensorboard-dir", launch.out]
    if launch.rule == "builtin":
        rate = 1e-3 if launch.step_size is None else launch.step_size
        words += ["--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", str(rate)]
    return words


def _model(shape: ModelShape) -> list[str]:
    fields = {**shape.transformer_fields(), **shape.embedding_fields()}
    fields["max_position_embeddings"] = shape.seq_length
    words = []
    for name, value, flag in (
        ("gated_linear_unit", True, "--swiglu"),
        ("add_bias_linear", False, "--disable-bias-linear"),
        ("share_embeddings_and_output_weights", False, "--untie-embeddings-and-output-weights"),
    ):
        assert fields.pop(name) is value, name
        words.append(flag)
    return [*_flags(fields), *words]


def _training(training: Training) -> dict[str, Any]:
    return {
        "global_batch_size": training.global_batch_size,
        "micro_batch_size": training.micro_batch_size,
        "train_iters": training.steps,
        "lr_decay_iters": training.steps,
        "lr_warmup_iters": training.warmup_steps,
        "lr": training.lr,
        "min_lr": training.min_lr,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.beta1,
        "adam_beta2": training.beta2,
        "adam_eps": training.eps,
        "clip_grad": training.clip_grad,
    }


def _flags(fields: Mapping[str, Any]) -> list[str]:
    """Fields as words: None and False are left out, True is the flag alone."""
    words = []
    for name, value in fields.items():
        if value is None or value is False:
            continue
        words.append(flag_of(RENAMED.get(name, name)))
        if value is not True:
            words.append(str(value).replace(" ", ""))
    return words
