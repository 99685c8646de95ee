"""`alflb theory` and `alflb train --certify`: command lines, files, and certificates of real training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alflb_megatron.lab import cli
from alflb_megatron.lab.replay.scores import open_scores
from alflb_megatron.lab.theory import command as theory
from alflb_megatron.lab.theory import tables
from alflb_megatron.lab.theory.certificate import certify, regret_in_hindsight
from alflb_megatron.lab.training.certificates import POOLED
from alflb_megatron.lab.training.resolve import resolve
from alflb_megatron.settings import SettingError
from tests import forked
from tests.lab.replay.test_replay import train
from tests.lab.theory.test_claims import SMALL


def test_one_claim_writes_its_table_figures_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["theory", "preference", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "The preference rule" in shown.out and "holds" in shown.out and "conditional" not in shown.out
    assert "The preference rule ..." in shown.err
    written = json.loads((tmp_path / "theory.json").read_text(encoding="utf-8"))
    (claim,) = written["claims"].values()
    assert {row["verdict"] for row in claim["rows"]} == {"holds"}
    assert claim["figures"]["switches"]["any other"] == 0 and claim["source"]
    assert (tmp_path / "preference.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, tables.format_table(written, width=100).splitlines())) <= 100
    assert tables.markdown_table(claim).count("\n") == 1 + len(claim["rows"])


def test_every_claim_with_a_picture_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but regret, which the tests of the claims measure; at the size of those tests."""
    from alflb_megatron.lab.theory import claims
    from alflb_megatron.lab.theory.plots import draw

    monkeypatch.setattr(claims, "make", lambda name, full=False: SMALL[name])
    results = theory.measure(["lagrangian", "balance", "structure", "convexity"])

    assert [path.name for path in draw(results, tmp_path)] == ["lagrangian.png", "balance.png", "convexity.png"]
    assert theory.failed(results) == []


def test_a_claim_that_fails_is_said_and_is_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alflb_megatron.lab.theory import claims

    few = type(SMALL["convexity"])(directions=1, tails=(1.5,), seeds=1, samples=60)
    monkeypatch.setattr(claims, "make", lambda name, full=False: few)
    assert cli.main(["theory", "convexity", "--out", str(tmp_path)]) == 1
    assert "alflb theory: fails: convexity: near ties of a sample give mu" in capsys.readouterr().err


def test_bad_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["theory", "entropy", "--out", str(tmp_path / "new")]) == 2
    assert "CLAIM=entropy: must be one of lagrangian, preference" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert cli.main(["theory", "preference", "--out", str(tmp_path / "file")]) == 2


@pytest.mark.parametrize(
    ("job", "shape", "alf", "said"),
    [
        ({"rule": "builtin"}, {}, {}, "needs a rule of ours, not builtin"),
        ({}, {"num_groups": 4, "group_topk": 1}, {}, "needs routing over all experts"),
        ({}, {"topk": 16}, {}, "needs --topk below --num-experts"),
        ({}, {}, {"score_unit": "logit"}, "needs --alflb-score-unit score, not logit"),
    ],
)
def test_what_cannot_be_certified_is_refused(
    job: dict[str, object], shape: dict[str, object], alf: dict[str, object], said: str
) -> None:
    with pytest.raises(SettingError, match=f"--certify=2: {said}"):
        resolve({**job, "certify": 2}, shape, alf)


def test_certificates_of_a_training_are_those_of_its_scores(tmp_path: Path) -> None:
    """Two ranks; certifying changes nothing, and what it says is what the recorded scores and biases say."""
    steps = train(tmp_path / "run", "--certify", "2", "--record-scores", "3", "--ep", "2", nproc=2)
    plain = train(tmp_path / "plain", "--ep", "2", nproc=2)
    assert [step["bias"] for step in steps] == [step["bias"] for step in plain]
    assert [("certificates" in step) for step in steps] == [False, True, False]
    found = steps[1]["certificates"]
    assert [row["layer"] for row in found] == steps[1]["layers"]
    scores_LTE = list(open_scores(tmp_path / "run"))[1]
    for at, row in enumerate(found):
        # rank 0 is the one that certifies, and its tokens are the first of the step's
        assert row["tokens"] == scores_LTE.shape[1] // 2
        again = certify(scores_LTE[at, : row["tokens"]], 2, torch.tensor(steps[0]["bias"][at]))
        assert row["dual"] == pytest.approx(again.dual, abs=1e-9)
        assert row["optimum"] == pytest.approx(again.optimum, abs=1e-9)
        assert row["gap"] >= 0 and row["proof"] < 1e-9 and row["tied"] <= 15


def test_certificates_come_from_every_pipeline_stage(tmp_path: Path) -> None:
    steps = train(tmp_path / "run", "--certify", "3", "--pp", "2", "--ep", "1", "--gate", "softmax", nproc=2)
    assert [row["layer"] for row in steps[2]["certificates"]] == steps[2]["layers"]
    assert [row["layer"] for row in summary(tmp_path / "run")["regret"]] == steps[2]["layers"]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def test_the_regret_of_a_training_is_that_of_its_scores_and_outlives_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--rule", "sign", "--alflb-step-size", "0.05", "--certify", "1", "--ep", "1"]
    steps = train(folder, *words, "--record-scores", "3", "--save")
    regret = summary(folder)["regret"]
    assert [row["layer"] for row in regret] == steps[0]["layers"]
    start = torch.zeros(len(regret), 16).tolist()
    biases = [start, *(step["bias"] for step in steps)]
    for at, row in enumerate(regret):
        routed = zip(open_scores(folder), biases, strict=False)
        samples = [(scores_LTE[at], torch.tensor(bias[at])) for scores_LTE, bias in routed]
        whole = regret_in_hindsight(samples, 2)
        assert row["tokens"] == whole.tokens <= POOLED  # so few that the sample is all of them
        assert row["regret"] == pytest.approx(whole.regret, abs=1e-12) and row["proof"] < 1e-9
    # broken off before the summary: nothing is trained again, and the samples are still there
    (folder / "summary.json").unlink()
    resumed = ("train", "--resume", "--out", folder)
    assert forked.alflb(*resumed).returncode == 0
    assert summary(folder)["regret"] == regret
    # without a step's samples none is said, and the run still ends well
    next((folder / "certified").iterdir()).unlink()
    (folder / "summary.json").unlink()
    assert forked.alflb(*resumed).returncode == 0
    assert summary(folder)["regret"] == []
