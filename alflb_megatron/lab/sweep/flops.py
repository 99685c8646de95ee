"""What training costs on paper: floating-point operations a token, and GPU-hours from them.

A multiply-add is two operations. A weight of a matrix product costs a token 2 forward and 4 backward (the gradients of
its input and of the weight), so the products with weights cost 6 a weight that the token uses: attention, its FFN or
its share of the experts, the router, the output head. The input embedding is a lookup and costs nothing; norms,
activations, softmax and rotary embedding are left out, being a small part and not done by the tensor cores.

Causal attention adds products without weights: the token at position t meets t keys, (s + 1) / 2 on average over a
sequence of s, taken as s / 2. Each costs 2 d for the score and 2 d for the weighted sum of values, with d the width of
all heads together (the hidden size): 4 d * s / 2 = 2 s d a layer forward, three times that in training: 6 s d a layer.

Recomputation is not counted: utilisation below is that of the model's operations (MFU; Chowdhery et al. 2022, arXiv
2204.02311, appendix B, whose 12 L H Q T for attention is twice ours for not being causal).
"""

from __future__ import annotations

from dataclasses import dataclass

from alflb_megatron.models import ModelShape

H100_PEAK = 989.4e12
"""FLOP/s of an H100 SXM in BF16 without sparsity: NVIDIA's white paper on the H100's architecture. The data sheet has
twice that, rounded, with sparsity."""

UTILISATION = 0.35
"""Share of the peak that the model's operations are assumed to get; an assumption, not a measurement."""


@dataclass(frozen=True)
class Attention:
    """One layer's attention: weights of its matrix products, and its core's width, the mean of what a key and a value
    of all heads together hold."""

    weights: int
    width: float


def multi_head(shape: ModelShape) -> Attention:
    """Plain multi-head attention, which `alflb train` and the presets have: queries, keys, values and output."""
    return Attention(4 * shape.hidden_size**2, shape.hidden_size)


def active_weights(shape: ModelShape, attention: Attention | None = None) -> int:
    """Weights that a token is multiplied with, output head included, input embedding and norms not.

    An MTP layer is one more MoE layer with a projection of two hidden states into one and another pass through the
    head (DeepSeek-V3, arXiv 2412.19437, section 2.2).
    """
    attention = attention or multi_head(shape)
    hidden = shape.hidden_size
    experts = shape.topk + shape.num_shared_experts
    moe_layer = attention.weights + hidden * (3 * experts * shape.moe_ffn_hidden_size + shape.num_experts)
    dense_layer = attention.weights + 3 * hidden * shape.ffn_hidden_size
    head = shape.vocab_size * hidden
    moe_layers = shape.num_layers - shape.num_dense_layers
    mtp = shape.mtp_layers * (moe_layer + 2 * hidden**2 + head)
    return shape.num_dense_layers * dense_layer + moe_layers * moe_layer + head + mtp


def flops_per_token(shape: ModelShape, attention: Attention | None = None) -> float:
    """Floating-point operations that training spends on a token; `attention` where it is not plain multi-head."""
    attention = attention or multi_head(shape)
    layers = shape.num_layers + shape.mtp_layers
    return 6.0 * active_weights(shape, attention) + 6.0 * layers * shape.seq_length * attention.width


def gpu_hours(shape: ModelShape, tokens: float, utilisation: float = UTILISATION, peak: float = H100_PEAK) -> float:
    """Hours of one GPU of `peak` FLOP/s that training on `tokens` takes at that utilisation."""
    return tokens * flops_per_token(shape) / (utilisation * peak) / 3600
