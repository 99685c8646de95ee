"""`alflb report`: one self-contained HTML page about one run, or about several side by side.

The page opens offline: its pictures are in it, and it holds no script and no address. It is drawn from the files of
the run folders alone, of a run that goes on too. Everything is drawn before anything is written, and each file takes
the place of an older one at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alflb_megatron import __version__
from alflb_megatron.runs import report_figures as figures
from alflb_megatron.runs.history import KEPT_EVENTS, History, clean, labels, mapping, number, read_history
from alflb_megatron.runs.plots import DATA_NAMES, save, short_count
from alflb_megatron.runs.record import maxvio_text
from alflb_megatron.runs.report_page import Picture, Table, page
from alflb_megatron.settings import SettingError

PAGE = "report.html"
KINDS = {
    "alarm": "alarms",
    "rejected": "updates rejected (scores that are NaN or infinite)",
    "skipped": "steps skipped by the optimizer",
    "loss": "losses that are not finite",
}
OWN = ("rule", "out", "resume", "json", "certify", "record_scores", "save", "save_every")
"""Settings that are shown elsewhere, or say where and what a run writes, which makes no run another one."""


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] = "", png: bool = False) -> list[Path]:
    """Writes `out`/report.html about the run folders `runs`, or, `png`, its pictures alone; returns the files written.

    Without `out` it goes into the run's folder, and for several runs into the folder `report`. Raises SettingError:
    RUN for a folder that holds no run that can be read, `--out` for one that cannot be written.
    """
    paths = [Path(run) for run in runs]
    if not 1 <= len(paths) <= figures.MOST_RUNS:
        raise SettingError("RUN", len(paths), f"a page shows 1 to {figures.MOST_RUNS} runs")
    if len({path.resolve() for path in paths}) < len(paths):
        raise SettingError("RUN", " ".join(clean(path) for path in paths), "must name each run once")
    histories = [read_history(path, label) for path, label in zip(paths, labels(paths), strict=True)]
    folder = Path(out) if os.fspath(out) else paths[0] if len(paths) == 1 else Path("report")
    if folder.exists() and not folder.is_dir():
        raise SettingError("--out", clean(folder), "must be a folder, and this is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as beside:
            return _write(histories, folder, Path(beside), png)
    except OSError as error:
        raise SettingError("--out", clean(folder), f"must be a folder that can be written ({error.strerror})") from None


def _write(histories: Sequence[History], folder: Path, beside: Path, png: bool) -> list[Path]:
    sections = draw(histories, beside)
    if png:
        made = [picture.file for _, pictures in sections for picture in pictures]
    else:
        made = [beside / PAGE]
        made[0].write_text(_text(histories, sections), encoding="utf-8", errors="replace")
    written = []
    for file in made:
        written.append(folder / file.name)
        os.replace(file, written[-1])
    return written


# -- pictures -------------------------------------------------------------------------------------------------------


def draw(histories: Sequence[History], folder: Path) -> list[tuple[str, list[Picture]]]:
    """Draws every picture there is something for into `folder`; returns them by section of the page."""
    several = len(histories) > 1

    def made(name: str, title: str, caption: str, figure: Any) -> list[Picture]:
        if figure is None:
            return []
        return [Picture(name, title, caption, save(figure, folder / f"{name}.png"))]

    limit = figures.loads_limit(histories)
    with np.errstate(all="ignore"):
        training = [
            *made("loss", "Loss", "Language-model loss of every global batch.", figures.loss(histories)),
            *made(
                "loss_difference",
                f"Loss against {histories[0].label}",
                f"Below 0: a lower loss than {histories[0].label} at the same step.",
                figures.loss_difference(histories),
            ),
            *made(
                "maxvio",
                "MaxVio",
                "0 is perfect balance. The sampling floor is the MaxVio of tokens that draw their experts evenly and "
                "independently: a bias set before the batch is seen does not go below it for long.",
                figures.maxvio(histories),
            ),
            *made(
                "spread",
                "Spread of the bias",
                "How far apart the biases of a layer are: it grows as long as the router leans on the bias more.",
                figures.spread(histories),
            ),
            *made("gain", "Gain of the rule", "How far a bias moves for a relative violation of 1.",
                  figures.gain(histories)),
            *made(
                "certificates",
                "Certificates",
                "Gap: what a token loses against the best bias for the sample. Modulus: how strongly the dual curves "
                "there; its inverse sets the step size of u/n. What is 0 or not known has no point.",
                figures.certificates(histories),
            ),
        ]  # fmt: skip
        sections = [("Training and balance", training)]
        for at, run in enumerate(histories, 1):
            before = f"run{at}_" if several else ""
            of = f" of {run.label}" if several else ""
            lines = figures.bias(run)
            none = "" if lines is not None else " The run has no expert bias."
            pictures = [
                *made(
                    f"{before}loads",
                    f"Loads{of}",
                    "A row an expert, a panel an MoE layer; white is the mean load, orange more, purple less."
                    + none
                    + _binned(run),
                    figures.loads(run, limit),
                ),
                *made(
                    f"{before}bias",
                    f"Expert bias{of}",
                    "A line an expert, a panel an MoE layer; coloured by where it stands at the end, yellow highest."
                    + _binned(run),
                    lines,
                ),
            ]
            if pictures:
                sections.append((f"Experts of {run.label}" if several else "Experts", pictures))
    return [(title, pictures) for title, pictures in sections if pictures]


def _binned(run: History) -> str:
    left_out = len(run.tracks) - len(figures.shown_tracks(run))
    texts = []
    if run.width > 1:
        texts.append(f" Means of {run.width} steps.")
    if left_out:
        texts.append(f" {left_out} of {len(run.tracks)} layers are left out, evenly.")
    return "".join(texts)


# -- text -----------------------------------------------------------------------------------------------------------


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
    parameters = mapping(run.config.get("parameters"))
    total, active = number(parameters.get("total")), number(parameters.get("active"))
    if total > 0:
        parts.append(short_count(total) + (f" ({short_count(active)} active)" if active > 0 else "") + " parameters")
    return clean(", ".join(parts)) or "-"


def same_model(histories: Sequence[History]) -> str | None:
    """The model of all runs in words; None where they have different ones."""
    texts = {model_text(run) for run in histories}
    return texts.pop() if len(texts) == 1 else None


def rule_text(run: History) -> str:
    """The rule with the options it was given."""
    rule = run.summary.get("rule") or run.setting("rule") or mapping(run.config.get("alflb")).get("rule") or "-"
    options = mapping(run.config.get("alflb")).get("rule_options")
    return clean(f"{rule} ({options})" if options else rule, 80)


def state_text(run: History) -> str:
    """The last step, out of how many, and whether the run has ended."""
    assert run.last is not None
    total = number(run.setting("steps"))
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
            _figure_text(run.last.loss) if math.isfinite(run.last.loss) else "not finite",
            _figure_text(number(run.summary.get("validation_loss"))),
            _vio(maxvio_end(run)),
            _vio(number(run.summary.get("maxvio_global_mean"))),
            _vio(run.floor()),
            f"{run.last.bias_spread:.3g}" if run.last.bias_spread > 0 else "-",
            f"{np.median(seconds):.3g}" if len(seconds) else "-",
        ])  # fmt: skip
    head = (
        "run", "rule", *(["model"] if models else []), "steps", "final loss", "validation loss", "MaxVio, last 50",
        "MaxVio_global", "sampling floor", "bias spread", "seconds a step",
    )  # fmt: skip
    marks = [
        ("solid" if look["linestyle"] == "-" else "dashed", look["color"]) for look in figures.styles(histories)
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


def flat(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by dotted name with their values as JSON, whatever groups they are in."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{clean(name, 80)}.{inner}": text for inner, text in flat(value).items()}
        else:
            found[clean(name, 80)] = clean(value if isinstance(value, str) else json.dumps(value), 200)
    return found


def differences(histories: Sequence[History]) -> Table | None:
    """The settings in which the runs differ, a row each; None where there are none beside the rule.

    A setting that a run does not have at all (those of our rules in a run without one) makes no difference.
    """
    # a group, or a setting outside of groups, that is null is not there
    given = [{name: value for name, value in run.settings().items() if value is not None} for run in histories]
    every = [flat(settings) for settings in given]
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
        found = flat({"": run.config.get("versions") or {}, "parts": run.config.get("parts") or {}})
        revision = run.config.get("git_revision")
        every.append(
            {name.lstrip(".").removeprefix("parts."): text for name, text in found.items()}
            | ({"git revision": clean(revision, 60)} if revision else {})
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
        rows += [[f"{step:,}", *([run.label] if several else []), text] for step, _, text in run.events]
        told = ", ".join(f"{count:,} {KINDS[kind]}" for kind, count in run.counts.items())
        before = f"{run.label}: " if several else ""
        if told:
            more = "; the list holds the latest" if sum(run.counts.values()) > KEPT_EVENTS else ""
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
            last[clean(row.get("layer"), 20)] = (step, row)
        for layer, (step, found) in last.items():
            cells = [number(found.get(key)) for key in ("maxvio", "gap", "modulus", "harmonic_step", "largest_step")]
            texts = [f"{value:.3g}" if math.isfinite(value) else "-" for value in cells]
            rows.append([*([run.label] if several else []), layer, f"{step:,}", *texts])
    head = [
        *(["run"] if several else []), "layer", "step", "MaxVio of the sample", "gap, score a token", "modulus",
        "u of u/n, at the least", "u of proportional, below",
    ]  # fmt: skip
    return Table("Last certificates", head, rows) if rows else None


def _warnings(histories: Sequence[History]) -> list[str]:
    found = []
    for run in histories:
        if not run.ended():
            file = run.path / "metrics.jsonl"
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(file.stat().st_mtime))
            half = "; its last line is half written and left out" if run.cut_off else ""
            found.append(f"{run.label} has no summary: it goes on, or was stopped. Last record {when}{half}.")
        elif run.cut_off:
            found.append(f"{run.label}: the last line of its metrics.jsonl is half written and left out.")
    return found


def _text(histories: Sequence[History], sections: Sequence[tuple[str, Sequence[Picture]]]) -> str:
    data = dict.fromkeys(str(run.setting("data") or "") for run in histories)
    texts = [clean(DATA_NAMES.get(name, os.path.basename(name.rstrip(os.sep)) or name), 120) for name in data if name]
    model = same_model(histories)
    subtitle = [model] if model else []
    subtitle += [f"trained on {' and '.join(texts)}"] if texts else []
    tokens = dict.fromkeys(run.last.tokens for run in histories if run.last is not None and run.last.tokens > 0)
    subtitle += [f"{' or '.join(f'{count:,.0f}' for count in tokens)} tokens a step"] if tokens else []
    subtitle.append(f"made by alflb report {__version__}")
    title = f"Balance of {histories[0].label}" if len(histories) == 1 else f"Balance of {len(histories)} runs"
    before = [overview(histories), *filter(None, [differences(histories)])]
    after = [events(histories), *filter(None, [certificate_table(histories), versions(histories)])]
    return page(title, ", ".join(subtitle), _warnings(histories), before, sections, after)


# -- command line ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `alflb report` to `parser`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder of alflb train; it may still be going on")
    parser.add_argument(
        "--out", default="", metavar="DIR", help="folder of the page (default: the run's; of several runs: report)"
    )
    parser.add_argument("--png", action="store_true", help="write the pictures alone, one PNG file each")


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """`report` with parsed flags; prints what it wrote and returns 0. SettingError for what cannot work."""
    for file in report(flags.runs, flags.out, flags.png):
        print(file)
    return 0
