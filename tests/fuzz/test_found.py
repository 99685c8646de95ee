"""What the fuzzing and the reading for it found in our readers, one named case each."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from alflb_megatron.config import ALFConfig, parse_options
from alflb_megatron.lab import cli
from alflb_megatron.lab.checkpoints import scan
from alflb_megatron.lab.checkpoints.pickle_scan import UnsafePickleError
from alflb_megatron.lab.data import open_data
from alflb_megatron.lab.records.files import read_json
from alflb_megatron.lab.records.run_folder import RunFolder
from alflb_megatron.lab.replay.scores import open_scores
from alflb_megatron.lab.training import launch
from alflb_megatron.lab.training.resolve import resolve, resolve_resumed
from alflb_megatron.settings import SettingError
from tests.fuzz import seeds


def _refused(*words: str) -> Any:
    return pytest.raises(SettingError, match=".*".join(words))


def _step(folder: Path, step: int, name: str = "layer_2", **about: str) -> None:
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    metadata = {"format": "1", "ranks": "1", "topk": "1", **about}
    path = folder / "scores" / f"step_{step:08d}.rank_00000.safetensors"
    save_file({name: torch.rand(8, 4)}, path, metadata=metadata)


def test_two_steps_far_apart_make_no_list_of_all_between(tmp_path: Path) -> None:
    _step(tmp_path, 1)
    _step(tmp_path, 99_999_999)
    with _refused("step 2 is missing"):
        open_scores(tmp_path)


def test_a_number_of_ranks_beyond_all_makes_no_list_of_them(tmp_path: Path) -> None:
    _step(tmp_path, 1, ranks=str(10**18))
    with _refused("rank 1 of"):
        open_scores(tmp_path)


def test_groups_that_do_not_fit_the_experts(tmp_path: Path) -> None:
    _step(tmp_path, 1, num_groups="3", group_topk="1")
    with _refused("num_groups 3"):
        open_scores(tmp_path)


def test_scores_that_are_packed_a_thousandfold_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1, 2**17, 2**10)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("scores.npy", "w") as member:
        member.write(head.getvalue())
        for _ in range(2**9):
            member.write(bytes(2**20))
    with _refused("is packed"):
        open_scores(path)


def test_a_shape_below_zero(tmp_path: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (-2, -2, 4)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("scores.npy", head.getvalue() + bytes(64))
    with _refused("SCORES=", "shape|empty"):
        open_scores(tmp_path / "a.npz")


def test_an_offset_that_overflows(tmp_path: Path) -> None:
    seeds.indexed(tmp_path)
    idx = tmp_path / "tokens.idx"
    data = bytearray(idx.read_bytes())
    struct.pack_into("<q", data, 34 + 4 * 40, 2**63 - 1)
    idx.write_bytes(data)
    with _refused("--data=", "at byte"):
        open_data(str(tmp_path / "tokens"), seq_length=8, vocab_size=256, seed=1)


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000])
def test_an_option_that_json_cannot_hold(value: str) -> None:
    assert parse_options(f"x={value}") == {"x": value}
    with _refused("no such knob"):
        ALFConfig(rule="sign", rule_options=f"x={value}")


def test_a_whole_number_beyond_all_floats() -> None:
    with _refused("--alflb-step-size=", "finite"):
        ALFConfig(rule="sign", step_size=10**400)
    with _refused("--steps=1", "at most 9223372036854775807"):
        resolve({"steps": 10**400}, {}, {})


def test_a_value_of_several_lines_is_said_in_one() -> None:
    error = SettingError("--out", "a\nb\x1b[31m" + "x" * 10_000, "must be short")
    assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 1000


@pytest.mark.parametrize("values", [{"job": {"preset": {}}}, {}, {"job": {"unknown": 1}, "model": {}, "alflb": None}])
def test_a_config_that_is_none_of_ours(values: dict[str, Any]) -> None:
    saved = resolve({"nproc": 2}, {}, {}).as_dict() | values if values.get("job") else values
    with pytest.raises(SettingError):
        resolve_resumed(saved, {"out": "x"}, {}, {})


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", "\ud800"])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_records_that_cannot_be_gone_on_with_stay_as_they_are(tmp_path: Path) -> None:
    seeds.run_folder(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    lines[1]["seconds"] = "soon"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    before = metrics.read_bytes()
    with _refused("--out=", "step 2 has no number as seconds"):
        RunFolder(tmp_path, resume_step=3)
    assert metrics.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".part")


def test_a_launcher_that_says_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with _refused("WORLD_SIZE=two"):
        launch.world_size()


def test_an_archive_whose_names_are_no_text() -> None:
    stream = io.BytesIO()
    torch.save({"a": 1}, stream)
    with pytest.raises(UnsafePickleError):
        scan._scan_archive(stream.getvalue().replace(b"byteorder", b"\xff\xfeteorder"), empty=False)


def test_an_argument_of_any_length_is_a_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["replay", "x", "--nonsense=" + "[" * 100_000])
    assert len(capsys.readouterr().err) < 1000
