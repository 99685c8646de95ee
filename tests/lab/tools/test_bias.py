"""`alflb bias` and `alflb train --bias`: the biases of a real run, shown, written, and started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alflb_megatron import lab
from alflb_megatron.biases import Biases
from alflb_megatron.hosts import huggingface
from alflb_megatron.lab.cli import main
from alflb_megatron.lab.records import metrics_file
from alflb_megatron.lab.records.run_folder import saved_settings
from alflb_megatron.lab.tools import bias
from alflb_megatron.lab.training.resolve import resolve, resolve_resumed
from alflb_megatron.settings import SettingError
from tests import forked
from tests.distributed import jobs

MODEL = {**jobs.SMALL, "vocab_size": 256}
SHAPE = [word for name, value in MODEL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
JOB = ["--pp", "2", "--ep", "1", "--validation-sequences", "16", "--data", str(Path(lab.__file__).parent)]
STEPS = 3


def _train(*words: str) -> None:
    done = forked.alflb("train", *SHAPE, *JOB, *words, nproc=2)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two pipeline stages, whose biases have moved."""
    folder = tmp_path_factory.mktemp("bias") / "run"
    _train("--rule", "adaptive", "--steps", str(STEPS), "--out", str(folder))
    return folder


def _recorded(folder: Path) -> list[list[list[float]]]:
    return [step["bias"] for step in metrics_file.read_metrics(folder)]


def _written(file: Path) -> list[list[float]]:
    tensors = load_file(file)
    return [tensors[huggingface.NAME.format(index=layer - 1)].tolist() for layer in (2, 3, 4)]


def test_a_run_is_exported_bit_for_bit_at_any_step(run: Path, tmp_path: Path, capsys: Any) -> None:
    recorded = _recorded(run)
    assert recorded[0] != recorded[-1]
    file = tmp_path / "bias.safetensors"
    assert main(["bias", "export", str(run), "--out", str(file)]) == 0
    assert _written(file) == recorded[-1]
    assert "3 layers" in capsys.readouterr().err
    assert main(["bias", "export", str(run), "--out", str(file), "--step", "1"]) == 0
    assert _written(file) == recorded[0], "and the earlier file is replaced"
    assert [path.name for path in tmp_path.iterdir()] == ["bias.safetensors"]


def test_the_shift_of_an_export(run: Path, tmp_path: Path, capsys: Any) -> None:
    file, plain = tmp_path / "bias.safetensors", bias.read_biases(run)
    assert main(["bias", "export", str(run), "--out", str(file), "--shift", "auto"]) == 0
    assert plain.lowest < 0 <= huggingface.read(file).lowest
    assert f"shifted by {plain.shift_needed():g}" in capsys.readouterr().err
    assert main(["bias", "export", str(run), "--out", str(file), "--shift", "2"]) == 0
    assert _written(file) == [(row + 2).tolist() for row in plain.rows.values()]
    before = file.read_bytes()
    capsys.readouterr()
    for shift in ("0.0001", "-1", "much", "nan", "inf", "1e39"):
        assert main(["bias", "export", str(run), "--out", str(file), "--shift", shift]) == 2
        assert capsys.readouterr().err.startswith(f"alflb: --shift={shift}: must be ")
    assert file.read_bytes() == before


def test_a_group_limited_run_is_told_of_the_shift(run: Path, tmp_path: Path, capsys: Any) -> None:
    limited = shutil.copytree(run, tmp_path / "limited")
    config = json.loads((limited / "config.json").read_text())
    config["settings"]["model"] |= {"num_groups": 4, "group_topk": 1, "topk": 2}
    (limited / "config.json").write_text(json.dumps(config))
    for source, told in ((run, False), (limited, True)):
        assert main(["bias", "export", str(source), "--out", str(tmp_path / "b.safetensors")]) == 0
        assert ("--shift auto" in capsys.readouterr().err) == told


def test_biases_are_put_into_a_model(run: Path, tmp_path: Path, capsys: Any) -> None:
    name = huggingface.NAME.format
    weights = {name(index=i): torch.zeros(8).bfloat16() for i in (1, 2, 3)} | {"lm_head.weight": torch.randn(4, 4)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert main(["bias", "export", str(run), "--into", str(tmp_path)]) == 0
    assert _written(tmp_path / "model.safetensors") == _recorded(run)[-1]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], weights["lm_head.weight"])
    save_file({name(index=1): torch.zeros(8)}, tmp_path / "model.safetensors")
    assert main(["bias", "export", str(run), "--into", str(tmp_path)]) == 2
    assert f"alflb: --into={run} at step {STEPS}: has a bias for layer 3, 4" in capsys.readouterr().err


