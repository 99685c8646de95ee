"""`alflb reproduce` through NeMo-Run: for real on this machine, and as what Slurm would be given."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alflb_megatron.lab.cli import main
from alflb_megatron.lab.sweep import collect, execute, plan_file, run_state
from alflb_megatron.settings import SettingError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nemo_run") is None, reason="NeMo-Run is not installed here")

ONE = """
seeds: {smoke: [5], full: [5, 6]}
train: {data: /data/text, tokenizer: "huggingface:/data/tokenizer", nproc: 16, ep: 8}
runs:
  - {model: deepseek-moe-1b, rule: sign, u: 1e-3}
executor:
  {kind: slurm, account: acct, partition: batch, container_image: "nemo:25.11", mounts: "/data:/data", time: "23:00:00"}
"""
RUNS = ("deepseek-moe-1b.sigmoid.sign.u0.001.s5", "deepseek-moe-1b.sigmoid.sign.u0.001.s6")


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "nemorun"))
    (tmp_path / "one.yaml").write_text(ONE, encoding="utf-8")
    return tmp_path / "one.yaml"


def test_runs_here_are_started_by_nemo_run(one: Path, tmp_path: Path) -> None:
    out, sweep = tmp_path / "out", plan_file.read_plan(one, "smoke")
    with execute.lock_folder(out) as lock:
        assert execute.train_locally(sweep, out, 1, lock, print) == []
    assert [row["run"] for row in collect.collect(sweep, out)] == [RUNS[0]]
    assert "Experiment" in (out / f"{RUNS[0]}.log").read_text(encoding="utf-8")


def reproduce(one: Path, *arguments: str) -> str:
    """All that a dry run printed; in a process of its own, for NeMo-Run's tunnel reads standard input."""
    words = ["-m", "alflb_megatron.lab.cli", "reproduce", str(one), "--out", str(one.parent / "out"), "--dryrun"]
    done = subprocess.run(
        [sys.executable, *words, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        stdin=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "250"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_slurm_is_given_a_script_for_every_run(one: Path) -> None:
    said, out = reproduce(one), one.parent / "out"
    for run in RUNS:
        assert f"# {run}\n" in said and f"--out {out / run}" in said
    assert f"--container-mounts /data:/data,{out}:{out}" in said and said.count("train --requeue") == 2
    for words in ("--account=acct", "--nodes=2", "--nproc-per-node 8", "--alflb-step-size 0.001", "GPU-hours"):
        assert words in said
    assert "0 of 2 runs have finished, 2 would be submitted" in said
    assert not list(out.glob("*.submitted.json"))


def test_what_was_submitted_is_not_submitted_again(one: Path) -> None:
    out = one.parent / "out"
    out.mkdir()
    run_state.submission_file(plan_file.read_plan(one).runs[0], out).write_text("{}", encoding="utf-8")
    said = reproduce(one)
    assert f"# {RUNS[0]}" not in said and f"# {RUNS[1]}" in said and "1 would be submitted" in said
    assert f"# {RUNS[0]}" in reproduce(one, "--resubmit")
    with pytest.raises(SettingError, match="have not finished"):
        collect.collect(plan_file.read_plan(one), out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("account=", "Slurm needs an account"),
        ("colour=blue", "no such setting"),
        ("processes=5", "must divide the 16 ranks"),
        ("time=1:00:00", "takes about"),
        ("time=soon", "must be HH:MM:SS"),
        ("nonsense", "--executor-options=nonsense: must be name=value"),
    ],
)
def test_a_wrong_option_explains_itself(
    one: Path, tmp_path: Path, options: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", str(one), "--out", str(tmp_path / "out"), "--dryrun", "--executor-options", options]
    assert main(words) == 2
    assert said in capfd.readouterr().err


def test_data_and_tokenizer_that_are_here_are_named_in_full_and_mounted(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    for name in ("text.idx", "text.bin"):
        (tmp_path / "made" / name).touch()
    (tmp_path / "words").mkdir()
    said = reproduce(one, "--data", "made/text", "--tokenizer", "huggingface:words")
    assert f"--data {tmp_path}/made/text" in said and f"--tokenizer huggingface:{tmp_path}/words" in said
    for folder in (tmp_path / "made", tmp_path / "out", tmp_path / "words"):
        assert f"{folder}:{folder}" in said


def test_data_that_is_nowhere_is_refused(one: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["reproduce", str(one), "--out", str(tmp_path / "out"), "--dryrun", "--data", "no/text"]
    assert main(words) == 2
    assert "data=no/text: is not there: make it with `alflb data prepare`" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_skypilot_needs_storage_that_both_sides_see(
    one: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", str(one), "--out", str(tmp_path / "out"), "--dryrun", "--executor", "skypilot"]
    plain = one.read_text(encoding="utf-8").split("executor:")[0]
    one.write_text(plain, encoding="utf-8")
    assert main(words) == 2
    assert "the run folders are read from there" in capfd.readouterr().err
