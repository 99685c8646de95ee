"""Cluster scale on paper: formulas against cases counted by hand, and the page against its results."""

import json
import math
from dataclasses import replace

import pytest
import torch

from alflb_megatron import agreement, metrics, rules
from alflb_megatron.lab.records.run_folder import RunFolder
from alflb_megatron.lab.records.summary import summarise
from alflb_megatron.lab.sweep import flops
from alflb_megatron.lab.training.command import plan_of
from alflb_megatron.lab.training.resolve import resolve
from alflb_megatron.loads import LoadAllReduce, LoadCounter
from alflb_megatron.models import PRESETS, ModelShape
from benchmarks import cluster, cluster_loads, cluster_tables, report, scale
from benchmarks.cluster import MODELS, ONE_B, V3

# -- FLOPs ------------------------------------------------------------------------------------------------------------

TOY = ModelShape(
    vocab_size=10, seq_length=6, hidden_size=4, num_layers=3, num_dense_layers=1, num_heads=2, ffn_hidden_size=5,
    moe_ffn_hidden_size=3, num_experts=8, topk=2, num_shared_experts=1,
)  # fmt: skip


def test_flops_counted_by_hand():
    attention = 4 * 4 * 4
    dense = attention + 3 * 4 * 5
    moe = attention + 3 * (3 * 4 * 3) + 4 * 8  # two routed and one shared expert, and the router
    assert flops.active_weights(TOY) == dense + 2 * moe + 4 * 10
    assert flops.flops_per_token(TOY) == 6 * (dense + 2 * moe + 40) + 3 * 3 * (2 * 6 * 4)
    with_mtp = replace(TOY, mtp_layers=1)
    assert flops.active_weights(with_mtp) - flops.active_weights(TOY) == moe + 2 * 4 * 4 + 4 * 10


def test_hours_of_one_gpu():
    per_token = flops.flops_per_token(TOY)
    assert flops.gpu_hours(TOY, 3600, utilisation=0.5, peak=2 * per_token) == pytest.approx(1)
    assert flops.gpu_hours(TOY, 7200, utilisation=0.5, peak=2 * per_token) == pytest.approx(2)
    assert flops.gpu_hours(TOY, 1e9) < flops.gpu_hours(replace(TOY, topk=3), 1e9)


@pytest.mark.parametrize("name", ["tiny", "small", "deepseek-moe-1b", "deepseek-moe-3b"])
def test_flops_against_six_times_active_parameters(name):
    """6 N a token, less the input embedding and the norms, which are no products, plus attention's core."""
    shape = PRESETS[name]
    no_product = shape.vocab_size * shape.hidden_size + (2 * shape.num_layers + 1) * shape.hidden_size
    core = 6 * shape.num_layers * shape.seq_length * shape.hidden_size
    assert flops.flops_per_token(shape) == 6 * (shape.parameters(active_only=True) - no_product) + core


def test_the_1b_is_within_six_percent_of_six_n():
    ratio = ONE_B.flops / (6 * ONE_B.shape.parameters(active_only=True))
    assert 0.94 < ratio < 0.96


def test_v3_has_the_active_parameters_that_its_paper_states():
    main = replace(V3.shape, mtp_layers=0)  # 37B are those of the main model, input embedding included
    active = flops.active_weights(main, V3.attention) + main.vocab_size * main.hidden_size
    assert active == pytest.approx(37e9, rel=0.02)
    by_hand = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    assert V3.attention.weights == by_hand
    assert V3.attention.width == 128 * (192 + 128) / 2
    assert 0.2 < cluster.v3_utilisation() < 0.8  # in FP8, its peak twice as high: no other count would be believable


# -- the all-reduce against the step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sign", "adaptive"])
def test_bytes_are_what_the_balancer_sends(name):
    margins = rules.make(name).threshold is not None
    windows = [LoadCounter(8, with_margins=margins) for _ in range(3)]
    sent = LoadAllReduce(windows, None, piggyback=torch.zeros(agreement.CHECKSUM_SIZE, dtype=torch.int64))
    assert cluster.all_reduce_bytes(3, 8, margins) == sent.nbytes


def test_time_is_that_of_the_alpha_beta_model_over_the_step():
    row = cluster.collective(ONE_B, gpus=64, stages=1)
    assert row["layers"] == 9
    for kind in ("counts", "margins"):
        time = scale.best(64, cluster.all_reduce_bytes(9, 64, kind == "margins"))
        assert row[kind]["ms"] == time["ms"]
        assert row[kind]["share"]["0.35"] == pytest.approx(time["ms"] / 1e3 / row["step_seconds"]["0.35"])
    assert row["step_seconds"]["0.35"] == pytest.approx(1152 * 2048 * ONE_B.flops / (64 * 989.4e12 * 0.35))


