"""`alflb watch` on a real run, and on its files as a job writes, cuts and replaces them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from alflb_megatron.lab.cli import main
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.records.step_record import LayerRecord
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.watch.follow import FollowedRun, MetricsTail
from alflb_megatron.lab.watch.view import BLOCKS, PLAIN, block_levels, loads_text, render_frame, sparkline
from alflb_megatron.lab.watch.watch import watch
from tests.lab.report.test_report import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "ours", "--rule", "sign")


@pytest.fixture
def going(run, tmp_path) -> Path:
    """The run as if it went on: without a summary."""
    shutil.copytree(run, tmp_path / "going", ignore=shutil.ignore_patterns("summary.json"))
    return tmp_path / "going"


def lines_of(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def numbers(steps) -> list[int]:
    return [step.step for step in steps]


def shown(
    followed: FollowedRun, width: int = 100, height: int = 40, whole: bool = False, encoding: str = "utf-8"
) -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", newline="\n")
    console = Console(file=buffer, width=width, height=height, highlight=False, markup=False)
    console.print(render_frame(followed, console, whole))
    buffer.flush()
    return buffer.buffer.getvalue().decode(encoding)


# -- reading what is appended ---------------------------------------------------------------------------------------


def test_only_what_was_appended_is_read(run, tmp_path):
    file, lines = tmp_path / "metrics.jsonl", lines_of(run)
    with MetricsTail(file) as tail:
        assert tail.read_new() == ([], False)
        file.write_text("".join(lines[:3]) + lines[3][:50])
        steps, fresh = tail.read_new()
        assert numbers(steps) == [1, 2, 3] and fresh
        for _ in range(3):
            assert tail.read_new() == ([], False)
        with file.open("a") as more:
            more.write(lines[3][50:] + lines[4])
        steps, fresh = tail.read_new()
        assert numbers(steps) == [4, 5] and not fresh
        assert tail.bytes_read == file.stat().st_size == len("".join(lines[:5])), "every byte once"


def test_of_a_long_file_only_the_end_is_read(run, tmp_path):
    file, lines = tmp_path / "metrics.jsonl", lines_of(run)
    file.write_text("".join(lines))
    end = len(lines[-1]) + len(lines[-2]) + 20
    with MetricsTail(file, tail=end) as tail:
        assert numbers(tail.read_new()[0]) == [7, 8]
        assert tail.bytes_read == end and tail.broken == 0


def test_a_file_that_is_replaced_or_cut_is_read_anew(going):
    file, lines = going / "metrics.jsonl", lines_of(going)
    followed = FollowedRun(going)
    assert numbers(followed.read_new()) == list(range(1, 9))
    other = going / "other"
    other.write_text("".join(lines[:5]) + " " * 10_000 + "\n")  # longer than what it replaces
    os.replace(other, file)
    assert numbers(followed.read_new()) == [1, 2, 3, 4, 5] and list(followed.history.series("step")) == [1, 2, 3, 4, 5]
    file.write_text("".join(lines[:2]))  # shorter, in place
    assert numbers(followed.read_new()) == [1, 2]
    file.write_text("")
    file.write_text("".join(lines[:4]))  # longer, in place: seen by its steps at the latest
    followed.read_new()
    with file.open("a") as more:
        more.write("".join(lines[4:]))
    followed.read_new()
    assert followed.history.last is not None and followed.history.last.step == 8
    file.unlink()
    assert followed.read_new() == []
    file.write_text("".join(lines[:1]))
    assert numbers(followed.read_new()) == [1] and len(followed.history.series("step")) == 1
    followed.tail.close()


def test_lines_that_are_no_records_are_counted_and_named(going):
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": "x"}\n' + "[" * 200_000 + "\n\xff\n[]\n" + '{"step": 9}\n')
    followed = FollowedRun(going)
    followed.read_new()
    assert followed.tail.broken == 4 and followed.history.last is not None and followed.history.last.step == 9
    assert "4 lines of metrics.jsonl are no records" in shown(followed)
    followed.tail.close()


# -- what is shown --------------------------------------------------------------------------------------------------


def test_the_frame_holds_the_figures_of_the_last_record(run):
    followed = FollowedRun(run)
    followed.read_new()
    text, last = shown(followed), list(read_metrics(run))[-1]
    assert "step 8 / 8" in text and f"{last['loss']:.4f}" in text and maxvio_text(last["maxvio_mean"]) in text
    assert f"the floor of {maxvio_text(followed.history.floor())}" in text and "rule sign" in text
    for number, loads, bias in zip(last["layers"], last["loads"], last["bias"], strict=True):
        vio = maxvio_text(max(loads) / np.mean(loads) - 1)
        ends = [f"{end(loads) / np.mean(loads):.2f}" for end in (min, max)]
        assert re.search(
            rf"^ +{number} +{re.escape(vio)} +{ends[0]} +{ends[1]} +{max(bias) - min(bias):.3g}", text, re.M
        )
    assert "ended: validation loss" in text
    followed.tail.close()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("width", [20, 60, 200])
def test_it_fits_every_terminal(run, width, encoding):
    followed = FollowedRun(run)
    followed.read_new()
    lines = shown(followed, width, encoding=encoding).splitlines()
    assert lines and max(map(len, lines)) <= width
    assert any(set(line) & set(BLOCKS) for line in lines) == (encoding == "utf-8")
    followed.tail.close()


def test_figures_of_micro_batches_are_shown_where_there_are_any(run, going):
    followed = FollowedRun(run)
    followed.read_new()
    assert "micro-batches" not in shown(followed)
    record = list(read_metrics(going))[-1]
    record |= {"step": 9, "maxvio_micro_mean": 0.61, "maxvio_micro_worst": 1.32, "overload_micro_worst": 1.08}
    with (going / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    followed = FollowedRun(going)
    followed.read_new()
    assert "micro-batches: MaxVio 0.61  worst 1.32  fullest expert-parallel rank 1.08x the mean" in shown(followed)
    followed.tail.close()


def test_of_more_layers_than_lines_the_worst_are_shown(going):
    loads = [[100 + i, 100 - i, 100, 100] for i in range(60)]
    record = next(read_metrics(going)) | {"step": 9, "layers": list(range(60)), "loads": loads, "bias": None}
    with (going / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    followed = FollowedRun(going)
    followed.read_new()
    text = shown(followed, height=24)
    rows = [int(number) for number in re.findall(r"^ {2,4}(\d+) +0\.\d+ +\d", text, re.M)]
    assert rows == list(range(60 - len(rows), 60)) and 3 < len(rows) < 20 and text.count("\n") <= 24
    assert len(re.findall(r"^ {2,4}\d+ +0?\.?\d+ +\d", shown(followed, whole=True), re.M)) == 60
    followed.tail.close()


def test_alarms_and_rejected_steps_are_shown_and_no_control_code_of_a_file_is(going):
    record = next(read_metrics(going))
    alarms = {
        "step": 9,
        "alarms": ["expert 3 of layer 2 \x1b]0;title\x07 starved [red]"],
        "rejected": [2],
        "loss": None,
    }
    with (going / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record | alarms) + "\n")
    followed = FollowedRun(going)
    followed.read_new()
    text = shown(followed)
    assert "step 9: expert 3 of layer 2 ?]0;title? starved [red]" in text and "not finite" in text
    assert "bias of layer 2 stayed" in text and "\x1b" not in text
    followed.tail.close()


def test_characters_for_values():
    assert block_levels(np.array([0.0, 1.0, 2.0, np.nan, 9.0]), 0.0, 2.0, PLAIN) == ".+@ @"
    text, many, means = sparkline(np.array([1.0] * 40 + [10.0] * 40), 8, BLOCKS)
    assert text == "▁▁▁▁████" and many == 80 and means.tolist() == [1.0] * 4 + [10.0] * 4
    assert sparkline(np.array([np.nan, 0.0]), 8, BLOCKS)[0] == ""
    layer = LayerRecord(1, np.array([0.0, 1.0, 3.0, 0.0]), np.array([]), float("nan"))
    assert loads_text(layer, 8, PLAIN).plain == "x+@x"
    assert loads_text(layer, 2, PLAIN).plain == "@x", "largest first where there is no room for all"


# -- the command ----------------------------------------------------------------------------------------------------


def test_once_prints_a_frame_and_ends(run, capsys):
    assert main(["watch", str(run), "--once"]) == 0
    out = capsys.readouterr().out
    assert "step 8 / 8" in out and "\x1b" not in out


def test_an_output_that_knows_ascii_alone_gets_what_it_can_show(run, tmp_path):
    there = shutil.copytree(run, tmp_path / "\u7a7a")
    command = [sys.executable, "-m", "alflb_megatron.lab.cli", "watch", str(there), "--once"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}  # which Python reads when it starts
    done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=300)
    assert b"step 8 / 8" in done.stdout and done.stdout.isascii()


def test_what_cannot_work_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "metrics.jsonl")
    for arguments, told in [
        ([tmp_path / "absent", "--once"], "RUN="),
        ([tmp_path / "file"], "this is a file"),
        ([tmp_path / "fifo", "--once"], "RUN="),
        ([run, "--every", "0"], "--every=0.0"),
        ([run, "--every", "nan"], "--every=nan"),
    ]:
        assert main(["watch", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1 and error.startswith("alflb: ")


def test_it_waits_for_a_run_follows_it_and_ends_with_it(run, tmp_path):
    there, lines, out = tmp_path / "run", lines_of(run), io.StringIO()
    console = Console(file=out, width=100, markup=False, highlight=False)
    thread = threading.Thread(target=watch, args=(there, False, 0.1, console), daemon=True)
    thread.start()

    def until(text: str) -> None:
        limit = time.monotonic() + 60
        while text not in out.getvalue():
            assert time.monotonic() < limit, out.getvalue()
            time.sleep(0.05)

    until("waiting for")
    shutil.copytree(run, there, ignore=shutil.ignore_patterns("summary.json", "metrics.jsonl"))
    (there / "metrics.jsonl").write_text(lines[0])
    until("step 1 / 8")
    with (there / "metrics.jsonl").open("a") as file:
        file.write("".join(lines[1:]))
    until("step 8 / 8")
    assert "ended" not in out.getvalue()
    shutil.copy(run / "summary.json", there)
    thread.join(60)
    assert not thread.is_alive() and "ended: validation loss" in out.getvalue()


def test_in_a_terminal_it_draws_and_ends(run):
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "alflb_megatron.lab.cli", "watch", str(run)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "90", "LINES": "30"}
    process = subprocess.Popen(command, stdout=child, stderr=child, env=environment)
    os.close(child)
    drawn = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # how a pseudo-terminal reports that its other end was closed
            break
        if not piece:
            break
        drawn += piece
    os.close(parent)
    assert process.wait(60) == 0
    assert b"\x1b[" in drawn and "step 8 / 8" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.decode())
