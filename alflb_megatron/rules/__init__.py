"""How the expert bias moves: one small file a rule, one registry.

A rule is a frozen dataclass of its own knobs with two methods, `init` and `step`. It sees all layers of one width at
once, as [L, E] tensors (L layers, E experts), and never loops over either. To add one:

    from dataclasses import dataclass
    from alflb_megatron.rules import Rule, register
    from alflb_megatron.settings import knob

    @register("mine")
    @dataclass(frozen=True)
    class Mine(Rule):
        step_size: float = knob(1e-3, "largest move of a bias in one update", minimum=0)

        def step(self, bias, stats, state):
            return bias + self.step_size * stats.violation.tanh(), state

and it is there for `ALFConfig(rule="mine")`, `alflb train --rule mine`, `alflb replay` and every host. A rule that
needs more than loads says so by `threshold`; it is then shown a histogram of margins (`alflb_megatron.margins`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from alflb_megatron import metrics, settings
from alflb_megatron.margins import Threshold, move_to_load, sampled_loads

State = dict[str, Tensor]


@dataclass(frozen=True)
class Stats:
    """What a rule is shown of one global batch.

    loads: int64 [L, E], tokens that chose each expert over all ranks and micro-batches, before any is dropped; with
    `--alflb-update-every micro-batch`, in parts of a token (`near_ties.UNIT`), as is the histogram.
    n: int64 [L], 1-based number of this update in each layer (the n of u/n).
    histogram: int32 [L, E, B], margins of a sample of these tokens (`margins.sample_stride`), where the rule has a
    `threshold`.
    edges: float64 [B - 1], of its inner bins where they are not those of `margins`.
    """

    loads: Tensor
    n: Tensor
    histogram: Tensor | None = None
    edges: Tensor | None = None

    @cached_property
    def violation(self) -> Tensor:
        """(L - A_k) / L, float32 [L, E]."""
        return metrics.violation(self.loads).float()

    @cached_property
    def sign(self) -> Tensor:
        """sign(L - A_k), float32 [L, E], from integers: no rounding can flip it."""
        total = self.loads.sum(dim=-1, keepdim=True)
        return torch.sign(total - self.loads * self.loads.shape[-1]).float()

    @cached_property
    def move_to_balance(self) -> Tensor:
        """By how much each bias must move, alone, for its expert to carry L tokens, float32 [L, E].

        Loads are known of all tokens, margins of a share f of them. Of the sample expert k has a_k tokens, and is to
        have f (L - A_k) more: how the sample's load differs from its share of the load is chance that is known, a
        control variate (Hammersley and Handscomb 1964, section 5.5). With all tokens in the sample that is L.
        """
        if self.histogram is None:
            raise ValueError("the rule asks for margins but has no `threshold`, so none were measured")
        sampled_LE = sampled_loads(self.histogram)
        share_L1 = sampled_LE.sum(-1, keepdim=True) / self.loads.sum(-1, keepdim=True).clamp(min=1).double()
        wanted_LE = sampled_LE + share_L1 * (metrics.mean_load(self.loads).double() - self.loads)
        return move_to_load(self.histogram, wanted_LE, self.edges)


@dataclass(frozen=True)
class Rule:
    """The contract. `step` is pure: it returns new tensors and leaves its arguments as they are.

    It runs on the device, forces no synchronisation and has shapes that never change, so a CUDA graph can hold it.
    """

    @property
    def threshold(self) -> Threshold | None:
        """What margins are to be measured against for this rule; None where loads are all it needs."""
        return None

    def init(self, layers: int, experts: int) -> State:
        """The rule's own state before the first update: name -> tensor with one row a layer; none by default.

        Rows become router buffers, so they are checkpointed, resharded and resumed with the router.
        """
        return {}

    def share_of_move(self, stats: Stats, state: State) -> tuple[Tensor, Tensor] | None:
        """The move that would balance these tokens, [L, E], and the share g of it that `step` takes, [L, 1].

        With `--alflb-update-every micro-batch` it is asked for inside a global batch (`within_batch`). None for a rule
        that is shown loads alone: that is stepped itself, on each micro-batch.
        """
        return None

    def step(self, bias: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
        """One update: bias float32 [L, E] and state in, the new bias and state out."""
        raise NotImplementedError(f"{type(self).__name__} has no step")


def keep_where(commit_L1: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of `new` where bool [L, 1] `commit_L1` holds, of `old` elsewhere; both [L, ...]."""
    return torch.where(commit_L1.view(-1, *[1] * (new.dim() - 1)), new, old)


R = TypeVar("R", bound=type[Rule])
_REGISTRY: dict[str, type[Rule]] = {}


def register(name: str) -> Callable[[R], R]:
    """Class decorator: makes a rule known under `name`. A name taken by another class is an error."""

    def add(cls: R) -> R:
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"rule {name!r} is taken by {known.__module__}.{known.__qualname__}")
        _REGISTRY[name] = cls
        return cls

    return add


def names() -> list[str]:
    """The registered rules, in alphabetical order."""
    _load_builtin()
    return sorted(_REGISTRY)


def get(name: str) -> type[Rule]:
    """The rule class of that name; `SettingError` where there is none."""
    if name not in names():
        raise settings.SettingError("--alflb-rule", name, f"must be one of {', '.join(names())}")
    return _REGISTRY[name]


def flag_for(knob: str) -> str:
    """The command-line flag through which a rule's knob is set."""
    return "--alflb-step-size" if knob == "step_size" else f"--alflb-rule-options {knob}"


def make(name: str, **options: Any) -> Rule:
    """Builds a rule with its knobs checked; an unknown or impossible knob is a `SettingError`."""
    cls = get(name)
    known = [field.name for field, *_ in settings.knobs(cls)]
    for key, value in options.items():
        if key not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise settings.SettingError(flag_for(key), value, f"rule {name} has no such knob; {there}")
    rule = cls(**options)
    settings.check(rule, flag_for=flag_for)
    return rule


def _load_builtin() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
