"""SIGKILL of a random rank at a random moment, restart, and again: the run is the one nobody killed.

Twenty faults; `ALFLB_LONG=1` for two hundred, whose figures go to docs/results/faults.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.run_folder import RunFolder
from alflb_megatron.settings import SettingError
from tests.reliability import faults, planted

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "faults.json"
LONG = bool(os.environ.get("ALFLB_LONG"))


def _faults(out: Path, kills: int, *more: str, limit: int) -> tuple[int, dict[str, Any], str]:
    """Runs the module by itself: ranks are forked, which a process with pytest's history is not fit for."""
    words = ["-W", "ignore", "-m", "tests.reliability.faults", "--kills", str(kills), "--out", str(out), *more]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=limit)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode, json.loads(out.read_text()), done.stdout


def test_a_run_that_is_killed_again_and_again_is_the_run_nobody_killed(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    kills, variants = (204, list(faults.VARIANTS)) if LONG else (20, list(faults.VARIANTS)[:4])
    status, found, said = _faults(out, kills, "--variants", *variants, limit=3600 if LONG else 600)
    assert found["problems"] == []
    assert (status, found["tried"], found["survived"], found["lost"]) == (0, kills, kills, 0)
    missed = [moment for moment, counts in found["by_moment"].items() if counts["tried"] == 0]
    assert missed == [], said
    if LONG:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS, found)


@pytest.mark.parametrize("defect", planted.DEFECTS)
def test_a_defect_loses_faults(defect: str, tmp_path: Path) -> None:
    """Each defect by itself; what is named tells what kind of difference was seen."""
    if not LONG and defect != "in place":
        pytest.skip("the long form plants them all")
    status, found, _ = _faults(
        tmp_path / "faults.json", 6, "--plant", defect, "--variants", next(iter(faults.VARIANTS)), limit=600
    )
    assert status == 1
    assert found["lost"] > 0
    assert len(found["problems"]) == 1
    assert "seed 0" in found["problems"][0] and "rank " in found["problems"][0] and "moment" in found["problems"][0]


def test_a_folder_left_before_its_config_is_started_in_again(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").close()  # killed here
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    RunFolder(tmp_path / "run").close()
    (tmp_path / "run" / "metrics.jsonl").write_text("somebody's\n")
    with pytest.raises(SettingError, match="--out"):
        RunFolder(tmp_path / "run")
