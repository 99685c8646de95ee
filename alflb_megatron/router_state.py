"""The buffers of a router that carry its bias: made, read and written by the balancer, saved, loaded and cast.

Buffers keep Megatron's names and types:
`expert_bias` is float32 [E] and checkpointed where Megatron-Core would keep its own, so checkpoints load both ways.
Beside it live `alf_n` (updates so far, int64 [1]), one `alf_<name>` for each row of rule state, and `alf_rule` (int64
[1], `rule_id` of the rule's name), by which a checkpoint of another rule is told apart: its bias is kept, n and state
begin afresh.
"""

from __future__ import annotations

import copy
import functools
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from alflb_megatron import rules
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import LoadCounter, reset
from alflb_megatron.rules import State
from alflb_megatron.within_batch import WithinBatch

logger = logging.getLogger(__name__)

STATE_PREFIX = "alf_"
"""Buffers that are ours alone begin with this; a checkpoint without them loads, and they start afresh."""


_rule_state_left_out = False


@contextmanager
def rule_state_left_out() -> Iterator[None]:
    """Within the block `state_dict()` of a router has no state beyond `expert_bias`, as Megatron-Core's own.

    For loaders that map every key of a model to one of Hugging Face's (mbridge, verl). A frozen router never has more.
    """
    global _rule_state_left_out
    before, _rule_state_left_out = _rule_state_left_out, True
    try:
        yield
    finally:
        _rule_state_left_out = before


