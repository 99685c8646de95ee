"""Replays rules over recorded scores, so that a user chooses one before paying for a cluster.

The order is causal: step n is routed with the bias made from the steps before n, and only then moves it. `replay`
returns, and `alflb replay --json` writes:

    {"steps": int, "layers": [int], "tokens": mean of a step, "topk": int, "experts": int,
     "floor": expected MaxVio if every token drew topk distinct experts uniformly (`floor_of`),
     "rules": {LABEL: {
        "steps_to_2x_floor": first step, from 0, whose MaxVio is at most twice the floor: so many updates it took;
                             the slowest layer's, null if one never gets there,
        "mean_over_floor":   mean MaxVio over steps 10 and later / floor; "maxvio_mean" is the same undivided,
        "tail_over_floor":   the same over the last quarter of the steps; "maxvio_tail",
        "worst_over_floor":  the largest MaxVio of steps 10 and later / floor; "maxvio_worst",
        "affinity_kept":     chosen scores / those of the K best of each token, each summed over steps 10 and later,
        "update_ms":         median milliseconds of one layer's update: measuring margins, and the rule's step,
        "maxvio":            [MaxVio of each step, mean over the layers],
        "per_layer":         [{"layer": int, and all of the above but update_ms and maxvio}]}},
     "hindsight": {the same keys without steps_to_2x_floor and update_ms, and "sweeps": mean number a step} or null}

Figures of a rule are means over its layers but where another is said. With fewer than 11 steps those that need step 10
are null; so are ratios where the floor is 0 (topk = experts). "hindsight" is what the best bias for each very batch
would have given (`Hindsight`): no rule can know it beforehand.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alflb_megatron import metrics, rules
from alflb_megatron.config import parse_options
from alflb_megatron.lab.display.text_table import aligned, explained
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.replay.replayed_rules import Contestant, Hindsight, Player, choose, topk_of
from alflb_megatron.lab.replay.scores import FLAG, Gating, Recording, open_scores
from alflb_megatron.rules import Rule
from alflb_megatron.settings import SettingError, add_flags, check, given_flags, knob

DEFAULT_RULES = ("sign", "quantile", "adaptive")

WARM_UP = 10
"""Steps that the means leave out."""


@functools.cache
def floor_of(tokens: int, topk: int, experts: int) -> float:
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
    players: Mapping[str, Rule | Contestant] | None = None,
    topk: int | None = None,
    centring: bool = True,
    hindsight: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Replays rules (label -> rule; by default `DEFAULT_RULES`) side by side; the figures in the module's docstring.

    A player may also be any other `Contestant`, another framework's router say.

    The recording is read once. `topk` goes over the recording's own; `centring` is `ALFConfig.centring`. `progress` is
    called with the number of steps done after each. Raises SettingError for a recording that cannot be replayed.
    """
    gating = resolve_gating(recording, topk)
    if players is None:
        players = {name: rules.make(name) for name in DEFAULT_RULES}
    layers, experts, steps = len(recording.layers), recording.experts, recording.steps
    going: dict[str, Contestant | Hindsight] = {
        label: Player(player, layers, experts, gating, centring) if isinstance(player, Rule) else player
        for label, player in players.items()
    }
    if hindsight:
        going[""] = Hindsight(layers, experts, gating)
    vio = {label: np.empty((steps, layers)) for label in going}
    kept = {label: np.empty((steps, layers)) for label in going}
    most_SL, tokens_S = np.empty((steps, layers)), np.empty(steps)
    done = 0
    for step, scores_LTE in enumerate(recording):
        tokens_S[step] = scores_LTE.shape[1]
        most_SL[step] = [choose(scores_TE, gating).affinity(scores_TE) for scores_TE in scores_LTE]
        for label, player in going.items():
            loads_LE, kept[label][step] = player.step(scores_LTE)
            vio[label][step] = metrics.max_vio(loads_LE).numpy()
        done = step + 1
        if progress is not None:
            progress(done)
    if done != steps:
        raise SettingError(FLAG, recording.name, f"holds {done} steps, not the {steps} it announces")
    tokens = float(tokens_S.mean())
    floor = floor_of(round(tokens), topk_of(gating), experts)
    found = {label: _figures(recording.layers, vio[label], kept[label], most_SL, floor) for label in going}
    by_rule: dict[str, Any] = {}
    for label, player in going.items():
        if not isinstance(player, Hindsight):
            by_rule[label] = {**found[label], "update_ms": 1e3 * statistics.median(player.seconds)}
    result: dict[str, Any] = {
        "floor": floor,
        "topk": topk_of(gating),
        "experts": experts,
        "tokens": tokens,
        "steps": steps,
    }
    result |= {"layers": list(recording.layers), "rules": by_rule, "hindsight": None}
    if isinstance(last := going.get(""), Hindsight):
        for row in (found[""], *found[""]["per_layer"]):
            del row["steps_to_2x_floor"]  # nothing is learnt from step to step
        result["hindsight"] = {**found[""], "sweeps": statistics.fmean(last.sweeps)}
    return result


