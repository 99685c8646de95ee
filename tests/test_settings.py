"""Settings: one declaration gives defaults, checks, flags and the table."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from alflb_megatron.config import PREFIX, ALFConfig, parse_options
from alflb_megatron.lab.training.job import Job
from alflb_megatron.models import ModelShape
from alflb_megatron.settings import SettingError, add_flags, given_environment, given_flags, knobs

ROOT = Path(__file__).parent.parent


def read(*words: str) -> ALFConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser, ALFConfig, PREFIX)
    return ALFConfig(**given_flags(parser.parse_args(words), ALFConfig, PREFIX))


def test_flags_and_defaults_come_from_the_dataclass() -> None:
    assert read() == ALFConfig()
    words = ["--alflb-rule", "sqrt", "--alflb-step-size", "0.5", "--no-alflb-centring", "--alflb-frozen"]
    assert read(*words) == ALFConfig(rule="sqrt", step_size=0.5, centring=False, frozen=True)
    assert read("--alflb-step-size", "none").step_size is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--alflb-rule", "magic"],
            "--alflb-rule=magic: must be one of adaptive, harmonic, proportional, quantile, rms, sign, smebu, sqrt",
        ),
        (["--alflb-step-size", "-0.1"], "--alflb-step-size=-0.1: must be at least 0"),
        (["--alflb-step-size", "fast"], "--alflb-step-size=fast: must be of type float"),
        (["--alflb-step-size", "inf"], "--alflb-step-size=inf: must be a finite number, at least 0"),
        (["--alflb-score-unit", "loss"], "--alflb-score-unit=loss: must be one of score, logit"),
        (["--alflb-log-every", "1.5"], "--alflb-log-every=1.5: must be of type int"),
        (["--alflb-rule-options", "x"], "--alflb-rule-options=x: must be name=value, several separated by commas"),
        (
            ["--alflb-rule-options", "x=1"],
            "--alflb-rule-options x=1: rule adaptive has no such knob; it has none",
        ),
    ],
)
def test_a_wrong_value_names_flag_value_and_what_is_allowed(words: list[str], text: str) -> None:
    with pytest.raises(SettingError) as caught:
        read(*words)
    assert str(caught.value) == text


def test_types_are_held() -> None:
    with pytest.raises(SettingError, match="--alflb-frozen"):
        ALFConfig(frozen="yes")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="--alflb-log-every"):
        ALFConfig(log_every=True)
    assert ALFConfig(rule="sign", step_size=1).rule_knobs.step_size == 1.0  # type: ignore[attr-defined]


def test_rule_options_are_read_as_values() -> None:
    assert parse_options("floor=0.01, restart=true,name=text") == {"floor": 0.01, "restart": True, "name": "text"}


def test_every_knob_says_what_it_does() -> None:
    for cls in (ALFConfig, Job, ModelShape):
        for field, knob, *_ in knobs(cls):
            assert knob.help, field.name


def test_the_reference_pages_are_what_the_code_states() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, page in generate.PAGES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page(), f"docs/{name}: run `make docs`"


def test_the_environment_sets_knobs_too() -> None:
    given = {
        "ALFLB_RULE": "sqrt",
        "ALFLB_STEP_SIZE": "0.5",
        "ALFLB_CENTRING": "false",
        "ALFLB_RULE_OPTIONS": "",
        "X": "1",
    }
    assert given_environment(given, ALFConfig, PREFIX) == {"rule": "sqrt", "step_size": 0.5, "centring": False}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"ALFLB_STEP": "1"}, "ALFLB_STEP=1: no such setting; there are ALFLB_RULE, ALFLB_STEP_SIZE"),
        ({"ALFLB_STEP_SIZE": "fast"}, "ALFLB_STEP_SIZE=fast: must be of type float"),
        ({"ALFLB_FROZEN": "maybe"}, "ALFLB_FROZEN=maybe: must be true or false"),
    ],
)
def test_a_wrong_variable_is_named(given: dict[str, str], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        given_environment(given, ALFConfig, PREFIX)
