"""`alflb`: a thin front over `alflb_megatron.runs`."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from alflb_megatron import __version__
from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.hosts.stop import leave
from alflb_megatron.models import ModelShape
from alflb_megatron.runs import launch
from alflb_megatron.runs.bias import add_arguments as add_bias_flags
from alflb_megatron.runs.bias import run as run_bias
from alflb_megatron.runs.data.prepare import add_arguments as add_data_flags
from alflb_megatron.runs.data.prepare import run as run_data
from alflb_megatron.runs.demo import add_arguments as add_demo_flags
from alflb_megatron.runs.demo import run as run_demo
from alflb_megatron.runs.doctor import add_arguments as add_doctor_flags
from alflb_megatron.runs.doctor import run as run_doctor
from alflb_megatron.runs.job import Job, Plan, resolve, resolve_resumed
from alflb_megatron.runs.patch import add_arguments as add_patch_flags
from alflb_megatron.runs.patch import run as run_patch
from alflb_megatron.runs.record import has_checkpoint, saved_settings
from alflb_megatron.runs.replay import add_arguments as add_replay_flags
from alflb_megatron.runs.replay import run as run_replay
from alflb_megatron.runs.report import add_arguments as add_report_flags
from alflb_megatron.runs.report import run as run_report
from alflb_megatron.runs.reproduce import add_arguments as add_reproduce_flags
from alflb_megatron.runs.reproduce import run as run_reproduce
from alflb_megatron.runs.theory import add_arguments as add_theory_flags
from alflb_megatron.runs.theory import run as run_theory
from alflb_megatron.runs.watch import add_arguments as add_watch_flags
from alflb_megatron.runs.watch import run as run_watch
from alflb_megatron.settings import SettingError, add_flags, given_flags


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        text = " ".join(re.sub(r"^argument ", "", message).split())
        text = text if len(text) <= 500 else f"{text[:500]}..."
        self.exit(2, f"{self.prog}: {text} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line, every flag generated from the dataclass that holds it."""
    top = _Parser(prog="alflb", description="Auxiliary-loss-free load balancing for Megatron-Core.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"alflb {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    train = commands.add_parser(
        "train", help="train a DeepSeekMoE with Megatron-Core and watch its balance", allow_abbrev=False
    )
    add_flags(train.add_argument_group("job"), Job)
    add_flags(train.add_argument_group("model (over the preset)"), ModelShape)
    add_flags(train.add_argument_group("how the expert bias moves"), ALFConfig, PREFIX, skip=("rule",))
    train.set_defaults(run=_train)
    demo = commands.add_parser(
        "demo", help="train without a bias, with Megatron-Core's own and with ours, and compare", allow_abbrev=False
    )
    add_demo_flags(demo)
    demo.set_defaults(run=run_demo)
    data = commands.add_parser(
        "data", help="make training data of text, in Megatron's format, and check its files", allow_abbrev=False
    )
    add_data_flags(data)
    data.set_defaults(run=run_data)
    replay = commands.add_parser(
        "replay", help="replay rules over recorded router scores, and compare their balance", allow_abbrev=False
    )
    add_replay_flags(replay)
    replay.set_defaults(run=run_replay)
    theory = commands.add_parser(
        "theory", help="measure what the theory claims, and print one table", allow_abbrev=False
    )
    add_theory_flags(theory)
    theory.set_defaults(run=run_theory)
    patch = commands.add_parser(
        "patch", help="put the flags of ALF-LB into a checkout of Megatron-LM, or take them out", allow_abbrev=False
    )
    add_patch_flags(patch)
    patch.set_defaults(run=run_patch)
    doctor = commands.add_parser(
        "doctor", help="say what of the hosts is installed, and which path each feature takes", allow_abbrev=False
    )
    add_doctor_flags(doctor)
    doctor.set_defaults(run=run_doctor)
    bias = commands.add_parser(
        "bias", help="show expert biases, or write them for Hugging Face's models", allow_abbrev=False
    )
    add_bias_flags(bias)
    bias.set_defaults(run=run_bias)
    report = commands.add_parser(
        "report", help="draw one page about a run, or several side by side", allow_abbrev=False
    )
    add_report_flags(report)
    report.set_defaults(run=run_report)
    reproduce = commands.add_parser(
        "reproduce", help="train every run of a plan, and make its tables and figures", allow_abbrev=False
    )
    add_reproduce_flags(reproduce)
    reproduce.set_defaults(run=run_reproduce)
    watch = commands.add_parser("watch", help="show a running job in the terminal", allow_abbrev=False)
    add_watch_flags(watch)
    watch.set_defaults(run=run_watch)
    return top


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The checked plan of `alflb train`'s arguments; under an outer launcher its number of ranks is the job's."""
    job = given_flags(arguments, Job)
    if launch.under_a_launcher():
        world = launch.world_size()
        if job.setdefault("nproc", world) != world:
            raise SettingError("--nproc", job["nproc"], f"must be left out under a launcher, or be its {world} ranks")
    shape, alf = given_flags(arguments, ModelShape), given_flags(arguments, ALFConfig, PREFIX)
    if job.get("requeue") and has_checkpoint(Path(Job(**job).folder)):
        job["resume"] = True
    if not job.get("resume") or job.get("load"):
        return resolve(job, shape, alf)
    folder = Job(**job).folder
    return resolve_resumed(saved_settings(folder, "--resume"), {**job, "out": folder}, shape, alf)


def _train(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    plan = plan_of(arguments)
    if not launch.under_a_launcher():
        if plan.job.nproc > 1:
            return launch.launch(argv, plan.job.nproc)
        launch.as_single_rank()
    # Their advice about packages that a CPU does not have; ours stays.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("alflb_megatron").setLevel(logging.INFO)
        logging.getLogger("alflb_megatron").addHandler(logging.StreamHandler())
    from alflb_megatron.runs.train import train

    summary = train(plan)
    if summary and plan.job.json:
        import json

        print(json.dumps(summary))
    elif summary:
        print(
            f"validation loss {summary['validation_loss']:.4f}  MaxVio_global {summary['maxvio_global_mean']:.4f}  "
            f"MaxVio of the last 50 steps {summary['maxvio_last50']:.4f}  {summary['run']}"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a setting that cannot work, 1 for a failed run."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments: Any = parser().parse_args(words)
        return int(arguments.run(arguments, words))
    except SettingError as error:
        if launch.under_a_launcher():
            leave(error)
        print(f"alflb: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
