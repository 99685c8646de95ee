"""`alflb train` as a command: its flags, the plan they come to, and the ranks that train it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.lab.records.run_folder import has_checkpoint, saved_settings
from alflb_megatron.lab.training import launch
from alflb_megatron.lab.training.job import Job, Plan
from alflb_megatron.lab.training.resolve import resolve, resolve_resumed
from alflb_megatron.models import ModelShape
from alflb_megatron.settings import SettingError, add_flags, given_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `alflb train` to `parser`, each generated from the dataclass that holds it."""
    add_flags(parser.add_argument_group("job"), Job)
    add_flags(parser.add_argument_group("model (over the preset)"), ModelShape)
    add_flags(parser.add_argument_group("how the expert bias moves"), ALFConfig, PREFIX, skip=("rule",))


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


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Starts the ranks, or trains on this one under a launcher; the exit code. SettingError for what cannot work."""
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
    from alflb_megatron.lab.training.train import train

    summary = train(plan)
    if summary and plan.job.json:
        print(json.dumps(summary))
    elif summary:
        print(
            f"validation loss {summary['validation_loss']:.4f}  MaxVio_global {summary['maxvio_global_mean']:.4f}  "
            f"MaxVio of the last 50 steps {summary['maxvio_last50']:.4f}  {summary['run']}"
        )
    return 0
