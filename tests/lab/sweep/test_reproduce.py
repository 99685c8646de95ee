"""`alflb reproduce`: plans expand to what they say, stopped sweeps go on, and only whole, equal runs are collected."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from alflb_megatron.lab.cli import main
from alflb_megatron.lab.sweep import collect, execute, figures, plan, plan_file, tables
from alflb_megatron.settings import SettingError
from tests import forked

SHIPPED = ("wang2024", "han_zhong", "beyond", "settled")

TWO = """
about: two runs
seeds: {smoke: [5]}
train: {alflb_centring: false}
runs:
  - {model: deepseek-moe-1b, rule: none}
  - {model: deepseek-moe-1b, rule: sign, u: 1e-3, settings: {certify: 2}}
published:
  deepseek-moe-1b.sigmoid.none: {perplexity: 9, maxvio_global: 2}
  deepseek-moe-1b.sigmoid.sign.u0.001: {perplexity: 8, maxvio_global: 1}
compare: [[deepseek-moe-1b.sigmoid.sign.u0.001, deepseek-moe-1b.sigmoid.none]]
"""
NONE, SIGN = "deepseek-moe-1b.sigmoid.none.s5", "deepseek-moe-1b.sigmoid.sign.u0.001.s5"


def written(folder: Path, text: str = TWO, name: str = "two.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def changed(**keys: Any) -> str:
    return str(yaml.safe_dump({**yaml.safe_load(TWO), **keys}))


# -- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["full", "settled", "mini", "smoke"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_plans_expand_to_every_combination_and_seed(name: str, scale: str) -> None:
    path = plan_file.find_plan(name)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    sweep = plan_file.read_plan(path, scale)
    listed = [[len(v) if isinstance(v, list) else 1 for v in row.values()] for row in given["runs"]]
    cells = sum(int(math.prod(lengths)) for lengths in listed)
    assert len(sweep.runs) == cells * len(given["seeds"].get(scale, [1234]))
    assert len({run.name for run in sweep.runs}) == len(sweep.runs)
    assert {run.plan.job.preset for run in sweep.runs} <= {"deepseek-moe-1b", "deepseek-moe-3b"}


def test_a_list_is_a_grid_in_the_order_written(tmp_path: Path) -> None:
    runs = [{"model": "deepseek-moe-1b", "rule": ["sign", "sqrt"], "u": [0.1, 1], "gate": ["sigmoid", "softmax"]}]
    text = changed(runs=runs, published={}, compare=[], seeds={"smoke": [1, 2]})
    sweep = plan_file.read_plan(written(tmp_path, text), "smoke")
    names = [run.name for run in sweep.runs]
    cells = [
        f"deepseek-moe-1b.{g}.{r}.u{u}" for g in ("sigmoid", "softmax") for r in ("sign", "sqrt") for u in (0.1, 1)
    ]
    assert names == [f"{cell}.s{seed}" for seed in (1, 2) for cell in cells]
    for run in sweep.runs:
        assert run.plan.alf is not None
        assert f"{run.plan.shape.gate}.{run.plan.alf.rule}.u{run.plan.alf.step_size:g}" in run.name


def test_full_size_is_the_presets_and_the_scale_says_what_it_divided() -> None:
    full, mini = (plan_file.read_plan(plan_file.find_plan("wang2024"), scale) for scale in ("full", "mini"))
    one = full.runs[0].plan
    assert (one.shape.hidden_size, one.shape.num_experts, one.job.steps, one.job.global_batch_size) == (
        1024, 64, 40_000, 1152,
    )  # fmt: skip
    assert mini.changes()["deepseek-moe-1b"]["steps"] == (40_000, mini.runs[0].plan.job.steps)
    assert mini.changes()["deepseek-moe-1b"]["hidden_size"] == (1024, mini.runs[0].plan.shape.hidden_size)
    assert mini.changes()["deepseek-moe-1b"]["dtype"] == ("bf16", "fp32")
    assert full.hours() > 100 and not full.changes()["deepseek-moe-1b"]


def test_u_is_scaled_where_plan_and_scale_say_so_and_keeps_its_name() -> None:
    sweep = plan_file.read_plan(plan_file.find_plan("wang2024"), "mini")
    run = next(run for run in sweep.runs if run.group == "deepseek-moe-1b.sigmoid.sign.u0.001")
    assert run.plan.alf is not None and (run.u, run.plan.alf.step_size) == (1e-3, 1e-2)
    run = next(
        r for r in plan_file.read_plan(plan_file.find_plan("han_zhong"), "mini").runs if r.group.endswith("sign.u0.001")
    )
    assert run.plan.alf is not None and (run.u, run.plan.alf.step_size) == (1e-3, 1e-3)


def test_flags_give_the_run_back() -> None:
    from alflb_megatron.lab.cli import parse
    from alflb_megatron.lab.training.command import plan_of

    for run in plan_file.read_plan(plan_file.find_plan("wang2024"), "smoke").runs:
        again = plan_of(parse(["train", *run.flags(Path("somewhere"), resume=False)]))
        assert plan.same_settings(again.as_dict(), run.plan.as_dict()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is no YAML"),
        ("[]", "must map names to values"),
        ("!!python/object/apply:os.system ['touch owned']", "is no YAML"),
        (changed(colour=1), "colour: no such key"),
        (changed(runs=[]), "must be a list of runs"),
        (changed(runs=[{"rule": "sign"}]), "needs `model`"),
        (changed(runs=[{"model": "gpt-9", "rule": "sign"}], published={}, compare=[]), "--scale smoke knows"),
        (changed(runs=[{"model": "deepseek-moe-1b", "rule": "sing"}]), "this run cannot work: --rule=sing"),
        (changed(runs=[{"model": "deepseek-moe-1b", "rule": "sign", "u": "fast"}]), "must be a number"),
        (changed(runs=[{"model": "deepseek-moe-1b", "rule": "none", "u": 1.0}]), "has no meaning with --rule none"),
        (changed(runs=[{"model": "deepseek-moe-1b", "rule": ["sign", "sign"]}]), "stands in the plan twice"),
        (changed(train={"stepps": 3}), "stepps: no such setting of alflb train"),
        (changed(train={"alflb_step_size": 3}), "is given by a run's own keys"),
        (changed(seeds={"smoke": ["x"]}), "must be a list of whole numbers"),
        (changed(seeds={"smoke": [1], "smok": [1]}), "smok: no such scale of seeds"),
        (changed(at={"smoke": {"stepps": 3}}), "stepps: no such setting of alflb train"),
        (changed(runs=[{"model": "deepseek-moe-1b", "rule": "sign", "u": []}]), "must not have an empty list"),
        (changed(published={"deepseek-moe-1b.sigmoid.none": {"perplexity": "abc"}}), "must be a number"),
        (changed(scale_u="no"), "must be true or false"),
        (changed(published={"nobody": {"perplexity": 1}}), "published: nobody: no such run"),
        (changed(compare=[["a", "b"]]), "must be two runs' names"),
        (changed(cluster={"utilisation": 2}), "must be above 0 and at most 1"),
    ],
)
def test_a_plan_that_cannot_work_says_why(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", str(written(tmp_path, text)), "--scale", "smoke"]) == 2
    printed = capsys.readouterr().err
    assert said in " ".join(printed.replace("=", ": ", 1).split()) or said in printed
    assert printed.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "must be a file, or one of beyond, han_zhong, settled, wang2024"),
        (["wang2024", "--scale", "huge"], "must be one of full, mini, settled, smoke"),
        (["wang2024", "--scale", "smoke", "--at-once", "0"], "--at-once=0: must be at least 1"),
        (["wang2024", "--scale", "smoke", "--results", "nothing.csv"], "cannot be read"),
    ],
)
def test_a_wrong_flag_explains_itself(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *words]) == 2
    assert said in capsys.readouterr().err


# -- running, stopping, going on -------------------------------------------------------------------------------------


def start(path: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "alflb_megatron.lab.cli",
        "reproduce",
        str(path),
        "--scale",
        "smoke",
        "--out",
        str(out),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.parent / "sweep.log").open("ab") as log:
        return subprocess.Popen([*command, "--at-once", "1"], env=env, stdout=log, stderr=log)


def reproduce(path: Path, out: Path) -> int:
    """The same in this process, whose trainings are processes all the same; the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return main(["reproduce", str(path), "--scale", "smoke", "--out", str(out), "--at-once", "1"])


