"""The shape of a DeepSeekMoE, once, for every host: dense layers first, then MoE layers with shared experts.

The presets `deepseek-moe-1b` and `deepseek-moe-3b` are those of Wang et al. 2024 (arXiv 2408.15664, appendix):
vocabulary, width, heads, number of MoE layers, experts, d_ff / d_expert and initialisation are stated there. Where it
is silent we take the public litgpt fork of Han (June 2025): RMSNorm with epsilon 1e-6, RoPE with base 10000, no biases,
d_ff = 2.75 * hidden (2816 at 1024, which with Wang's ratio 16/3 gives d_expert = 528). Our own reading, where the two
differ: "9 MoE layers" and "the first FFN is dense" make 10 layers; the fork has 9, the first of them dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alflb_megatron.settings import SettingError, check, knob


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer: `num_dense_layers` with a plain FFN, the others with shared and routed experts."""

    vocab_size: int = knob(256, "entries of the token embedding", minimum=2)
    seq_length: int = knob(256, "tokens in a sequence", minimum=2)
    hidden_size: int = knob(128, "width of the residual stream", minimum=1)
    num_layers: int = knob(4, "transformer layers, dense and MoE", minimum=1)
    num_dense_layers: int = knob(1, "how many of them, from the first, have a plain FFN", minimum=0)
    num_heads: int = knob(4, "attention heads", minimum=1)
    ffn_hidden_size: int = knob(352, "width of a plain FFN (SwiGLU: three matrices)", minimum=1)
    moe_ffn_hidden_size: int = knob(64, "width of one expert", minimum=1)
    num_experts: int = knob(16, "routed experts a layer", minimum=1)
    topk: int = knob(2, "routed experts a token", minimum=1)
    num_shared_experts: int = knob(1, "experts every token passes through", minimum=0)
    gate: str = knob("sigmoid", "activation of the routing scores", choices=("sigmoid", "softmax"))
    pre_softmax: bool = knob(False, "softmax gate: normalise over all experts, before the choice")
    topk_scaling_factor: float | None = knob(None, "factor on the gate weights", above=0.0)
    num_groups: int | None = knob(None, "groups of experts for group-limited routing", minimum=1)
    group_topk: int | None = knob(None, "groups a token may use", minimum=1)
    mtp_layers: int = knob(0, "multi-token-prediction layers", minimum=0)
    init_std: float = knob(0.02, "standard deviation of the initial weights", above=0.0)
    norm_eps: float = knob(1e-6, "epsilon of RMSNorm", above=0.0)
    rope_base: int = knob(10000, "base of the rotary position embedding", minimum=2)

    def __post_init__(self) -> None:
        check(self)
        for flag, value, holds, allowed in (
            ("--topk", self.topk, self.topk <= self.num_experts, f"must be at most the {self.num_experts} experts"),
            (
                "--num-heads",
                self.num_heads,
                self.hidden_size % self.num_heads == 0,
                f"must divide --hidden-size {self.hidden_size}",
            ),
            (
                "--num-dense-layers",
                self.num_dense_layers,
                self.num_dense_layers < self.num_layers,
                f"must be below --num-layers {self.num_layers}: without an MoE layer there is nothing to balance",
            ),
            ("--pre-softmax", self.pre_softmax, not self.pre_softmax or self.gate == "softmax", "needs --gate softmax"),
        ):
            if not holds:
                raise SettingError(flag, value, allowed)
        self._check_groups()

    def _check_groups(self) -> None:
        groups, chosen = self.num_groups, self.group_topk
        if (groups is None) != (chosen is None):
            raise SettingError("--num-groups", groups, "must be given together with --group-topk")
        if groups is None or chosen is None:
            return
        if self.num_experts % groups:
            raise SettingError("--num-groups", groups, f"must divide the {self.num_experts} experts")
        if chosen > groups or self.topk % chosen:
            raise SettingError(
                "--group-topk", chosen, f"must be at most --num-groups {groups} and divide --topk {self.topk}"
            )
        if self.topk // chosen > self.num_experts // groups:
            raise SettingError("--group-topk", chosen, f"leaves too few experts in its groups for --topk {self.topk}")

    @property
    def moe_layer_freq(self) -> list[int]:
        """1 for an MoE layer, 0 for a dense one, in order (Megatron-Core's `moe_layer_freq`)."""
        return [0] * self.num_dense_layers + [1] * (self.num_layers - self.num_dense_layers)

    def transformer_fields(self) -> dict[str, Any]:
        """The shape as fields of Megatron-Core's `TransformerConfig`, all but its activation (SiLU, gated)."""
        fields: dict[str, Any] = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "ffn_hidden_size": self.ffn_hidden_size,
            "moe_ffn_hidden_size": self.moe_ffn_hidden_size,
            "num_moe_experts": self.num_experts,
            "moe_router_topk": self.topk,
            "moe_shared_expert_intermediate_size": self.num_shared_experts * self.moe_ffn_hidden_size or None,
            "moe_layer_freq": self.moe_layer_freq,
            "moe_router_score_function": self.gate,
            "moe_router_pre_softmax": self.pre_softmax,
            "moe_router_topk_scaling_factor": self.topk_scaling_factor,
            "moe_router_num_groups": self.num_groups,
            "moe_router_group_topk": self.group_topk,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.norm_eps,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "init_method_std": self.init_std,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }
        if self.mtp_layers:
            fields["mtp_num_layers"] = self.mtp_layers
        return fields

    def embedding_fields(self) -> dict[str, Any]:
        """The rest of the shape, in the names that Megatron-Bridge's and NeMo's GPT configurations share."""
        return {
            "seq_length": self.seq_length,
            "position_embedding_type": "rope",
            "rotary_base": self.rope_base,
            "share_embeddings_and_output_weights": False,
        }

    def parameters(self, active_only: bool = False) -> int:
        """Number of parameters, of the main model without MTP layers; with `active_only` those one token uses.

        Untied embeddings count both ways; RMSNorm has one weight a channel; nothing has a bias.
        """
        attention = 4 * self.hidden_size**2
        norms = 2 * self.hidden_size
        expert = 3 * self.hidden_size * self.moe_ffn_hidden_size
        experts = (self.topk if active_only else self.num_experts) + self.num_shared_experts
        moe_layer = attention + norms + experts * expert + self.num_experts * self.hidden_size
        dense_layer = attention + norms + 3 * self.hidden_size * self.ffn_hidden_size
        moe_layers = self.num_layers - self.num_dense_layers
        embeddings = 2 * self.vocab_size * self.hidden_size
        return embeddings + self.hidden_size + self.num_dense_layers * dense_layer + moe_layers * moe_layer


