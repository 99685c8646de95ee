"""The run folder: what is written can be read back, survives a kill, and its figures mean what they say."""

import contextlib
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from alflb_megatron.lab.records import files
from alflb_megatron.lab.records.metrics_file import HalfWrittenLine, read_metrics
from alflb_megatron.lab.records.run_folder import CONFIG_KEYS, RunFolder, is_run_folder
from alflb_megatron.lab.records.summary import (
    FIGURE_KEYS,
    maxvio_last,
    maxvio_text,
    seconds_per_step,
    steps_to_maxvio,
    summarise,
)
from alflb_megatron.lab.records.versions import git_revision, versions
from alflb_megatron.lab.training.progress import Progress
from alflb_megatron.settings import SettingError


def step_record(step, **changes):
    return {
        "step": step, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.7, "seconds": 0.5, "tokens": 8, "tokens_per_second": 16.0,
        "maxvio_mean": 0.5, "maxvio_max": 1.0, "bias_spread": 0.01, "layers": [2, 3],
        "loads": [[2, 4, 4, 6], [4, 4, 4, 4]], "bias": [[0.1, -0.1, 0.25, 1 / 3], [0.0, 0.0, 0.0, 0.0]],
    } | changes  # fmt: skip


def whole_summary(**changes):
    return {
        "rule": "sign", "steps": 3, "validation_loss": 2.4, "maxvio_global_mean": 0.1, "maxvio_global_max": 0.2,
        "validation_loads": [[1, 3], [2, 2]], "maxvio_last50": 0.3, "steps_to_maxvio_0.2": None,
        "sequence_floor": None, "steps_to_2x_sequence_floor": None,
        "seconds_per_step": 0.5, "tokens_per_second": 16.0, "final_loss": 2.5, "checkpoint": None, "run": "runs/x",
    } | changes  # fmt: skip


def open_run(path, steps=0, resume_step=None, **changes):
    folder = RunFolder(path, resume_step=resume_step)
    folder.write_config({"job": {"steps": 3}}, {"rule": "sign"}, {"device": "CPU"}, {"total": 10, "active": 5})
    for step in range(1, steps + 1):
        folder.append(step_record(step, **changes))
    return folder


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def with_maxvio(values):
    return [{"step": step, "maxvio_mean": value} for step, value in enumerate(values, 1)]


# -- what is written -----------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    with open_run(tmp_path / "new" / "run", steps=3) as folder:
        folder.write_summary(whole_summary())
        assert folder.records() == [step_record(step) for step in (1, 2, 3)]
    path = tmp_path / "new" / "run"
    assert list(read_metrics(path)) == list(read_metrics(path / "metrics.jsonl")) == [step_record(s) for s in (1, 2, 3)]
    config = json.loads((path / "config.json").read_text())
    assert tuple(config) == CONFIG_KEYS
    assert config["settings"] == {"job": {"steps": 3}} and config["parameters"] == {"total": 10, "active": 5}
    assert config["versions"] == versions() and config["git_revision"] == git_revision()
    assert json.loads((path / "summary.json").read_text()) == whole_summary()
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "metrics.jsonl", "summary.json"]


def test_each_step_can_be_read_while_the_run_goes_on(tmp_path):
    folder = open_run(tmp_path / "run", steps=2)
    assert steps_of(folder.path) == [1, 2]
    folder.close()


def test_a_number_that_is_not_finite_is_null(tmp_path):
    with open_run(tmp_path / "run") as folder:
        folder.append(step_record(1, loss=math.nan, bias=[[math.inf, 1.0], [0.0, 0.0]]))
        folder.write_summary(whole_summary(validation_loss=math.inf))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    (record,) = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    assert record["loss"] is None and record["bias"] == [[None, 1.0], [0.0, 0.0]]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["validation_loss"] is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({key: value for key, value in step_record(2).items() if key != "loads"}, "lacks loads"),
        (step_record(1), "step 1 after step 1"),
        (step_record(2, layers=[2]), "2 rows of loads for 1 layers"),
    ],
)
def test_a_record_out_of_order_or_incomplete_is_refused(tmp_path, record, message):
    with open_run(tmp_path / "run", steps=1) as folder:
        with pytest.raises(ValueError, match=message):
            folder.append(record)
        assert steps_of(folder.path) == [1]


