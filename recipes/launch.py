"""NeMo-Run as a launcher of every recipe: on this machine, through Slurm, or in a cloud through SkyPilot.

    python -m alflb_megatron.recipes.launch local --processes 2 -- -m alflb_megatron.recipes.bridge \
        deepseek_moe_tiny_alflb
    python -m alflb_megatron.recipes.launch slurm --dryrun --account acct --partition batch --nodes 2 --processes 8 \
        --container-image nvcr.io/nvidia/nemo:25.11 --mounts /data:/data --env NCCL_DEBUG=WARN -- \
        nemo llm pretrain --factory "deepseek_moe_1b_alflb(num_nodes=2)" --yes

What follows `--` runs under torchrun on every node: a Python script, `-m MODULE`, or any program. `--dryrun` prints
what would be submitted. In Python `local_executor`, `slurm_executor` and `skypilot_executor` give the executors, and
`start` runs a `run.Script` or `run.Partial` under one. NeMo-Run keeps its records in NEMORUN_HOME, by default
`~/.nemo_run`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alflb_megatron.settings import SettingError, add_flags, check, from_mapping, given_flags, knob


@dataclass(frozen=True)
class Job:
    """What every place needs to know. Raises `SettingError` on a value that cannot work."""

    name: str = knob("alflb", "name of the job")
    nodes: int = knob(1, "machines", minimum=1)
    processes: int = knob(1, "processes on each machine, one for each of its GPUs", minimum=1)
    env: str = knob("", "environment of the processes", metavar="NAME=VALUE,...")

    def __post_init__(self) -> None:
        check(self)
        _ = self.environment

    @property
    def environment(self) -> dict[str, str]:
        """`env` as a dict."""
        return dict(_pairs("--env", self.env, "="))


@dataclass(frozen=True)
class ContainerJob(Job):
    """A job that runs in a container, somewhere else."""

    container_image: str = knob("", "image of the container; empty for none")
    mounts: str = knob("", "what the container sees of the outside", metavar="OUTSIDE:INSIDE,...")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.mounted

    @property
    def mounted(self) -> dict[str, str]:
        """`mounts` as a dict, outside to inside."""
        return dict(_pairs("--mounts", self.mounts, ":"))


@dataclass(frozen=True)
class SlurmJob(ContainerJob):
    """A job for Slurm with pyxis; without `host` this machine is one that can submit."""

    account: str = knob("", "account to charge; needed")
    partition: str = knob("", "partition; empty for Slurm's default")
    time: str = knob("04:00:00", "time limit", metavar="HH:MM:SS")
    gpus: int | None = knob(None, "GPUs of each node; none for as many as processes, 0 for none", minimum=0)
    mem: str = knob("0", "memory of each node; 0 for all of it")
    exclusive: bool = knob(True, "take whole nodes")
    srun_args: str = knob("--mpi=pmix", "further arguments of srun, separated by commas")
    job_dir: str = knob("", "where scripts and logs go, on the cluster; empty for NeMo-Run's own folder")
    host: str = knob("", "log in here to submit, over SSH; needs --user and --job-dir")
    user: str = knob("", "who logs in")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.account:
            raise SettingError("--account", "", "Slurm needs an account")
        if self.host and not (self.user and self.job_dir):
            raise SettingError("--host", self.host, "needs --user and --job-dir")


@dataclass(frozen=True)
class SkypilotJob(ContainerJob):
    """A job for SkyPilot, in the cloud that `infra` names or the cheapest it finds."""

    accelerator: str = knob("H100", "kind of GPU, of which each node has as many as processes")
    infra: str = knob("", "cloud, region or Kubernetes context, as SkyPilot names it; empty for any")
    cluster: str = knob("", "name of the cluster; empty for a new one")
    setup: str = knob("", "shell commands that prepare each node")
    spot: bool = knob(False, "take instances that can be withdrawn")
    down: bool = knob(True, "take the cluster down when the job has ended")


def _pairs(flag: str, text: str, separator: str) -> list[tuple[str, str]]:
    """`"a=b,c=d"` as pairs, `"a:b"` also with semicolons between; `SettingError` on a part without the separator."""
    found = []
    for part in filter(None, (p.strip() for p in re.split("[,;]" if separator == ":" else ",", text))):
        pair = re.fullmatch(rf"((?:\w+://)?[^{separator}]+){separator}(.*)", part)  # the colon of s3:// is none of ours
        if pair is None:
            raise SettingError(flag, part, f"must be two names joined by {separator!r}, several separated by commas")
        found.append((pair[1], pair[2]))
    return found


def _nemo_run() -> Any:
    if importlib.util.find_spec("nemo_run") is None:
        raise ImportError("NeMo-Run is not installed: pip install nemo-run")
    return importlib.import_module("nemo_run")


def local_executor(job: Job) -> Any:
    """NeMo-Run's executor for this machine, with torchrun. Raises `SettingError` for more than one node."""
    import torch

    if job.nodes != 1:
        raise SettingError("--nodes", job.nodes, "must be 1: this is one machine")
    beside_python = os.path.dirname(sys.executable)  # torchrun, also where its environment is not the active one
    env = {"PATH": f"{beside_python}{os.pathsep}{os.environ.get('PATH', os.defpath)}", **job.environment}
    if not torch.cuda.is_available():
        # hosts/cpu has to come before whatever imports Megatron-Core; this is its one setting that cannot come later.
        env.setdefault("TORCHDYNAMO_DISABLE", "1")
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job.processes)))
    return _nemo_run().LocalExecutor(ntasks_per_node=job.processes, launcher="torchrun", env_vars=env)


