"""What balancing does to a real training: balance and validation loss under each way to balance, over several seeds.

Every run is an `alflb train` process of one rank and one thread on the presets `tiny` and `small`; the modes are those
of MODES, and share data, seeds and steps. `aux` is Megatron-Core's auxiliary loss alone, with the coefficient that
Megatron-Core recommends and Switch Transformer uses (Fedus et al. 2021, arXiv 2101.03961), 1e-2. Rules run with their
defaults. MaxVio is the mean over the MoE layers of a global batch; the sampling floor is that of the preset's tokens,
topk and experts. A run that is finished in its folder with the same settings is not run again, so an interrupted
benchmark goes on; after a change of the code remove the folder. Repeat with

    python -m benchmarks.in_training     (--presets tiny --seeds 1 for a look)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.records.versions import git_revision
from alflb_megatron.lab.sweep.demo import TrainingFailed, failure_text
from alflb_megatron.lab.training.job import Plan
from alflb_megatron.lab.training.resolve import resolve
from alflb_megatron.metrics import sampling_floor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AUX_COEFF = 1e-2
MODES: dict[str, dict[str, Any]] = {
    "none": {"rule": "none"},
    "aux": {"rule": "none", "aux_loss_coeff": AUX_COEFF},
    "builtin": {"rule": "builtin"},
    "quantile": {"rule": "quantile"},
    "adaptive": {"rule": "adaptive"},
}
"""What is compared, as settings of `alflb train`."""
LABELS = {
    "none": "no balancing",
    "aux": "auxiliary loss",
    "builtin": "Megatron-Core's sign",
    "quantile": "quantile",
    "adaptive": "adaptive",
}
OURS, YARDSTICK = "adaptive", "builtin"

STEPS = {"tiny": 200, "small": 100}
FIRST_SEED = 1234
SETTLED = 10
"""First step of `mean_over_floor`."""
NOISE = 2.0
"""Standard errors of the paired difference within which a validation loss is no worse."""

FIGURES = {
    "validation_loss": "validation loss",
    "maxvio": "MaxVio, last quarter",
    "maxvio_global": "MaxVio_global",
    "mean_over_floor": f"MaxVio / floor, from step {SETTLED}",
    "steps_to_2x_floor": "steps to 2x floor",
}


def settings(preset: str, mode: str, seed: int, steps: int) -> dict[str, Any]:
    """The settings of one run that differ from the preset's, by name; its folder is not among them."""
    one_rank = {"nproc": 1, "ep": 1, "save": False, "json": True}
    return {"preset": preset, **MODES[mode], "seed": seed, "steps": steps, **one_rank}


def command(options: Mapping[str, Any], out: Path) -> list[str]:
    """The command line of a run."""
    words = [sys.executable, "-m", "alflb_megatron.lab.cli", "train", "--out", str(out)]
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def is_finished(options: Mapping[str, Any], out: Path) -> bool:
    """Whether `out` holds a finished run of exactly these settings, wherever it was written to."""
    try:
        json.loads((out / "summary.json").read_text(encoding="utf-8"))
        found = json.loads((out / "config.json").read_text(encoding="utf-8"))["settings"]
        found["job"]["out"] = ""
        made = Plan.from_dict(found)  # a run made before a setting existed had its default
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return made == resolve(options, {}, {})


