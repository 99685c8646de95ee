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
    update_every: str = knob(
        "global-batch",
        "what moves the bias that tokens are routed with: a global batch, or each of its micro-batches too",
        choices=("global-batch", "micro-batch"),
    )
    centring: bool = knob(True, "keep the biases of a layer at mean zero; the choice of experts does not change")
    frozen: bool = knob(False, "watch only: loads are counted and reported, the bias stays as it is")
    stop_after: int = knob(
        0,
        "updates of this rule (its n) after which the bias stands still, as at the end of DeepSeek-V3's training; "
        "0 for never",
        minimum=0,
    )
    fade: int = knob(0, "how many of the last updates before --alflb-stop-after shrink linearly to nothing", minimum=0)
    check_every: int = knob(
        10, "updates between checks that all ranks hold the same biases and rule state; 0 for never", minimum=0
    )
    on_disagreement: str = knob(
        "heal",
        "what to do where they do not: heal (take over what most ranks hold, and log an error) or stop the training",
        choices=("heal", "stop"),
    )
    alarm_after: int = knob(
        100, "updates in a row for which something must be wrong before it is logged as an alarm; 0 for none", minimum=0
    )
    alarm_max_vio: float = knob(2.0, "MaxVio above which a layer is in alarm", minimum=0.0)
    alarm_spread: float | None = knob(
        None,
        "spread of a layer's bias above which it is in alarm; none is 1 where the bias is added to sigmoid or softmax "
        "scores, which differ by less, and no alarm elsewhere",
        above=0.0,
    )
    log_layers: bool = knob(False, "show MaxVio and bias spread of every layer in TensorBoard and W&B too")
    log_every: int = knob(0, "log MaxVio of every n-th global batch through Python's logging; 0 for never", minimum=0)

    def __post_init__(self) -> None:
        check(self, PREFIX)
        if self.fade > self.stop_after:
            flag, allowed = f"--{PREFIX}fade", f"must be at most --{PREFIX}stop-after, {self.stop_after}"
            raise SettingError(flag, self.fade, allowed)
        _ = self.rule_knobs  # a rule's wrong knob stops here, not at the first update

    @cached_property
    def rule_knobs(self) -> Rule:
        """The rule with its knobs set."""
        from alflb_megatron import rules

        options: dict[str, Any] = parse_options(self.rule_options)
        if self.step_size is not None:
            options["step_size"] = float(self.step_size)
        return rules.make(self.rule, **options)


def parse_options(text: str, flag: str = "--alflb-rule-options") -> dict[str, Any]:
    """`"floor=0.01,restart=true"` as a dict; values are read as JSON where they can be, else taken as text.

    Raises `SettingError` that names `flag`.
    """
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise SettingError(flag, part, "must be name=value, several separated by commas")
        try:
            options[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):  # also a number of thousands of digits, and brackets nested as deeply
            options[name.strip()] = value.strip()
    return options