def until(what: Callable[[], bool], sweep: subprocess.Popen[bytes], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert sweep.poll() is None and time.monotonic() < limit, "the sweep ended before its stage was reached"
        time.sleep(0.02)


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in collect.read_csv(path)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert reproduce(written(folder), folder / "out") == 0
    return folder / "out"


def copied(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder / "out", ignore=shutil.ignore_patterns("results.csv", ".lock"))
    for config in (folder / "out").glob("*/config.json"):
        assert str(whole) in config.read_text(encoding="utf-8")
    return folder / "out"


def test_a_finished_sweep_has_table_figures_and_rows(whole: Path) -> None:
    rows = collect.read_csv(whole / "results.csv")
    assert [row["run"] for row in rows] == [NONE, SIGN]
    for row in rows:
        summary = json.loads((whole / row["run"] / "summary.json").read_text(encoding="utf-8"))
        assert row["validation_loss"] == summary["validation_loss"]
        assert row["maxvio_global"] == summary["maxvio_global_mean"]
        assert len(row["maxvio_curve"]) == row["steps"]
        regret = [layer["regret"] for layer in summary.get("regret", [])]
        assert row["regret"] == (pytest.approx(statistics.fmean(regret)) if row["run"] == SIGN else None)
        assert row["certified"] == (2 if row["run"] == SIGN else None)
    page = (whole / "two.md").read_text(encoding="utf-8")
    assert "| sign, u = 0.001 | 1 |" in page and "not decided" in page
    for name in ("two-course.png", "two-published.png"):
        assert name in page and (whole / name).stat().st_size > 5000


def test_stopped_at_every_stage_it_loses_and_repeats_nothing(whole: Path, tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "out"
    records, checkpoints = out / NONE / "metrics.jsonl", out / NONE / "checkpoints"

    first = start(path, out)  # killed in the first run, with its training, after the first checkpoint
    until(lambda: any(checkpoints.glob("step_*[0-9]")), first)
    training = psutil.Process(first.pid).children(recursive=True)
    for process in (first, *training):
        process.kill()
    first.wait()
    assert not (out / NONE / "summary.json").exists() or not (out / SIGN).exists()

    second = start(path, out)  # asked to end in the second run
    until((out / SIGN / "config.json").exists, second)
    kept = records.stat().st_mtime_ns
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 130

    assert reproduce(path, out) == 0
    assert records.stat().st_mtime_ns == kept  # a finished run is not trained again
    os.unlink(out / "results.csv")  # as if killed between the last run and the table
    assert reproduce(path, out) == 0
    assert without_times(out / "results.csv") == without_times(whole / "results.csv")


def test_a_requeued_job_goes_on_where_there_is_a_checkpoint_and_begins_where_there_is_none(
    whole: Path, tmp_path: Path
) -> None:
    from alflb_megatron.lab.cli import parse
    from alflb_megatron.lab.training.command import plan_of

    run = plan_file.read_plan(written(tmp_path), "smoke").runs[0]
    for folder, resumes in ((tmp_path / "new", False), (whole / NONE, True)):
        words = ["train", "--requeue", *run.flags(folder, resume=False)]
        found = plan_of(parse(words))
        assert found.job.resume is resumes
        assert plan.same_settings(found.as_dict(), run.plan.as_dict()) == []


def test_a_training_that_a_killed_sweep_left_keeps_others_out(tmp_path: Path) -> None:
    with execute.lock_folder(tmp_path) as lock:
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
    with pytest.raises(SettingError, match="is at work here"), execute.lock_folder(tmp_path):
        pass
    left.kill()
    left.wait()
    with execute.lock_folder(tmp_path):
        pass


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = written(tmp_path, changed(train={"alflb_centring": False, "save": False})), tmp_path / "out"
    (out / NONE).mkdir(parents=True)
    (out / NONE / "of somebody else").touch()
    assert reproduce(path, out) == 1
    said = capsys.readouterr().err
    assert f"1 of 2 runs failed: {NONE}" in said and "must be a new folder" in said
    assert (out / SIGN / "summary.json").exists() and not (out / "results.csv").exists()


# -- collecting ------------------------------------------------------------------------------------------------------


def refused(whole: Path, folder: Path, spoil: Callable[[Path], object]) -> str:
    out = copied(whole, folder)
    spoil(out)
    with pytest.raises(SettingError) as error:
        collect.collect(plan_file.read_plan(written(folder), "smoke"), out)
    return str(error.value)


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_half_finished_runs_are_refused_by_name(whole: Path, tmp_path: Path) -> None:
    said = refused(whole, tmp_path, lambda out: (out / SIGN / "summary.json").unlink())
    assert f"1 of 2 runs have not finished: {SIGN}" in said


def test_runs_with_missing_records_are_refused_by_name(whole: Path, tmp_path: Path) -> None:
    def cut(out: Path) -> None:
        lines = (out / SIGN / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (out / SIGN / "metrics.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")

    assert f"{SIGN}: has records of 3 of its 4 steps" in refused(whole, tmp_path, cut)


def test_runs_of_other_settings_are_refused_by_name(whole: Path, tmp_path: Path) -> None:
    def other(config: dict[str, Any]) -> None:
        config["settings"]["job"]["lr"] = 0.5

    said = refused(whole, tmp_path, lambda out: edited(out / SIGN / "config.json", other))
    assert SIGN in said and "lr 0.5 for" in said


def test_a_mixture_of_versions_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    def older(config: dict[str, Any]) -> None:
        config["versions"]["torch"] = "2.6.0"

    said = refused(whole, tmp_path, lambda out: edited(out / SIGN / "config.json", older))
    assert f"{SIGN} was trained with torch 2.6.0, {NONE} with" in said


def test_a_run_that_diverged_is_a_row_that_says_so(whole: Path, tmp_path: Path) -> None:
    """JSON has no NaN: such a loss is null in a summary."""

    def diverged(summary: dict[str, Any]) -> None:
        summary["validation_loss"] = None

    out = copied(whole, tmp_path)
    edited(out / NONE / "summary.json", diverged)
    sweep = plan_file.read_plan(written(tmp_path), "smoke")
    assert execute.describe_run(sweep.runs[0], out).startswith(f"{NONE}: diverged, MaxVio_global")
    (out / "results.csv").write_text(collect.as_csv(collect.collect(sweep, out)), encoding="utf-8")
    found = collect.read_csv(out / "results.csv")
    assert math.isnan(found[0]["perplexity"])
    page = tables.sweep_page(sweep, found, figures.draw_figures("two", found, tmp_path))
    assert "| diverged |" in page and "not decided" in page


def test_results_of_several_revisions_are_not_drawn(whole: Path, tmp_path: Path) -> None:
    found = collect.read_csv(whole / "results.csv")
    found[1]["revision"] = "0" * 40
    for row in found:
        row |= {name: " ".join(map(str, value)) for name, value in row.items() if isinstance(value, list)}
    (tmp_path / "mixed.csv").write_text(collect.as_csv(found), encoding="utf-8")
    with pytest.raises(SettingError, match=r"--results=.*holds a mixture: .* was trained with revision 0000"):
        collect.read_csv(tmp_path / "mixed.csv")


def test_settings_at_one_scale_and_those_of_the_command_win(tmp_path: Path) -> None:
    path = written(tmp_path, changed(at={"mini": {"steps": 7}}, train={"steps": 9, "certify": 3}))
    steps = {s: plan_file.read_plan(path, s).runs[1].plan.job.steps for s in ("full", "mini", "smoke")}
    assert steps == {"full": 9, "mini": 7, "smoke": 4}
    job = plan_file.read_plan(path, "mini", {"data": "/some/text"}).runs[1].plan.job
    assert (job.data, job.certify) == ("/some/text", 2)


def test_tables_and_figures_come_from_results_csv_alone(whole: Path, tmp_path: Path) -> None:
    words = ["reproduce", str(written(tmp_path)), "--scale", "smoke", "--out", str(tmp_path / "again")]
    assert main([*words, "--results", str(whole / "results.csv")]) == 0
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (whole / path.name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["two-course.png", "two-published.png", "two.md"]


def test_the_runs_that_have_finished_make_a_page_that_says_how_many(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(whole, tmp_path)
    (out / SIGN / "summary.json").unlink()
    words = ["reproduce", str(written(tmp_path)), "--scale", "smoke", "--out", str(out)]
    assert main([*words, "--finished"]) == 0
    page = (out / "two.md").read_text(encoding="utf-8")
    assert "1 of 2 runs, seeds 5" in page and "Differences" not in page  # no pair has both
    assert main([*words, "--results", str(out / "results.csv")]) == 0
    assert (out / "two.md").read_text(encoding="utf-8") == page
    (out / NONE / "summary.json").unlink()
    assert main([*words, "--finished"]) == 2
    assert "holds no finished run of two at scale smoke" in capsys.readouterr().err


def test_a_file_of_before_there_were_evaluations_can_be_read(whole: Path, tmp_path: Path) -> None:
    lines = (whole / "results.csv").read_text(encoding="utf-8").splitlines()
    older = [",".join(line.split(",")[: -len(collect.ADDED)]) for line in lines]
    (tmp_path / "older.csv").write_text("\n".join(older), encoding="utf-8")
    found = collect.read_csv(tmp_path / "older.csv")
    assert found[0]["label"] == "" and found[0]["sequence_floor"] is None and found[0]["evaluated"] == []
    assert "sequence floor" not in tables.results_table(found)


def test_runs_that_differ_in_settings_alone_have_a_label(tmp_path: Path) -> None:
    row = {"model": "deepseek-moe-1b", "rule": "adaptive"}
    two = [row, {**row, "label": "once a micro-batch", "settings": {"alflb_update_every": "micro-batch"}}]
    sweep = plan_file.read_plan(written(tmp_path, changed(runs=two, published={}, compare=[])), "smoke")
    assert [run.group.rpartition(".")[2] for run in sweep.runs] == ["adaptive", "once-a-micro-batch"]
    with pytest.raises(SettingError, match=r"label: .*/up: must be letters, digits, spaces and hyphens"):
        plan_file.read_plan(written(tmp_path, changed(runs=[{**row, "label": "../up"}])), "smoke")


def test_results_of_another_plan_are_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reproduce", "wang2024", "--scale", "smoke", "--out", str(tmp_path)]
    assert main([*words, "--results", str(whole / "results.csv")]) == 2
    assert "its runs are not those of wang2024 at scale smoke" in capsys.readouterr().err


# -- figures of tables -----------------------------------------------------------------------------------------------


def test_intervals_are_students() -> None:
    found = collect.confidence_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.302652729911275 / 3**0.5)  # t(0.975, 2) of any table
    assert collect.confidence_interval([1.0]).half is None


def rows(values: list[float], published: float | None, group: str) -> list[dict[str, Any]]:
    row = {"group": group, "published_perplexity": published}
    return [{**row, "seed": seed, "perplexity": value} for seed, value in enumerate(values)]


@pytest.mark.parametrize(
    ("left", "right", "published", "verdict"),
    [
        ([1.0, 1.1, 1.05], [2.0, 2.1, 2.06], (1.0, 2.0), "holds"),
        ([1.0, 1.1, 1.05], [2.0, 2.1, 2.06], (2.0, 1.0), "reversed"),
        ([1.0, 1.1, 1.05], [2.0, 2.1, 2.06], (None, None), "clear"),
        ([1.0, 3.0, 2.0], [2.0, 2.1, 2.06], (1.0, 2.0), "not decided"),
        ([1.0], [2.0], (1.0, 2.0), "not decided"),
    ],
)
def test_verdicts(left: list[float], right: list[float], published: tuple[Any, Any], verdict: str) -> None:
    found = tables.compare_pair(rows(left, published[0], "a"), rows(right, published[1], "b"), "perplexity")
    assert found[1] == verdict


def test_the_best_u_of_each_rule_is_that_of_its_means() -> None:
    swept = [
        {"group": f"{rule}{u}", "model": "m", "gate": "g", "rule": rule, "u": u, "seed": seed, "gap": None,
         "maxvio_global": value * (1 + seed / 10), "maxvio_last50": 1 / value}
        for rule, by_u in {"sign": {0.1: 3.0, 0.01: 1.0, 0.001: 1.9}, "sqrt": {1.0: 2.0}}.items()
        for u, value in by_u.items()
        for seed in (0, 1)
    ]  # fmt: skip
    _, _, *lines = tables.best_step_size_table(swept).splitlines()
    assert lines == ["| sign | 3 | 0.01: 1.1 (2 within twice) | 0.1: 0.33 (2 within twice) |"]
    assert tables.best_step_size_table([row for row in swept if row["rule"] == "sqrt"]) == ""


def test_curves_are_means_over_equal_stretches() -> None:
    assert collect.means_over_stretches([1, 2, 3, 4, 5, 6], 3) == [1.5, 3.5, 5.5]
    assert collect.means_over_stretches([1, 2], 3) == [1, 2]


# -- the plans themselves --------------------------------------------------------------------------------------------


def test_smoke_of_the_paper_runs_from_end_to_end(tmp_path: Path) -> None:
    """Every run of it is trained: the first two at once by the sweep itself, the others as forks."""
    out = tmp_path / "out"
    sweep = plan_file.read_plan(plan_file.find_plan("wang2024"), "smoke", {"save": False})
    for run in sweep.runs[2:]:
        done = forked.alflb("train", *run.flags(out / run.name, resume=False))
        assert done.returncode == 0, done.stderr[-2000:]
    with execute.lock_folder(out) as lock:
        assert execute.train_locally(sweep, out, 2, lock, print) == []
    found = collect.collect(sweep, out)
    assert [row["run"] for row in found] == [run.name for run in sweep.runs]
    (out / "results.csv").write_text(collect.as_csv(found), encoding="utf-8")
    typed = collect.read_csv(out / "results.csv")
    assert figures.draw_figures("wang2024", typed, out) == [
        "wang2024-course.png", "wang2024-step-size.png", "wang2024-published.png",
    ]  # fmt: skip
    assert tables.order_table(typed, sweep.compare).count("\n") == len(tables.FIGURE_TITLES) * len(sweep.compare) + 1