class ExpertBiasRouter(TopKRouter):
    """Megatron-Core's router with bias, number of updates and rule state as buffers of its own.

    Where it is frozen by its settings only the bias is saved: there is no update whose state would be carried on.
    """

    alf: ALFConfig
    load_counter: LoadCounter
    expert_bias: Tensor
    alf_n: Tensor
    alf_rule: Tensor
    batch_bias: Tensor
    alf_micro_batches: Tensor

    @property
    def within_batch(self) -> WithinBatch | None:
        """What moves the bias inside the global batch; with the counts, which a shallow copy of a router shares."""
        return self.load_counter.within_batch

    @within_batch.setter
    def within_batch(self, within: WithinBatch | None) -> None:
        self.load_counter.within_batch = within

    @property
    def stands_still(self) -> bool:
        """Whether no update moves this bias: frozen by settings, by Megatron-LM, or with the weights of its router.

        A gate that is not trained belongs to a model that others have: a tower that is kept as it is, or a base under
        adapters, whose checkpoints hold no bias.
        """
        if self.alf.frozen or getattr(self, "frozen_expert_bias", False):  # by --freeze-all-layers
            return True
        if self.within_batch is not None and self.within_batch.micro_batches > 1:
            return not self.within_batch.moves(self)  # as it was when the global batch began
        untrained = not any(parameter.requires_grad for parameter in self.parameters())
        if untrained:
            log_once("the weights of some routers are not trained: their biases stand still")
        return untrained

    def new_bias_state(self, device: torch.device | int | str) -> None:
        """Registers the buffers: bias 0, n 0, rule state at its beginning. ValueError where a rule's name is taken."""
        self._new_buffer("expert_bias", torch.zeros(self.num_experts, dtype=torch.float32, device=device))
        rows = self._first_state()
        if taken := {"n", "rule", "micro_batches"} & rows.keys():
            raise ValueError(f"rule {self.alf.rule}: no state may be named {taken.pop()}, which every router keeps")
        self._new_buffer("alf_n", torch.zeros(1, dtype=torch.int64, device=device))
        self._new_buffer("alf_rule", torch.tensor([rule_id(self.alf.rule)], device=device))
        self._state_names = tuple(rows)
        for name, row in rows.items():
            self._new_buffer(STATE_PREFIX + name, row.to(device))
        if self.moves_within_batch:
            self._new_buffer("alf_micro_batches", torch.zeros(1, dtype=torch.int64, device=device))
            self.register_buffer("batch_bias", torch.zeros_like(self.expert_bias), persistent=False)

    @property
    def moves_within_batch(self) -> bool:
        """Whether micro-batches move the bias that tokens are routed with (`within_batch`)."""
        return self.alf.update_every == "micro-batch" and not self.alf.frozen

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
            if self.moves_within_batch:
                self.alf_micro_batches.zero_()

    def _new_buffer(self, name: str, value: Tensor) -> None:
        if hasattr(self, name):  # the parent leaves `expert_bias = None` where its own bias is off
            delattr(self, name)
        self.register_buffer(name, value, persistent=not (self.alf.frozen and name.startswith(STATE_PREFIX)))

    # -- what the balancer reads and writes --------------------------------------------------------------------------

    def read_state(self) -> tuple[Tensor, State]:
        """The number of updates so far (int64 [1]) and this layer's row of rule state."""
        return self.alf_n, {name: getattr(self, STATE_PREFIX + name) for name in self._state_names}

    @torch.no_grad()
    def write_state(self, bias_E: Tensor, n: Tensor, state: State) -> None:
        """Commits one update, in place: views of the buffers, as CUDA graphs hold them, stay valid."""
        rows = [getattr(self, STATE_PREFIX + name) for name in state]
        torch._foreach_copy_([self.expert_bias, *rows], [bias_E, *state.values()])
        self.alf_n.copy_(n)

    @torch.no_grad()
    def start_from(self, bias_E: Tensor) -> None:
        """Takes over a bias (floating point [E]) from elsewhere, in place; n and rule state begin afresh."""
        state = {name: row.to(self.expert_bias.device) for name, row in self._first_state().items()}
        self.write_state(bias_E, torch.zeros_like(self.alf_n), state)

    # -- precision and checkpoints -----------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertBiasRouter:
        """A copy with weights, bias and counts of its own, on the same process groups and replay.

        A process group cannot be copied, and Megatron-Core finds a replay by the list that it was put into when it was
        made. A router that is copied by itself (PEFT, `modules_to_save`) stays in its model, and so on its
        configuration; a copied model has one of its own.
        """
        kinds: tuple[type, ...] = (dist.ProcessGroup, ProcessGroupCollection, RouterReplay)
        if not memo:
            kinds += (TransformerConfig,)
        memo.update({id(value): value for value in vars(self).values() if isinstance(value, kinds)})
        if self.within_batch is not None:
            memo[id(self.within_batch)] = None  # of the model that the copy will be in
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        for mine, its in zip(self.parameters(), copied.parameters(), strict=True):
            vars(its).update(vars(mine))  # Megatron-Core's marks: by `sequence_parallel` it sums gradients
        return copied

    def _is_filled(self) -> bool:
        """Whether bias and state are what somebody wrote, and not memory as `to_empty` leaves it."""
        if self.alf_rule.is_meta:
            return False
        return int(self.alf_rule) == rule_id(self.alf.rule) and bool(self.expert_bias.isfinite().all())

    def _own_state(self) -> list[str]:
        """As the router was built: `alf` may have been replaced since, by a frozen one say."""
        return ["expert_bias", *(name for name in self._buffers if name.startswith(STATE_PREFIX))]

    def _saved_state(self) -> list[str]:
        return [name for name in self._own_state() if name not in self._non_persistent_buffers_set]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if _rule_state_left_out:
            for name in self._own_state():
                if name.startswith(STATE_PREFIX):
                    destination.pop(prefix + name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertBiasRouter:
        """Moves to another device, but never rounds our state: `Float16Module` casts every floating buffer."""
        exact = {name: getattr(self, name) for name in [*self._own_state(), "batch_bias"] if name in self._buffers}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                self._buffers[name] = value.to(device=moved.device)
        return self

    def _take_memory(self, device: torch.device) -> None:
        """Gives counts that are on the meta device, of which no checkpoint holds any, memory of their own."""
        if self.load_counter.tokens_per_expert.is_meta:
            self.load_counter.to_empty(device=device)
            self.load_counter.reset_parameters()
        if self.moves_within_batch and self.batch_bias.is_meta:
            self.batch_bias = torch.zeros_like(self.batch_bias, device=device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loads, and says once what of a checkpoint is not carried on.

        A bias that `state_dict` lacks stays as it is, as Megatron-Core's own does: the file was written without biases,
        holds parameters alone (an average of them), or is one of several. Only memory that nobody has filled begins
        afresh. A bias that comes without our state begins anew with it. Where another rule wrote it, its bias is taken
        and n and state begin afresh: the n of u / n, or a gain learnt with another rule, would mislead this one.
        """
        saved = self._saved_state()
        given = next((state_dict[name] for n in ("expert_bias", "weight") if (name := prefix + n) in state_dict), None)
        device = given.device if given is not None and self.expert_bias.is_meta else self.expert_bias.device
        first = {
            STATE_PREFIX + name: row.to(device)  # assigned as they are, where a load assigns
            for name, row in self._first_state().items()
            if STATE_PREFIX + name in saved
        }
        # Not what `alf_rule` holds: a distributed checkpoint is read into the buffers themselves, and then handed in.
        beginning = {"alf_rule": torch.tensor([rule_id(self.alf.rule)], device=device), **first}
        written_by = state_dict.get(prefix + "alf_rule") if "alf_rule" in saved else None
        if written_by is not None and int(written_by) != rule_id(self.alf.rule):
            afresh = {"alf_n": torch.zeros_like(self.alf_n, device=device), **beginning}
            state_dict.update({prefix + name: row for name, row in afresh.items()})
            log_once(
                f"the checkpoint was written by rule {_rule_name(int(written_by))}: rule {self.alf.rule} goes on from "
                f"its biases; n and rule state ({', '.join(first) or 'it has none'}) begin afresh"
            )
        elif prefix + "expert_bias" not in state_dict and prefix + "weight" in state_dict:
            log_once(
                "what is loaded holds no expert bias: biases stay as they are, at zero in a new model. "
                "alflb_megatron.warm_start (alflb train --warm-start) gives them a better start, load_bias takes them "
                "from elsewhere"
            )
        elif absent := [n for n in first if prefix + n not in state_dict and prefix + "expert_bias" in state_dict]:
            log_once(
                f"the checkpoint holds biases but no {', '.join(absent)} of rule {self.alf.rule}: these begin afresh"
            )
        for name in [n for n in state_dict if n.startswith(prefix + STATE_PREFIX)]:
            if name.removeprefix(prefix) not in saved:
                del state_dict[name]  # another rule's, or of no use to a frozen router: a strict load would stop at it
        whole = prefix + "weight" in state_dict or prefix + "expert_bias" in state_dict
        begins = prefix + "expert_bias" in state_dict or (whole and not self._is_filled())
        for name in saved:
            mine = getattr(self, name)
            if prefix + name in state_dict:
                # a cast checkpoint may be assigned as it is
                state_dict[prefix + name] = state_dict[prefix + name].to(mine.dtype)
            else:
                state_dict[prefix + name] = (
                    beginning.get(name, torch.zeros_like(mine, device=device)) if begins else mine
                )
        if whole:
            self._take_memory(device)
            reset([self.load_counter])
            if self.within_batch is not None:
                self.within_batch.end(committed=False)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def rule_id(rule: str) -> int:
    """A number that stands for a rule's name in a checkpoint."""
    return zlib.crc32(rule.encode())


def _rule_name(number: int) -> str:
    return next((name for name in rules.names() if rule_id(name) == number), "another (not known here)")


@functools.cache
def log_once(text: str) -> None:
    """Logs `text` once, not for every layer, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(text)
