"""Replays rules over recorded scores, so that a user chooses one before paying for a cluster.

The order is causal: step n is routed with the bias made from the steps before n, and only then moves it. `replay`
returns, and `alflb replay --json` writes:

    {"steps": int, "layers": [int], "tokens": mean of a step, "topk": int, "experts": int,
     "floor": expected MaxVio if every token drew topk distinct experts uniformly (`sampling_floor_at_any_size`),
     "sequence_floor": that of whole sequences under the best bias (`sequence_floor`), mean over the layers and over at
                       most FLOOR_STEPS of steps 10 and later; null where the recording does not tell its sequences,
     "rules": {LABEL: {
        "steps_to_2x_floor": first step, from 0, whose MaxVio is at most twice the floor: so many updates it took;
                             the slowest layer's, null if one never gets there,
        "steps_to_2x_sequence_floor": the same with the sequence floor; null also where there is none,
        "mean_over_floor":   mean MaxVio over steps 10 and later / floor; "maxvio_mean" is the same undivided,
        "tail_over_floor":   the same over the last quarter of the steps; "maxvio_tail",
        "worst_over_floor":  the largest MaxVio of steps 10 and later / floor; "maxvio_worst",
        "affinity_kept":     chosen scores / those of the K best of each token, each summed over steps 10 and later,
        "update_ms":         median milliseconds of one layer's update: measuring margins, and the rule's step,
        "maxvio":            [MaxVio of each step, mean over the layers],
        "per_layer":         [{"layer": int, and all of the above but update_ms and maxvio}]}},
     "hindsight": {the same keys without steps_to_... and update_ms, and "sweeps": mean number a step} or null}

Figures of a rule are means over its layers but where another is said. With fewer than 11 steps those that need step 10
are null; so are ratios where the floor is 0 (topk = experts). "hindsight" is what the best bias for each very batch
would have given (`HindsightBias`): no rule can know it beforehand.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alflb_megatron import metrics, rules
from alflb_megatron.lab.replay.recording import FLAG, Gating, Recording
from alflb_megatron.lab.replay.replayed_rules import (
    HindsightBias,
    ReplayedRouter,
    ReplayedRule,
    choose_experts,
    topk_of,
)
from alflb_megatron.lab.replay.sequence_floor import sequence_floor
from alflb_megatron.rules import Rule
from alflb_megatron.settings import SettingError

DEFAULT_RULES = ("sign", "quantile", "adaptive")

WARM_UP = 10
"""Steps that the means leave out."""
FLOOR_STEPS = 8
"""Steps that the sequence floor is taken at, evenly over those that the means are of."""


STEPS_TO = ("steps_to_2x_floor", "steps_to_2x_sequence_floor")


@functools.cache
def sampling_floor_at_any_size(tokens: int, topk: int, experts: int) -> float:
    """The sampling floor (`metrics.sampling_floor`) in a few seconds at any size, good to a few percent.

    Simulated with up to 1000 draws. Where the mean load is above 2000, the loads' joint distribution is normal:
    sampling_floor's limit, from 20,000 seeded draws of that.
    """
    work = tokens * topk * (1 + topk / 4)  # in units of some 10 ns
    if tokens * topk <= 2000 * experts and (draws := int(3e8 / work)) >= 100:
        return metrics.sampling_floor(tokens, topk, experts, draws=min(1000, draws))
    if topk == experts:
        return 0.0
    normal_DE = np.random.default_rng(0).standard_normal((20_000, experts))
    normal_DE -= normal_DE.mean(axis=1, keepdims=True)
    share = topk / experts  # a load's variance is tokens share (1 - share); all loads sum to tokens topk
    deviation = math.sqrt((1 - share) / (tokens * share) * experts / (experts - 1))  # of load / mean load
    return float(normal_DE.max(axis=1).mean() * deviation)


def resolve_gating(recording: Recording, topk: int | None) -> Gating:
    """The recording's gating with `topk` over its own; SettingError where there is none, or it cannot be."""
    gating, experts = recording.gating, recording.experts
    if topk is None and gating.topk is None:
        raise SettingError("--topk", "none", f"{recording.name} does not hold it: give 1 to {experts}")
    chosen = topk_of(gating) if topk is None else topk
    if not 1 <= chosen <= experts:
        raise SettingError("--topk", chosen, f"must be from 1 to the {experts} experts of {recording.name}")
    if gating.group_topk and gating.num_groups:
        most = gating.group_topk * (experts // gating.num_groups)
        if chosen % gating.group_topk or chosen > most:
            allowed = f"must be a multiple of {gating.group_topk}, at most {most}: the scores were made with groups"
            raise SettingError("--topk", chosen, allowed)
    return Gating(chosen, gating.score_function, gating.num_groups, gating.group_topk)


def replay(
    recording: Recording,
    candidates: Mapping[str, Rule | ReplayedRouter] | None = None,
    topk: int | None = None,
    centring: bool = True,
    hindsight: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Replays rules (label -> rule; by default `DEFAULT_RULES`) side by side; the figures in the module's docstring.

    A candidate may also be any other `ReplayedRouter`, another framework's router say.

    The recording is read once. `topk` goes over the recording's own; `centring` is `ALFConfig.centring`. `progress` is
    called with the number of steps done after each. Raises SettingError for a recording that cannot be replayed.
    """
    gating = resolve_gating(recording, topk)
    if candidates is None:
        candidates = {name: rules.make(name) for name in DEFAULT_RULES}
    layers, experts, steps = len(recording.layers), recording.experts, recording.steps
    replayed: dict[str, ReplayedRouter | HindsightBias] = {
        label: ReplayedRule(one, layers, experts, gating, centring) if isinstance(one, Rule) else one
        for label, one in candidates.items()
    }
    if hindsight:
        replayed[""] = HindsightBias(layers, experts, gating)
    vio = {label: np.empty((steps, layers)) for label in replayed}
    kept = {label: np.empty((steps, layers)) for label in replayed}
    most_SL, tokens_S = np.empty((steps, layers)), np.empty(steps)
    floor_at = set(np.linspace(min(WARM_UP, steps - 1), steps - 1, FLOOR_STEPS).astype(int).tolist())
    sequence_floors: list[float] = []
    done = 0
    for step, scores_LTE in enumerate(recording):
        tokens_S[step] = scores_LTE.shape[1]
        most_SL[step] = [choose_experts(scores_TE, gating).affinity(scores_TE) for scores_TE in scores_LTE]
        for label, one in replayed.items():
            loads_LE, kept[label][step] = one.step(scores_LTE)
            vio[label][step] = metrics.max_vio(loads_LE).numpy()
        if step in floor_at and recording.layout is not None:
            for scores_TE in scores_LTE:
                sequences_NTE = recording.layout.sequences(scores_TE)
                if sequences_NTE is None:
                    length, tokens = recording.layout.sequence_length, scores_TE.shape[0]
                    raise SettingError("--sequence-length", length, f"must divide the {tokens} tokens of step {step}")
                if len(sequences_NTE) > 1:
                    sequence_floors.append(sequence_floor(sequences_NTE, gating))
        done = step + 1
        if progress is not None:
            progress(done)
    if done != steps:
        raise SettingError(FLAG, recording.name, f"holds {done} steps, not the {steps} it announces")
    mean_tokens = float(tokens_S.mean())
    floor = sampling_floor_at_any_size(round(mean_tokens), topk_of(gating), experts)
    whole = statistics.fmean(sequence_floors) if sequence_floors else None
    found = {label: _figures(recording.layers, vio[label], kept[label], most_SL, floor, whole) for label in replayed}
    by_rule: dict[str, Any] = {}
    for label, one in replayed.items():
        if not isinstance(one, HindsightBias):
            by_rule[label] = {**found[label], "update_ms": 1e3 * statistics.median(one.seconds)}
    result: dict[str, Any] = {
        "floor": floor,
        "sequence_floor": whole,
        "topk": topk_of(gating),
        "experts": experts,
        "tokens": mean_tokens,
        "steps": steps,
    }
    result |= {"layers": list(recording.layers), "rules": by_rule, "hindsight": None}
    if isinstance(last := replayed.get(""), HindsightBias):
        for row in (found[""], *found[""]["per_layer"]):
            for name in STEPS_TO:
                del row[name]  # nothing is learnt from step to step
        result["hindsight"] = {**found[""], "sweeps": statistics.fmean(last.sweeps)}
    return result


def _figures(
    layers: Sequence[int],
    vio_SL: NDArray[np.float64],
    kept_SL: NDArray[np.float64],
    most_SL: NDArray[np.float64],
    floor: float,
    whole: float | None,
) -> dict[str, Any]:
    per_layer = []
    for column, layer in enumerate(layers):
        vio_S, kept_S, most_S = vio_SL[:, column], kept_SL[WARM_UP:, column], most_SL[WARM_UP:, column]
        later_S, tail_S = vio_S[WARM_UP:], vio_S[-max(1, len(vio_S) // 4) :]
        row: dict[str, Any] = {"layer": layer}
        for name, level in zip(STEPS_TO, (floor, whole), strict=True):
            there_S = np.flatnonzero(vio_S <= 2 * (-1 if level is None else level))
            row[name] = int(there_S[0]) if len(there_S) else None
        plain = {
            "mean": float(later_S.mean()) if len(later_S) else None,
            "tail": float(tail_S.mean()),
            "worst": float(later_S.max()) if len(later_S) else None,
        }
        row |= {f"{name}_over_floor": None if x is None or not floor else x / floor for name, x in plain.items()}
        row |= {f"maxvio_{name}": x for name, x in plain.items()}
        row["affinity_kept"] = float(kept_S.sum() / most_S.sum()) if most_S.sum() else None
        per_layer.append(row)
    all_layers: dict[str, Any] = {}
    for name in per_layer[0]:
        values = [row[name] for row in per_layer]
        if name != "layer":
            over = max if name in STEPS_TO else statistics.fmean
            all_layers[name] = None if None in values else over(values)
    return {**all_layers, "maxvio": vio_SL.mean(axis=1).tolist(), "per_layer": per_layer}
