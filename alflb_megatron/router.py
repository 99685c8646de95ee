"""ALFRouter: Megatron-Core's TopKRouter with an expert bias that this package moves.

Gating, input jitter, z-loss, auxiliary losses, capacity and replay are the parent's; what differs is the choice of
experts (`routing.select`) and the counting of demand (`loads.LoadWindow`). Buffers keep Megatron's names and types:
`expert_bias` is float32 [E] and checkpointed where Megatron-Core would keep its own, so checkpoints load both ways.
Beside it live `alf_n` (updates so far, int64 [1]), one `alf_<name>` for each row of rule state, and `alf_rule` (int64
[1], `identity` of the rule's name), by which a checkpoint of another rule is told apart: its bias is kept, n and state
begin afresh.
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from alflb_megatron import rules
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import LoadWindow
from alflb_megatron.routing import Gate, group_limited_topk, margins_of_map, scores_of, select
from alflb_megatron.rules import State
from alflb_megatron.settings import SettingError

logger = logging.getLogger(__name__)

STATE_PREFIX = "alf_"
"""Buffers that are ours alone begin with this; a checkpoint without them loads, and they start afresh."""

FORWARDS_BEFORE_WARNING = 20_000
"""Micro-batches without an update after which a router says that nothing moves its bias."""


class ALFRouter(TopKRouter):
    """Routes each token to the K experts with the largest s + p; gate weights from s alone.

    Args:
        config: Megatron-Core's configuration of the layer.
        pg_collection: its process groups.
        alf: how the bias moves.
        float32_scores: whether this version's gate keeps its scores in float32 (see `routing.Gate`).
        host_kwargs: what later Megatron-Core versions hand to every router (`is_mtp_layer`).

    Raises:
        SettingError: a setting of `config` that cannot work with a bias; the text names the flag and what is allowed.
    """

    expert_bias: Tensor
    alf_n: Tensor
    alf_rule: Tensor
    score_taps: tuple[Callable[[Tensor], None], ...] = ()
    """Each is shown the scores of the tokens that are counted, [T, E] before the bias, without gradient."""
    logit_taps: tuple[Callable[[Tensor], None], ...] = ()
    """Each is shown the logits of those tokens, [T, E], without gradient."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: Any = None,
        *,
        alf: ALFConfig | None = None,
        float32_scores: bool = True,
        **host_kwargs: Any,
    ) -> None:
        self.alf = alf or ALFConfig()
        check_gate(config, self.alf)
        super().__init__(config=config, pg_collection=pg_collection, **host_kwargs)
        # Megatron's own updater reads `enable_expert_bias`, finds routers by their `expert_bias` and steps by the sign
        # of `local_tokens_per_expert`, which stays zero here: with its flag on, it moves our bias by nothing.
        self.enable_expert_bias = False
        self.gate = Gate(
            topk=self.topk,
            score_function=self.score_function,
            pre_softmax=config.moe_router_pre_softmax,
            scaling_factor=config.moe_router_topk_scaling_factor,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            score_unit=self.alf.score_unit,
            float32_scores=float32_scores,
            threshold=None if self.alf.frozen else self.alf.rule_knobs.threshold,
        )
        device = torch.cuda.current_device()
        self.load_window = LoadWindow(self.num_experts, device, with_margins=self.gate.threshold is not None)
        self._new_buffer("expert_bias", torch.zeros(self.num_experts, dtype=torch.float32, device=device))
        rows = self._first_state()
        if taken := {"n", "rule"} & rows.keys():
            raise ValueError(f"rule {self.alf.rule}: no state may be named {taken.pop()}, which every router keeps")
        self._new_buffer("alf_n", torch.zeros(1, dtype=torch.int64, device=device))
        self._new_buffer("alf_rule", torch.tensor([identity(self.alf.rule)], device=device))
        self._state_names = tuple(rows)
        for name, row in rows.items():
            self._new_buffer(STATE_PREFIX + name, row.to(device))

    def _first_state(self) -> State:
        """The rule's state before the first update: this layer's row of each."""
        return {name: rows[0] for name, rows in self.alf.rule_knobs.init(layers=1, experts=self.num_experts).items()}

    def _new_buffer(self, name: str, value: Tensor) -> None:
        if hasattr(self, name):  # the parent leaves `expert_bias = None` where its own bias is off
            delattr(self, name)
        self.register_buffer(name, value)

    # -- routing ---------------------------------------------------------------------------------------------------

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses experts for one micro-batch and counts the demand.

        Args:
            logits: the gate's output [sequence, batch, E].
            padding_mask: bool [sequence, batch], True at padding, or None.

        Returns:
            Gate weights [T, E] (zero where not chosen) and the routing map, bool [T, E], T = sequence * batch.
        """
        sequence, batch = logits.shape[:2]
        logits_TE = logits.view(-1, self.num_experts)
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_T)
        probs_TE, map_TE = self._choose(logits_TE, None if padding_T is None else ~padding_T)
        if self.config.moe_expert_capacity_factor is not None:
            probs_TE, map_TE = apply_router_token_dropping(
                probs_TE,
                map_TE,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            probs_TE = self._with_aux_losses(probs_TE, logits_TE, padding_T, sequence, batch)
        return probs_TE, map_TE

    def _choose(self, logits_TE: Tensor, valid_T: Tensor | None) -> tuple[Tensor, Tensor]:
        counting = self.load_window.is_open(self.training)
        with_margins = counting and self.load_window.wants_margins
        if counting:
            self._warn_if_never_updated()
            if self.score_taps:
                scores_TE = scores_of(logits_TE.detach(), self.gate)
                for tap in self.score_taps:
                    tap(scores_TE if valid_T is None else scores_TE[valid_T])
            for tap in self.logit_taps:
                tap(logits_TE.detach() if valid_T is None else logits_TE.detach()[valid_T])
        if self.config.moe_router_fusion:
            probs_TE, map_TE = topk_routing_with_score_function(
                logits_TE,
                self.topk,
                use_pre_softmax=self.gate.pre_softmax,
                num_groups=self.gate.num_groups,
                group_topk=self.gate.group_topk,
                scaling_factor=self.gate.scaling_factor,
                score_function=self.gate.score_function,
                expert_bias=self.expert_bias,
                fused=True,
            )
            if counting:
                margins_TE = margins_of_map(logits_TE, self.gate, self.expert_bias, map_TE) if with_margins else None
                self.load_window.observe_map(map_TE, valid_T, weights_TE=probs_TE, margins_TE=margins_TE)
            return probs_TE, map_TE
        choice = select(logits_TE, self.gate, self.expert_bias, self._replayed_topk(), with_margins)
        if counting:
            self.load_window.observe(
                choice.experts_TK, valid_T, ranked_TK=choice.ranked_TK, margins_TE=choice.margins_TE
            )
        return choice.probs_TE, choice.map_TE

    def _replayed_topk(self) -> Any:
        """The K-largest search of Megatron's router replay, None where replay is off."""
        replay = self.router_replay
        if replay is None:
            return None

        def topk(scores_TE: Tensor, k: int, groups: int | None, group_topk: int | None) -> tuple[Tensor, Tensor]:
            return replay.get_replay_topk(scores_TE, k, groups, group_topk, group_limited_topk)

        return topk

    def _with_aux_losses(
        self, probs_TE: Tensor, logits_TE: Tensor, padding_T: Tensor | None, sequence: int, batch: int
    ) -> Tensor:
        """Attaches Megatron's auxiliary losses, which are defined on the unbiased choice, to the gate weights."""
        unbiased_TE, scores_TE = compute_routing_scores_for_aux_loss(
            logits_TE, self.topk, self.score_function, fused=self.config.moe_router_fusion, padding_mask=padding_T
        )
        masked = padding_T is not None
        probs_TE = self._apply_aux_loss(probs_TE, scores_TE, unbiased_TE, with_padding_mask=masked)
        probs_TE = self._apply_seq_aux_loss(probs_TE, scores_TE, unbiased_TE, sequence, batch, with_padding_mask=masked)
        return self._apply_global_aux_loss(probs_TE, scores_TE, unbiased_TE, with_padding_mask=masked)

    def _warn_if_never_updated(self) -> None:
        if self.load_window.seen == FORWARDS_BEFORE_WARNING:
            warnings.warn(
                f"layer {self.layer_number}: {FORWARDS_BEFORE_WARNING} micro-batches were routed without an update of "
                "the expert bias. Is config.finalize_model_grads_func wrapped (alflb_megatron.hosts.core.install)?",
                stacklevel=2,
            )

    # -- what the balancer reads and writes --------------------------------------------------------------------------

    def read_state(self) -> tuple[Tensor, State]:
        """The number of updates so far (int64 [1]) and this layer's row of rule state."""
        return self.alf_n, {name: getattr(self, STATE_PREFIX + name) for name in self._state_names}

    @torch.no_grad()
    def write_state(self, bias_E: Tensor, n: Tensor, state: State) -> None:
        """Commits one update, in place: views of the buffers, as CUDA graphs hold them, stay valid."""
        self.expert_bias.copy_(bias_E)
        self.alf_n.copy_(n)
        for name, row in state.items():
            getattr(self, STATE_PREFIX + name).copy_(row)

    @torch.no_grad()
    def begin_with(self, bias_E: Tensor) -> None:
        """Takes over a bias (floating point [E]) from elsewhere, in place; n and rule state begin afresh."""
        state = {name: row.to(self.expert_bias.device) for name, row in self._first_state().items()}
        self.write_state(bias_E, torch.zeros_like(self.alf_n), state)

    # -- precision and checkpoints -----------------------------------------------------------------------------------

    def _own_state(self) -> list[str]:
        return ["expert_bias", "alf_n", "alf_rule", *(STATE_PREFIX + name for name in self._state_names)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ALFRouter:
        """Moves to another device, but never rounds our state: `Float16Module` casts every floating buffer."""
        exact = {name: getattr(self, name) for name in self._own_state()}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                self._buffers[name] = value.to(device=moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loads, and says once what of a checkpoint is not carried on.

        State of ours that `state_dict` lacks stays as it is, which in a new model is its beginning: it was written
        without this package, or is a part of a model. Where another rule wrote it, its bias is taken and n and state
        begin afresh: the n of u / n, or a gain learnt with another rule, would mislead this one.
        """
        first = {STATE_PREFIX + name: row for name, row in self._first_state().items()}
        written_by = state_dict.get(prefix + "alf_rule")
        if written_by is not None and int(written_by) != identity(self.alf.rule):
            afresh = {"alf_n": torch.zeros_like(self.alf_n), "alf_rule": self.alf_rule, **first}
            state_dict.update({prefix + name: row for name, row in afresh.items()})
            _say(
                f"the checkpoint was written by rule {_name_of(int(written_by))}: rule {self.alf.rule} goes on from "
                f"its biases; n and rule state ({', '.join(first) or 'it has none'}) begin afresh"
            )
        elif prefix + "expert_bias" not in state_dict and prefix + "weight" in state_dict:
            _say(
                "the checkpoint holds no expert bias: biases begin at zero. alflb_megatron.warm_start (alflb train "
                "--warm-start) gives them a better start, load_bias takes them from elsewhere"
            )
        elif absent := [n for n in first if prefix + n not in state_dict and prefix + "expert_bias" in state_dict]:
            _say(f"the checkpoint holds biases but no {', '.join(absent)} of rule {self.alf.rule}: these begin afresh")
        for name in [n for n in state_dict if n.startswith(prefix + STATE_PREFIX)]:
            if name.removeprefix(prefix) not in self._own_state():
                del state_dict[name]  # another rule's, which a strict load would stop at
        for name in self._own_state():
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def identity(rule: str) -> int:
    """A number that stands for a rule's name in a checkpoint."""
    return zlib.crc32(rule.encode())


def _name_of(number: int) -> str:
    return next((name for name in rules.names() if identity(name) == number), "another (not known here)")


@functools.cache
def _say(text: str) -> None:
    """Logs `text` once, not for every layer, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(text)


def check_gate(config: TransformerConfig, alf: ALFConfig) -> None:
    """Refuses settings of the host that cannot work with an expert bias; `SettingError` names the host's flag."""
    balancing = config.moe_router_load_balancing_type
    if {"sinkhorn", "quantile_balancing"} & ({balancing} if isinstance(balancing, str) else set(balancing)):
        raise SettingError(
            "--moe-router-load-balancing-type",
            config.moe_router_load_balancing_type,
            "chooses experts by itself; with ALF-LB use none, aux_loss, seq_aux_loss or global_aux_loss",
        )
    graphs = f"{getattr(config, 'cuda_graph_impl', '')} {getattr(config, 'cuda_graph_scope', '')}"
    if re.search(r"full_iteration\b(?!_inference)", graphs):
        raise SettingError(
            "--cuda-graph-impl",
            "full_iteration",
            "replays a whole step without Python, in which the bias is updated; use graphs of layers",
        )
    if config.moe_router_topk > config.num_moe_experts:
        raise SettingError(
            "--moe-router-topk", config.moe_router_topk, f"must be at most the {config.num_moe_experts} experts"
        )
    if config.moe_router_fusion and config.moe_router_score_function != "sigmoid":
        raise SettingError(
            "--moe-router-fusion",
            True,
            "Transformer Engine's fused router takes an expert bias with the sigmoid gate only; "
            f"switch it off for the {config.moe_router_score_function} gate",
        )
    if config.moe_router_fusion and alf.score_unit != "score":
        raise SettingError(
            "--alflb-score-unit",
            alf.score_unit,
            "must be score with --moe-router-fusion, which adds the bias to scores",
        )