def test_an_incomplete_summary_is_refused(tmp_path):
    with open_run(tmp_path / "run", steps=1) as folder:
        with pytest.raises(ValueError, match=r"lacks rule, validation_loss"):
            folder.write_summary(summarise(folder.records()))
        assert not folder.summary.exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    with open_run(tmp_path / "run") as folder:
        folder.write_summary(whole_summary())
        with pytest.raises(TypeError):
            folder.write_summary(whole_summary(run=object()))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == whole_summary()


# -- which folder may be used --------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for resume_step in (None, 5):
        with pytest.raises(SettingError, match=r"^--out=.*must be a new folder, an empty one or that of a"):
            RunFolder(tmp_path, resume_step=resume_step)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_somebody_elses_config_does_not_make_a_run(tmp_path):
    for text in ("not JSON", "[]", '{"settings": {}}'):
        (tmp_path / "config.json").write_text(text)
        assert not is_run_folder(tmp_path)
        with pytest.raises(SettingError, match="--out"):
            RunFolder(tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="must be a folder, and this is a file"):
        RunFolder(tmp_path / "file")
    with pytest.raises(SettingError, match="must be a folder that can be written"):
        RunFolder(tmp_path / "file" / "run")


def test_an_empty_folder_and_the_rest_of_a_killed_start_are_accepted(tmp_path):
    (tmp_path / ".config.json.part").write_text('{"sett')
    open_run(tmp_path, steps=1).close()
    assert is_run_folder(tmp_path) and steps_of(tmp_path) == [1]


def test_a_new_run_replaces_an_earlier_one_without_checkpoints(tmp_path):
    with open_run(tmp_path, steps=3) as folder:
        folder.write_summary(whole_summary())
    with open_run(tmp_path, steps=2):
        assert steps_of(tmp_path) == [1, 2]
        assert not (tmp_path / "summary.json").exists()


def test_a_run_with_checkpoints_is_not_replaced(tmp_path):
    with open_run(tmp_path, steps=3) as folder:
        (folder.checkpoints / "step_00000003").mkdir(parents=True)
    with pytest.raises(SettingError, match="holds a run with checkpoints"):
        RunFolder(tmp_path)
    assert steps_of(tmp_path) == [1, 2, 3]
    RunFolder(tmp_path, resume_step=3).close()


# -- resuming ------------------------------------------------------------------------------------------------------


def test_resuming_drops_the_later_steps_byte_for_byte_and_goes_on(tmp_path):
    with open_run(tmp_path, steps=6) as folder:
        folder.write_summary(whole_summary())
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with open_run(tmp_path, resume_step=4) as folder:
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:4])
        assert not (tmp_path / "summary.json").exists()
        with pytest.raises(ValueError, match="step 4 after step 4"):
            folder.append(step_record(4))
        folder.append(step_record(5, loss=9.0))
        assert [(r["step"], r["loss"]) for r in folder.records()] == [(1, 2.5), (2, 2.5), (3, 2.5), (4, 2.5), (5, 9.0)]


def test_resuming_is_atomic(tmp_path, monkeypatch):
    open_run(tmp_path, steps=6).close()
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resuming_after_a_kill_repairs_the_half_written_line(tmp_path, recwarn):
    open_run(tmp_path, steps=4).close()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-30])
    with open_run(tmp_path, resume_step=3) as folder:
        folder.append(step_record(4))
    assert steps_of(tmp_path) == [1, 2, 3, 4] and not recwarn.list


def test_resuming_where_records_are_missing_says_so(tmp_path):
    open_run(tmp_path, steps=2).close()
    with pytest.warns(UserWarning, match=r"ends at step 2, the run goes on after step 5"):
        RunFolder(tmp_path, resume_step=5).close()