def test_a_pipeline_stage_sums_its_own_layers_over_its_own_ranks():
    whole, stages = cluster.collective(V3, 2048, 1), cluster.collective(V3, 2048, 16)
    assert (whole["layers"], whole["counts"]["ranks"]) == (59, 2048)
    assert (stages["layers"], stages["counts"]["ranks"]) == (4, 128)  # 62 layers on 16 stages
    assert stages["step_seconds"] == whole["step_seconds"]


def test_shares_grow_with_gpus_and_utilisation():
    rows = [cluster.collective(ONE_B, gpus, 1) for gpus in (8, 64, 512)]
    shares = [row["counts"]["share"]["0.35"] for row in rows]
    assert shares == sorted(shares)
    one = rows[0]["counts"]["share"]
    assert one["0.2"] < one["0.35"] < one["0.5"]


# -- what balance is worth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("ep", cluster.EP)
def test_even_loads_cost_nothing_and_one_full_rank_what_is_derived(model, ep):
    part = cluster.shares(model, ep)
    s = part["experts"] + part["exchange"]
    assert 0 < s < 1
    even = torch.full((3, 64), 7)
    assert float(cluster.price(model, even, ep)) == pytest.approx(1)
    everything = torch.zeros(3, 64)
    everything[:, 0] = 100.0  # all at the first rank, which then has ep times its share
    assert float(cluster.price(model, everything, ep)) == pytest.approx(1 + s * (ep - 1))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("ep", cluster.EP)
def test_the_formula_is_the_simulation(model, ep):
    """No sender is ever busier than the fullest receiver, at any loads, within a node and beyond."""
    generator = torch.Generator().manual_seed(ep)
    for skew in (0.1, 1.0, 4.0):
        loads = torch.exp(skew * torch.randn(20, 4, 128, generator=generator, dtype=torch.float64))
        formula = [
            cluster.step_ratio(cluster.shares(model, ep), over)
            for over in metrics.overload(loads, ep).mean(-1).tolist()
        ]
        assert cluster.price(model, loads, ep).tolist() == pytest.approx(formula)


def test_one_layer_counted_by_hand():
    # Two ranks in a node, loads 3 : 1, top-6: of the 12 copies of a token of each, 9 go to the first; half of them came
    # from the other rank, so 4.5 enter by NVLink.
    experts, exchange = cluster.layer_seconds(ONE_B, torch.tensor([1.0, 2.0, 1.0, 0.0]), ep=2, utilisation=0.5)
    assert float(experts) == pytest.approx(9 * 18 * 1024 * 528 / (0.5 * 989.4e12))
    assert float(exchange) == pytest.approx(4 * 4.5 * 1024 * 2 / 450e9)
    # 16 ranks, even: 6 copies a rank, of which 8 in 16 came from another node and 7 over NVLink, which is faster.
    _, exchange = cluster.layer_seconds(ONE_B, torch.ones(16), ep=16)
    assert float(exchange) == pytest.approx(4 * 6 * 8 / 16 * 1024 * 2 / 50e9)


def test_experts_are_a_share_of_the_model():
    part = cluster.shares(ONE_B, 8)
    routed = 6 * 9 * 6 * 3 * 1024 * 528  # 9 layers, 6 experts a token
    assert part["experts"] / (1 - part["exchange"]) == pytest.approx(routed / ONE_B.flops)


def test_more_imbalance_costs_more():
    loads = torch.stack([torch.tensor([1.0 + d, 1.0, 1.0, 1.0 - d]) for d in (0.0, 0.1, 0.5, 1.0)])[:, None]
    for ep in (2, 4):
        price = cluster.price(V3, loads, ep)
        assert (price.diff() > 0).all()


def test_at_ep_below_e_a_full_and_an_empty_expert_even_out():
    loads = torch.tensor([[2.0, 0.0, 1.0, 1.0]])
    assert float(metrics.max_vio(loads)) == 1
    assert float(cluster.price(ONE_B, loads, 2)) == pytest.approx(1)
    assert float(cluster.price(ONE_B, loads, 4)) > 1


def test_luck_is_the_floor_of_max_vio_where_each_rank_has_one_expert():
    assert cluster.luck(10_000, 6, 64, 64) == pytest.approx(1 + metrics.floor_constant(6, 64) / 100)
    assert cluster.luck(10_000, 64, 64, 8) == 1


def test_luck_against_draws():
    tokens, topk, experts, ep = 500, 3, 16, 4
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(400, tokens, experts, generator=generator).topk(topk).indices.flatten(1)
    loads = torch.zeros(400, experts).scatter_add_(1, chosen, torch.ones(chosen.shape))
    assert float(metrics.overload(loads, ep).mean()) == pytest.approx(cluster.luck(tokens, topk, experts, ep), rel=3e-3)


