"""Expert biases apart from a model: by layer, with what they mean, and what may be done to them. Pure tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alflb_megatron.routing import Gate, scores_of
from alflb_megatron.settings import SettingError

GRID = 1 / 1024
"""What a shift is a multiple of: short in print, and exact in float32 beside biases of everyday size."""


@dataclass(frozen=True)
class Biases:
    """The expert biases of a model, or of those of its layers that one rank holds.

    rows: float32 [E] by layer, as Megatron-Core counts: from 1, MTP layers after the decoder's last.
    num_layers: of the decoder, dense ones included; None where it is not known.
    score_unit: `score` or `logit`, where the bias is added (`ALFConfig.score_unit`).
    score_function: the gate's activation, None where it is not known.
    num_groups: of group-limited routing, None where it is not known or all experts are one group.
    name: where they come from, for messages.
    """

    rows: Mapping[int, Tensor]
    num_layers: int | None = None
    score_unit: str = "score"
    score_function: str | None = None
    num_groups: int | None = None
    name: str = field(default="biases", compare=False)

    @property
    def lowest(self) -> float:
        """The smallest bias of all layers."""
        return min(float(row.min()) for row in self.rows.values())

    def require_sound(self, flag: str) -> Biases:
        """These biases, sorted by layer; SettingError naming `flag` where there is none or one is not finite."""
        if not self.rows:
            raise SettingError(flag, self.name, "holds no expert bias")
        for layer, row in self.rows.items():
            if row.dim() != 1 or row.numel() == 0 or row.dtype != torch.float32:
                text = f"the bias of layer {layer} must be float32 [experts], not {row.dtype} {list(row.shape)}"
                raise SettingError(flag, self.name, text)
            if not bool(row.isfinite().all()):
                raise SettingError(flag, self.name, f"the bias of layer {layer} holds a NaN or an infinity")
        return dataclasses.replace(self, rows=dict(sorted(self.rows.items())))

    def require_fit(self, experts: Mapping[int, int], num_layers: int, flag: str) -> None:
        """Whether every layer of a model gets its bias, and every bias its layer; SettingError naming `flag`.

        Args:
            experts: the number of experts of each MoE layer of the whole model.
            num_layers: of its decoder. Biases of MTP layers may be left over: a model is often trained without them.
        """
        if self.num_layers is not None and self.num_layers != num_layers:
            text = f"has a bias for a decoder of {self.num_layers} layers; the model has {num_layers}"
            raise SettingError(flag, self.name, text)
        for layer, width in experts.items():
            if layer not in self.rows:
                text = f"has no bias for layer {layer}, which is MoE here; it has {listed(self.rows)}"
                raise SettingError(flag, self.name, text)
            if (have := self.rows[layer].numel()) != width:
                raise SettingError(flag, self.name, f"has {have} experts in layer {layer}; the model has {width}")
        known = self.num_layers is not None
        if extra := [layer for layer in self.rows if layer not in experts and not (known and layer > num_layers)]:
            text = f"has a bias for layer {listed(extra)}; the model has MoE layers {listed(experts)}"
            raise SettingError(flag, self.name, text)

    def require_gate(self, score_unit: str, score_function: str | None, flag: str) -> None:
        """Whether a router adds its bias where these were added; SettingError naming `flag`."""
        if self.score_unit != score_unit:
            text = f"holds biases for the {self.score_unit}; the router adds its own to the {score_unit}"
            raise SettingError(flag, self.name, text)
        if score_function and self.score_function and self.score_function != score_function:
            text = f"holds biases of a {self.score_function} gate; the model has a {score_function} gate"
            raise SettingError(flag, self.name, text)

    def shifted(self, amount: float) -> Biases:
        """Biases with `amount` added to each: tokens choose the same experts, but for ties of float32."""
        return dataclasses.replace(self, rows={layer: row + amount for layer, row in self.rows.items()})

    def shift_needed(self) -> float:
        """The least multiple of `GRID` that lifts every bias to above zero, 0.0 where none is below zero.

        Scores of a sigmoid, softmax or sqrtsoftplus gate are above zero, so biased scores then are too.
        """
        return 0.0 if self.lowest >= 0 else (math.floor(-self.lowest / GRID) + 1) * GRID

    def rounding(self, amount: float) -> float:
        """The largest change, in score, of the difference of two biases of a layer that `shifted(amount)` makes.

        Tokens whose K-th and next biased score are closer than this, and than float32 tells apart, may choose
        otherwise.
        """
        errors = (
            (row + amount).double() - row.double() - amount for row in self.rows.values()
        )  # the shift itself is exact in float64
        return max(float(error.max() - error.min()) for error in errors)


def listed(numbers: Iterable[int]) -> str:
    """`1, 3, 4` of numbers; a run of three or more is `1 to 3`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts) or "none"


# -- the bias of Megatron-Core's quantile balancing --------------------------------------------------------------------

_INVERSE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.logit,
    "softmax": torch.log,  # over the token's normaliser, which cancels
    "sqrtsoftplus": lambda scores: scores.square().expm1().log(),
}
_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": torch.exp,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


def bias_from_qb_beta(beta_E: Tensor, score_function: str = "sigmoid", threshold: float | None = None) -> Tensor:
    """The expert bias that chooses as `qb_beta` of Megatron-Core's quantile balancing does, float32 [..., E].

    Quantile balancing (megatron-core 0.19, `transformer/moe/router.py`) takes the K experts with the largest
    z - beta, z being the logits in float32: its beta is a price, ours a bonus, and it is in units of the logit whatever
    the gate. For `score_unit="logit"` the bias is therefore -beta, and the choice the same for every token.

    Args:
        beta_E: floating point [..., E].
        score_function: the gate's activation f: sigmoid, softmax or sqrtsoftplus.
        threshold: a score t, to convert to `score_unit="score"`: of the largest expert not chosen, without its
            beta (`threshold_of_qb_beta`). An expert is chosen where z_k > f^-1(t) + beta_k, which is
            s_k > f(f^-1(t) + beta_k): hence p_k = t - f(f^-1(t) + beta_k), centred. That is exact for a token whose
            threshold is t. No bias on scores chooses alike for all tokens.

    Raises:
        SettingError: a threshold that is no score of this gate.
    """
    if threshold is None:
        return -beta_E.float()
    if score_function not in _FORWARD:
        raise SettingError("score_function", score_function, f"must be one of {', '.join(_FORWARD)}")
    t = torch.tensor(threshold, dtype=torch.float64)
    at = _INVERSE[score_function](t)
    if not bool(at.isfinite()):
        raise SettingError("threshold", threshold, f"must be a score that a {score_function} gate can give")
    bias_E = t - _FORWARD[score_function](at + beta_E.double())
    return (bias_E - bias_E.mean(dim=-1, keepdim=True)).float()


def threshold_of_qb_beta(logits_TE: Tensor, beta_E: Tensor, topk: int, score_function: str = "sigmoid") -> float:
    """The median over tokens of the score at which an expert of beta zero is just not chosen, for `bias_from_qb_beta`.

    Args:
        logits_TE: [T, E] of some batch; beta_E: [E]; topk: K, below E.
    """
    logits_TE = logits_TE.float()
    alpha_T = (logits_TE - beta_E.float()).topk(topk + 1, dim=-1).values[:, -1]
    if score_function == "softmax":
        return float((alpha_T - logits_TE.logsumexp(dim=-1)).exp().median())
    return float(scores_of(alpha_T, Gate(topk, score_function)).median())