PRESETS: dict[str, ModelShape] = {
    "tiny": ModelShape(),
    "small": ModelShape(
        hidden_size=256,
        num_layers=6,
        num_heads=4,
        ffn_hidden_size=704,
        moe_ffn_hidden_size=192,
        num_experts=32,
        topk=4,
    ),
    "deepseek-moe-1b": ModelShape(
        vocab_size=32064,
        seq_length=2048,
        hidden_size=1024,
        num_layers=10,
        num_heads=8,
        ffn_hidden_size=2816,
        moe_ffn_hidden_size=528,
        num_experts=64,
        topk=6,
        num_shared_experts=2,
        init_std=0.006,
    ),
    "deepseek-moe-3b": ModelShape(
        vocab_size=32064,
        seq_length=2048,
        hidden_size=1280,
        num_layers=12,
        num_heads=10,
        ffn_hidden_size=3520,
        moe_ffn_hidden_size=880,
        num_experts=64,
        topk=6,
        num_shared_experts=2,
        init_std=0.006,
    ),
}
"""Shapes by name; `tiny` and `small` are ours, for two CPU cores."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model is trained: sequences a global batch, optimizer steps, learning rate."""

    global_batch_size: int
    steps: int
    warmup_steps: int
    lr: float
    min_lr: float


PUBLISHED: dict[str, Schedule] = {
    "deepseek-moe-1b": Schedule(global_batch_size=1152, steps=40_000, warmup_steps=1000, lr=1e-3, min_lr=1e-4),
    "deepseek-moe-3b": Schedule(global_batch_size=1728, steps=56_514, warmup_steps=1000, lr=7.8e-4, min_lr=7.8e-5),
}
"""Of Wang et al. 2024 (arXiv 2408.15664, appendix), whoever trains them; the warm-up of the 3B model, on which it is
silent, is the 1B's."""