def test_a_checkpoint_can_be_continued_in_a_new_folder(tmp_path, recwarn):
    with open_run(tmp_path / "new", resume_step=10) as folder:
        folder.append(step_record(11))
    assert steps_of(tmp_path / "new") == [11] and not recwarn.list


# -- reading -------------------------------------------------------------------------------------------------------


def test_a_half_written_last_line_is_reported_and_left_out(tmp_path):
    open_run(tmp_path, steps=3).close()
    metrics = tmp_path / "metrics.jsonl"
    length = len(metrics.read_bytes().splitlines()[-1]) - 10
    metrics.write_bytes(metrics.read_bytes()[:-11])
    with pytest.warns(HalfWrittenLine, match=rf"metrics.jsonl: the last line is half written \({length} char.*2 whole"):
        assert steps_of(tmp_path) == [1, 2]


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path, recwarn):
    open_run(tmp_path, steps=3).close()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-1])
    assert steps_of(tmp_path) == [1, 2, 3] and not recwarn.list
    with open_run(tmp_path, resume_step=3) as folder:
        folder.append(step_record(4))
    assert steps_of(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("line", "message"), [('{"step": 2, "lo', "not JSON"), ("[2]", "not a record"), ("{}", "not a record")]
)
def test_damage_before_the_last_line_is_an_error_with_its_place(tmp_path, line, message):
    open_run(tmp_path, steps=1).close()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + line + "\n" + metrics.read_text())
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2: {message}"):
        steps_of(tmp_path)


# -- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.9, 0.2, 0.2, 0.2, 0.2, 0.2], 2),
        ([0.9, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1], 4),  # after step 2 the next four have mean 0.3
        ([0.1, 0.5, 0.1, 0.1, 0.1], 1),  # one step above is forgiven where the mean is 0.2
        ([0.21, 0.1, 0.1, 0.1, 0.1], None),  # step 2 has only three steps after it
        ([0.1, 0.1, 0.1, 0.1], None),
        ([], None),
    ],
)
def test_steps_to_maxvio(values, expected):
    assert steps_to_maxvio(with_maxvio(values)) == expected


def test_steps_to_maxvio_gives_the_number_of_the_step():
    records = [{"step": 100 + i, "maxvio_mean": 0.1} for i in range(6)]
    assert steps_to_maxvio(records) == 100
    assert steps_to_maxvio(records, level=0.05) is None
    assert steps_to_maxvio(records[:3], following=2) == 100


def test_maxvio_of_the_last_fifty_steps():
    assert maxvio_last(with_maxvio([9.0] * 10 + [1.0] * 25 + [2.0] * 25)) == 1.5
    assert maxvio_last(with_maxvio([1.0, 2.0, 6.0])) == 3.0


def test_the_median_step_leaves_out_warm_up_in_all_but_the_shortest_runs():
    times = [50.0, 40.0, 30.0, 20.0, 10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 99.0]
    assert seconds_per_step([{"seconds": s} for s in times]) == 3.5  # of 1, 2, 3, 4, 5, 99
    assert seconds_per_step([{"seconds": s} for s in times[:10]]) == 7.5  # ten steps: all of them


def test_summarise():
    records = [step_record(s, seconds=0.25, maxvio_mean=1.0 if s < 4 else 0.1, loss=10.0 - s) for s in range(1, 9)]
    assert summarise(iter(records)) == {
        "steps": 8,
        "final_loss": 2.0,
        "maxvio_last50": pytest.approx((3 * 1.0 + 5 * 0.1) / 8),
        "steps_to_maxvio_0.2": 4,
        "steps_to_2x_sequence_floor": None,
        "seconds_per_step": 0.25,
        "tokens_per_second": 32.0,
    }
    assert tuple(summarise(records)) == FIGURE_KEYS
    assert summarise(records, 0.05)["steps_to_2x_sequence_floor"] == 4
    assert summarise(records, 0.04)["steps_to_2x_sequence_floor"] is None
    with pytest.raises(ValueError, match="without a step"):
        summarise([])


