"""`alflb replay` as a command: its flags, the rules they name, and the table it prints."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alflb_megatron import rules
from alflb_megatron.config import parse_options
from alflb_megatron.lab.display.text import align_rows, explain_columns
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.replay.recording import FLAG, Layout
from alflb_megatron.lab.replay.replay import DEFAULT_RULES, STEPS_TO, WARM_UP, replay, resolve_gating
from alflb_megatron.lab.replay.scores import open_scores
from alflb_megatron.rules import Rule
from alflb_megatron.settings import SettingError, add_flags, check, given_flags, knob


@dataclass(frozen=True)
class ReplaySettings:
    """The flags of `alflb replay`."""

    rules: str = knob(
        ",".join(DEFAULT_RULES),
        "what to replay, with a rule's own knobs after a colon: quantile:against=own;ema=0.8",
        metavar="RULE,...",
    )
    topk: int | None = knob(None, "experts a token; none takes the recording's", minimum=1)
    sequence_length: int | None = knob(
        None, "tokens of a sequence, one sequence after another; none takes the recording's", minimum=1
    )
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
    "to 2x sequences'": "steps_to_2x_sequence_floor",
    "mean": "mean_over_floor",
    "tail": "tail_over_floor",
    "worst": "worst_over_floor",
    "affinity kept": "affinity_kept",
    "ms an update": "update_ms",
}
MEANINGS = {
    "rule": "hindsight: the best bias for each batch, made from that very batch; no rule can know it before.",
    "steps to 2x": "updates until MaxVio is at most twice the floor in every layer.",
    "to 2x sequences'": "the same with the sequence floor, which is that of whole sequences under the best bias.",
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
            if key == "steps_to_2x_sequence_floor" and result["sequence_floor"] is None:
                value = "-"
            if key in STEPS_TO and value is None:
                value = f"never in {result['steps']}"
            row.append(value if isinstance(value, str) else "-" if value is None else _digits(str(key), value))
        rows.append(row)
    layers = len(result["layers"])
    about = (
        f"{result['steps']} steps, {layers} layer{'s' * (layers > 1)}, {result['tokens']:,.0f} tokens a step, "
        f"top-{result['topk']} of {result['experts']} experts; sampling floor of MaxVio {maxvio_text(result['floor'])}"
    )
    if result["sequence_floor"] is not None:
        about += f", sequence floor {maxvio_text(result['sequence_floor'])}"
    if result["steps"] <= WARM_UP:
        about += f"\nfewer than {WARM_UP + 1} steps: there is no mean over steps {WARM_UP} and later"
    return "\n".join([about, "", *align_rows(rows), "", *explain_columns(MEANINGS)])


def _digits(key: str, value: float) -> str:
    digits = {**dict.fromkeys(STEPS_TO, 0), "affinity_kept": 4, "update_ms": 3}.get(key, 2)
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
    add_flags(parser, ReplaySettings)


def run(arguments: argparse.Namespace, words: Sequence[str] = ()) -> int:
    """`alflb replay` with parsed arguments; returns 0. SettingError for what cannot work."""
    settings = ReplaySettings(**given_flags(arguments, ReplaySettings))
    check(settings)
    candidates = parse_rules(settings.rules)
    _check_out("--json", settings.json)
    _check_out("--plot", settings.plot)
    recording = open_scores(arguments.scores)
    if settings.sequence_length is not None:
        recording = dataclasses.replace(recording, layout=Layout(settings.sequence_length))
    topk = resolve_gating(recording, settings.topk).topk
    if settings.plot and topk == recording.experts:
        raise SettingError("--plot", settings.plot, f"shows nothing where every token takes all {topk} experts")
    from tqdm import tqdm

    with tqdm(total=recording.steps, unit="step", file=sys.stderr, disable=None) as bar:  # none where no terminal is
        result = replay(
            recording, candidates, settings.topk, settings.centring, settings.hindsight, lambda done: bar.update()
        )
    if settings.json:
        write_json(Path(settings.json), result)
    print(format_table(result), flush=True)
    if settings.plot:
        from alflb_megatron.lab.replay.plots import plot_replay

        print(f"\npicture: {plot_replay(result, Path(settings.plot)).resolve()}")
    return 0
