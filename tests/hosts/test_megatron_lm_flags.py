"""The Megatron-LM host without a checkout: its flags, what it turns on, and what it refuses."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from alflb_megatron import ALFConfig
from alflb_megatron.hosts import enable, megatron_lm
from alflb_megatron.settings import SettingError

OURS = ["alflb_megatron.hosts.megatron_lm", "block_spec"]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    yield
    enable.disable()


@pytest.fixture
def without_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what needs a checkout: our entries in Megatron-LM's log (tests/hosts/test_megatron_lm.py)."""
    monkeypatch.setattr(megatron_lm, "show_loads", lambda: None)


def parsed(*words: str) -> argparse.Namespace:
    """Megatron-LM's namespace, as far as it is read, with our flags."""
    parser = megatron_lm.add_arguments()(argparse.ArgumentParser(allow_abbrev=False))
    parser.set_defaults(spec=None, num_experts=8, moe_router_enable_expert_bias=False, rank=0)
    return parser.parse_args(words)


def test_every_flag_has_its_default_in_the_namespace() -> None:
    args = vars(parsed())
    default = ALFConfig()
    assert args["alflb_rule"] is None
    for name in ("step_size", "rule_options", "score_unit", "centring", "frozen", "log_every"):
        assert args[f"alflb_{name}"] == getattr(default, name)


def test_the_given_provider_comes_first() -> None:
    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--theirs", default=3)
        return parser

    parser = megatron_lm.add_arguments(provider)(argparse.ArgumentParser())
    assert vars(parser.parse_args([]))["theirs"] == 3
    assert "ALF-LB" in parser.format_help() and "default: off" in parser.format_help()


def test_off_changes_nothing() -> None:
    before = (sys.excepthook, enable.MoELayer.__init__)
    megatron_lm.enable_from(parsed())
    assert before == (sys.excepthook, enable.MoELayer.__init__)
    assert "megatron.training" not in sys.modules


def test_the_rule_turns_it_on_once(without_log: None) -> None:
    args = parsed("--alflb-rule", "sign", "--alflb-step-size", "0.01", "--no-alflb-centring")
    megatron_lm.enable_from(args)
    once = enable.MoELayer.__init__
    megatron_lm.enable_from(args)
    assert enable.MoELayer.__init__ is once
    assert enable.enable(rule="sign", step_size=0.01, centring=False) == ALFConfig("sign", 0.01, centring=False)


@pytest.mark.parametrize(
    ("words", "changes", "text"),
    [
        (["--alflb-step-size", "0.1"], {}, "--alflb-step-size=0.1: has no effect without --alflb-rule"),
        (["--no-alflb-centring"], {}, "--alflb-centring=False: has no effect without --alflb-rule"),
        (["--alflb-rule", "best"], {}, "--alflb-rule=best: must be one of"),
        (["--alflb-rule", "sign", "--alflb-step-size", "x"], {}, "--alflb-step-size=x: must be of type float"),
        (["--alflb-rule", "sign"], {"num_experts": None}, "--num-experts=None: ALF-LB balances experts"),
        ([], {"spec": OURS}, "--spec=.* block_spec: is for an unpatched pretrain_gpt.py; here use --alflb-rule"),
    ],
)
def test_what_cannot_work_is_refused(words: list[str], changes: dict[str, Any], text: str) -> None:
    args = parsed(*words)
    vars(args).update(changes)
    with pytest.raises(SettingError, match=text):
        megatron_lm.enable_from(args)


def test_megatrons_own_flag_is_allowed_and_said_to_move_nothing(
    without_log: None, caplog: pytest.LogCaptureFixture
) -> None:
    args = parsed("--alflb-rule", "sign")
    args.moe_router_enable_expert_bias = True
    megatron_lm.enable_from(args)
    assert "move nothing while ALF-LB is on" in caplog.text


@pytest.mark.parametrize(
    "refused", [{"virtual_pipeline_model_parallel_size": 2}, {"mtp_num_layers": 1}, {"yaml_cfg": "a.yaml"}]
)
def test_one_block_cannot_serve_every_chunk(refused: dict[str, Any]) -> None:
    args = argparse.Namespace(virtual_pipeline_model_parallel_size=None, mtp_num_layers=None)
    megatron_lm._refuse_what_one_object_cannot_serve(args)
    vars(args).update(refused)
    with pytest.raises(SettingError, match=r"alflb patch DIR"):
        megatron_lm._refuse_what_one_object_cannot_serve(args)


def test_no_spec_is_built_before_arguments_are_parsed() -> None:
    assert importlib.import_module("alflb_megatron.hosts.megatron_lm").block_spec is None
