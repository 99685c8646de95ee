"""Each rule against a few lines of NumPy that say its formula, and what all rules owe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from alflb_megatron import rules
from alflb_megatron.rules import Rule, Stats
from alflb_megatron.settings import SettingError, knob

FORMULAS = {
    "sign": lambda p, a, n: p + 1e-3 * np.sign(a.mean(-1, keepdims=True) - a),
    "proportional": lambda p, a, n: p + 1e-2 * (a.mean(-1, keepdims=True) - a) / a.mean(-1, keepdims=True),
    "sqrt": lambda p, a, n: p + 0.1 / np.sqrt(n[:, None]) * (a.mean(-1, keepdims=True) - a) / a.mean(-1, keepdims=True),
    "harmonic": lambda p, a, n: p + 1.0 / n[:, None] * (a.mean(-1, keepdims=True) - a) / a.mean(-1, keepdims=True),
}


def example(seed: int = 0, layers: int = 3, experts: int = 16) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    loads = torch.randint(0, 1000, (layers, experts), generator=generator)
    bias = torch.randn(layers, experts, generator=generator) * 0.1
    return bias, Stats(loads, torch.randint(1, 50, (layers,), generator=generator))


def step(name: str, bias: torch.Tensor, stats: Stats) -> torch.Tensor:
    rule = rules.make(name)
    return rule.step(bias, stats, rule.init(*bias.shape))[0]


def test_every_rule_has_a_formula_here() -> None:
    assert sorted(FORMULAS) == rules.names()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(5))
def test_rule_is_its_formula(name: str, seed: int) -> None:
    bias, stats = example(seed)
    expected = FORMULAS[name](bias.double().numpy(), stats.loads.double().numpy(), stats.n.double().numpy())
    np.testing.assert_allclose(step(name, bias, stats).numpy(), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", FORMULAS)
def test_permuting_experts_permutes_the_step(name: str) -> None:
    bias, stats = example()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    permuted = step(name, bias[:, order], Stats(stats.loads[:, order], stats.n))
    torch.testing.assert_close(permuted, step(name, bias, stats)[:, order], rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_constant_in_the_bias_does_not_change_the_move(name: str) -> None:
    bias, stats = example()
    # 0.25 and the biases' moves are added in another order: one rounding of float32 apart.
    torch.testing.assert_close(step(name, bias + 0.25, stats) - 0.25, step(name, bias, stats), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_same_relative_loads_give_the_same_step_at_any_batch_size(name: str) -> None:
    bias, stats = example()
    larger = Stats(stats.loads * 1024, stats.n)
    assert torch.equal(step(name, bias, larger), step(name, bias, stats))


@pytest.mark.parametrize("name", FORMULAS)
def test_step_leaves_its_arguments_alone(name: str) -> None:
    bias, stats = example()
    kept_bias, kept_loads = bias.clone(), stats.loads.clone()
    step(name, bias, stats)
    assert torch.equal(bias, kept_bias)
    assert torch.equal(stats.loads, kept_loads)


@pytest.mark.parametrize("name", FORMULAS)
def test_balance_is_a_fixed_point(name: str) -> None:
    bias, stats = example()
    even = Stats(torch.full_like(stats.loads, 7), stats.n)
    assert torch.equal(step(name, bias, even), bias)


def test_the_sign_is_exact_where_float32_is_not() -> None:
    # One token away from balance, beyond the integers float32 holds.
    loads = torch.tensor([[2**26 + 1, 2**26 - 1, 2**26, 2**26]])
    assert Stats(loads, torch.ones(1)).sign.tolist() == [[-1.0, 1.0, 0.0, 0.0]]


def test_the_rule_of_the_package_docstring_works() -> None:
    @rules.register("mine")
    @dataclass(frozen=True)
    class Mine(Rule):
        step_size: float = knob(1e-3, "largest move of a bias in one update", minimum=0.0)

        def step(self, bias, stats, state):  # type: ignore[no-untyped-def]
            return bias + self.step_size * stats.violation.tanh(), state

    try:
        bias, stats = example()
        assert "mine" in rules.names()
        assert (rules.make("mine", step_size=0.5).step(bias, stats, {})[0] - bias).abs().max() <= 0.5
        with pytest.raises(ValueError, match="taken"):
            rules.register("mine")(rules.get("sign"))
    finally:
        rules._REGISTRY.pop("mine")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("signs", {}, "--alflb-rule=signs: must be one of harmonic, proportional, sign, sqrt"),
        ("sign", {"step_size": -1.0}, "--alflb-step-size=-1.0: must be at least 0"),
        ("sign", {"step_size": float("nan")}, "--alflb-step-size=nan: must be a finite number, at least 0"),
        ("sign", {"floor": 1.0}, "--alflb-rule-options floor=1.0: rule sign has no such knob; it has step_size"),
        ("sqrt", {"step_size": "big"}, "--alflb-step-size='big': must be of type float"),
    ],
)
def test_a_wrong_knob_explains_itself(name: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(SettingError) as caught:
        rules.make(name, **options)
    assert str(caught.value) == text
