"""The demo around its trainings: the table, the streaming of a process, failures, and which folders it touches."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from alflb_megatron.lab.cli import main
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.records.run_folder import RunFolder, is_run_folder
from alflb_megatron.lab.sweep.demo import COLUMNS, demo, failure_text, format_table
from alflb_megatron.lab.sweep.processes import last_lines, run_streaming
from alflb_megatron.settings import SettingError


def finished_run(path, **figures):
    """A run folder of two steps with given summary figures."""
    with RunFolder(path) as folder:
        folder.write_config({"job": {"preset": "tiny"}, "model": {"topk": 1}}, {}, {}, {"total": 10, "active": 5})
        for step in (1, 2):
            folder.append({
                "step": step, "loss": 2.0, "lr": 0.1, "grad_norm": None, "seconds": 1.0, "tokens": 8,
                "tokens_per_second": 8.0, "maxvio_mean": 0.5, "maxvio_max": 0.5, "bias_spread": 0.0,
                "layers": [1], "loads": [[6, 2]],
            })  # fmt: skip
        folder.write_summary({
            "rule": path.name, "steps": 2, "final_loss": 2.0, "tokens_per_second": 8.0, "maxvio_global_max": 0.5,
            "validation_loads": [[3, 1]], "checkpoint": None, "run": str(path),
        } | figures)  # fmt: skip
    return path


def figures(loss, last, of_all, reached, seconds, floor=0.21):
    return {
        "validation_loss": loss, "maxvio_last50": last, "maxvio_global_mean": of_all,
        "steps_to_maxvio_0.2": None, "steps_to_2x_sequence_floor": reached, "sequence_floor": floor,
        "seconds_per_step": seconds,
    }  # fmt: skip


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_table_of_three_folders(tmp_path):
    folders = [
        finished_run(tmp_path / "none", **figures(2.43151, 1.52349, 12.481, None, 0.21)),
        finished_run(tmp_path / "builtin", **figures(2.4, 0.31, 0.0371, 143, 0.2345)),
        finished_run(tmp_path / "proportional", **figures(float("nan"), 0.1, 0.04, 7, 10.2, floor=None)),
    ]
    summaries = {path.name: json.loads((path / "summary.json").read_text()) for path in folders}
    table, meanings = format_table(summaries).split("\n\n")
    assert table == (
        "rule          validation loss  MaxVio, last 50  floor  steps to 2x  MaxVio_global  seconds a step\n"
        "------------  ---------------  ---------------  -----  -----------  -------------  --------------\n"
        "none                    2.432             1.52   0.21   never in 2          12.48           0.210\n"
        "builtin                 2.400             0.31   0.21          143          0.037           0.234\n"
        "proportional       not finite             0.10      -            -           0.04          10.200"
    )
    for line, name in zip(meanings.splitlines(), COLUMNS, strict=True):
        assert line.startswith(f"{name} ") and len(line) > 40


def test_one_line_explains_each_column():
    assert next(iter(COLUMNS)) == "rule" and len(COLUMNS) == 7
    assert "Wang et al. 2024" in COLUMNS["MaxVio_global"]
    assert not any("\n" in meaning for meaning in COLUMNS.values())


# -- running a process ---------------------------------------------------------------------------------------------


def python(code):
    return [sys.executable, "-c", code]


def test_standard_error_is_passed_on_and_kept_and_standard_output_returned(tmp_path, capfd):
    code = "import sys; print('{}'); print('step 1/2', file=sys.stderr); print('é', file=sys.stderr); sys.exit(3)"
    returned = run_streaming(python(code), tmp_path / "log")
    assert returned == (3, "{}\n")
    assert (tmp_path / "log").read_text() == "step 1/2\né\n"
    captured = capfd.readouterr()
    assert captured.err == "step 1/2\né\n" and captured.out == ""


def test_more_output_than_a_pipe_holds_does_not_block(tmp_path, capfd):
    code = "import sys; print('x' * 300_000); print('y' * 300_000, file=sys.stderr)"
    code, printed = run_streaming(python(code), tmp_path / "log")
    assert code == 0 and len(printed) == 300_001 and len(capfd.readouterr().err) == 300_001


def test_a_process_left_behind_does_not_hold_us_up(tmp_path):
    grandchild = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {grandchild!r}]).pid)"
    code, printed = run_streaming(python(code), tmp_path / "log")
    try:
        assert code == 0
        os.kill(int(printed), 0)  # it still runs, with our pipe open, while we went on
    finally:
        os.kill(int(printed), 9)


def test_a_terminal_is_passed_on_to_the_process(tmp_path):
    """Run under a pseudo-terminal, so that standard error is one."""
    inner = "import sys; sys.stderr.write(f'terminal {sys.stderr.isatty()}'); sys.exit(0)"
    outer = (
        "import sys; from pathlib import Path; from alflb_megatron.lab.sweep.processes import run_streaming;"
        f"print(run_streaming([sys.executable, '-c', {inner!r}], Path({str(tmp_path / 'log')!r})))"
    )
    reader, writer = pty.openpty()
    process = subprocess.Popen(python(outer), stderr=writer, stdout=subprocess.PIPE, text=True)
    os.close(writer)
    printed, _ = process.communicate(timeout=60)
    shown = os.read(reader, 1000)
    os.close(reader)
    assert process.returncode == 0 and printed == "(0, '')\n"
    assert b"terminal True" in shown and "terminal True" in (tmp_path / "log").read_text()


def test_last_lines_skip_empty_ones_and_show_a_bar_as_it_was_last():
    text = "first\n\n  0%| step 0\r 50%| step 1\r100%| step 2\r\nValueError: no\n"
    assert last_lines(text) == "    first\n    100%| step 2\n    ValueError: no"
    assert last_lines(text, 1) == "    ValueError: no"
    assert last_lines("") == ""


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_training_that_fails_is_named_with_its_last_lines_and_exit_code_1(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # `alflb train` takes itself for one of three ranks, and refuses --nproc 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["demo", "--rules", "builtin", "--steps", "2", "--out", str(tmp_path / "demo")]) == 1
    error = capfd.readouterr().err
    assert "alflb demo: training with rule builtin failed (exit code 2); the last lines of its output:\n" in error
    assert error.splitlines()[-1].startswith("    ") and "--nproc=2: must be left out" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert (tmp_path / "demo" / "builtin.log").read_text() in error
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["runs"] == {}


def test_a_training_ended_by_a_signal_is_told_apart(tmp_path):
    code, _ = run_streaming(python("import os; os.kill(os.getpid(), 9)"), tmp_path / "log")
    assert failure_text("sign", code, "step 1\n") == (
        "training with rule sign failed (signal 9); the last lines of its output:\n    step 1"
    )


def test_an_interrupt_ends_the_process_too(tmp_path):
    inner = "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"
    outer = (
        "import signal, sys; from pathlib import Path; from alflb_megatron.lab.sweep.processes import run_streaming;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a job in the background is started without
        f"run_streaming([sys.executable, '-c', {inner!r}], Path({str(tmp_path / 'log')!r}))"
    )
    process = subprocess.Popen(python(outer), stderr=subprocess.PIPE, text=True)
    pid = int(process.stderr.readline())
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps=0: must be at least 1"),
        (["--nproc", "-1"], "--nproc=-1: must be at least 1"),
        (["--rules", "sign", "sign"], "--rules=sign sign: must name at least one rule, and each once"),
        (["--rules", "none", "../home"], "--rule=../home: must be one of none, builtin, "),
        (["--nproc", "3"], "--global-batch-size=16: must be a multiple of "),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    assert main(["demo", "--out", str(tmp_path / "demo"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"alflb: {message}") and error.count("\n") == 1
    assert not (tmp_path / "demo").exists()


# -- the folder ----------------------------------------------------------------------------------------------------


def test_a_run_that_no_demo_made_is_left_alone(tmp_path):
    finished_run(tmp_path / "builtin", **figures(2.4, 0.3, 0.2, None, 0.2))
    with pytest.raises(SettingError, match="holds builtin, which no earlier demo made"):
        demo(tmp_path, steps=1, rules=("none", "builtin"))
    assert is_run_folder(tmp_path / "builtin") and sorted(p.name for p in tmp_path.iterdir()) == ["builtin"]


def test_something_else_in_the_folder_of_a_rule_is_left_alone(tmp_path):
    write_json(tmp_path / "demo.json", {})
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingError, match="holds none"):
        demo(tmp_path, steps=1)
    assert (tmp_path / "none" / "thesis.txt").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="must be a folder, and this is a file"):
        demo(tmp_path / "file")


# -- the whole -----------------------------------------------------------------------------------------------------


def test_a_demo_trains_compares_and_can_be_repeated(tmp_path, capfd, monkeypatch):
    """Real trainings, of a few steps, on one rank."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "demo"
    assert main(["demo", "--steps", "3", "--nproc", "1", "--rules", "none", "sign-micro-batch", "--out", str(out)]) == 0
    captured = capfd.readouterr()
    assert "[2/2] training with rule sign-micro-batch" in captured.err and captured.err.count("step 3/3  loss ") == 2
    table, _, where = captured.out.strip().split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["rule", "----------------", "none", "sign-micro-batch"]
    assert where == f"picture: {(out / 'comparison.png').resolve()}"
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "demo.json").read_text())
    assert record["rules"] == ["none", "sign-micro-batch"] and record["steps"] == 3
    for rule in record["rules"]:
        assert record["runs"][rule] == json.loads((out / rule / "summary.json").read_text())
        assert record["runs"][rule]["steps"] == 3 and record["runs"][rule]["sequence_floor"] > 0
    config = json.loads((out / "sign-micro-batch" / "config.json").read_text())
    assert (config["alflb"]["rule"], config["alflb"]["update_every"]) == ("sign", "micro-batch")
    for record in read_metrics(out / "sign-micro-batch"):
        assert 0 < record["maxvio_micro_mean"] <= record["maxvio_micro_worst"]
        assert record["overload_micro_worst"] == 1, "on one expert-parallel rank"
    assert main(["demo", "--steps", "2", "--nproc", "1", "--rules", "none", "--out", str(out)]) == 0, (
        "over the earlier demo"
    )
    assert json.loads((out / "none" / "summary.json").read_text())["steps"] == 2
    assert is_run_folder(out / "sign-micro-batch"), "a run that was not asked for stays"
