"""NeMo-Run as the launcher: run for real on this machine, rendered for Slurm and SkyPilot, refused where wrong."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_nemo_run = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None, reason="NeMo-Run is not installed here"
)
needs_nemo = pytest.mark.skipif(
    importlib.util.find_spec("nemo") is None or importlib.util.find_spec("nemo_run") is None,
    reason="NeMo 2 (nemo-toolkit 2.7.x and nemo-run) is not installed here",
)
needs_sky = pytest.mark.skipif(
    importlib.util.find_spec("sky") is None or importlib.util.find_spec("nemo_run") is None,
    reason="SkyPilot is not installed here, and NeMo-Run makes no SkypilotExecutor without it",
)
without_sky = pytest.mark.skipif(
    importlib.util.find_spec("sky") is not None or importlib.util.find_spec("nemo_run") is None,
    reason="is about NeMo-Run without SkyPilot",
)

RECIPE = ["nemo", "llm", "pretrain", "--factory", "deepseek_moe_1b_alflb(num_nodes=2)", "--yes"]
CONTAINER = ["--container-image", "nvcr.io/nvidia/nemo:25.11", "--mounts", "/data:/data", "--env", "A=1,B=2"]


def launch(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and all that was printed."""
    env = {**os.environ, "NEMORUN_HOME": str(folder / "nemorun"), "OMP_NUM_THREADS": "1", "COLUMNS": "250"}
    with open(folder / "printed.txt", "w", encoding="utf-8") as printed:
        done = subprocess.run(
            [sys.executable, "-m", "alflb_megatron.recipes.launch", *arguments],
            cwd=folder,
            env=env,
            stdout=printed,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
    return done.returncode, (folder / "printed.txt").read_text(encoding="utf-8")


@needs_nemo
def test_local_trains_a_recipe_on_two_ranks(tmp_path: Path) -> None:
    factory = f"deepseek_moe_tiny_alflb(dir='{tmp_path}', num_gpus_per_node=2, max_steps=2)"
    command = ["nemo", "llm", "pretrain", "--factory", factory, "--yes", "trainer.enable_checkpointing=False"]
    code, printed = launch(tmp_path, "local", "--processes", "2", "--", *command, "log.ckpt=None")
    assert code == 0, printed[-6000:]
    assert "[default1]:" in printed
    assert "alflb/MaxVio" in printed
    assert "`max_steps=2` reached" in printed


@needs_nemo_run
def test_local_fails_when_the_command_does(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("raise SystemExit(3)", encoding="utf-8")
    code, printed = launch(tmp_path, "local", "--", str(tmp_path / "wrong.py"))
    assert code == 1
    assert "the job ended as FAILED" in printed


@needs_nemo_run
def test_what_slurm_would_get(tmp_path: Path) -> None:
    place = ["--account", "acct", "--partition", "batch", "--nodes", "2", "--processes", "8", "--time", "01:00:00"]
    code, printed = launch(tmp_path, "slurm", "--dryrun", *place, *CONTAINER, "--", *RECIPE)
    assert code == 0, printed
    for text in (
        "#SBATCH --account=acct",
        "#SBATCH --partition=batch",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --time=01:00:00",
        "export A=1",
        "export B=2",
        "--container-image nvcr.io/nvidia/nemo:25.11",
        "--container-mounts /data:/data,",
        "--mpi=pmix torchrun",
        "--nnodes 2 --nproc-per-node 8 --node-rank $SLURM_NODEID",
        "nemo llm pretrain --factory 'deepseek_moe_1b_alflb(num_nodes=2)' --yes",
        "export TORCHDYNAMO_DISABLE=0",
    ):
        assert text in printed


@needs_sky
def test_what_skypilot_would_get(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    given = ["--nodes", "2", "--processes", "8", "--accelerator", "H200", "--mounts", f"{tmp_path}/data:/data"]
    code, printed = launch(tmp_path, "skypilot", "--dryrun", *given, *CONTAINER[:2], "--env", "A=1", "--", *RECIPE)
    assert code == 0, printed
    for text in (
        "num_nodes: 2",
        "H200: 8",
        "docker:nvcr.io/nvidia/nemo:25.11",
        f"/data: {tmp_path}/data",
        "A: '1'",
        "TORCHDYNAMO_DISABLE: '0'",
        "--nnodes 2 --nproc-per-node 8 --node-rank $SKYPILOT_NODE_RANK",
    ):
        assert text in printed


@without_sky
def test_skypilot_that_is_missing_is_named(tmp_path: Path) -> None:
    code, printed = launch(tmp_path, "skypilot", "--dryrun", "--", *RECIPE)
    assert code == 1
    assert "SkyPilot is not installed: pip install skypilot" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["slurm", "--dryrun", "--", "x.py"], "--account=: Slurm needs an account"),
        (["slurm", "--account", "a", "--host", "h", "--", "x.py"], "--host=h: needs --user and --job-dir"),
        (["slurm", "--account", "a", "--mounts", "/data", "--", "x.py"], "--mounts=/data: must be two names"),
        (["local", "--env", "A", "--", "x.py"], "--env=A: must be two names"),
        (["local", "--nodes", "2", "--", "x.py"], "--nodes=2: must be 1"),
        (["local", "--processes", "0", "--", "x.py"], "--processes=0: must be at least 1"),
    ],
)
def test_refusals(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module("alflb_megatron.recipes.launch").main(arguments) == 2
    assert f"alflb: {said}" in capsys.readouterr().err
