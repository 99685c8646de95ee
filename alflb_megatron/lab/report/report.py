"""`alflb report`: one self-contained HTML page about one run, or about several side by side.

The page opens offline: its pictures are in it, and it holds no script and no address. It is drawn from the files of
the run folders alone, of a run that goes on too. Everything is drawn before anything is written, and each file takes
the place of an older one at once.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alflb_megatron import __version__
from alflb_megatron.lab.display.plot_style import save_png
from alflb_megatron.lab.display.text import DATA_NAMES
from alflb_megatron.lab.records.history import History, labels, read_history
from alflb_megatron.lab.records.step_record import clean_text
from alflb_megatron.lab.report import figures, layer_panels, tables
from alflb_megatron.lab.report.axes import MOST_RUNS
from alflb_megatron.lab.report.page import Picture, render_page
from alflb_megatron.settings import SettingError

PAGE = "report.html"


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] = "", png: bool = False) -> list[Path]:
    """Writes `out`/report.html about the run folders `runs`, or, `png`, its pictures alone; returns the files written.

    Without `out` it goes into the run's folder, and for several runs into the folder `report`. Raises SettingError:
    RUN for a folder that holds no run that can be read, `--out` for one that cannot be written.
    """
    paths = [Path(run) for run in runs]
    if not 1 <= len(paths) <= MOST_RUNS:
        raise SettingError("RUN", len(paths), f"a page shows 1 to {MOST_RUNS} runs")
    if len({path.resolve() for path in paths}) < len(paths):
        raise SettingError("RUN", " ".join(clean_text(path) for path in paths), "must name each run once")
    histories = [read_history(path, label) for path, label in zip(paths, labels(paths), strict=True)]
    folder = Path(out) if os.fspath(out) else paths[0] if len(paths) == 1 else Path("report")
    if folder.exists() and not folder.is_dir():
        raise SettingError("--out", clean_text(folder), "must be a folder, and this is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as beside:
            return _write(histories, folder, Path(beside), png)
    except OSError as error:
        raise SettingError(
            "--out", clean_text(folder), f"must be a folder that can be written ({error.strerror})"
        ) from None


def _write(histories: Sequence[History], folder: Path, beside: Path, png: bool) -> list[Path]:
    sections = draw(histories, beside)
    if png:
        drawn = [picture.file for _, pictures in sections for picture in pictures]
    else:
        drawn = [beside / PAGE]
        drawn[0].write_text(_text(histories, sections), encoding="utf-8", errors="replace")
    written = []
    for file in drawn:
        written.append(folder / file.name)
        os.replace(file, written[-1])
    return written


# -- pictures -------------------------------------------------------------------------------------------------------


def draw(histories: Sequence[History], folder: Path) -> list[tuple[str, list[Picture]]]:
    """Draws every picture there is something for into `folder`; returns them by section of the page."""
    several = len(histories) > 1

    def picture(name: str, title: str, caption: str, figure: Any) -> list[Picture]:
        if figure is None:
            return []
        return [Picture(name, title, caption, save_png(figure, folder / f"{name}.png"))]

    limit = layer_panels.loads_limit(histories)
    with np.errstate(all="ignore"):
        training = [
            *picture("loss", "Loss", "Language-model loss of every global batch.", figures.loss(histories)),
            *picture(
                "loss_difference",
                f"Loss against {histories[0].label}",
                f"Below 0: a lower loss than {histories[0].label} at the same step.",
                figures.loss_difference(histories),
            ),
            *picture(
                "maxvio",
                "MaxVio",
                "0 is perfect balance. The sampling floor is the MaxVio of tokens that draw their experts evenly and "
                "independently: a bias set before the batch is seen does not go below it for long.",
                figures.maxvio(histories),
            ),
            *picture(
                "spread",
                "Spread of the bias",
                "How far apart the biases of a layer are: it grows as long as the router leans on the bias more.",
                figures.spread(histories),
            ),
            *picture(
                "gain",
                "Gain of the rule",
                "Share of the way to balance that one update goes, as the rule has learnt it.",
                figures.gain(histories),
            ),
            *picture(
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
            lines = layer_panels.bias(run)
            none = "" if lines is not None else " The run has no expert bias."
            pictures = [
                *picture(
                    f"{before}loads",
                    f"Loads{of}",
                    "A row an expert, a panel an MoE layer; white is the mean load, orange more, purple less."
                    + none
                    + _binned(run),
                    layer_panels.loads(run, limit),
                ),
                *picture(
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
    left_out = len(run.layer_histories) - len(layer_panels.shown_layers(run))
    texts = []
    if run.width > 1:
        texts.append(f" Means of {run.width} steps.")
    if left_out:
        texts.append(f" {left_out} of {len(run.layer_histories)} layers are left out, evenly.")
    return "".join(texts)


# -- text -----------------------------------------------------------------------------------------------------------


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
    texts = [
        clean_text(DATA_NAMES.get(name, os.path.basename(name.rstrip(os.sep)) or name), 120) for name in data if name
    ]
    model = tables.same_model(histories)
    subtitle = [model] if model else []
    subtitle += [f"trained on {' and '.join(texts)}"] if texts else []
    tokens = dict.fromkeys(run.last.tokens for run in histories if run.last is not None and run.last.tokens > 0)
    subtitle += [f"{' or '.join(f'{count:,.0f}' for count in tokens)} tokens a step"] if tokens else []
    subtitle.append(f"made by alflb report {__version__}")
    title = f"Balance of {histories[0].label}" if len(histories) == 1 else f"Balance of {len(histories)} runs"
    before = [tables.overview(histories), *filter(None, [tables.differences(histories)])]
    after = [tables.events(histories), *filter(None, [tables.certificate_table(histories), tables.versions(histories)])]
    return render_page(title, ", ".join(subtitle), _warnings(histories), before, sections, after)
