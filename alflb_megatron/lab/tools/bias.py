"""`alflb bias`: expert biases out of a run or a Hugging Face model, into a file or a Hugging Face model.

A run's biases are those of its metrics.jsonl, where every step's stand; no checkpoint is opened, nothing is unpickled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alflb_megatron.biases import Biases
from alflb_megatron.hosts import huggingface
from alflb_megatron.lab.display.text import align_rows
from alflb_megatron.lab.records import metrics_file
from alflb_megatron.lab.records.run_folder import is_run_folder, saved_settings
from alflb_megatron.models import ModelShape
from alflb_megatron.settings import SettingError, check

SOURCE = "a run folder, a .safetensors file, or the folder of a Hugging Face model"


# -- where biases come from --------------------------------------------------------------------------------------------


def read_biases(source: str | os.PathLike[str], flag: str = "SOURCE", step: int | None = None) -> Biases:
    """The biases of a run (after `step`, by default its last), a .safetensors file or a Hugging Face folder.

    Raises:
        SettingError: naming `flag` (or `--step`) where there are none.
    """
    path = Path(source)
    if is_run_folder(path):
        return _biases_of_run(path, flag, step)
    if step is not None:
        raise SettingError("--step", step, f"is for a run; {source} is none")
    return huggingface.read(path, flag)


def _biases_of_run(folder: Path, flag: str, step: int | None) -> Biases:
    wanted = _record(folder, flag, step)
    name = f"{folder} at step {wanted['step']}"
    layers: Any = wanted.get("layers")
    biases: Any = wanted.get("bias")
    if biases is None:
        raise SettingError(flag, name, "has no expert bias (--rule none)")
    try:
        rows = {_whole(k): torch.tensor(row, dtype=torch.float32) for k, row in zip(layers, biases, strict=True)}
        if len(rows) != len(layers):
            raise ValueError("a layer stands twice")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SettingError(flag, name, f"layers and bias cannot be read ({error})") from None
    shape, alf = _settings(folder, flag)
    groups = shape.num_groups if shape.group_topk and shape.group_topk < (shape.num_groups or 0) else None
    unit = "logit" if alf.get("score_unit") == "logit" else "score"
    return Biases(rows, shape.num_layers, unit, shape.gate, groups, name).require_sound(flag)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no layer")
    return value


def _record(folder: Path, flag: str, step: int | None) -> dict[str, Any]:
    """The record of `step`, or the last whole one."""
    found, first = None, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", metrics_file.HalfWrittenLine)  # of a run that writes it now
            for one in metrics_file.read_metrics(folder):
                first = one["step"] if first is None else first
                found = one
                if one["step"] == step:
                    return one
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(flag, folder, f"its metrics.jsonl cannot be read ({error})") from None
    if found is None:
        raise SettingError(flag, folder, "has not finished a step yet")
    if step is not None:
        raise SettingError("--step", step, f"must be a step of the run, which has {first} to {found['step']}")
    return found


def _settings(folder: Path, flag: str) -> tuple[ModelShape, Mapping[str, Any]]:
    settings = saved_settings(folder, flag)
    try:
        shape = ModelShape(**settings["model"])
        check(shape)
        return shape, dict(settings["alflb"] or {})
    except (KeyError, TypeError, ValueError) as error:
        raise SettingError(flag, folder, f"holds a config.json that cannot be read ({error})") from None


# -- what `alflb train --bias` starts from -----------------------------------------------------------------------------


def initial_biases(source: str, shape: ModelShape, score_unit: str, flag: str = "--bias") -> Biases:
    """The biases of `source` for a model of `shape` to start from; SettingError naming `flag` where they do not fit."""
    biases = read_biases(source, flag)
    biases.require_gate(score_unit, shape.gate, flag)
    moe = range(shape.num_dense_layers + 1, shape.num_layers + shape.mtp_layers + 1)
    biases.require_fit(dict.fromkeys(moe, shape.num_experts), shape.num_layers, flag)
    return biases


# -- the command -------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands to `parser`."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=type(parser))
    show = commands.add_parser("show", help="print what the biases of each layer are", allow_abbrev=False)
    export = commands.add_parser(
        "export", help="write biases for Hugging Face, as e_score_correction_bias", allow_abbrev=False
    )
    for command in (show, export):
        command.add_argument("source", metavar="SOURCE", help=SOURCE)
        command.add_argument("--step", type=int, metavar="N", help="of a run: the biases after this step, not the last")
    show.add_argument("--json", action="store_true", help="print it as JSON")
    to = export.add_mutually_exclusive_group(required=True)
    to.add_argument("--out", metavar="FILE.safetensors", help="write a file that holds them alone")
    to.add_argument("--into", metavar="DIR", help="put them into the Hugging Face model in this folder")
    export.add_argument(
        "--shift",
        default="0",
        metavar="auto|VALUE",
        help="add a constant to all, which changes no choice: group-limited DeepSeek-V3 in transformers up to 4.57 "
        "needs biases that are not negative; auto takes what that needs",
    )


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """Runs `show` or `export`; the exit code."""
    biases = read_biases(flags.source, step=flags.step)
    if flags.what == "show":
        print(json.dumps(_as_json(biases), indent=2) if flags.json else "\n".join(_report(biases)))
        return 0
    for note in _export(biases, flags):
        print(note, file=sys.stderr)
    return 0


def _export(biases: Biases, flags: argparse.Namespace) -> Iterable[str]:
    amount = _shift(biases, flags.shift)
    shifted = biases.shifted(amount) if amount else biases
    files = (
        [huggingface.save(shifted, flags.out, "--out")] if flags.out else huggingface.put(shifted, flags.into, "--into")
    )
    yield f"{len(biases.rows)} layers of {biases.name}: {', '.join(map(str, files))}"
    if amount:
        yield f"shifted by {amount:g}; two biases of a layer moved apart by at most {biases.rounding(amount):.1e}"
    elif biases.num_groups and biases.lowest < 0:
        yield (
            f"groups are limited and the lowest bias is {biases.lowest:.4g}: transformers up to 4.57 may choose "
            f"other experts unless it is given --shift auto ({biases.shift_needed():g})"
        )
    if flags.out and biases.score_unit == "logit":
        yield "biases on logits, which no Hugging Face model takes: written under Megatron-Core's names"
    elif biases.score_function not in (None, "sigmoid"):
        yield f"biases of a {biases.score_function} gate; DeepSeek-V3 and GLM-4.5 have a sigmoid gate"


def _shift(biases: Biases, text: str) -> float:
    """The constant of `--shift`, a float32 number."""
    if text == "auto":
        return biases.shift_needed()
    try:
        amount = float(torch.tensor(float(text), dtype=torch.float32))
    except (ValueError, OverflowError, RuntimeError):
        raise SettingError("--shift", text, "must be auto or a number") from None
    if amount and not biases.shifted(amount).lowest >= 0:
        least = f"{biases.shift_needed():g} or more, or auto"
        raise SettingError("--shift", text, f"must be {least}: the lowest bias is {biases.lowest:.6g}")
    if amount and not all(bool(row.isfinite().all()) for row in biases.shifted(amount).rows.values()):
        raise SettingError("--shift", text, "must be auto or a finite number")
    return amount


def _figures(biases: Biases) -> list[dict[str, float]]:
    return [
        {
            "layer": layer,
            "experts": row.numel(),
            "spread": float(row.max() - row.min()),
            "mean": float(row.double().mean()),
            "min": float(row.min()),
            "max": float(row.max()),
        }
        for layer, row in biases.rows.items()
    ]


def _as_json(biases: Biases) -> dict[str, Any]:
    about = {field.name: getattr(biases, field.name) for field in dataclasses.fields(biases) if field.name != "rows"}
    rows = zip(_figures(biases), biases.rows.values(), strict=True)
    return {**about, "layers": [{**figures, "bias": row.tolist()} for figures, row in rows]}


def _report(biases: Biases) -> list[str]:
    gate = f"{biases.score_function} gate" if biases.score_function else "gate not stated"
    groups = f", {biases.num_groups} groups" if biases.num_groups else ""
    depth = f", decoder of {biases.num_layers} layers" if biases.num_layers else ""
    figures = _figures(biases)
    keys = ("layer", "experts", "spread", "mean", "min", "max")
    rows = [keys, *(tuple(f"{layer[key]:.4g}" for key in keys) for layer in figures)]
    return [f"{biases.name}: added to the {biases.score_unit}, {gate}{groups}{depth}", *align_rows(rows)]