def test_show_says_what_the_biases_are(run: Path, capsys: Any) -> None:
    assert main(["bias", "show", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["num_layers"], told["score_unit"], told["score_function"]) == (4, "score", "sigmoid")
    for layer, row in zip(told["layers"], _recorded(run)[-1], strict=True):
        assert layer["bias"] == row and layer["spread"] == pytest.approx(max(row) - min(row))
        assert (layer["min"], layer["max"], layer["experts"]) == (min(row), max(row), 8)
    assert main(["bias", "show", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "sigmoid gate, decoder of 4 layers" in lines[0] and [line.split()[0] for line in lines[3:]] == [
        "2",
        "3",
        "4",
    ]


def test_a_run_starts_from_biases_on_every_stage(run: Path, tmp_path: Path) -> None:
    rows = {layer: torch.randn(8, generator=torch.Generator().manual_seed(layer)) for layer in (2, 3, 4)}
    file = huggingface.save(Biases(rows), tmp_path / "bias.safetensors")
    out = tmp_path / "started"
    # over the weights, and against the biases, of the other run; frozen, so that they are seen as they were read
    words = ["--load", str(run), "--bias", str(file), "--alflb-frozen", "--rule", "adaptive", "--steps", "1"]
    _train(*words, "--out", str(out))
    assert _recorded(out) == [[row.tolist() for row in rows.values()]]
    assert json.loads((out / "config.json").read_text())["settings"]["job"]["bias"] == str(file)
    resumed = resolve_resumed(saved_settings(out, "--resume"), {"resume": True, "steps": 2, "out": str(out)}, {}, {})
    assert resumed.job.bias == "", "a run that goes on goes on with its own"


@pytest.mark.parametrize(
    ("job", "shape", "alf", "said"),
    [
        ({}, {"num_experts": 16}, {}, "has 8 experts in layer 2; the model has 16"),
        ({}, {"num_layers": 5}, {}, "decoder of 4 layers; the model has 5"),
        ({}, {"num_dense_layers": 0}, {}, "has no bias for layer 1, which is MoE here; it has 2 to 4"),
        ({}, {"num_dense_layers": 2}, {}, "has a bias for layer 2; the model has MoE layers 3, 4"),
        ({}, {"mtp_layers": 1}, {}, "has no bias for layer 5, which is MoE here"),
        ({}, {"gate": "softmax"}, {}, "holds biases of a sigmoid gate; the model has a softmax gate"),
        ({}, {}, {"score_unit": "logit"}, "holds biases for the score"),
        ({"rule": "none"}, {}, {}, "needs a rule"),
        ({"resume": True}, {}, {}, "cannot be given with --resume"),
        ({"out": "RUN"}, {}, {}, "is the folder this run is written to"),
        ({"bias": "nowhere"}, {}, {}, "there is no such file or folder"),
    ],
)
def test_biases_that_cannot_be_started_from(
    run: Path, job: dict[str, Any], shape: dict[str, Any], alf: dict[str, Any], said: str
) -> None:
    job = {"bias": str(run), "ep": 1, **job}
    job |= {"out": str(run)} if job.get("out") else {}
    assert resolve({"bias": str(run), "ep": 1}, MODEL, {}).job.bias == str(run)
    with pytest.raises(SettingError) as error:
        resolve(job, {**MODEL, **shape}, alf)
    assert error.value.flag == "--bias" and said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("bias"), "has no expert bias"),
        (lambda r: r.update(bias=r["bias"][:2]), "cannot be read"),
        (lambda r: r.update(layers=[2, 2, 3]), "a layer stands twice"),
        (lambda r: r.update(layers=[2, 3, "4"]), "'4' is no layer"),
        (lambda r: r.update(layers=None), "cannot be read"),
        (lambda r: r["bias"][1].__setitem__(0, None), "cannot be read"),
        (lambda r: r["bias"].__setitem__(1, "text"), "cannot be read"),
        (lambda r: r["bias"].__setitem__(1, [[1.0]]), "layer 3 must be float32 .experts."),
        (lambda r: r["bias"][1].__setitem__(0, 1e39), "layer 3 holds a NaN or an infinity"),
    ],
)
def test_a_damaged_record_is_one_line(run: Path, tmp_path: Path, change: Any, said: str) -> None:
    damaged = shutil.copytree(run, tmp_path / "damaged", ignore=shutil.ignore_patterns("checkpoints"))
    last = list(metrics_file.read_metrics(damaged))[-1]
    change(last)
    (damaged / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    with pytest.raises(SettingError, match=f"^SOURCE=.*{said}"):
        bias.read_biases(damaged)


def test_steps_and_sources_that_are_not_there(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = huggingface.save(bias.read_biases(run), tmp_path / "bias.safetensors")
    for words, said in (
        (["show", str(run), "--step", "9"], f"--step=9: must be a step of the run, which has 1 to {STEPS}"),
        (["show", str(file), "--step", "1"], "--step=1: is for a run"),
        (["show", str(tmp_path / "no")], "there is no such file or folder"),
        (["export", str(file), "--into", str(tmp_path / "no")], "must be the folder of a Hugging Face model"),
    ):
        assert main(["bias", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("alflb: ") and said in error and error.count("\n") == 1
