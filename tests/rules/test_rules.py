"""Each rule against a few lines of NumPy that say its formula, and what all rules owe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alflb_megatron import rules
from alflb_megatron.margins import BINS, Threshold, add, of_top
from alflb_megatron.rules import Rule, Stats
from alflb_megatron.settings import SettingError, knob


def _violation(a: np.ndarray) -> np.ndarray:
    return 1 - a / a.mean(-1, keepdims=True)


def _smebu(p: np.ndarray, a: np.ndarray, n: np.ndarray, margins: list[np.ndarray]) -> np.ndarray:
    drive = 5e-4 * np.tanh(2 * _violation(a))
    return p + 0.5 * (drive - drive.mean(-1, keepdims=True))


def _rms(p: np.ndarray, a: np.ndarray, n: np.ndarray, margins: list[np.ndarray]) -> np.ndarray:
    e = _violation(a)
    return p + 1e-3 * e / np.sqrt((e**2).mean(-1, keepdims=True))


def _exact_moves(margins: list[np.ndarray], a: np.ndarray) -> np.ndarray:
    """Minus the L-th largest margin of each expert, from the margins themselves."""
    return np.stack([-np.sort(m, axis=0)[-int(load), :] for m, load in zip(margins, a.mean(-1), strict=True)])


def _quantile(p: np.ndarray, a: np.ndarray, n: np.ndarray, margins: list[np.ndarray]) -> np.ndarray:
    return p + _exact_moves(margins, a)


def _adaptive(p: np.ndarray, a: np.ndarray, n: np.ndarray, margins: list[np.ndarray]) -> np.ndarray:
    d = _exact_moves(margins, a)  # the first update: gain 1, no velocity yet
    return p + (d - d.mean(-1, keepdims=True)) * (a.shape[-1] - 1) / a.shape[-1]


FORMULAS = {
    "adaptive": _adaptive,
    "harmonic": lambda p, a, n, m: p + 1.0 / n[:, None] * _violation(a),
    "proportional": lambda p, a, n, m: p + 1e-2 * _violation(a),
    "quantile": _quantile,
    "rms": _rms,
    "sign": lambda p, a, n, m: p + 1e-3 * np.sign(a.mean(-1, keepdims=True) - a),
    "smebu": _smebu,
    "sqrt": lambda p, a, n, m: p + 0.1 / np.sqrt(n[:, None]) * _violation(a),
}
TOPK = 2


@dataclass(frozen=True)
class Batch:
    """One global batch routed with `bias`: what a rule is shown, and the margins behind the histogram."""

    bias: torch.Tensor
    stats: Stats
    margins: list[torch.Tensor]


def route(scores_LTE: torch.Tensor, bias: torch.Tensor, n: torch.Tensor, threshold: Threshold) -> Batch:
    layers, _, experts = scores_LTE.shape
    histogram = torch.zeros(layers, experts, BINS, dtype=torch.int32)
    loads = torch.zeros(layers, experts, dtype=torch.int64)
    kept = []
    for layer in range(layers):
        ranked = scores_LTE[layer] + bias[layer]
        top, chosen = ranked.topk(TOPK + 1)
        margins_TE = of_top(ranked, top, chosen[:, :TOPK], threshold)
        add(histogram[layer], margins_TE)
        loads[layer] = torch.bincount(chosen[:, :TOPK].flatten(), minlength=experts)
        kept.append(margins_TE)
    return Batch(bias, Stats(loads, n, histogram), kept)


def example(name: str, seed: int = 0, layers: int = 3, tokens: int = 400, experts: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layers, tokens, experts, generator=generator)
    bias = torch.randn(layers, experts, generator=generator) * 0.1
    n = torch.randint(1, 50, (layers,), generator=generator)
    return route(scores, bias, n, rules.make(name).threshold or Threshold.OWN)


def step(name: str, bias: torch.Tensor, stats: Stats) -> torch.Tensor:
    rule = rules.make(name)
    return rule.step(bias, stats, rule.init(*bias.shape))[0]


def test_every_rule_has_a_formula_here() -> None:
    assert sorted(FORMULAS) == rules.names()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(5))
def test_rule_is_its_formula(name: str, seed: int) -> None:
    batch = example(name, seed)
    stats = batch.stats
    expected = FORMULAS[name](
        batch.bias.double().numpy(),
        stats.loads.double().numpy(),
        stats.n.double().numpy(),
        [margins.double().numpy() for margins in batch.margins],
    )
    # A histogram knows a margin up to its bin, which is at most a quarter of it; margins here are below 1.
    tolerance = {"rtol": 0, "atol": 3e-7} if rules.make(name).threshold is None else {"rtol": 0.25, "atol": 0.02}
    moved = step(name, batch.bias, stats).numpy()
    np.testing.assert_allclose(moved - batch.bias.numpy(), expected - batch.bias.numpy(), **tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_the_chance_in_a_sample_does_not_move_a_bias(seed: int) -> None:
    """Of eight samples of one batch, each with the exact loads beside it: all ask for nearly the move of the batch."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 8000, 16, generator=generator) + 0.1 * torch.rand(16, generator=generator)
    bias, n = torch.zeros(1, 16), torch.ones(1, dtype=torch.int64)
    whole = route(scores, bias, n, Threshold.OWN).stats
    errors: dict[str, list[torch.Tensor]] = {"exact loads": [], "sample's loads": []}
    for first in range(8):
        sample = route(scores[:, first::8], bias, n, Threshold.OWN).stats
        for name, loads in (("exact loads", whole.loads), ("sample's loads", sample.loads)):
            move = Stats(loads, n, sample.histogram).move_to_balance
            errors[name].append(move - whole.move_to_balance)
    size = {name: float(torch.stack(rows).square().mean().sqrt()) for name, rows in errors.items()}
    assert size["exact loads"] < 0.5 * size["sample's loads"]
    assert size["exact loads"] < 0.2 * float(whole.move_to_balance.square().mean().sqrt())