def logged(name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Runs a training with all that it prints in `log`: two bars at once would overwrite each other.

    Raises `TrainingFailed` if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+", encoding="utf-8", errors="replace") as file:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment).returncode
        file.seek(0)
        if code != 0:
            raise TrainingFailed(failure_text(name, code, file.read()))


def train(name: str, options: Mapping[str, Any], out: Path) -> str:
    """Makes sure that `out` holds the run, and says in one line what it came to; `TrainingFailed` if it fails."""
    again = is_finished(options, out)
    if not again:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        logged(name, command(options, out), out.with_name(f"{out.name}.log"), environment)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    revision = json.loads((out / "config.json").read_text(encoding="utf-8"))["git_revision"]
    loss = summary["validation_loss"]
    told = f"{name}: validation loss {'not finite' if loss is None else f'{loss:.4f}'}"
    told += f", {summary['seconds_per_step']:.2f} seconds a step"
    if again:
        told += ", was there already"
        told += "" if revision == git_revision() else f" (made at revision {revision}, which is not today's)"
    return told


def folder(out: Path, preset: str, mode: str, seed: int) -> Path:
    return out / f"{preset}-{mode}-{seed}"


def in_turn(runs: Sequence[Callable[[], str]], jobs: int) -> None:
    """Makes all runs, `jobs` at a time, and says what each came to; a failure ends it, after those under way."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run) for run in runs]
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                print(f"[{number}/{len(runs)}] {done.result()}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_all(steps: Mapping[str, int], seeds: Sequence[int], out: Path, jobs: int) -> None:
    """Trains every preset, seed and mode."""
    runs = [
        partial(train, f"{preset} {mode} {seed}", settings(preset, mode, seed, count), folder(out, preset, mode, seed))
        for preset, count in steps.items()
        for seed in seeds
        for mode in MODES
    ]
    in_turn(runs, jobs)


# -- from run folders to figures --------------------------------------------------------------------------------------


def figures_of(run: Path, floor: float) -> tuple[dict[str, float | None], list[float]]:
    """The figures of one run folder, named as FIGURES, and MaxVio of every step."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    records = list(read_metrics(run))
    vio = [float(record["maxvio_mean"]) for record in records]
    settled = [value for value, record in zip(vio, records, strict=True) if record["step"] > SETTLED]
    return {
        "validation_loss": summary["validation_loss"],
        "maxvio": statistics.fmean(vio[-math.ceil(len(vio) / 4) :]),
        "maxvio_global": summary["maxvio_global_mean"],
        "mean_over_floor": statistics.fmean(settled) / floor if settled else None,
        "steps_to_2x_floor": next(
            (record["step"] - 1 for value, record in zip(vio, records, strict=True) if value <= 2 * floor), None
        ),
    }, vio


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, None where a seed has no such number (or is alone); and each."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {
        "mean": statistics.fmean(known) if whole else None,
        "sd": statistics.stdev(known) if whole and len(known) > 1 else None,
        "each": list(values),
    }


def difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> dict[str, Any]:
    """Paired difference over seeds: mean and its standard error, None as in `spread`."""
    pairs = [None if a is None or b is None else a - b for a, b in zip(ours, theirs, strict=True)]
    over = spread(pairs)
    error = None if over["sd"] is None else over["sd"] / math.sqrt(len(pairs))
    return {"mean": over["mean"], "standard_error": error, "each": pairs}


def verdicts(modes: Mapping[str, Mapping[str, Any]], loss: Mapping[str, Any]) -> dict[str, bool | None]:
    """The two questions of the benchmark; None where the runs cannot tell (one seed has no noise to compare with)."""
    vio = {mode: figures["maxvio"]["mean"] for mode, figures in modes.items()}
    mean, error = loss["mean"], loss["standard_error"]
    return {
        "lowest_maxvio": all(vio[OURS] < value for mode, value in vio.items() if mode != OURS),
        "loss_no_worse": None if mean is None or error is None else mean <= NOISE * error,
    }


def collect(out: Path, preset: str, seeds: Sequence[int]) -> dict[str, Any]:
    """All figures of a preset from its run folders in `out`."""
    first = json.loads((folder(out, preset, YARDSTICK, seeds[0]) / "config.json").read_text(encoding="utf-8"))
    job, model = first["settings"]["job"], first["settings"]["model"]
    tokens = job["global_batch_size"] * model["seq_length"]
    floor = sampling_floor(tokens, model["topk"], model["num_experts"])
    modes: dict[str, dict[str, Any]] = {}
    maxvio: dict[str, list[float]] = {}
    revisions = set()
    for mode in MODES:
        runs = [folder(out, preset, mode, seed) for seed in seeds]
        figures, steps = zip(*(figures_of(run, floor) for run in runs), strict=True)
        modes[mode] = {name: spread([one[name] for one in figures]) for name in FIGURES}
        maxvio[mode] = [round(statistics.fmean(values), 4) for values in zip(*steps, strict=True)]
        revisions |= {json.loads((run / "config.json").read_text(encoding="utf-8"))["git_revision"] for run in runs}
    loss = difference(modes[OURS]["validation_loss"]["each"], modes[YARDSTICK]["validation_loss"]["each"])
    return {
        "steps": job["steps"],
        "seeds": list(seeds),
        "tokens": tokens,
        "topk": model["topk"],
        "experts": model["num_experts"],
        "floor": floor,
        "git_revisions": sorted(map(str, revisions)),
        "modes": modes,
        "loss_difference": loss,
        "verdicts": verdicts(modes, loss),
        "maxvio_by_step": maxvio,
    }


# -- what is shown ----------------------------------------------------------------------------------------------------


