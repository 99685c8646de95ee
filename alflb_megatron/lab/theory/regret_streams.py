"""What the regret claim is measured on: the streams of scores, and the rules and step sizes that run over them."""

from __future__ import annotations

from collections.abc import Mapping

from alflb_megatron import rules
from alflb_megatron.lab.theory.curvature import moduli
from alflb_megatron.lab.theory.score_stream import Stream
from alflb_megatron.rules import Rule

SWEPT = ("sign", "proportional", "sqrt", "harmonic")
STEP_SIZES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""u, in the unit of the rules: score units per relative violation (L - A) / L."""
MULTIPLES = {f"u/n, u = {m:g}/mu": m for m in (0.125, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)}
"""u of u/n around 1 / mu, mu that at p*, by label."""
AT = "u/n, u = 1/mu"

QUICK = Stream(seeds=20)
CLOSE, CLOSE_MULTIPLE = Stream(tokens=512, spread=0.1), 2.0
"""A stream whose iterates stay close to p*, and u for it in units of 1 / mu."""
UNEVEN = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
"""Widths of eight experts' scores: the curvature then differs by direction."""


def harmonic_rules(stream: Stream, multiples: Mapping[str, float]) -> dict[str, Rule]:
    """u/n with u in units of 1 / mu(p*); u per token is K / E of it in the unit of the rules."""
    model = stream.model()
    mu = moduli(model.weights(model.optimum())).smallest
    unit = stream.topk / stream.experts
    return {label: rules.make("harmonic", step_size=m * unit / mu) for label, m in multiples.items()}


def swept_rules() -> dict[str, Rule]:
    """Every rule of `SWEPT` at every u of `STEP_SIZES`, and the rules that have none."""
    swept: dict[str, Rule] = {f"{name} u={u:g}": rules.make(name, step_size=u) for name in SWEPT for u in STEP_SIZES}
    return swept | {name: rules.make(name) for name in ("quantile", "adaptive")}


def rules_for_moving_means(unit: float, mu: float) -> dict[str, Rule]:
    """What is compared where the comparator moves, beside u/n; `unit` is K / E, `mu` the modulus at p*."""
    return {
        "u/sqrt n, u = 1/mu": rules.make("sqrt", step_size=unit / mu),
        "sign u=0.01": rules.make("sign", step_size=1e-2),
        "proportional u=0.1": rules.make("proportional", step_size=0.1),
        "quantile": rules.make("quantile"),
        "adaptive": rules.make("adaptive"),
    }
