"""Benchmarks in small: formulas against values worked by hand, real run folders, tables from real results."""

import json
import math

import pytest

from alflb_megatron import rules
from alflb_megatron.lab.records.run_folder import RunFolder
from alflb_megatron.lab.records.summary import summarise
from alflb_megatron.lab.training.command import plan_of
from alflb_megatron.lab.training.resolve import resolve
from alflb_megatron.loads import LoadAllReduce, LoadCounter
from alflb_megatron.margins import BINS
from alflb_megatron.metrics import sampling_floor
from benchmarks import all_reduce, in_training, scale

# -- scale ------------------------------------------------------------------------------------------------------------

SLOW = scale.Link("by hand", alpha=1.0, alpha_tree=1.0, bandwidth=1e9, alpha_from="", bandwidth_from="")


def test_alpha_beta_by_hand():
    # 4 ranks, 8 GB at 1 GB/s, a second a hop: the ring sends 2 * 3/4 of the bytes in 6 hops, the tree 2 of them.
    assert scale.ring(4, 8e9, SLOW) == pytest.approx(12 + 6)
    assert scale.tree(4, 8e9, SLOW) == pytest.approx(16 + 2 * 3 * 28e-6)
    assert scale.tree(4096, 0, SLOW) == pytest.approx(2 * (7 * 28e-6 + 9 * 50e-6))
    assert scale.ring(4096, 0, SLOW) == pytest.approx(8190)


def test_the_better_algorithm_over_the_link_that_is_needed():
    few, many = scale.best(8, 0), scale.best(4096, 0)
    assert (few["algorithm"], few["link"]) == ("ring", scale.NVLINK.name)
    assert few["ms"] == pytest.approx(1e3 * 14 * scale.NVLINK.alpha)
    assert (many["algorithm"], many["link"]) == ("tree", scale.NETWORK.name)
    assert many["ms"] == pytest.approx(2e3 * (7 * 28e-6 + 9 * 50e-6))
    assert scale.best(8, 1e12)["algorithm"] == "ring"
    assert scale.best(9, 0)["link"] == scale.NETWORK.name


@pytest.mark.parametrize(("with_margins", "by_hand"), [(False, 3 * 5 * 8), (True, 3 * (5 + 4 * BINS) * 4)])
def test_all_reduce_bytes_are_those_of_all_windows(with_margins, by_hand):
    windows = [LoadCounter(4, with_margins=with_margins) for _ in range(3)]
    assert scale.all_reduce_bytes(3, 4, with_margins) == LoadAllReduce(windows, None).nbytes == by_hand


def test_kept_bytes_by_hand():
    # bias float32 [2, 4], n int64 [2]; counts int64 [4] and one int64 a layer; margins int32 [4, BINS] a layer
    assert scale.kept_bytes(rules.make("sign"), 2, 4) == {"state": 32 + 16, "window": 2 * (32 + 8)}
    quantile = scale.kept_bytes(rules.make("quantile"), 2, 4)
    assert quantile == {"state": 32 + 16, "window": 2 * (32 + 8 + 4 * BINS * 4)}
    assert scale.kept_bytes(rules.make("smebu"), 2, 4)["state"] == 32 + 16 + 32  # its momentum


