"""The tables of `alflb report`: an overview, settings that differ, events, certificates, versions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alflb_megatron.lab.display.text import short_count
from alflb_megatron.lab.records.history import KEPT_EVENTS, History
from alflb_megatron.lab.records.step_record import as_number, as_object, clean_text
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.report.axes import line_styles
from alflb_megatron.lab.report.page import Table

KINDS = {
    "alarm": "alarms",
    "rejected": "updates rejected (scores that are NaN or infinite)",
    "skipped": "steps skipped by the optimizer",
    "loss": "losses that are not finite",
}
OWN = ("rule", "out", "resume", "json", "certify", "record_scores", "save", "save_every")
"""Settings that are shown elsewhere, or say where and what a run writes, which makes no run another one."""


def _figure_text(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _vio(value: float) -> str:
    return maxvio_text(value) if math.isfinite(value) else "-"


def model_text(run: History) -> str:
    """The model in a few words: preset, layers, experts, parameters; layers and experts as the records have them."""
    assert run.last is not None
    experts = sorted({len(layer.loads_E) for layer in run.last.layers})
    parts = []
    preset = run.setting("preset")
    if isinstance(preset, str) and preset:
        parts.append(preset)
    if run.last.layers:
        parts.append(f"{len(run.last.layers)} MoE layers")
        of = f"{' or '.join(map(str, experts))} experts"
        parts.append(f"top-{run.topk} of {of}" if run.topk else of)
    parameters = as_object(run.config.get("parameters"))
    total, active = as_number(parameters.get("total")), as_number(parameters.get("active"))
    if total > 0:
        parts.append(short_count(total) + (f" ({short_count(active)} active)" if active > 0 else "") + " parameters")
    return clean_text(", ".join(parts)) or "-"


def same_model(histories: Sequence[History]) -> str | None:
    """The model of all runs in words; None where they have different ones."""
    texts = {model_text(run) for run in histories}
    return texts.pop() if len(texts) == 1 else None


def rule_text(run: History) -> str:
    """The rule with the options it was given."""
    rule = run.summary.get("rule") or run.setting("rule") or as_object(run.config.get("alflb")).get("rule") or "-"
    options = as_object(run.config.get("alflb")).get("rule_options")
    return clean_text(f"{rule} ({options})" if options else rule, 80)


def state_text(run: History) -> str:
    """The last step, out of how many, and whether the run has ended."""
    assert run.last is not None
    total = as_number(run.setting("steps"))
    steps = f"{run.last.step:,}" + (f" of {total:,.0f}" if total > run.last.step else "")
    return steps if run.ended() else f"{steps}, not ended"


def maxvio_end(run: History, count: int = 50) -> float:
    """MaxVio, mean over the layers and over the last `count` steps; nan where no step has one."""
    values = run.series("maxvio_mean")[-count:]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def overview(histories: Sequence[History]) -> Table:
    """The table at the head of the page: a row a run."""
    rows = []
    models = same_model(histories) is None
    for run in histories:
        assert run.last is not None
        seconds = run.series("seconds")[5:] if len(run.series("seconds")) > 10 else run.series("seconds")
        seconds = seconds[np.isfinite(seconds)]
        rows.append([
            run.label,
            rule_text(run),
            *([model_text(run)] if models else []),
            state_text(run),
            "not finite" if run.last.diverged else _figure_text(run.last.loss),
            _figure_text(as_number(run.summary.get("validation_loss"))),
            _vio(maxvio_end(run)),
            _vio(as_number(run.summary.get("maxvio_global_mean"))),
            _vio(run.floor()),
            f"{run.last.bias_spread:.3g}" if run.last.bias_spread > 0 else "-",
            f"{np.median(seconds):.3g}" if len(seconds) else "-",
        ])  # fmt: skip
    head = (
        "run", "rule", *(["model"] if models else []), "steps", "final loss", "validation loss", "MaxVio, last 50",
        "MaxVio_global", "sampling floor", "bias spread", "seconds a step",
    )  # fmt: skip
    marks = [
        ("solid" if style["linestyle"] == "-" else "dashed", style["color"]) for style in line_styles(histories)
    ]  # fmt: skip
    alike = " Beside the rule no setting differs." if len(histories) > 1 and differences(histories) is None else ""
    return Table(
        "Overview",
        head,
        rows,
        "Losses in nats a token. MaxVio = (largest load - mean load) / mean load of a global batch, mean over the MoE "
        "layers and the last 50 steps; MaxVio_global: of the whole validation set. Seconds: median, warm-up left out."
        + alike,
        marks if len(histories) > 1 else (),
    )


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by dotted name with their values as JSON, whatever groups they are in."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{clean_text(name, 80)}.{inner}": text for inner, text in flatten_settings(value).items()}
        else:
            found[clean_text(name, 80)] = clean_text(value if isinstance(value, str) else json.dumps(value), 200)
    return found


def differences(histories: Sequence[History]) -> Table | None:
    """The settings in which the runs differ, a row each; None where there are none beside the rule.

    A setting that a run does not have at all (those of our rules in a run without one) makes no difference.
    """
    # a group, or a setting outside of groups, that is null is not there
    given = [{name: value for name, value in run.settings().items() if value is not None} for run in histories]
    every = [flatten_settings(settings) for settings in given]
    names = dict.fromkeys(name for settings in every for name in settings)
    rows = [
        [name, *(settings.get(name, "-") or "(empty)" for settings in every)]
        for name in names
        if name.rpartition(".")[2] not in OWN and len({settings[name] for settings in every if name in settings}) > 1
    ]
    head = ["setting", *(run.label for run in histories)]
    return Table("Settings that differ", head, rows) if rows else None


def versions(histories: Sequence[History]) -> Table | None:
    """What the runs were made with; where they differ, which had what."""
    every = []
    for run in histories:
        found = flatten_settings({"": run.config.get("versions") or {}, "parts": run.config.get("parts") or {}})
        revision = run.config.get("git_revision")
        every.append(
            {name.lstrip(".").removeprefix("parts."): text for name, text in found.items()}
            | ({"git revision": clean_text(revision, 60)} if revision else {})
        )
    rows = []
    for name in dict.fromkeys(name for found in every for name in found):
        holders: dict[str, list[str]] = {}
        for run, found in zip(histories, every, strict=True):
            holders.setdefault(found.get(name, "-"), []).append(run.label)
        texts = [text if len(holders) == 1 else f"{text} ({', '.join(who)})" for text, who in holders.items()]
        rows.append([name, "; ".join(texts)])
    return Table("Versions and parts", ("part", "version"), rows) if rows else None


def events(histories: Sequence[History]) -> Table:
    """Alarms, rejected and skipped steps of all runs, the latest last, and how often each was."""
    several = len(histories) > 1
    rows, notes = [], []
    for run in histories:
        rows += [[event.steps, *([run.label] if several else []), event.text] for event in run.events]
        told = ", ".join(f"{count:,} {KINDS[kind]}" for kind, count in run.counts.items())
        before = f"{run.label}: " if several else ""
        if told:
            more = "; the list holds the latest" if len(run.events) == KEPT_EVENTS else ""
            notes.append(f"{before}{told}{more}.")
    note = " ".join(notes) or "No alarm, no step rejected or skipped."
    return Table("Alarms and rejected steps", ["step", *(["run"] if several else []), "what"], rows, note)


def certificate_table(histories: Sequence[History]) -> Table | None:
    """The last certificate of every layer of every run."""
    several = len(histories) > 1
    rows = []
    for run in histories:
        last: dict[str, tuple[int, dict[str, Any]]] = {}
        for step, row in run.certificates:
            last[clean_text(row.get("layer"), 20)] = (step, row)
        for layer, (step, found) in last.items():
            cells = [as_number(found.get(key)) for key in ("maxvio", "gap", "modulus", "harmonic_step", "largest_step")]
            texts = [f"{value:.3g}" if math.isfinite(value) else "-" for value in cells]
            rows.append([*([run.label] if several else []), layer, f"{step:,}", *texts])
    head = [
        *(["run"] if several else []), "layer", "step", "MaxVio of the sample", "gap, score a token", "modulus",
        "u of u/n, at the least", "u of proportional, below",
    ]  # fmt: skip
    return Table("Last certificates", head, rows) if rows else None
