"""The benchmark of one device, end to end without CUDA: real trainings, a real profile, the table of what they gave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import one_gpu

ROOT = Path(__file__).parents[1]
SMALL = {"num-layers": 2, "seq-length": 64, "global-batch-size": 8, "micro-batch-size": 4, "validation-sequences": 8}


def test_every_rule_is_trained_and_profiled(tmp_path: Path) -> None:
    out = tmp_path / "results" / "one_gpu.json"
    words = ["--preset", "tiny", "--steps", "6", "--rules", "builtin,adaptive", "--rounds", "1", "--out", str(out)]
    words += ["--runs", str(tmp_path / "runs"), "--", *(f"--{name}={value}" for name, value in SMALL.items())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_gpu", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert done.stdout.rstrip("\n") == one_gpu.one_gpu_table(result)
    assert (result["device"], result["preset"], result["steps"], result["rounds"]) == ("CPU", "tiny", 6, 1)
    assert (result["tokens"], result["micro_batches"]) == (512, 2)
    assert list(result["rules"]) == ["builtin", "adaptive"]
    assert result["rules"]["builtin"]["ratio"] == 1.0
    for rule, row in result["rules"].items():
        assert row["tokens_per_second"] > 0 and row["ratio"] > 0
        assert row["maxvio"] > 0 and row["maxvio_global"] > 0
        assert row["peak_memory"] is None
        assert len(row["each"]) == 1
        parts = row["profile"]["parts"]
        # what is counted for the record alone stands beside the counting of a router that is not ours
        assert set(parts) == set(one_gpu.PARTS) - ({"watching"} if rule == "adaptive" else set())
        assert all(0 < part["share"] <= 1 for part in parts.values())
        assert sum(parts[name]["ms"] for name in ("gate", "selection", "counting")) <= parts["router"]["ms"]
        assert parts["router"]["ms"] + parts["update"]["ms"] < row["profile"]["step_ms"]
        records = (tmp_path / "runs" / f"{rule}-0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        speeds = sorted(json.loads(line)["tokens_per_second"] for line in records[2:])
        assert row["tokens_per_second"] == pytest.approx((speeds[1] + speeds[2]) / 2)


NEEDS_CUDA = "--preset=deepseek-moe-1b: needs CUDA"
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing to refuse with CUDA")


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        pytest.param([], NEEDS_CUDA, marks=without_cuda),
        (["--preset", "tiny", "--rules", "sign"], "--rules=sign: must have builtin"),
        (["--preset", "tiny", "--rules", "builtin,no-such"], "--rule=no-such: "),
        (["--preset", "tiny", "--steps", "2"], "--steps=2: must be at least 3"),
        (["--preset", "tiny", "--", "--rule", "sign"], "--rule=sign: is set by the benchmark"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], setting: str
) -> None:
    assert one_gpu.main(["--out", str(tmp_path / "one_gpu.json"), "--runs", str(tmp_path / "runs"), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"one_gpu: {setting}") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_result_the_table_says_how_to_measure() -> None:
    text = one_gpu.one_gpu_table(None)
    assert text.splitlines() == [text]
    assert text.startswith("Not measured.")
    assert "`python -m benchmarks.one_gpu --preset deepseek-moe-1b " in text


@without_cuda
def test_the_command_it_names_is_one_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_gpu.main(one_gpu.one_gpu_table(None).split("`")[1].split()[3:]) == 2
    assert capsys.readouterr().err.startswith(f"one_gpu: {NEEDS_CUDA}")
