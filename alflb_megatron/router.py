"""ALFRouter: Megatron-Core's TopKRouter with an expert bias that this package moves.

Gating, input jitter, z-loss, auxiliary losses, capacity and replay are the parent's; what differs is the choice of
experts (`routing.select`) and the counting of demand (`loads.LoadCounter`). Its buffers are those of
`router_state.ExpertBiasRouter`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import num_microbatches_calculator
from megatron.core.jit import jit_fuser
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from alflb_megatron import margins, recomputation
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import LoadCounter
from alflb_megatron.router_checks import check_router_config
from alflb_megatron.router_state import ExpertBiasRouter, log_once
from alflb_megatron.routing import Gate, add_margins, group_limited_topk, scores_of, select
from alflb_megatron.settings import SettingError

logger = logging.getLogger(__name__)

_add_margins = jit_fuser(add_margins)  # a few kernels where there were twenty

_DICTATING = (RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD)

FORWARDS_BEFORE_WARNING = 20_000
"""Micro-batches without an update after which a router says that nothing moves its bias."""


class ALFRouter(ExpertBiasRouter):
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

    score_hooks: tuple[Callable[[Tensor], None], ...] = ()
    """Each is shown the scores of the tokens that are counted, [T, E] before the bias, without gradient."""
    logit_hooks: tuple[Callable[[Tensor], None], ...] = ()
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
        check_router_config(config, self.alf)
        super().__init__(config=config, pg_collection=pg_collection, **host_kwargs)
        # Megatron's own updater reads `enable_expert_bias`, finds routers by their `expert_bias` and steps by the sign
        # of `local_tokens_per_expert`, which stays zero here: with its flag on, it moves our bias by nothing.
        self.enable_expert_bias = False
        self.float32_scores = float32_scores
        device = torch.cuda.current_device()
        self.load_counter = LoadCounter(
            self.num_experts,
            device,
            with_margins=self.gate.threshold is not None,
            with_replay=config.moe_enable_routing_replay,
        )
        self.new_bias_state(device)

    @property
    def gate(self) -> Gate:
        """What is chosen by, as router and configuration have it now, which Megatron-Core reads in every pass too."""
        return Gate(
            topk=self.topk,
            score_function=self.score_function,
            pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            score_unit=self.alf.score_unit,
            float32_scores=self.float32_scores,
            threshold=None if self.alf.frozen else self.alf.rule_knobs.threshold,
        )

    # -- routing ---------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # what is counted depends on which pass this is, which a compiled graph would bake in
    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses experts for one micro-batch and counts the demand.

        Args:
            logits: the gate's output [sequence, batch, E].
            padding_mask: bool [sequence, batch], True at padding, or None.

        Returns:
            Gate weights [T, E] (zero where not chosen) and the routing map, bool [T, E], T = sequence * batch.
        """
        if self.num_experts != len(self.expert_bias):
            raise SettingError(
                "num_moe_experts",
                self.num_experts,
                f"must be {len(self.expert_bias)}, as the router was built: prune the experts of a model with "
                "Megatron-Core's own routers (moe_router_enable_expert_bias), whose checkpoint loads here",
            )
        sequence, batch = logits.shape[:2]
        logits_TE = logits.view(-1, self.num_experts)
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_T)
        probs_TE, map_TE = self._choose(logits_TE, None if padding_T is None else ~padding_T, sequence)
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

    def _choose(self, logits_TE: Tensor, valid_T: Tensor | None, sequence: int) -> tuple[Tensor, Tensor]:
        bias_E, counting = self._begin_pass()
        gate = self.gate
        if counting:
            self._warn_if_never_updated()
            if self.score_hooks:
                scores_TE = scores_of(logits_TE.detach(), gate)
                for hook in self.score_hooks:
                    hook(scores_TE if valid_T is None else scores_TE[valid_T])
            for hook in self.logit_hooks:
                hook(logits_TE.detach() if valid_T is None else logits_TE.detach()[valid_T])
        if self.config.moe_router_fusion:
            probs_TE, map_TE = topk_routing_with_score_function(
                logits_TE,
                self.topk,
                use_pre_softmax=gate.pre_softmax,
                num_groups=gate.num_groups,
                group_topk=gate.group_topk,
                scaling_factor=gate.scaling_factor,
                score_function=gate.score_function,
                expert_bias=bias_E,
                fused=True,
            )
            if counting:
                self.load_counter.observe_map(map_TE, valid_T, weights_TE=probs_TE)
                self._observe_margins(logits_TE, map_TE, valid_T, bias_E, sequence, gate)
                self._end_pass()
            return probs_TE, map_TE
        choice = select(logits_TE, gate, bias_E, self._replayed_topk())
        if counting:
            dictated = self._is_dictated()
            self.load_counter.observe(choice.experts_TK, valid_T, ranked_TK=choice.ranked_TK, dictated=dictated)
            if not dictated:
                self._observe_margins(logits_TE, choice.map_TE, valid_T, bias_E, sequence, gate)
            self._end_pass()
        return choice.probs_TE, choice.map_TE

    def _observe_margins(
        self, logits_TE: Tensor, map_TE: Tensor, valid_T: Tensor | None, bias_E: Tensor, sequence: int, gate: Gate
    ) -> None:
        """Measures the margins of every r-th position (`margins.sample_stride`), another one of them each update."""
        if not self.load_counter.wants_margins:
            return
        tokens = logits_TE.shape[0] * self.tp_dp_cp_group.size() * micro_batches()
        run = sequence // 2 if self.config.context_parallel_size > 1 else sequence  # a rank holds two, of equal length
        stride = margins.sample_stride(tokens, self.topk, self.num_experts, run)
        logits_SBE, map_SBE = (of_TE.view(sequence, -1, self.num_experts) for of_TE in (logits_TE, map_TE))
        valid_SB = None if valid_T is None else valid_T.view(sequence, -1)
        first_X = margins.positions(sequence, stride, logits_TE.device)
        histogram_EB = self.load_counter.histogram_EB
        _add_margins(histogram_EB, logits_SBE, map_SBE, valid_SB, bias_E, first_X, self.alf_n, stride, gate)

    def _replayed_topk(self) -> Any:
        """The K-largest search of Megatron's router replay, None where replay is off."""
        replay = self.router_replay
        if replay is None:
            return None

        def topk(scores_TE: Tensor, k: int, groups: int | None, group_topk: int | None) -> tuple[Tensor, Tensor]:
            return replay.get_replay_topk(scores_TE, k, groups, group_topk, group_limited_topk)

        return topk

    def _begin_pass(self) -> tuple[Tensor, bool]:
        """The bias to route with, and whether the pass counts.

        Where micro-batches move the bias, a second pass routes with that of its first.
        """
        within, counter = self.within_batch, self.load_counter
        if not self.moves_within_batch or not self.training or counter.counting_all:
            return self.expert_bias, counter.is_counting(self.training)
        checkpoints = recomputation.enclosing()
        second = bool(checkpoints) and checkpoints[-1].second
        if within is None:  # left to its price, perhaps since the first pass
            kept = recomputation.kept_bias(checkpoints[-1], self) if second else None
            return self.expert_bias if kept is None else kept, counter.is_counting(self.training)
        if second:
            counting, kept = False, recomputation.kept_bias(checkpoints[-1], self)
        else:
            counting = torch.is_grad_enabled() or bool(checkpoints)
            unknown = counting and recomputation.in_backward() and not checkpoints
            kept = None if unknown else within.bias_of(self)
        if kept is None:
            raise SettingError(
                "--alflb-update-every",
                "micro-batch",
                "needs checkpoints whose first pass is seen (Megatron-Core's, Transformer Engine's, torch's): this "
                "recomputation could not choose the experts of its first pass; use global-batch",
            )
        recomputation.keep_bias(checkpoints, self, kept)
        return kept, counting

    def micro_batches_told(self) -> int:
        """Micro-batches of a global batch, as far as Megatron-Core was told (`micro_batches`)."""
        return micro_batches()

    def _end_pass(self) -> None:
        if self.within_batch is not None and not self.load_counter.counting_all:
            self.within_batch.end_pass(self)

    def _is_dictated(self) -> bool:
        """Whether Megatron's router replay gives the experts: their loads are no answer to the bias."""
        replay = self.router_replay
        dictated = replay is not None and replay.router_replay_action in _DICTATING
        if dictated and not self.stands_still:
            log_once("router replay dictates experts: loads are reported, biases stand still in such global batches")
        return dictated

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
        if self.load_counter.passes == FORWARDS_BEFORE_WARNING:
            warnings.warn(
                f"layer {self.layer_number}: {FORWARDS_BEFORE_WARNING} micro-batches were routed without an update of "
                "the expert bias. Is config.finalize_model_grads_func wrapped (alflb_megatron.hosts.core.install)?",
                stacklevel=2,
            )


def micro_batches() -> int:
    """Micro-batches of a global batch on each rank, as trainers tell Megatron-Core; 1 where none has told it."""
    try:
        return int(num_microbatches_calculator.get_num_microbatches())
    except AttributeError:  # it holds None
        return 1
