"""`alflb report` on real runs, on what such runs look like when something is missing or broken, and in a browser."""

from __future__ import annotations

import html.parser
import json
import math
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alflb_megatron.lab.cli import main
from alflb_megatron.lab.records.history import BINS, History, labels, read_history
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.records.step_record import StepRecord, sampling_floor_of
from alflb_megatron.lab.records.summary import maxvio_text
from alflb_megatron.lab.report import axes, figures
from alflb_megatron.lab.report.report import PAGE, report
from alflb_megatron.metrics import max_vio, sampling_floor
from alflb_megatron.settings import SettingError
from tests import forked
from tests.lab.report import chromium

SMALL = shlex.split(
    "--steps 8 --nproc 1 --ep 1 --no-save --global-batch-size 4 --micro-batch-size 4 --seq-length 64 --hidden-size 32 "
    "--num-layers 3 --num-dense-layers 1 --num-heads 2 --ffn-hidden-size 32 --moe-ffn-hidden-size 16 --num-experts 4 "
    "--topk 2 --validation-sequences 4"
)


def train(out: Path, *flags: str) -> Path:
    done = forked.alflb("train", *SMALL, *flags, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


LOOKED_AT = {"test_png_writes_the_pictures_alone", "test_the_page_opens_offline_and_shows_every_picture"}


@pytest.fixture(autouse=True)
def few_pixels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test does not look at the pixels: they are most of what a page costs."""
    if request.node.originalname not in LOOKED_AT:
        monkeypatch.setattr(axes, "DPI", 40)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "ours", "--rule", "adaptive", "--certify", "4")


@pytest.fixture(scope="module")
def none(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "none", "--rule", "none", "--num-experts", "8", "--num-layers", "2")


def changed(run: Path, out: Path, change=lambda record: record, tail: str = "", without: tuple[str, ...] = ()) -> Path:
    """A copy of a real run with its records changed."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("report*"))
    records = [change(record) for record in read_metrics(run)]
    text = "".join(json.dumps(record) + "\n" for record in records if record is not None) + tail
    (out / "metrics.jsonl").write_text(text, encoding="utf-8")
    for name in without:
        (out / name).unlink()
    return out


class Page(html.parser.HTMLParser):
    """What a browser would see: the elements with their attributes, and the text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == "img"]


# -- what is read ---------------------------------------------------------------------------------------------------


def test_the_history_holds_what_the_run_recorded(ours):
    history, records = read_history(ours, "ours"), list(read_metrics(ours))
    np.testing.assert_array_equal(history.series("loss"), [record["loss"] for record in records])
    assert history.topk == 2 and history.bins == len(records) == 8
    for row, track in enumerate(history.layer_histories.values()):
        loads = np.array([record["loads"][row] for record in records])
        assert track.layer == records[0]["layers"][row]
        np.testing.assert_allclose(track.relative_loads(history.bins), loads / loads.mean(1, keepdims=True))
        np.testing.assert_allclose(track.mean("bias", history.bins), [record["bias"][row] for record in records])
    last = StepRecord.from_json(records[-1])
    assert [layer.maxvio for layer in last.layers] == pytest.approx(
        max_vio(torch.tensor(records[-1]["loads"])).tolist()
    )
    assert sampling_floor_of(last, 2) == pytest.approx(
        records[-1].get("maxvio_floor") or sampling_floor(256, 2, 4), rel=0.05
    )
    assert {step for step, _ in history.certificates} == {4, 8}


def test_maxvio_of_micro_batches_is_drawn_where_it_is_recorded(ours, tmp_path):
    def lines(run: Path) -> dict[str, list[float]]:
        figure = figures.maxvio([read_history(run, "run")])
        return {str(line.get_label()): list(line.get_ydata()) for line in figure.axes[0].lines}

    assert "of micro-batches, mean" not in lines(ours)
    given = changed(ours, tmp_path / "micro", lambda record: record | {"maxvio_micro_mean": 0.75})
    assert lines(given)["of micro-batches, mean"] == [0.75] * 8


def test_the_floor_of_more_tokens_than_are_drawn_is_scaled(ours):
    step = next(read_metrics(ours)) | {"loads": [[2**16] * 4], "layers": [1], "tokens": 2**17, "maxvio_floor": None}
    assert sampling_floor_of(StepRecord.from_json(step), None) == pytest.approx(sampling_floor(2**17, 2, 4), rel=0.1)


def test_a_long_run_is_binned_without_losing_a_step(ours):
    record, history = next(read_metrics(ours)), History(Path("x"), "x")
    generator, steps = np.random.default_rng(0), 2 * BINS + 37
    loads = generator.integers(1, 99, size=(steps, 1, 4))
    for step, rows in enumerate(loads, 1):
        history.add(StepRecord.from_json(record | {"step": step, "layers": [7], "loads": rows.tolist(), "bias": None}))
    (track,) = history.layer_histories.values()
    assert history.width == 4 and history.bins == math.ceil(steps / 4)
    means = track.mean("loads", history.bins)
    np.testing.assert_allclose(means[0], loads[:4, 0].mean(0))
    np.testing.assert_allclose(means[-1], loads[steps // 4 * 4 :, 0].mean(0))
    np.testing.assert_array_equal(history.edges()[[0, 1, -1]], [0.5, 4.5, steps + 0.5])


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert labels([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]


def test_an_event_of_steps_in_a_row_is_one(ours, tmp_path):
    def change(record):
        return record | {"loss": None if record["step"] in (3, 4, 5, 7) else record["loss"], "alarms": ["expert 3"]}

    history = read_history(changed(ours, tmp_path / "x", change), "x")
    assert [(event.steps, event.kind) for event in history.events] == [
        ("1 - 8", "alarm"),
        ("3 - 5", "loss"),
        ("7", "loss"),
    ]
    assert history.counts == {"alarm": 8, "loss": 4}


# -- the page -------------------------------------------------------------------------------------------------------


def test_a_page_about_one_run_holds_everything_in_itself(ours, tmp_path):
    assert report([ours], tmp_path / "out") == [tmp_path / "out" / PAGE]
    page, summary = Page(tmp_path / "out" / PAGE), json.loads((ours / "summary.json").read_text())
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "url(" not in (tmp_path / "out" / PAGE).read_text()
    titles = [image["alt"].rstrip(".") for image in page.images()]
    assert titles[:3] == ["Loss", "MaxVio", "Spread of the bias"] and titles[-2:] == ["Loads", "Expert bias"]
    assert "Certificates" in titles
    for figure in (f"{summary['validation_loss']:.3f}", maxvio_text(summary["maxvio_last50"]), "top-2 of 4 experts"):
        assert figure in page.text
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [PAGE], "nothing is left beside the page"


def test_runs_of_other_models_stand_side_by_side(ours, none, tmp_path):
    report([ours, none], tmp_path)
    page = Page(tmp_path / PAGE)
    titles = [image["alt"] for image in page.images()]
    assert {"Loads of ours", "Expert bias of ours", "Loads of none", "Loss against ours"} <= set(titles)
    assert "Expert bias of none" not in titles and "The run has no expert bias." in page.text
    assert "model.num_experts" in page.text and "model.topk" not in page.text


@pytest.mark.parametrize("alarm", ["<img src=http://127.0.0.1:9/x.png>", "</table><script>alert(1)</script>"])
def test_nothing_from_a_file_becomes_html(ours, tmp_path, alarm):
    run = changed(ours, tmp_path / "<script>$x_^{", lambda record: record | {"alarms": [alarm + "\x1b[31m\ud800"]})
    config = json.loads((run / "config.json").read_text())
    config["versions"][alarm] = alarm
    (run / "config.json").write_text(json.dumps(config))
    report([run, ours], tmp_path / "out")
    page = Page(tmp_path / "out" / PAGE)
    assert not any(tag == "script" for tag, _ in page.elements)
    assert all(image["src"].startswith("data:") for image in page.images())
    assert alarm in page.text and "<script>$x_^{" in page.text and "\x1b" not in page.text


CASES = {
    "one step": lambda record: record if record["step"] == 1 else None,
    "no loss is finite": lambda record: record | {"loss": None},
    "no token": lambda record: record | {"loads": [[0] * 4] * 2, "maxvio_mean": 0.0, "maxvio_max": 0.0},
    "even": lambda record: record | {"loads": [[128] * 4] * 2, "maxvio_mean": 0.0, "maxvio_max": 0.0},
    "old": lambda record: {key: record[key] for key in ("step", "loss", "loads")},
    "steps alone": lambda record: {"step": record["step"]},
    "no certificate": lambda record: {key: value for key, value in record.items() if key != "certificates"},
    "other layers halfway": lambda record: record
    if record["step"] < 4
    else record | {"layers": [2], "loads": [[9, 8]], "bias": [[0.5, -0.5]]},
    "gain": lambda record: record | {"gain": [0.1 / record["step"], None], "maxvio_floor": 0.08},
    "of another kind": lambda record: {
        "step": record["step"], "loss": "x", "maxvio_mean": -1, "tokens": [], "seconds": 0, "layers": [1e300, None, 3],
        "loads": [[1e308] * 4, "x", [None, -3]], "bias": {"a": 1}, "gain": 3, "alarms": [[1]], "certificates": [3, {}],
    },
}  # fmt: skip


# The pictures that a case has, and those that it must not have.
PICTURES = {
    "one step": ("Loss, MaxVio, Spread of the bias, Loads, Expert bias", "Certificates"),
    "no loss is finite": ("MaxVio, Loads", "Loss"),
    "no token": ("Loss, Expert bias", "MaxVio, Loads"),
    "even": ("Loss, Loads", "MaxVio"),
    "old": ("Loss, MaxVio, Loads", "Spread of the bias, Expert bias, Certificates, Gain of the rule"),
    "steps alone": ("", "Loss, MaxVio, Spread of the bias, Loads, Expert bias"),
    "no certificate": ("Loss, Expert bias", "Certificates"),
    "other layers halfway": ("Loss, Loads, Expert bias", ""),
    "gain": ("Gain of the rule", ""),
    "of another kind": ("", "Loss, MaxVio, Loads, Expert bias, Gain of the rule, Certificates"),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_a_run_lacks_there_is_a_page_of_the_rest(ours, tmp_path, case):
    run = changed(ours, tmp_path / "run", CASES[case], without=("summary.json",) if case == "old" else ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report([run], tmp_path / "out")
    page = Page(tmp_path / "out" / PAGE)
    titles = {image["alt"] for image in page.images()}
    there, absent = (set(filter(None, names.split(", "))) for names in PICTURES[case])
    assert there <= titles and not absent & titles
    assert "nan" not in page.text


def test_a_run_that_goes_on_is_shown_and_named(ours, tmp_path):
    run = changed(ours, tmp_path / "run", tail='{"step": 9, "los', without=("summary.json",))
    assert main(["report", str(run)]) == 0
    assert "has no summary" in (text := Page(run / PAGE).text) and "half written" in text and "8, not ended" in text


def test_png_writes_the_pictures_alone(ours, tmp_path, capsys):
    assert main(["report", str(ours), "--png", "--out", str(tmp_path)]) == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["bias.png", "certificates.png", *(["gain.png"] if "gain.png" in files else []), "loads.png",
                     "loss.png", "maxvio.png", "spread.png"]  # fmt: skip
    assert sorted(Path(line).name for line in capsys.readouterr().out.split()) == files
    for name in files:
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("L"), dtype=float)
        assert pixels.shape[1] == 1254 and pixels.var() > 50, f"{name} is blank"


# -- what cannot work -----------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_writes_nothing(ours, tmp_path, capsys):
    broken = changed(ours, tmp_path / "broken")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join([*lines[:3], "{oops\n", *lines[3:]]))
    config = changed(ours, tmp_path / "config")
    (config / "config.json").write_text("[1, 2")
    empty = changed(ours, tmp_path / "empty", lambda record: None, tail="{")
    deep = changed(ours, tmp_path / "deep", tail="[" * 200_000 + "\n")
    file = tmp_path / "file"
    file.write_text("")
    out = tmp_path / "out"
    for arguments, told in [
        ([tmp_path / "absent"], "RUN="),
        ([file], "RUN="),
        ([tmp_path], "holds no metrics.jsonl"),
        ([broken], "line 4"),
        ([config], "config.json"),
        ([empty], "no whole record"),
        ([deep], "RUN="),
        ([ours, ours], "each run once"),
        ([ours] * 15, "1 to 14 runs"),
        ([ours, "--out", file], "--out="),
    ]:
        words = [*map(str, arguments), *([] if "--out" in arguments else ["--out", str(out)])]
        assert main(["report", *words]) == 2, told
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1 and error.startswith("alflb: ")
    assert not out.exists()


def test_a_page_is_replaced_at_once_or_not_at_all(ours, tmp_path):
    (tmp_path / PAGE).mkdir()  # it cannot be replaced by a file
    with pytest.raises(SettingError, match="--out="):
        report([ours], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PAGE]


# -- in a browser ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(chromium.find() is None, reason="no chromium is installed")
def test_the_page_opens_offline_and_shows_every_picture(ours, none, tmp_path):
    report([ours, none], tmp_path)
    planted = tmp_path / "planted.html"
    planted.write_text('<img src="http://127.0.0.1:9/x.png" width=20 height=20><img src="data:image/png;base64,AAAA">')
    with chromium.browser(tmp_path / "profile") as browser:
        for width in (1280, 390):
            asked, sizes = browser.open(tmp_path / PAGE, width, tmp_path / f"{width}.png")
            assert {address.partition(":")[0] for address in asked} <= {"file", "data"}, asked
            assert sum(address.startswith("file:") for address in asked) == 1, "the page itself, once"
            assert len(sizes) == len(Page(tmp_path / PAGE).images()) >= 6
            assert all(shown > 200 and height > 50 and natural == 1254 for shown, height, natural in sizes), sizes
            assert browser.width <= width, "nothing but a table's own box is wider than the window"
            with Image.open(tmp_path / f"{width}.png") as image:
                assert image.width == width and np.asarray(image.convert("L"), dtype=float).var() > 100
        asked, sizes = browser.open(planted, 800)
        assert "http://127.0.0.1:9/x.png" in asked and {natural for _, _, natural in sizes} == {0}, "the check can fail"
