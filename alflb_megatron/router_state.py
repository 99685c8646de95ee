"""The buffers of a router that carry its bias: made, read and written by the balancer, saved, loaded and cast.

Buffers keep Megatron's names and types:
`expert_bias` is float32 [E] and checkpointed where Megatron-Core would keep its own, so checkpoints load both ways.
Beside it live `alf_n` (updates so far, int64 [1]), one `alf_<name>` for each row of rule state, and `alf_rule` (int64
[1], `rule_id` of the rule's name), by which a checkpoint of another rule is told apart: its bias is kept, n and state
begin afresh.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from alflb_megatron import rules
from alflb_megatron.config import ALFConfig
from alflb_megatron.rules import State

logger = logging.getLogger(__name__)

STATE_PREFIX = "alf_"
"""Buffers that are ours alone begin with this; a checkpoint without them loads, and they start afresh."""


class ExpertBiasRouter(TopKRouter):
    """Megatron-Core's router with bias, number of updates and rule state as buffers of its own."""

    alf: ALFConfig
    expert_bias: Tensor
    alf_n: Tensor
    alf_rule: Tensor

    def new_bias_state(self, device: torch.device | int | str) -> None:
        """Registers the buffers: bias 0, n 0, rule state at its beginning. ValueError where a rule's name is taken."""
        self._new_buffer("expert_bias", torch.zeros(self.num_experts, dtype=torch.float32, device=device))
        rows = self._first_state()
        if taken := {"n", "rule"} & rows.keys():
            raise ValueError(f"rule {self.alf.rule}: no state may be named {taken.pop()}, which every router keeps")
        self._new_buffer("alf_n", torch.zeros(1, dtype=torch.int64, device=device))
        self._new_buffer("alf_rule", torch.tensor([rule_id(self.alf.rule)], device=device))
        self._state_names = tuple(rows)
        for name, row in rows.items():
            self._new_buffer(STATE_PREFIX + name, row.to(device))

    def _first_state(self) -> State:
        """The rule's state before the first update, on the CPU: this layer's row of each."""
        with torch.device("cpu"):  # a model may be under construction on another default device, the meta device too
            rows = self.alf.rule_knobs.init(layers=1, experts=self.num_experts)
        return {name: row[0] for name, row in rows.items()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gate weights as Megatron-Core begins them; bias 0, n 0 and rule state at its beginning, in place.

        Whoever builds a model on the meta device calls it once the tensors have memory (Megatron-FSDP after
        `to_empty`), module by module: the counts are their own module's, `loads.LoadCounter`.
        """
        super().reset_parameters()
        if "alf_rule" in self._buffers:  # the parent's constructor comes here before there are any
            self.start_from(torch.zeros_like(self.expert_bias))
            self.alf_rule.fill_(rule_id(self.alf.rule))

    def _new_buffer(self, name: str, value: Tensor) -> None:
        if hasattr(self, name):  # the parent leaves `expert_bias = None` where its own bias is off
            delattr(self, name)
        self.register_buffer(name, value)

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
    def start_from(self, bias_E: Tensor) -> None:
        """Takes over a bias (floating point [E]) from elsewhere, in place; n and rule state begin afresh."""
        state = {name: row.to(self.expert_bias.device) for name, row in self._first_state().items()}
        self.write_state(bias_E, torch.zeros_like(self.alf_n), state)

    # -- precision and checkpoints -----------------------------------------------------------------------------------

    def _own_state(self) -> list[str]:
        return ["expert_bias", "alf_n", "alf_rule", *(STATE_PREFIX + name for name in self._state_names)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertBiasRouter:
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
        if written_by is not None and int(written_by) != rule_id(self.alf.rule):
            afresh = {"alf_n": torch.zeros_like(self.alf_n), "alf_rule": self.alf_rule, **first}
            state_dict.update({prefix + name: row for name, row in afresh.items()})
            _log_once(
                f"the checkpoint was written by rule {_rule_name(int(written_by))}: rule {self.alf.rule} goes on from "
                f"its biases; n and rule state ({', '.join(first) or 'it has none'}) begin afresh"
            )
        elif prefix + "expert_bias" not in state_dict and prefix + "weight" in state_dict:
            _log_once(
                "the checkpoint holds no expert bias: biases begin at zero. alflb_megatron.warm_start (alflb train "
                "--warm-start) gives them a better start, load_bias takes them from elsewhere"
            )
        elif absent := [n for n in first if prefix + n not in state_dict and prefix + "expert_bias" in state_dict]:
            _log_once(
                f"the checkpoint holds biases but no {', '.join(absent)} of rule {self.alf.rule}: these begin afresh"
            )
        for name in [n for n in state_dict if n.startswith(prefix + STATE_PREFIX)]:
            if name.removeprefix(prefix) not in self._own_state():
                del state_dict[name]  # another rule's, which a strict load would stop at
        for name in self._own_state():
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def rule_id(rule: str) -> int:
    """A number that stands for a rule's name in a checkpoint."""
    return zlib.crc32(rule.encode())


def _rule_name(number: int) -> str:
    return next((name for name in rules.names() if rule_id(name) == number), "another (not known here)")


@functools.cache
def _log_once(text: str) -> None:
    """Logs `text` once, not for every layer, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(text)
