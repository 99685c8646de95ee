"""`alflb train` as a user runs it: under torchrun or its own launcher, with each kind of rule, from other weights."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from alflb_megatron.lab.records import metrics_file
from alflb_megatron.lab.records.run_folder import CONFIG_KEYS, RunFolder
from alflb_megatron.lab.training.resolve import resolve
from alflb_megatron.settings import SettingError
from tests import forked
from tests.distributed import jobs, ranks
from tests.distributed.test_resume import PACKAGE

SHAPE = [word for name, value in jobs.SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
SHAPE[SHAPE.index("--vocab-size") + 1] = "256"
TRAIN = ["train", *SHAPE, "--steps", "4", "--validation-sequences", "16", "--data", str(PACKAGE), "--json"]


def _summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 4/4  loss" in done.stderr, "progress goes to standard error"
    return dict(json.loads(done.stdout))


def test_the_run_folder_of_each_kind_of_rule(tmp_path: Path) -> None:
    alflb, torchrun = [sys.executable, "-m", "alflb_megatron.lab.cli"], [sys.executable, "-m", "torch.distributed.run"]
    under_torchrun = [*torchrun, "--standalone", "--nproc-per-node", "2", "-m", "alflb_megatron.lab.cli"]

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, capture_output=True, text=True, timeout=300)

    plain = _summary(start(*under_torchrun, *TRAIN, "--rule", "none", "--out", str(tmp_path / "none")))
    builtin = _summary(start(*alflb, *TRAIN, "--rule", "builtin", "--no-save", "--out", str(tmp_path / "builtin")))
    words = ["--rule", "harmonic", "--gate", "softmax", "--load", plain["checkpoint"], "--out", str(tmp_path / "ours")]
    ours = _summary(forked.alflb(*TRAIN, *words, nproc=2))
    assert builtin["checkpoint"] is None
    assert ours["validation_loss"] < plain["validation_loss"], "it started from the other's weights"
    for name, summary in (("none", plain), ("builtin", builtin), ("ours", ours)):
        folder = tmp_path / name
        assert summary == json.loads((folder / "summary.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        assert set(config) == set(CONFIG_KEYS)
        assert config["versions"]["megatron-core"]
        assert config["parts"]["collectives"] in ("gloo", "nccl")
        steps = list(metrics_file.read_metrics(folder))
        assert [step["step"] for step in steps] == [1, 2, 3, 4]
        for step in steps:
            assert step["layers"] == [2, 3, 4]
            assert [sum(loads) for loads in step["loads"]] == [16 * 32 * 2] * 3
            assert ("bias" in step) == (name != "none")
        assert [sum(loads) for loads in summary["validation_loads"]] == [16 * 32 * 2] * 3
        moved = any(value for row in steps[-1].get("bias", []) for value in row)
        assert moved == (name != "none")


def _weights() -> list[float]:
    from alflb_megatron.lab.training import build

    plan = resolve({"nproc": 2, "ep": 1, "pp": 2}, jobs.SMALL, {})
    with ranks.model_parallel(**jobs.sizes(plan)):
        model = build.gpt_model(plan, build.transformer_config(plan))
        return [float(p.double().sum()) for name, p in model.named_parameters() if name.endswith("router.weight")]


def test_pipeline_stages_start_with_weights_of_their_own() -> None:
    sums = [value for rank in ranks.run(2, _weights) for value in rank]
    assert len(sums) == 3
    assert len(set(sums)) == 3


def _checkpoint(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    job = {"step": int(name[5:13]), "layout": {}, "fingerprint": ""}
    (folder / name / "job.json").write_text(json.dumps(job), encoding="utf-8")
    # The smallest that passes for one of Megatron-Core's.
    (folder / name / "metadata.json").write_text('{"sharded_backend": "torch_dist"}', encoding="utf-8")
    (folder / name / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))


def _find(folder: Path) -> list[Any]:
    from alflb_megatron.lab.training import checkpoint

    _checkpoint(folder / "checkpoints", "step_00000003")
    _checkpoint(folder / "checkpoints", "step_00000009.part")
    (folder / "checkpoints" / "step_00000012").mkdir()
    found: list[Any] = [checkpoint.find(folder, "--resume").step]
    (folder / "checkpoints" / "step_00000003" / "job.json").write_text("{", encoding="utf-8")
    for path in (folder, folder / "nothing"):
        try:
            checkpoint.find(path, "--resume")
        except SettingError as error:
            found.append(str(error))
    return found


def test_a_half_written_checkpoint_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    (found,) = ranks.run(1, _find, tmp_path)
    assert found[0] == 3
    assert "cannot be read" in found[1]
    assert "must name a run with a checkpoint" in found[2]


def test_a_run_killed_in_its_first_save_starts_anew(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_config({}, {}, {}, {"total": 1, "active": 1})
    (tmp_path / "checkpoints" / "step_00000003.part").mkdir(parents=True)
    RunFolder(tmp_path).close()
    (tmp_path / "checkpoints" / "step_00000006").mkdir()
    with pytest.raises(SettingError, match="--resume"):
        RunFolder(tmp_path)