# -- recorded loads ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    options, shape = cluster_loads.run_settings("sign", 2), {"num_experts": 4, "topk": 1}
    folder = tmp_path / "run"
    with RunFolder(folder) as run:
        plan = resolve({**options, "out": str(folder)}, shape, {})
        run.write_config(plan.as_dict(), {}, {}, {"total": 10, "active": 5})
        for step, loads in enumerate([[[4, 0, 4, 0]], [[1, 3, 2, 2]]], 1):
            run.append({
                "step": step, "loss": 2.5, "lr": 1e-3, "grad_norm": None, "seconds": 0.5, "tokens": 8,
                "tokens_per_second": 16.0, "maxvio_mean": 1.0, "maxvio_max": 1.0, "bias_spread": 0.0,
                "layers": [2], "loads": loads,
            })  # fmt: skip
        run.write_summary({
            "rule": "sign", **summarise(run.records()), "validation_loss": 2.0, "maxvio_global_mean": 0.1,
            "maxvio_global_max": 0.1, "validation_loads": [[1, 1, 1, 1]], "sequence_floor": None, "checkpoint": None,
            "run": str(folder),
        })  # fmt: skip
    return folder, options, shape


def test_what_is_kept_of_a_run(run, monkeypatch):
    folder, _, _ = run
    monkeypatch.setattr(cluster_loads, "EVERY", 1)
    found = cluster_loads.summarise(folder)
    assert found["tokens"] == 8
    assert found["maxvio"] == [[1.0], [0.5]]
    assert found["overload"] == {"2": [[1.0], [1.0]], "4": [[2.0], [1.5]]}  # 4 experts: no EP of 8 or more
    monkeypatch.setattr(cluster_loads, "EVERY", 2)
    assert cluster_loads.summarise(folder)["maxvio"] == [[0.5]]


def test_only_a_finished_run_with_the_same_settings_is_kept(run, tmp_path):
    folder, options, shape = run
    assert cluster_loads.is_finished(options, shape, folder)
    assert not cluster_loads.is_finished({**options, "steps": 3}, shape, folder)
    assert not cluster_loads.is_finished(options, {**shape, "topk": 2}, folder)
    assert not cluster_loads.is_finished(options, shape, tmp_path / "nothing")


def test_the_command_line_gives_the_settings():
    from alflb_megatron.lab import cli
    from benchmarks import in_training

    for name, shape in cluster_loads.RECORDED.items():
        options = cluster_loads.run_settings("builtin", 3)
        words = in_training.command({**options, **shape}, "x")[3:]
        assert plan_of(cli.parse(words)) == resolve({**options, "out": "x"}, shape, {})
        large = next(model.shape for model in MODELS if model.name == name)
        assert (shape["num_experts"], shape["topk"]) == (large.num_experts, large.topk)


# -- the page ---------------------------------------------------------------------------------------------------------


def test_bins_hold_what_lies_in_them(monkeypatch):
    monkeypatch.setattr(cluster_tables, "SMALLEST_BIN", 2)
    run = {"maxvio": [[0.3, 0.4], [0.6, 0.01]], "overload": {"2": [[1.1, 1.2], [1.4, 1.0]]}}
    ((low, high, number, vio, over),) = cluster_tables.binned({"none": run})
    assert (low, high, number) == (0.25, 0.5, 2)
    assert vio == pytest.approx(0.35) and over["2"] == pytest.approx(1.15)


@pytest.mark.parametrize(
    ("part", "text"), [(0.5, "50%"), (0.0234, "2.3%"), (0.000024, "0.0024%"), (0.0000024, "0.0002%"), (0.0, "0%")]
)
def test_percent(part, text):
    assert cluster_tables.percent(part) == text


def test_the_page_is_that_of_the_results():
    assert (report.DOCS / "cluster.md").read_text(encoding="utf-8") == report.cluster(), "run `make docs`"


def test_the_results_are_those_of_the_formulas():
    found = report.results("cluster")
    assert found is not None
    paper = json.loads(json.dumps(cluster.paper()))
    assert {key: found[key] for key in paper} == _close(paper), "run `python -m benchmarks.cluster --paper`"
    for name, loads in found["loads"].items():
        experts = loads["shape"]["num_experts"]
        for run in loads["rules"].values():
            assert len(run["maxvio"]) == loads["steps"] // loads["every"]
            for ep, rows in run["overload"].items():
                pairs = [pair for row in zip(run["maxvio"], rows, strict=True) for pair in zip(*row, strict=True)]
                assert all(1 <= over <= 1 + vio + 1e-3 for vio, over in pairs), (name, ep)
                if int(ep) == experts:
                    assert all(math.isclose(over, 1 + vio, abs_tol=2e-4) for vio, over in pairs)


def _close(value):
    """The same with floats that compare equal up to rounding."""
    if isinstance(value, dict):
        return {key: _close(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_close(item) for item in value]
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value


def test_the_picture_is_drawn_from_the_results():
    found = report.results("cluster")
    assert found is not None
    assert len(cluster_tables.figure(found).axes) == len(found["loads"])