@pytest.mark.parametrize(("value", "text"), [(2.345, "2.35"), (0.1, "0.10"), (0.0432, "0.043"), (0.0, "0")])
def test_maxvio_in_words(value, text):
    assert maxvio_text(value) == text


# -- progress ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_at_the_first_every_nth_and_the_last_step():
    stream = io.StringIO()
    with Progress(25, every=10, stream=stream) as progress:
        progress.note("two ranks")
        for step in range(1, 26):
            seconds = 0.5 if step <= 10 else 2.0
            progress.step(step_record(step, tokens=8192, seconds=seconds, loss=2.4312, maxvio_mean=0.308))
    assert stream.getvalue().splitlines() == [
        "two ranks",
        "step 1/25  loss 2.431  MaxVio 0.31  16.4k tokens/s",
        "step 10/25  loss 2.431  MaxVio 0.31  16.4k tokens/s",
        "step 20/25  loss 2.431  MaxVio 0.31  4.1k tokens/s",
        "step 25/25  loss 2.431  MaxVio 0.31  4.1k tokens/s",
    ]


def test_plain_lines_of_a_resumed_run_and_of_a_loss_that_is_lost():
    stream = io.StringIO()
    with Progress(32, start=30, stream=stream) as progress:
        progress.step(step_record(31, loss=None))
        progress.step(step_record(32))
    first, last = stream.getvalue().splitlines()
    assert first == "step 31/32  loss nan  MaxVio 0.50  16 tokens/s" and last.startswith("step 32/32  loss 2.500")


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress(4, start=2, stream=stream) as progress:
        progress.note("two ranks")
        progress.step(step_record(3))
        progress.step(step_record(4, loss=1.25))
    text = stream.getvalue()
    assert "two ranks\n" in text and "step 1/4 " not in text
    assert re.search(r"100%.*step 4/4 \[.*loss 1\.250  MaxVio 0\.50  16 tokens/s", text.split("\r")[-1])


@pytest.mark.parametrize("size", [(24, 100), (0, 100), (0, 0)])
def test_the_bar_shows_on_a_real_terminal_even_if_that_gives_no_size(size):
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, size)
    with open(writer, "w") as stream, Progress(1, stream=stream) as progress:
        progress.step(step_record(1))
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends whose other side is closed
        while piece := os.read(reader, 10_000):
            shown += piece
    os.close(reader)
    assert b"step 1/1" in shown and b"loss 2.500  MaxVio 0.50" in shown


def test_progress_leaves_standard_output_alone(capsys):
    with Progress(1) as progress:
        progress.note("two ranks")
        progress.step(step_record(1))
    captured = capsys.readouterr()
    assert captured.out == "" and "step 1/1" in captured.err


def test_the_bar_is_imported_only_where_it_is_drawn():
    code = (
        "import sys; from alflb_megatron.lab.training.progress import Progress; Progress(1); "
        "print({'tqdm', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- where a run came from -----------------------------------------------------------------------------------------


def test_versions_name_what_is_installed():
    import torch

    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a package need not carry its build's name
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found) == {"python", "torch", "megatron-core", "alflb_megatron"}


def test_git_revision(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", tmp_path, *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    file, other = tmp_path / "code.py", tmp_path / "site-packages" / "other.py"
    file.write_text("a = 1\n")
    assert git_revision(file) is None, "no repository"
    git("init")
    assert git_revision(file) is None, "no commit"
    git("add", "code.py")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag must not stand in for the commit")
    head = git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a hook
    assert git_revision(file) == head
    file.write_text("a = 2\n")
    assert git_revision(file) == head + "-dirty"
    other.parent.mkdir()
    other.write_text("")
    assert git_revision(other) is None, "not tracked: the checkout around it is somebody else's"


def test_a_folder_that_is_being_written_is_refused(tmp_path):
    with RunFolder(tmp_path), pytest.raises(SettingError, match="is being written by another training"):
        RunFolder(tmp_path)
    RunFolder(tmp_path).close()