@pytest.mark.parametrize("name", FORMULAS)
def test_permuting_experts_permutes_the_step(name: str) -> None:
    batch = example(name)
    stats = batch.stats
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    permuted = step(name, batch.bias[:, order], Stats(stats.loads[:, order], stats.n, stats.histogram[:, order]))
    # `adaptive` sums over experts, in another order: one rounding of float32 apart.
    torch.testing.assert_close(permuted, step(name, batch.bias, stats)[:, order], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_constant_in_the_bias_does_not_change_the_move(name: str) -> None:
    batch = example(name)
    bias, stats = batch.bias, batch.stats
    # 0.25 and the biases' moves are added in another order: one rounding of float32 apart.
    torch.testing.assert_close(step(name, bias + 0.25, stats) - 0.25, step(name, bias, stats), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_same_relative_loads_give_the_same_step_at_any_batch_size(name: str) -> None:
    batch = example(name)
    bias, stats = batch.bias, batch.stats
    larger = Stats(stats.loads * 1024, stats.n, stats.histogram * 1024)
    assert torch.equal(step(name, bias, larger), step(name, bias, stats))


@pytest.mark.parametrize("name", FORMULAS)
def test_step_leaves_its_arguments_alone(name: str) -> None:
    batch = example(name)
    bias, stats, rule = batch.bias, batch.stats, rules.make(name)
    state = rule.init(*bias.shape)
    _, state = rule.step(bias, stats, state)
    arguments = [bias, stats.loads, stats.n, stats.histogram, *state.values()]
    kept = [argument.clone() for argument in arguments]
    rule.step(bias, stats, state)
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, kept, strict=True))


@pytest.mark.parametrize("name", FORMULAS)
def test_balance_is_a_fixed_point(name: str) -> None:
    # Every expert has four tokens of its own, all by another distance, so that no two histograms are alike.
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(64, 16, generator=generator) * 0.1
    for token in range(64):
        scores[token, token % 16] += 0.5 + 0.1 * (token % 16)
        scores[token, (token + 1) % 16] += 0.5
    bias = torch.randn(1, 16, generator=generator) * 0.01
    batch = route(scores[None], bias, torch.ones(1, dtype=torch.int64), rules.make(name).threshold or Threshold.OWN)
    assert torch.equal(batch.stats.loads, torch.full((1, 16), 8))
    assert batch.stats.histogram is not None
    assert not torch.equal(batch.stats.histogram[0, 0], batch.stats.histogram[0, 1])
    torch.testing.assert_close(step(name, batch.bias, batch.stats), batch.bias, rtol=0, atol=0)


