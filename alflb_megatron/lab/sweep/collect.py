"""Gathers the finished runs of a sweep into `results.csv`: one row a run, all that tables and figures are made of."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alflb_megatron.lab.records.files import read_json
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.sweep.plan import Run, Sweep
from alflb_megatron.lab.sweep.run_state import DONE, state_of
from alflb_megatron.settings import SettingError

POINTS = 25
"""Of a run's course that the table keeps: means over as many equal stretches of its steps."""

COLUMNS = {
    "run": "name, by the plan",
    "group": "name without the seed",
    "model": "preset",
    "gate": "sigmoid or softmax",
    "rule": "how the bias moved",
    "u": "step size as the plan names it; empty for the rule's own",
    "u_used": "step size of the run, a multiple of it where the scale says so",
    "aux": "coefficient of the auxiliary loss",
    "seed": "of weights and data order",
    "steps": "global batches",
    "tokens": "trained on",
    "parameters": "of the model",
    "active": "parameters one token uses",
    "validation_loss": "nats a token",
    "perplexity": "exp(validation_loss)",
    "maxvio_global": "of the loads over the whole validation set, mean over the MoE layers",
    "maxvio_last50": "of a global batch, mean over layers and the last 50 steps",
    "maxvio_mean": "of a global batch, mean over layers and all steps",
    "maxvio_floor": "sampling floor of a global batch",
    "gap": "dual gap per token at the certified steps, mean over steps and layers; empty without --certify",
    "regret": "against the best fixed bias, per token and certified step, mean over layers; may be negative",
    "modulus": "smallest curvature of the dual per token there, mean; empty where no sample gave one",
    "largest_step": "u from which the proportional rule overshoots, 2 K / (E largest curvature), median there",
    "certified": "certified steps",
    "seconds_per_step": "median",
    "maxvio_curve": f"MaxVio over the steps: means over {POINTS} equal stretches, separated by spaces",
    "loss_curve": "training loss likewise",
    "published_perplexity": "the plan's published figure",
    "published_maxvio_global": "the plan's published figure",
    "megatron_core": "version",
    "torch": "version",
    "revision": "commit of this package, -dirty if changed; empty where there is none",
    "label": "what tells the run from others of the same model, gate, rule and step size",
    "sequence_floor": "floor of a global batch of whole sequences at the last weights, mean over layers",
    "steps_to_2x_sequence_floor": "first step from which MaxVio stays within twice it; empty for never",
    "evaluated": "the steps after which the validation set was evaluated",
    "maxvio_global_curve": "maxvio_global there",
    "sequence_floor_curve": "sequence_floor there",
    "validation_loss_curve": "validation_loss there",
}
"""The columns of results.csv."""

ADDED = ("label", "sequence_floor", "steps_to_2x_sequence_floor", "evaluated", "maxvio_global_curve",
         "sequence_floor_curve", "validation_loss_curve")  # fmt: skip
"""Columns that files made before there were such figures lack, from the first of these on."""