COMPILED = {"TORCHDYNAMO_DISABLE": "0"}
"""For the machines of a cluster: a recipe built on one without CUDA has set this here, and Slurm hands it on."""


def slurm_executor(job: SlurmJob) -> Any:
    """NeMo-Run's executor for Slurm: one torchrun a node, the code that of the container."""
    run = _nemo_run()
    if job.host:
        tunnel = run.SSHTunnel(host=job.host, user=job.user, job_dir=job.job_dir)
    else:
        tunnel = run.LocalTunnel(job_dir=job.job_dir)
    gpus = job.processes if job.gpus is None else job.gpus
    return run.SlurmExecutor(
        account=job.account,
        partition=job.partition or None,
        time=job.time,
        nodes=job.nodes,
        ntasks_per_node=job.processes,
        gpus_per_node=gpus or None,
        mem=job.mem,
        exclusive=job.exclusive,
        container_image=job.container_image or None,
        container_mounts=[f"{outside}:{inside}" for outside, inside in job.mounted.items()],
        srun_args=[part for part in job.srun_args.split(",") if part],
        env_vars=COMPILED | job.environment,
        launcher="torchrun",
        tunnel=tunnel,
        packager=run.Packager(),
    )


def skypilot_executor(job: SkypilotJob) -> Any:
    """NeMo-Run's executor for SkyPilot. Code travels as the Git repository that this is called in.

    Raises ImportError where SkyPilot is missing: NeMo-Run cannot make the executor, nor a dry run, without it.
    """
    run = _nemo_run()
    if importlib.util.find_spec("sky") is None:
        raise ImportError("SkyPilot is not installed: pip install skypilot, with an extra for the cloud")
    return run.SkypilotExecutor(
        gpus=job.accelerator,
        gpus_per_node=job.processes,
        num_nodes=job.nodes,
        container_image=f"docker:{job.container_image}" if job.container_image else None,
        file_mounts={inside: outside for outside, inside in job.mounted.items()},
        infra=job.infra or None,
        cluster_name=job.cluster or None,
        setup=job.setup or None,
        use_spot=job.spot or None,
        autodown=job.down,
        env_vars=COMPILED | job.environment,
        launcher="torchrun",
    )


PACKED = "packed"

EXECUTORS: dict[str, tuple[type[Job], Any]] = {
    "local": (Job, local_executor),
    "slurm": (SlurmJob, slurm_executor),
    "skypilot": (SkypilotJob, skypilot_executor),
}