def _filter(moves: list[np.ndarray], violations: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """`adaptive` after its docstring, one layer: what each update leaves, given each batch's moves and violations."""

    def corr(a: np.ndarray, b: np.ndarray) -> float:
        length = np.sqrt((a @ a) * (b @ b))
        return float(a @ b / length) if length else 0.0

    experts = len(moves[0])
    p, v, s, last = (np.zeros(experts) for _ in range(4))
    g, c, e = 1.0, 0.0, 0.0
    found = []
    for d, r in zip(moves, violations, strict=True):
        now, before = np.mean(r**2), np.mean(last**2)
        landing = min(1.0, now / before) if before else 1.0
        v = v + 0.2 * landing * (s - v)
        g = float(np.clip(g * np.exp(0.4 * corr(r, last)), 0.02, 1))
        c = float(np.clip(c + 0.1 * landing * corr(r, v), 0, 0.95))
        if e > 0:
            shift = max(0.0, 1 - 4 * e / now)
            g, c = max(g, shift), c * (1 - shift)
        s = g * (d - d.mean()) * (experts - 1) / experts + c * v
        p = p + s
        e = e + 0.1 * (min(now, 16 * e) - e) if e > 0 else now
        last = r
        found.append(
            {"bias": p, "gain": np.array([g]), "velocity_weight": np.array([c]), "energy": np.array([e]), "velocity": v}
        )
    return found


def test_adaptive_is_its_formula_step_after_step() -> None:
    rule, generator = rules.make("adaptive"), torch.Generator().manual_seed(5)
    bias, state = torch.zeros(1, 12), rule.init(1, 12)
    taste, drift = torch.zeros(12), 0.02 * torch.randn(12, generator=generator)
    moves, violations, found = [], [], []
    for n in range(1, 61):
        taste = taste + (drift if n < 30 else 0) + (0.5 * torch.randn(12, generator=generator) if n == 45 else 0)
        scores = torch.rand(1, 500, 12, generator=generator) + taste
        batch = route(scores, bias, torch.tensor([n]), Threshold.OWN)
        bias, state = rule.step(bias, batch.stats, state)
        moves.append(batch.stats.move_to_balance[0].double().numpy())
        violations.append(batch.stats.violation[0].double().numpy())
        found.append({"bias": bias, **state})
    expected = _filter(moves, violations)
    gains = [row["gain"].item() for row in expected]
    assert min(gains) < 0.5, "the example should have noise"
    assert max(row["velocity_weight"].item() for row in expected) > 0.2, "and drift"
    assert gains[44] > gains[43] + 0.3, "and a shift"
    for mine, theirs in zip(found, expected, strict=True):
        for name, row in theirs.items():
            np.testing.assert_allclose(mine[name][0].numpy(), row, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("options", "share"), [({"ema": 0.8}, 0.2), ({"against": "own"}, 1.0)])
def test_variants_of_quantile(options: dict[str, object], share: float) -> None:
    rule = rules.make("quantile", **options)
    scores = torch.rand(1, 4000, 16, generator=torch.Generator().manual_seed(0))
    batch = route(scores, torch.randn(1, 16) * 0.1, torch.ones(1, dtype=torch.int64), rule.threshold)
    moved = (rule.step(batch.bias, batch.stats, {})[0] - batch.bias).double().numpy()
    exact = share * _exact_moves([m.double().numpy() for m in batch.margins], batch.stats.loads.double().numpy())
    np.testing.assert_allclose(moved, exact, rtol=0.05, atol=0.002)


def test_a_restart_that_is_switched_on_late_goes_on_from_n() -> None:
    batch = example("harmonic")
    stats = Stats(batch.stats.loads, torch.full((3,), 5000))
    rule = rules.make("harmonic", restart=0.5)
    moved = rule.step(batch.bias, stats, rule.init(3, 16))[0]
    assert torch.equal(moved, step("harmonic", batch.bias, stats))


@pytest.mark.parametrize("name", FORMULAS)
def test_layers_do_not_know_of_each_other(name: str) -> None:
    batch = example(name)
    stats = batch.stats
    alone = [
        step(name, batch.bias[k : k + 1], Stats(stats.loads[k : k + 1], stats.n[k : k + 1], stats.histogram[k : k + 1]))
        for k in range(3)
    ]
    torch.testing.assert_close(torch.cat(alone), step(name, batch.bias, stats), rtol=0, atol=1e-7)


@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(FORMULAS)),
    experts=st.sampled_from([2, 3, 16, 64]),
    tokens=st.sampled_from([1, 7, 300]),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 300.0]),
)
@settings(max_examples=80, deadline=None)
def test_steps_stay_finite_whatever_the_batch(seed: int, name: str, experts: int, tokens: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rule, bias, state = rules.make(name), torch.zeros(2, experts), rules.make(name).init(2, experts)
    for n in range(1, 5):
        scores = torch.randn(2, tokens, experts, generator=generator) * spread
        topk = min(TOPK, experts - 1)
        histogram = torch.zeros(2, experts, BINS, dtype=torch.int32)
        loads = torch.zeros(2, experts, dtype=torch.int64)
        for layer in range(2):
            top, chosen = (scores[layer] + bias[layer]).topk(topk + 1)
            add(histogram[layer], of_top(scores[layer] + bias[layer], top, chosen[:, :topk], Threshold.OWN))
            loads[layer] = torch.bincount(chosen[:, :topk].flatten(), minlength=experts)
        bias, state = rule.step(bias, Stats(loads, torch.full((2,), n), histogram), state)
        assert bias.isfinite().all()
        assert all(row.isfinite().all() for row in state.values())
        assert bias.dtype == torch.float32


def test_what_a_mean_centred_sign_moves_adds_up_to_nothing() -> None:
    batch = example("sign")
    rule = rules.make("sign", mean_centred=True)
    moved = rule.step(batch.bias, batch.stats, {})[0] - batch.bias
    plain = step("sign", batch.bias, batch.stats) - batch.bias
    assert plain.sum(-1).abs().max() > 1e-4, "the example should have more of one sign"
    torch.testing.assert_close(moved, plain - plain.mean(-1, keepdim=True), rtol=0, atol=1e-7)


def test_smebu_keeps_half_of_its_last_move() -> None:
    batch = example("smebu")
    rule, state = rules.make("smebu"), rules.make("smebu").init(3, 16)
    first, state = rule.step(batch.bias, batch.stats, state)
    even = Stats(torch.full_like(batch.stats.loads, 5), batch.stats.n)
    second, _ = rule.step(first, even, state)
    torch.testing.assert_close(second - first, 0.5 * (first - batch.bias), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(("name", "rate"), [("sqrt", 0.1), ("harmonic", 1.0)])
def test_a_floor_keeps_the_rate_from_freezing(name: str, rate: float) -> None:
    batch = example(name)
    late = Stats(batch.stats.loads, torch.full((3,), 10**6))
    moved = rules.make(name, floor=0.05).step(batch.bias, late, {})[0] - batch.bias
    torch.testing.assert_close(moved, 0.05 * late.violation, rtol=0, atol=1e-7)
    first = Stats(batch.stats.loads, torch.ones(3))
    moved = rules.make(name, floor=0.05).step(batch.bias, first, {})[0] - batch.bias
    torch.testing.assert_close(moved, rate * first.violation, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sqrt", "harmonic"])
def test_a_restart_comes_with_drift_and_not_with_noise(name: str) -> None:
    rule = rules.make(name, restart=0.5)
    generator = torch.Generator().manual_seed(0)
    bias, state = torch.zeros(1, 64), rule.init(1, 64)
    ages = []
    drift = torch.randint(-50, 50, (1, 64), generator=generator)
    for n in range(1, 121):
        noise = torch.randint(-50, 50, (1, 64), generator=generator)
        loads = 1000 + (noise if n <= 100 else drift)
        bias, state = rule.step(bias, Stats(loads, torch.tensor([n])), state)
        ages.append(int(state["age"]))
    assert ages[:100] == list(range(1, 101)), "independent violations are no reason to start again"
    assert min(ages[100:]) == 1


def test_the_gain_falls_in_noise_and_returns_at_once_when_the_data_shifts() -> None:
    rule, layers = rules.make("adaptive"), 1
    generator = torch.Generator().manual_seed(0)
    bias, state = torch.zeros(layers, 32), rule.init(layers, 32)
    taste = torch.randn(32, generator=generator) * 0.1
    gains = []
    for n in range(1, 42):
        if n == 41:
            taste = torch.randn(32, generator=generator) * 0.3
        scores = torch.rand(layers, 2000, 32, generator=generator) + taste
        batch = route(scores, bias, torch.tensor([n]), Threshold.OWN)
        bias, state = rule.step(bias, batch.stats, state)
        gains.append(float(state["gain"]))
    assert gains[0] == 1.0
    assert gains[39] < 0.35
    assert gains[40] > 0.9


def test_the_velocity_carries_the_bias_along_a_steady_drift() -> None:
    def lag(velocity: bool) -> float:
        rule = rules.make("adaptive")
        generator = torch.Generator().manual_seed(0)
        bias, state = torch.zeros(1, 32), rule.init(1, 32)
        direction = torch.randn(32, generator=generator) * 0.01
        vio = []
        for n in range(1, 81):
            scores = torch.rand(1, 4000, 32, generator=generator) + n * direction
            batch = route(scores, bias, torch.tensor([n]), Threshold.OWN)
            bias, state = rule.step(bias, batch.stats, state)
            if not velocity:
                state["velocity_weight"] = torch.zeros(1, 1)
            vio.append(float(batch.stats.violation.abs().max()))
        return sum(vio[20:]) / 60

    assert lag(velocity=True) < 0.9 * lag(velocity=False)


def test_a_rule_that_asks_for_margins_without_a_threshold_is_told() -> None:
    with pytest.raises(ValueError, match="threshold"):
        _ = Stats(torch.ones(1, 4, dtype=torch.int64), torch.ones(1)).move_to_balance


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
        bias, stats = example("sign").bias, example("sign").stats
        assert "mine" in rules.names()
        assert (rules.make("mine", step_size=0.5).step(bias, stats, {})[0] - bias).abs().max() <= 0.5
        with pytest.raises(ValueError, match="taken"):
            rules.register("mine")(rules.get("sign"))
    finally:
        rules._REGISTRY.pop("mine")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "signs",
            {},
            "--alflb-rule=signs: must be one of adaptive, harmonic, proportional, quantile, rms, sign, smebu, sqrt",
        ),
        ("sign", {"step_size": -1.0}, "--alflb-step-size=-1.0: must be at least 0"),
        ("sign", {"step_size": float("nan")}, "--alflb-step-size=nan: must be a finite number, at least 0"),
        (
            "sign",
            {"floor": 1.0},
            "--alflb-rule-options floor=1.0: rule sign has no such knob; it has step_size, mean_centred",
        ),
        (
            "quantile",
            {"step_size": 1.0},
            "--alflb-step-size=1.0: rule quantile has no such knob; it has ema, against",
        ),
        ("quantile", {"against": "last"}, "--alflb-rule-options against=last: must be one of own, next"),
        ("adaptive", {"gain": 1.0}, "--alflb-rule-options gain=1.0: rule adaptive has no such knob; it has none"),
        ("sqrt", {"step_size": "big"}, "--alflb-step-size='big': must be of type float"),
    ],
)
def test_a_wrong_knob_explains_itself(name: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(SettingError) as caught:
        rules.make(name, **options)
    assert str(caught.value) == text
