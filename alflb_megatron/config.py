"""ALFConfig: every knob of the balancer, once. Flags, checks, defaults and the reference table come from here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from alflb_megatron.settings import SettingError, check, knob

if TYPE_CHECKING:
    from alflb_megatron.rules import Rule

PREFIX = "alflb-"
"""What the flags of this configuration begin with: `--alflb-rule`, `--alflb-step-size`, ..."""


def _rule_names() -> list[str]:
    from alflb_megatron import rules  # imports torch, which reading a configuration's docs does not need

    return rules.names()


@dataclass(frozen=True)
class ALFConfig:
    """How the expert bias is moved. Raises `SettingError` (a `ValueError`) on a value that cannot work."""

    rule: str = knob("adaptive", "how the bias moves; one of the registered rules", choices=_rule_names)
    step_size: float | None = knob(
        None, "u of the rule, in score units; none takes the rule's own default", minimum=0.0
    )
    rule_options: str = knob("", "further knobs of the rule, as name=value,name=value", metavar="NAME=VALUE,...")
    score_unit: str = knob(
        "score",
        "where the bias is added: to the scores the gate produces, or to the logits before its activation",
        choices=("score", "logit"),
    )
    centring: bool = knob(True, "keep the biases of a layer at mean zero; the choice of experts does not change")
    frozen: bool = knob(False, "watch only: loads are counted and reported, the bias stays as it is")
    log_every: int = knob(0, "log MaxVio of every n-th global batch through Python's logging; 0 for never", minimum=0)

    def __post_init__(self) -> None:
        check(self, PREFIX)
        _ = self.rule_knobs  # a rule's wrong knob stops here, not at the first update

    @cached_property
    def rule_knobs(self) -> Rule:
        """The rule with its knobs set."""
        from alflb_megatron import rules

        options: dict[str, Any] = parse_options(self.rule_options)
        if self.step_size is not None:
            options["step_size"] = float(self.step_size)
        return rules.make(self.rule, **options)


def parse_options(text: str) -> dict[str, Any]:
    """`"floor=0.01,restart=true"` as a dict; values are read as JSON where they can be, else taken as text."""
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise SettingError("--alflb-rule-options", part, "must be name=value, several separated by commas")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[name.strip()] = value.strip()
    return options