def _figures(
    layers: Sequence[int],
    vio_SL: NDArray[np.float64],
    kept_SL: NDArray[np.float64],
    most_SL: NDArray[np.float64],
    floor: float,
) -> dict[str, Any]:
    per_layer = []
    for column, layer in enumerate(layers):
        vio_S, kept_S, most_S = vio_SL[:, column], kept_SL[WARM_UP:, column], most_SL[WARM_UP:, column]
        later_S, tail_S = vio_S[WARM_UP:], vio_S[-max(1, len(vio_S) // 4) :]
        there_S = np.flatnonzero(vio_S <= 2 * floor)
        row: dict[str, Any] = {"layer": layer, "steps_to_2x_floor": int(there_S[0]) if len(there_S) else None}
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
            over = max if name == "steps_to_2x_floor" else statistics.fmean
            all_layers[name] = None if None in values else over(values)
    return {**all_layers, "maxvio": vio_SL.mean(axis=1).tolist(), "per_layer": per_layer}


# -- the command ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """The flags of `alflb replay`."""

    rules: str = knob(
        ",".join(DEFAULT_RULES),
        "what to replay, with a rule's own knobs after a colon: quantile:against=own;ema=0.8",
        metavar="RULE,...",
    )
    topk: int | None = knob(None, "experts a token; none takes the recording's", minimum=1)
    hindsight: bool = knob(True, "show the best bias for each very batch too, which takes the most time")
    centring: bool = knob(True, "keep the biases of a layer at mean zero, as in training")
    json: str = knob("", "write the figures to this file", metavar="OUT")
    plot: str = knob("", "draw MaxVio over the steps into this PNG file", metavar="OUT")


def parse_rules(text: str) -> dict[str, Rule]:
    """`"sign,quantile:against=own;ema=0.8"` as label -> rule, the label being the text; SettingError (`--rules`)."""
    found: dict[str, Rule] = {}
    for label in (part.strip() for part in text.split(",")):
        if not label or label in found:
            raise SettingError("--rules", text or "nothing", "must name at least one rule, and each once")
        name, _, options = label.partition(":")
        try:
            rules.get(name)
        except SettingError as error:
            raise SettingError("--rules", name, error.allowed) from None
        try:
            knobs = parse_options(options.replace(";", ","))
        except SettingError as error:
            allowed = f"{error.value} must be name=value; several are separated by semicolons"
            raise SettingError("--rules", label, allowed) from None
        try:
            found[label] = rules.make(name, **knobs)
        except SettingError as error:  # it names a flag of `alflb train`
            knob_name = error.flag.rpartition(" ")[2].removeprefix("--alflb-").replace("-", "_")
            raise SettingError("--rules", label, f"{knob_name}: {error.allowed}") from None
    return found


COLUMNS = {
    "rule": None,
    "steps to 2x": "steps_to_2x_floor",
    "mean": "mean_over_floor",
    "tail": "tail_over_floor",
    "worst": "worst_over_floor",
    "affinity kept": "affinity_kept",
    "ms an update": "update_ms",
}
MEANINGS = {
    "rule": "hindsight: the best bias for each batch, made from that very batch; no rule can know it before.",
    "steps to 2x": "updates until MaxVio is at most twice the floor in every layer.",
    "mean": "MaxVio / floor, mean over steps 10 and later and over the layers; 1 is what even, independent draws give.",
    "tail": "the same over the last quarter of the steps.",
    "worst": "MaxVio / floor of the worst step from step 10 on, mean over the layers.",
    "affinity kept": "the chosen scores, over the largest scores each token could have had; steps 10 and later.",
    "ms an update": "median milliseconds for one layer: measuring margins, where the rule needs them, and its step.",
}


def format_table(result: Mapping[str, Any]) -> str:
    """What `alflb replay` prints: the recording, the table, what each column holds."""
    rows = [list(COLUMNS)]
    entries = dict(result["rules"])
    if result["hindsight"] is not None:
        entries["hindsight"] = result["hindsight"]
    for label, figures in entries.items():
        row = [label]
        for key in list(COLUMNS.values())[1:]:
            value = figures.get(key, "-") if key else None
            if key == "steps_to_2x_floor" and value is None:
                value = f"never in {result['steps']}"
            row.append(value if isinstance(value, str) else "-" if value is None else _digits(str(key), value))
        rows.append(row)
    layers = len(result["layers"])
    about = (
        f"{result['steps']} steps, {layers} layer{'s' * (layers > 1)}, {result['tokens']:,.0f} tokens a step, "
        f"top-{result['topk']} of {result['experts']} experts; sampling floor of MaxVio {maxvio_text(result['floor'])}"
    )
    if result["steps"] <= WARM_UP:
        about += f"\nfewer than {WARM_UP + 1} steps: there is no mean over steps {WARM_UP} and later"
    return "\n".join([about, "", *aligned(rows), "", *explained(MEANINGS)])


def _digits(key: str, value: float) -> str:
    digits = {"steps_to_2x_floor": 0, "affinity_kept": 4, "update_ms": 3}.get(key, 2)
    return f"{value:.{digits}f}"


def _check_out(flag: str, path: str) -> None:
    if not path:
        return
    folder = Path(path).absolute().parent
    try:
        sound = not Path(path).is_dir() and folder.is_dir() and os.access(folder, os.W_OK)
        # write_json adds six characters while it writes
        sound = sound and len(os.fsencode(Path(path).name)) + 6 <= os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):  # a path too long, or with a zero byte
        sound = False
    if not sound:
        raise SettingError(flag, path, "must be a file in a folder that exists and can be written")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `alflb replay` to `parser`."""
    parser.add_argument(
        "scores", metavar=FLAG, help="a .safetensors or .npz file, or a run folder of `alflb train --record-scores N`"
    )
    add_flags(parser, Replay)


def run(arguments: argparse.Namespace, words: Sequence[str] = ()) -> int:
    """`alflb replay` with parsed arguments; returns 0. SettingError for what cannot work."""
    settings = Replay(**given_flags(arguments, Replay))
    check(settings)
    players = parse_rules(settings.rules)
    _check_out("--json", settings.json)
    _check_out("--plot", settings.plot)
    recording = open_scores(arguments.scores)
    topk = resolve_gating(recording, settings.topk).topk
    if settings.plot and topk == recording.experts:
        raise SettingError("--plot", settings.plot, f"shows nothing where every token takes all {topk} experts")
    from tqdm import tqdm

    with tqdm(total=recording.steps, unit="step", file=sys.stderr, disable=None) as bar:  # none where no terminal is
        result = replay(
            recording, players, settings.topk, settings.centring, settings.hindsight, lambda done: bar.update()
        )
    if settings.json:
        write_json(Path(settings.json), result)
    print(format_table(result), flush=True)
    if settings.plot:
        from alflb_megatron.lab.display.plots import plot_replay

        print(f"\npicture: {plot_replay(result, Path(settings.plot)).resolve()}")
    return 0