def _cell(name: str, over: Mapping[str, Any]) -> str:
    if over["mean"] is None:
        found = sum(value is not None for value in over["each"])
        return f"in {found} of {len(over['each'])} runs" if name == "steps_to_2x_floor" else "-"
    if name == "steps_to_2x_floor":
        return f"{over['mean']:.3g}" + ("" if over["sd"] is None else f" ± {over['sd']:.2g}")
    show = (lambda value: f"{value:.4f}") if name == "validation_loss" else maxvio_text
    return show(over["mean"]) + ("" if over["sd"] is None else f" ± {show(over['sd'])}")


def _answer(verdict: bool | None) -> str:
    return {True: "yes", False: "no", None: "these runs cannot tell"}[verdict]


def table(results: Mapping[str, Any]) -> str:
    """One table a preset, and below it the paired difference and the two answers."""
    lines: list[str] = []
    for preset, found in results["presets"].items():
        loss, seeds = found["loss_difference"], len(found["seeds"])
        lines += [
            f"`{preset}`: {found['steps']} steps of {found['tokens']:,} tokens, top-{found['topk']} of "
            f"{found['experts']} experts, {seeds} seed{'s' * (seeds > 1)}; sampling floor "
            f"{maxvio_text(found['floor'])}. Mean ± standard deviation over seeds.",
            "",
            "| mode | " + " | ".join(FIGURES.values()) + " |",
            "|---|" + "---:|" * len(FIGURES),
            *(
                f"| {LABELS[mode]} | " + " | ".join(_cell(name, figures[name]) for name in FIGURES) + " |"
                for mode, figures in found["modes"].items()
            ),
            "",
        ]
        if loss["mean"] is not None:
            error = "" if loss["standard_error"] is None else f" ± {loss['standard_error']:.4f} (standard error)"
            lines.append(f"- Validation loss, {OURS} minus {YARDSTICK}, same seed: {loss['mean']:+.4f}{error}.")
        lines += [
            f"- {OURS} has the lowest MaxVio: {_answer(found['verdicts']['lowest_maxvio'])}.",
            f"- Validation loss no worse than {YARDSTICK}'s within seed noise (mean difference at most {NOISE:g} "
            f"standard errors): {_answer(found['verdicts']['loss_no_worse'])}.",
            "",
        ]
    return "\n".join(lines).rstrip()


def figure(results: Mapping[str, Any]) -> Figure:
    """MaxVio over the steps, mean over seeds, one panel a preset; the sampling floor dotted."""
    from matplotlib.figure import Figure

    from alflb_megatron.lab.display.plot_style import COLOURS, DPI, style_axes

    presets = results["presets"]
    drawn = Figure(figsize=(5.0 * len(presets), 4.0), dpi=DPI, layout="constrained")
    for panel, (preset, found) in enumerate(presets.items(), 1):
        axes = drawn.add_subplot(1, len(presets), panel)
        for (mode, vio), colour in zip(found["maxvio_by_step"].items(), COLOURS, strict=False):
            # Exact balance has no place on a logarithmic axis.
            axes.plot(range(1, len(vio) + 1), [v or math.nan for v in vio], color=colour, label=LABELS[mode], lw=1.4)
        axes.axhline(found["floor"], color="black", linestyle=":", linewidth=1.2, label="sampling floor")
        axes.set_yscale("log")
        axes.set_title(f"{preset}: top-{found['topk']} of {found['experts']} experts", fontsize=10)
        axes.set_xlabel(f"training step ({found['tokens']:,} tokens)")
        style_axes(axes)
        if panel == 1:
            axes.set_ylabel("MaxVio, mean over MoE layers and seeds")
            axes.legend(frameon=False, fontsize=9)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for preset, count in STEPS.items():
        parser.add_argument(f"--steps-{preset}", type=int, default=count, help="global batches a run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help=f"how many, from {FIRST_SEED} on (%(default)s)")
    parser.add_argument("--presets", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/in_training"), help="folder of the runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=machine.RESULTS / "in_training.json", help="the figures")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw MaxVio over the steps")
    flags = parser.parse_args(arguments)
    steps = {preset: getattr(flags, f"steps_{preset}") for preset in flags.presets}
    seeds = range(FIRST_SEED, FIRST_SEED + flags.seeds)
    try:
        run_all(steps, seeds, flags.out, flags.jobs)
    except TrainingFailed as error:
        print(f"in_training: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    presets = {preset: collect(flags.out, preset, seeds) for preset in flags.presets}
    results = {"machine": {**machine.describe(), "threads": 1}, "modes": MODES, "presets": presets}
    write_json(flags.results, results)
    print(table(results))
    if flags.plot is not None:
        figure(results).savefig(flags.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
