"""Save, kill, resume: the same split bit for bit, another split as exactly as its arithmetic allows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests import forked
from tests.distributed import jobs, ranks

PACKAGE = Path(__file__).parents[2] / "alflb_megatron"
STEPS, EVERY = 16, 6


def _words(out: Path, *more: str) -> list[str]:
    shape = [word for name, value in jobs.SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    shape[shape.index("--vocab-size") + 1] = "256"
    schedule = ["--steps", str(STEPS), "--save-every", str(EVERY), "--validation-sequences", "8", "--rule", "adaptive"]
    return ["train", *shape, *schedule, "--data", str(PACKAGE), "--out", str(out), *more]


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def _run(*words: str) -> None:
    nproc = int(words[words.index("--nproc") + 1]) if "--nproc" in words else 2
    done = forked.alflb(*words, nproc=nproc)
    assert done.returncode == 0, done.stderr[-2000:]


def _until(run: Any, folder: Path, step: int) -> None:
    """Waits until the run (it has `poll`) has written the record of `step`."""
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(_metrics(folder)) < step:
        assert run.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _run_and_kill(folder: Path, after_step: int, *words: str) -> None:
    """Kills every rank of the run, as a power cut would, once it has written the record of `after_step`."""
    running = forked.Command(words, nproc=2)
    _until(running, folder, after_step)
    running.kill()
    assert running.finish().returncode == -signal.SIGKILL
    assert len(_metrics(folder)) < STEPS, "the run ended before it could be killed"


def _launch_and_kill(folder: Path, after_step: int, *words: str) -> None:
    """The same to a run that `alflb train` has launched: launcher and ranks."""
    command = [sys.executable, "-m", "alflb_megatron.lab.cli", *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    _until(process, folder, after_step)
    ranks_ = psutil.Process(process.pid).children(recursive=True)
    for one in [psutil.Process(process.pid), *ranks_]:
        one.kill()
    process.wait()
    psutil.wait_procs(ranks_)  # they are not ours to wait for, and hold the folder until they are gone
    assert len(_metrics(folder)) < STEPS, "the run ended before it could be killed"


SAME = ("step", "loss", "lr", "grad_norm", "loads", "bias", "maxvio_mean", "maxvio_max", "bias_spread")


@pytest.fixture(
    scope="module",
    params=[["--ep", "2"], ["--ep", "1", "--pp", "2"], ["--ep", "2", "--optimizer", "distributed"]],
    ids=["ep2", "pp2", "distributed"],
)
def interrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that went through, and one that was killed after its first checkpoint."""
    whole, killed = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("killed") / "run"
    _run(*_words(whole, *request.param), "--eval-interval", str(STEPS // 2))
    kill = _launch_and_kill if request.param == ["--ep", "2"] else _run_and_kill
    kill(killed, EVERY + 2, *_words(killed, *request.param))
    return whole, killed


def test_resumed_on_the_same_split_it_is_the_same_run(interrupted: tuple[Path, Path]) -> None:
    whole, killed = interrupted
    settings = json.loads((killed / "config.json").read_text())["settings"]["job"]
    assert [p.name for p in (killed / "checkpoints").iterdir()] == [f"step_{EVERY:08d}"]
    if settings["optimizer"] == "adam":
        _other_split(whole, killed, settings)
    _run(*_words(killed, "--ep", str(settings["ep"]), "--pp", str(settings["pp"]), "--resume"))
    assert len(_metrics(killed)) == STEPS
    for mine, theirs in zip(_metrics(killed), _metrics(whole), strict=True):
        assert {key: mine[key] for key in SAME} == {key: theirs[key] for key in SAME}
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (killed, whole)]
    assert summaries[0]["validation_loss"] == summaries[1]["validation_loss"]
    assert summaries[0]["validation_loads"] == summaries[1]["validation_loads"]
    # The one was evaluated on its way and the other was not, which leaves no trace in any of the above.
    evaluated = {step["step"]: step["validation"] for step in _metrics(whole) if "validation" in step}
    assert list(evaluated) == [STEPS // 2, STEPS]
    assert evaluated[STEPS] == {name: summaries[1][name] for name in evaluated[STEPS]} != evaluated[STEPS // 2]
    assert not any("validation" in step for step in _metrics(killed))


def _other_split(whole: Path, killed: Path, settings: dict[str, Any]) -> None:
    """The killed run's checkpoint on one rank: biases and n bit for bit, the loss to 1e-4, the optimizer with it."""
    (found,) = ranks.run(1, _resumed_alone, killed)
    saved, following = _metrics(whole)[EVERY - 1], _metrics(whole)[EVERY]
    assert found["n"] == [EVERY] * len(saved["bias"])
    assert found["bias"] == saved["bias"]
    assert abs(found["losses"][0] - following["loss"]) < 1e-4
    assert abs(found["losses"][1] - _metrics(whole)[EVERY + 1]["loss"]) < 1e-4, (
        "the optimizer's state did not come along"
    )


def _resumed_alone(folder: Path) -> dict[str, Any]:
    """On one rank: biases and n as loaded, and the losses of the next two steps of training."""
    from alflb_megatron.lab.training import checkpoint
    from alflb_megatron.lab.training.job import Plan
    from alflb_megatron.lab.training.train import TrainingRun

    values = json.loads((folder / "config.json").read_text())["settings"]
    values["job"] |= {"nproc": 1, "ep": 1, "pp": 1, "resume": True, "steps": STEPS}
    plan = Plan.from_dict(values)
    metrics = (folder / "metrics.jsonl").read_text()
    with ranks.model_parallel(**jobs.sizes(plan)):
        session = TrainingRun(plan)
        assert session.resumed == checkpoint.find(folder, "--resume")
        routers = session.setup.balancer.routers
        found: dict[str, Any] = {
            "bias": [router.expert_bias.tolist() for router in routers],
            "n": [int(router.alf_n) for router in routers],
        }
        found["losses"] = [session._step(EVERY + 1)["loss"], session._step(EVERY + 2)["loss"]]
    (folder / "metrics.jsonl").write_text(metrics)
    return found


def _exchange(folder: Path) -> dict[str, Any]:
    """On a rank: a checkpoint by Megatron-Core's own bias read by ours, and one of ours read by Megatron-Core's."""
    from alflb_megatron.lab.training import checkpoint

    found: dict[str, Any] = {}
    own = jobs.plan({"rule": "builtin", "nproc": 2, "ep": 2}, step_size=0.01)
    ours = jobs.plan({"rule": "harmonic", "nproc": 2, "ep": 2})
    for name, writer, reader in (("own to ours", own, ours), ("ours to own", ours, own)):
        with ranks.model_parallel(**jobs.sizes(own)):
            runner = jobs.Runner(writer)
            for step in range(3):
                runner.step(step)
            path = checkpoint.save(runner.setup, writer, 3, folder / name.replace(" ", "-"), "")
            other = jobs.Runner(reader)
            checkpoint.load(other.setup, reader, checkpoint.find(path, "--load"), weights_only=True)
            found[name] = all(
                torch.equal(a.expert_bias, b.expert_bias) and bool(a.expert_bias.abs().sum() > 0)
                for a, b in zip(runner.routers, other.routers, strict=True)
            )
            if reader is ours:
                found["n"] = [int(router.alf_n) for router in other.routers]
            other.step(3)
            found[name + ", next loss"] = other.trace.losses[0] < runner.trace.losses[0]
    return found


def test_checkpoints_pass_between_megatron_cores_bias_and_ours(tmp_path: Path) -> None:
    for found in ranks.run(2, _exchange, tmp_path):
        assert found.pop("n") == [0, 0, 0], "rule state that the checkpoint lacks starts afresh"
        assert all(found.values()), found


def test_a_run_killed_after_its_last_checkpoint_is_still_validated(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _run(*_words(folder, "--nproc", "1", "--ep", "1"))
    summary, records = json.loads((folder / "summary.json").read_text()), _metrics(folder)
    (folder / "summary.json").unlink()
    _run(*_words(folder, "--nproc", "1", "--ep", "1", "--resume"))
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert _metrics(folder) == records
    again = forked.alflb(*_words(folder, "--resume"), "--nproc", "1", "--ep", "1")
    assert again.returncode == 2
    assert f"--steps={STEPS}: must be above {STEPS}, where the run stands" in again.stderr