def means_over_stretches(values: Sequence[float], points: int = POINTS) -> list[float]:
    """Means over `points` stretches of equal length, or the values themselves if there are no more."""
    n = min(points, len(values))
    return [statistics.fmean(values[k * len(values) // n : (k + 1) * len(values) // n]) for k in range(n)]


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _row(run: Run, out: Path, sweep: Sweep) -> dict[str, Any]:
    folder = out / run.name
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    maxvio, losses, certificates, certified, floor, evaluated = [], [], [], 0, math.nan, {}
    for step in read_metrics(folder):
        maxvio.append(step["maxvio_mean"])
        losses.append(step["loss"])
        floor = step.get("maxvio_floor", floor)
        if rows := step.get("certificates"):
            certificates += rows
            certified += 1
        if "validation" in step:
            evaluated[step["step"]] = step["validation"]
    if len(maxvio) != run.plan.job.steps:
        raise SettingError("RUN", run.name, f"has records of {len(maxvio)} of its {run.plan.job.steps} steps")
    moduli = [row["modulus"] for row in certificates if row["modulus"] is not None]
    limits = [row["largest_step"] for row in certificates if row["largest_step"] is not None]
    regret = summary.get("regret")
    loss = math.nan if summary["validation_loss"] is None else summary["validation_loss"]  # JSON has no NaN
    alf = run.plan.alf
    used = run.plan.builtin_rate if alf is None else alf.step_size
    published = sweep.published.get(run.group, {})
    job = run.plan.job
    return {
        "run": run.name,
        "group": run.group,
        "model": job.preset,
        "gate": run.plan.shape.gate,
        "rule": job.rule,
        "u": run.u,
        "u_used": used,
        "aux": job.aux_loss_coeff or None,
        "seed": job.seed,
        "steps": job.steps,
        "tokens": run.tokens,
        "parameters": config["parameters"]["total"],
        "active": config["parameters"]["active"],
        "validation_loss": loss,
        "perplexity": _perplexity(loss),
        "maxvio_global": summary["maxvio_global_mean"],
        "maxvio_last50": summary["maxvio_last50"],
        "maxvio_mean": statistics.fmean(maxvio),
        "maxvio_floor": floor,
        "gap": statistics.fmean(row["gap"] for row in certificates) if certificates else None,
        "regret": statistics.fmean(row["regret"] for row in regret) if regret else None,
        "modulus": statistics.fmean(moduli) if moduli else None,
        "largest_step": statistics.median(limits) if limits else None,
        "certified": certified or None,
        "seconds_per_step": summary["seconds_per_step"],
        "maxvio_curve": " ".join(f"{value:.5g}" for value in means_over_stretches(maxvio)),
        "loss_curve": " ".join(f"{value:.5g}" for value in means_over_stretches(losses)),
        "published_perplexity": published.get("perplexity"),
        "published_maxvio_global": published.get("maxvio_global"),
        "megatron_core": config["versions"]["megatron-core"],
        "torch": config["versions"]["torch"],
        "revision": config["git_revision"],
        "label": run.label,
        "sequence_floor": summary.get("sequence_floor"),
        "steps_to_2x_sequence_floor": summary.get("steps_to_2x_sequence_floor"),
        "evaluated": " ".join(map(str, evaluated)),
        **{
            f"{name}_curve": " ".join(f"{_number(found[key]):.5g}" for found in evaluated.values())
            for name, key in _EVALUATED.items()
        },
    }


_EVALUATED = {
    "maxvio_global": "maxvio_global_mean",
    "sequence_floor": "sequence_floor",
    "validation_loss": "validation_loss",
}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def finished(sweep: Sweep, out: Path) -> Sweep:
    """The part of a sweep that has finished in `out`: those runs, and the pairs of them."""
    return part(sweep, [run.name for run in sweep.runs if state_of(run, out).kind == DONE])


def part(sweep: Sweep, names: Collection[str]) -> Sweep:
    """The runs of those names in the plan's order, and the pairs of which both have runs of the same seeds."""
    runs = tuple(run for run in sweep.runs if run.name in names)
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(run.group, set()).add(run.plan.job.seed)
    pairs = tuple((a, b) for a, b in sweep.compare if seeds.get(a, set()) & seeds.get(b, set()))
    return replace(sweep, runs=runs, compare=pairs)


def collect(sweep: Sweep, out: Path) -> list[dict[str, Any]]:
    """The rows of results.csv, in the plan's order.

    A run that diverged has a loss and a perplexity of NaN.
    Raises `SettingError` that names the runs: those that have not finished, those of other settings than the plan's,
    those whose records are incomplete, and those that another version of torch, Megatron-Core or this package trained.
    """
    open_ = [run.name for run in sweep.runs if state_of(run, out).kind != DONE]
    if open_:
        held = f"{len(open_)} of {len(sweep.runs)} runs have not finished: {', '.join(open_[:5])}"
        raise SettingError("--out", out, held + (", ..." if len(open_) > 5 else ""))
    try:
        rows = []
        for run in sweep.runs:
            rows.append(_row(run, out, sweep))
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError("--out", out, f"holds a run that cannot be read: {run.name}: {error!r}") from None
    require_same_versions(rows, "--out", out)
    return rows


def require_same_versions(rows: Sequence[Mapping[str, Any]], flag: str, source: Path) -> None:
    """Raises `SettingError` where rows are of several versions of torch, Megatron-Core or this package."""
    for name in ("megatron_core", "torch", "revision"):
        first = rows[0]
        if other := next((row for row in rows if row[name] != first[name]), None):
            held = f"{other['run']} was trained with {name} {other[name]}, {first['run']} with {first[name]}"
            raise SettingError(flag, source, f"holds a mixture: {held}; train them anew with one")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of results.csv; numbers in full, None as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if row[name] is None else row[name] for name in COLUMNS} for row in rows)
    return text.getvalue()


_TEXT = {"run", "group", "model", "gate", "rule", "megatron_core", "torch", "revision", "label"}
_WHOLE = {"seed", "steps", "tokens", "parameters", "active", "certified", "steps_to_2x_sequence_floor"}
_CURVES = {"evaluated", *(name for name in COLUMNS if name.endswith("_curve"))}


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.csv, typed; raises `SettingError` where it is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
            older = [name for name in COLUMNS if name not in ADDED]
            if reader.fieldnames not in (list(COLUMNS), older) or not rows:
                raise ValueError("its columns are not those of a results.csv")
            typed = [{name: _typed(name, row.get(name, "")) for name in COLUMNS} for row in rows]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise SettingError("--results", path, f"cannot be read: {error}") from None
    require_same_versions(typed, "--results", path)
    return typed


def _typed(name: str, text: str) -> Any:
    if name in _CURVES:
        return [float(word) for word in text.split()]
    if name == "label":
        return text
    if text == "":
        return None
    return text if name in _TEXT else int(text) if name in _WHOLE else float(text)


@dataclass(frozen=True)
class Interval:
    """Mean over seeds, and half the width of its 95 % confidence interval by Student's t; None for one seed.

    A seed that diverged makes the mean NaN or infinite, and leaves no interval.
    """

    mean: float
    half: float | None
    n: int

    def text(self, digits: int = 3) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        if self.half is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def confidence_interval(values: Sequence[float]) -> Interval:
    """Of independent values, as seeds give them."""
    from scipy.stats import t

    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return Interval(math.fsum(values) / n, None, n)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(statistics.fmean(values), half, n)


def rows_by_group(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each group, in order of first appearance."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


def rows_by_step_size(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, list[Mapping[str, Any]]]]:
    """Rule -> u -> rows, of the rules that the first row's model and gate has with two u or more."""
    found: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    first = rows[0]
    for row in rows:
        if row["u"] is not None and (row["model"], row["gate"]) == (first["model"], first["gate"]):
            found.setdefault(row["rule"], {}).setdefault(row["u"], []).append(row)
    return {rule: by_u for rule, by_u in found.items() if len(by_u) > 1}