@pytest.mark.parametrize("threshold", list(scale.margins.Threshold))
def test_the_simulated_batch_is_one_that_could_be(threshold):
    loads_LE, histogram_LEB = scale.batch(6, 16, threshold, topk=2)
    assert loads_LE.shape == (6, 16)
    assert (loads_LE.sum(-1) == 2 * scale.TOKENS).all()
    assert (histogram_LEB.sum(-1) == scale.TOKENS).all()
    assert (histogram_LEB[..., BINS // 2 :].sum(-1) == loads_LE).all()  # margins from zero on: those who chose it


def test_scale_table(monkeypatch):
    monkeypatch.setattr(scale, "SECONDS", 0.0)
    results = json.loads(json.dumps(scale.measure(shapes=[(2, 8), (3, 16)], ranks=(8, 64))))
    assert [set(row["rules"]) for row in results["rows"]] == [set(rules.names())] * 2
    assert all(figures["ms"] > 0 for row in results["rows"] for figures in row["rules"].values())
    text = scale.table(results)
    _is_markdown(text, tables=2)
    assert "expert-parallel size" in text
    for link in (scale.NVLINK, scale.NETWORK):  # constants are named where their figures are
        assert link.alpha_from in text and link.bandwidth_from in text
    assert f"| 3 x 16 | loads alone | {3 * 17 * 8} B |" in text


def _is_markdown(text, tables):
    """Every table has a header, a rule and rows of one width."""
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == tables
    for block in blocks:
        rows = block.split("\n")
        rows = rows[: next((i for i, row in enumerate(rows) if not row.startswith("|")), len(rows))]
        assert len(rows) > 2 and set(rows[1]) <= set("|-:")
        assert len({row.count("|") for row in rows}) == 1


# -- all_reduce -------------------------------------------------------------------------------------------------------


def test_all_reduce_on_two_ranks():
    results = all_reduce.measure(shapes=[(2, 4)], ranks=(2,), repeats=2, gradient_bytes=4096)
    counts, margins = results["rows"]
    assert (counts["rule"], counts["bytes"]) == ("sign", 2 * 5 * 8)
    assert (margins["rule"], margins["bytes"]) == ("adaptive", 2 * (5 + 4 * BINS) * 4)
    for row in results["rows"]:
        assert row["calls"] == {"all_reduce": 1} and row["collectives"] == 1
        assert all(row[f"{name}_ms"] > 0 for name in ("bare", "packed", "other", "overlapped"))
    text = all_reduce.table(results)
    _is_markdown(text, tables=1)
    assert "| 2 | 2 x 4 | loads alone | 80 B | 1 |" in text and "4.1 kB" in text


# -- in_training ------------------------------------------------------------------------------------------------------

SEEDS = (1234, 1235)
SHAPE = {"num_experts": 4, "topk": 1, "seq_length": 32}
TOKENS = 16 * 32


def write_run(out, mode, seed, vio, loss, vio_global):
    """A run in the format of `alflb train`, MaxVio of each step given."""
    options = in_training.settings("tiny", mode, seed, len(vio))
    folder = in_training.folder(out, "tiny", mode, seed)
    with RunFolder(folder) as run:
        plan = resolve({**options, "out": str(folder)}, SHAPE, {})
        run.write_config(plan.as_dict(), {}, {}, {"total": 10, "active": 5})
        for step, value in enumerate(vio, 1):
            run.append({
                "step": step, "loss": 2.5, "lr": 1e-3, "grad_norm": None, "seconds": 0.5, "tokens": TOKENS,
                "tokens_per_second": 1024.0, "maxvio_mean": value, "maxvio_max": value, "bias_spread": 0.0,
                "layers": [2], "loads": [[128, 128, 128, 128]],
            })  # fmt: skip
        run.write_summary({
            "rule": options["rule"], **summarise(run.records()), "validation_loss": loss,
            "maxvio_global_mean": vio_global, "maxvio_global_max": vio_global, "validation_loads": [[1, 1, 1, 1]],
            "sequence_floor": None, "checkpoint": None, "run": str(folder),
        })  # fmt: skip
    return options, folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two modes and seeds; with F the floor of this shape, MaxVio stays at 8F, or falls to 2F and F and rises again."""
    monkeypatch.setattr(in_training, "MODES", {name: in_training.MODES[name] for name in ("builtin", "adaptive")})
    floor = sampling_floor(TOKENS, 1, 4)
    falling = [8 * floor] * 3 + [2 * floor] * 6 + [floor] * 5 + [5 * floor] * 2
    for seed, builtin, ours in zip(SEEDS, (2.10, 2.30), (2.00, 2.30), strict=True):
        write_run(tmp_path, "builtin", seed, [8 * floor] * 16, builtin, 0.4)
        write_run(tmp_path, "adaptive", seed, falling, ours, 0.1)
    return tmp_path, floor


def test_collection_by_hand(runs):
    out, floor = runs
    found = in_training.collect(out, "tiny", SEEDS)
    assert (found["tokens"], found["topk"], found["experts"], found["steps"]) == (TOKENS, 1, 4, 16)
    assert found["floor"] == floor
    ours, builtin = found["modes"]["adaptive"], found["modes"]["builtin"]
    assert ours["maxvio"]["mean"] == pytest.approx(3 * floor)  # the last 4 steps: F, F, 5F, 5F
    assert ours["mean_over_floor"]["mean"] == pytest.approx(14 / 6)  # after ten updates: four times F, 5F, 5F
    assert ours["steps_to_2x_floor"]["each"] == [3, 3]
    assert ours["maxvio_global"]["mean"] == pytest.approx(0.1)
    assert builtin["steps_to_2x_floor"] == {"mean": None, "sd": None, "each": [None, None]}
    assert builtin["validation_loss"]["mean"] == pytest.approx(2.2)
    assert builtin["validation_loss"]["sd"] == pytest.approx(math.sqrt(0.02))  # (0.1^2 + 0.1^2) / (2 - 1)
    loss = found["loss_difference"]  # -0.1 and 0: mean -0.05, deviation sqrt(0.005), over sqrt 2
    assert loss["mean"] == pytest.approx(-0.05) and loss["standard_error"] == pytest.approx(0.05)
    assert found["verdicts"] == {"lowest_maxvio": True, "loss_no_worse": True}
    assert found["maxvio_by_step"]["adaptive"][0] == round(8 * floor, 4)


def test_verdicts_can_be_no():
    modes = {mode: {"maxvio": {"mean": value}} for mode, value in (("quantile", 0.1), ("adaptive", 0.2))}
    worse = in_training.difference([2.2, 2.3, 2.4], [2.1, 2.2, 2.31])
    assert in_training.verdicts(modes, worse) == {"lowest_maxvio": False, "loss_no_worse": False}
    alone = in_training.difference([2.2], [2.1])
    assert in_training.verdicts(modes, alone)["loss_no_worse"] is None
    diverged = in_training.difference([2.2, None], [2.1, 2.1])
    assert diverged["mean"] is None and in_training.verdicts(modes, diverged)["loss_no_worse"] is None


def test_in_training_table_and_figure(runs):
    out, _ = runs
    found = in_training.collect(out, "tiny", SEEDS)
    results = json.loads(json.dumps({"presets": {"tiny": found}}))
    text = in_training.table(results)
    _is_markdown(text, tables=1)
    assert "in 0 of 2 runs" in text and "-0.0500 ± 0.0500 (standard error)" in text
    assert "adaptive has the lowest MaxVio: yes." in text
    (axes,) = in_training.figure(results).axes
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", ":"]


def test_only_a_finished_run_with_the_same_settings_is_kept(tmp_path):
    options, folder = write_run(tmp_path, "adaptive", 1234, [0.5] * 3, 2.0, 0.1)
    assert not in_training.is_finished(options, folder)  # its shape is not the preset's
    with RunFolder(folder) as run:
        run.write_config(resolve({**options, "out": "elsewhere"}, {}, {}).as_dict(), {}, {}, {"total": 1, "active": 1})
        assert not in_training.is_finished(options, folder)  # no summary
        (folder / "summary.json").write_text("{}", encoding="utf-8")
    assert in_training.is_finished(options, folder)
    assert not in_training.is_finished({**options, "steps": 4}, folder)
    assert not in_training.is_finished(options, tmp_path / "nothing")


def test_the_command_line_gives_the_settings():
    from alflb_megatron.lab import cli

    options = in_training.settings("tiny", "aux", 7, 3)
    words = in_training.command(options, "x")[3:]
    assert plan_of(cli.parse(words)) == resolve({**options, "out": "x"}, {}, {})