def script(command: Sequence[str]) -> Any:
    """A command line as NeMo-Run's `Script`: `FILE.py ...`, `-m MODULE ...` or `PROGRAM ...`; a leading python is fine.

    Raises `SettingError` where there is no command.
    """
    words = list(command)
    if words and os.path.basename(words[0]).startswith("python"):
        words = words[1:]
    if not words or words == ["-m"]:
        raise SettingError("--", " ".join(command), "a command has to follow: FILE.py, -m MODULE or a program")
    run = _nemo_run()
    if words[0] == "-m":
        return run.Script(path=words[1], args=words[2:], entrypoint="python", m=True)
    return run.Script(path=words[0], args=words[1:], entrypoint="python" if words[0].endswith(".py") else "bash")


def _unquoted(command: Sequence[str]) -> list[str]:
    """The command in words that no quoting changes, for this machine.

    NeMo-Run 0.11.1 quotes arguments for a shell (torchx_backend/components/torchrun.py:torchrun), but starts local jobs
    without one, so that the quotes would arrive. Where there would be some, `_run_packed` unpacks the command there.
    """
    words = list(command)
    if all(shlex.quote(word) == word for word in words):
        return words
    return ["-m", "alflb_megatron.recipes.launch", PACKED, json.dumps(words).encode().hex()]


def _run_packed(text: str) -> None:
    """Becomes the command that `_unquoted` has packed."""
    words = json.loads(bytes.fromhex(text))
    if words[0] == "-m" or words[0].endswith(".py"):
        words = [sys.executable, *words]
    os.execvp(words[0], words)


def _rendered(dryrun: Any) -> str:
    """A dry run as text; of SkyPilot's the task, for NeMo-Run 0.11.1 renders it with a function that SkyPilot moved."""
    task = getattr(dryrun.request, "task", None)
    return str(dryrun) if task is None else importlib.import_module("yaml").safe_dump(task.to_yaml_config(), width=4096)


def start(executor: Any, task: Any, name: str = "alflb", dryrun: bool = False, wait: bool = True) -> str:
    """Runs a `run.Script` or `run.Partial` under an executor and waits for it; returns what a dry run would submit.

    Without `wait` the job is only handed over, and NeMo-Run's name for the experiment returned. Raises RuntimeError
    where a job that is waited for did not succeed.
    """
    with _nemo_run().Experiment(name) as experiment:
        experiment.add(task, executor=executor, name=name, tail_logs=wait and not dryrun)
        if dryrun:
            experiment.dryrun(log=False)
            return _rendered(experiment.jobs[0]._dryrun_info)
        experiment.run(detach=not wait, tail_logs=wait)
        if not wait:
            return str(experiment._id)
    states = [str(job.state) for job in experiment.jobs]  # known once the experiment has been left
    if states != ["SUCCEEDED"]:
        raise RuntimeError(f"the job ended as {', '.join(states)}; its logs are above")
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for a setting that cannot work, 1 for a job that failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == [PACKED]:
        _run_packed(words[1])
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m alflb_megatron.recipes.launch", description=__doc__.split("\n")[0])
    places = parser.add_subparsers(dest="place", required=True)
    for place, (cls, make) in EXECUTORS.items():
        one = places.add_parser(place, help=make.__doc__.split("\n")[0], usage="%(prog)s [FLAG...] -- COMMAND...")
        one.add_argument("--dryrun", action="store_true", help="print what would be submitted")
        add_flags(one, cls)
    given = parser.parse_args(words[:split])
    cls, make = EXECUTORS[given.place]
    try:
        job = from_mapping(cls, given_flags(given, cls))
        executor, command = make(job), words[split + 1 :]
        task = script(_unquoted(command) if given.place == "local" else command)
        text = start(executor, task, job.name, given.dryrun)
    except (SettingError, ImportError, RuntimeError) as error:
        print(f"alflb: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    if text:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
