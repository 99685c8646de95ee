"""`alflb replay`: the order of things, its figures against NumPy, its command line, and real recorded training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alflb_megatron import metrics, rules
from alflb_megatron.lab import cli
from alflb_megatron.lab.records import metrics_file
from alflb_megatron.lab.replay.command import ReplaySettings, format_table, parse_rules
from alflb_megatron.lab.replay.recording import Gating, Layout, Recording
from alflb_megatron.lab.replay.replay import STEPS_TO, replay, sampling_floor_at_any_size
from alflb_megatron.lab.replay.replayed_rules import HindsightBias, ReplayedRule, choose_experts
from alflb_megatron.lab.replay.scores import open_scores
from alflb_megatron.lab.training.resolve import resolve, resolve_resumed
from alflb_megatron.margins import exact_move
from alflb_megatron.settings import SettingError, markdown_table
from tests import forked
from tests.distributed import ranks

STEPS, LAYERS, TOKENS, EXPERTS, TOPK = 24, 2, 200, 8, 2
FIGURES = {
    "steps_to_2x_floor", "steps_to_2x_sequence_floor", "mean_over_floor", "tail_over_floor", "worst_over_floor",
    "maxvio_mean", "maxvio_tail", "maxvio_worst", "affinity_kept",
}  # fmt: skip


def stream(steps: int = STEPS, seed: int = 3) -> Tensor:
    """Sigmoid scores [steps, layers, T, E] of experts that are not equally liked."""
    generator = torch.Generator().manual_seed(seed)
    liked = torch.randn(LAYERS, 1, EXPERTS, generator=generator)
    return torch.sigmoid(torch.randn(steps, LAYERS, TOKENS, EXPERTS, generator=generator) + liked)


def recording(scores: Tensor, **gating: Any) -> Recording:
    return Recording(tuple(range(1, scores.shape[1] + 1)), scores.shape[3], len(scores), lambda: iter(scores),
                     Gating(**{"topk": TOPK, **gating}))  # fmt: skip


# -- the order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rules.names())
def test_a_step_changes_nothing_before_the_next(name: str) -> None:
    changed = stream()
    changed[9] = changed[9].flip(-1)
    biases = []
    for scores in (stream(), changed):
        player = ReplayedRule(rules.make(name), LAYERS, EXPERTS, Gating(TOPK))
        routed_with = []
        for step in scores:
            routed_with.append(player.bias_LE)
            player.step(step)
        biases.append(routed_with)
    same = [torch.equal(mine, theirs) for mine, theirs in zip(*biases, strict=True)]
    assert same[:10] == [True] * 10 and not same[10]
    whole, other = (
        replay(recording(scores), {name: rules.make(name)}, hindsight=False) for scores in (stream(), changed)
    )
    assert whole["rules"][name]["maxvio"][:9] == other["rules"][name]["maxvio"][:9]


def test_the_first_step_is_routed_without_a_bias() -> None:
    scores = stream()
    loads = [torch.bincount(rows.topk(TOPK).indices.reshape(-1), minlength=EXPERTS) for rows in scores[0]]
    result = replay(recording(scores), hindsight=False)
    expected = float(metrics.max_vio(torch.stack(loads)).mean())
    assert [figures["maxvio"][0] for figures in result["rules"].values()] == pytest.approx([expected] * 3)


# -- the figures ---------------------------------------------------------------------------------------------------


def test_sign_against_numpy() -> None:
    scores, step_size = stream(), 0.02
    result = replay(recording(scores), {"sign": rules.make("sign", step_size=step_size)})["rules"]["sign"]
    for layer, figures in enumerate(result["per_layer"]):
        bias, vio, kept, most = np.zeros(EXPERTS, np.float32), [], 0.0, 0.0
        for step, s in enumerate(scores[:, layer].numpy()):
            chosen = np.argsort(-(s + bias), axis=1)[:, :TOPK]
            loads = np.bincount(chosen.ravel(), minlength=EXPERTS)
            vio.append(loads.max() / loads.mean() - 1)
            if step >= 10:
                kept += np.take_along_axis(s, chosen, 1).sum()
                most += np.sort(s, axis=1)[:, -TOPK:].sum()
            bias = bias + np.float32(step_size) * np.sign(loads.mean() - loads).astype(np.float32)
            bias -= bias.mean()
        floor = sampling_floor_at_any_size(TOKENS, TOPK, EXPERTS)
        assert figures["layer"] == layer + 1
        assert figures["maxvio_mean"] == pytest.approx(np.mean(vio[10:]), abs=1e-3)
        assert figures["maxvio_tail"] == pytest.approx(np.mean(vio[-6:]), abs=1e-3)
        assert figures["maxvio_worst"] == pytest.approx(max(vio[10:]), abs=1e-3)
        for name in ("mean", "tail", "worst"):
            assert figures[f"{name}_over_floor"] == pytest.approx(figures[f"maxvio_{name}"] / floor)
        assert figures["steps_to_2x_floor"] == next(n for n, x in enumerate(vio) if x <= 2 * floor)
        assert figures["affinity_kept"] == pytest.approx(kept / most, abs=1e-5)
    assert result["steps_to_2x_floor"] == max(row["steps_to_2x_floor"] for row in result["per_layer"])
    assert result["mean_over_floor"] == pytest.approx(np.mean([row["mean_over_floor"] for row in result["per_layer"]]))


def test_quantile_is_replayed_as_the_router_and_the_balancer_would() -> None:
    """Margins of `routing.margins_of`, counted into a window, on scores as a sigmoid gate gives them."""
    from alflb_megatron.loads import LoadCounter
    from alflb_megatron.routing import Gate, margins_of, select

    rule = rules.make("quantile")
    gate = Gate(TOPK, "sigmoid", threshold=rule.threshold)
    scores, bias = stream(5)[:, :1], torch.zeros(EXPERTS)
    player = ReplayedRule(rule, 1, EXPERTS, Gating(TOPK))
    for step in scores:
        window = LoadCounter(EXPERTS, with_margins=True)
        choice = select(step[0].logit(), gate, bias)
        window.observe(choice.experts_TK)
        window.observe_margins(margins_of(step[0].logit(), choice.map_TE, gate, bias))
        apart = (player.step(step)[0] - window.tokens_per_expert).abs().max()
        assert apart <= 1, "logit and sigmoid are no exact inverses"
        stats = rules.Stats(window.tokens_per_expert[None], torch.ones(1), window.histogram_EB[None])
        bias = rule.step(bias[None], stats, {})[0][0]
        bias = bias - bias.mean()
        assert torch.allclose(player.bias_LE[0], bias, atol=1e-2)


def test_keys_are_as_documented() -> None:
    result = replay(recording(stream()))
    top = {"floor", "sequence_floor", "topk", "experts", "tokens", "steps", "layers", "rules", "hindsight"}
    assert set(result) == top
    assert (result["topk"], result["experts"], result["tokens"], result["steps"]) == (TOPK, EXPERTS, TOKENS, STEPS)
    assert result["layers"] == [1, 2] and list(result["rules"]) == ["sign", "quantile", "adaptive"]
    for figures in result["rules"].values():
        assert set(figures) == FIGURES | {"update_ms", "maxvio", "per_layer"}
        assert len(figures["maxvio"]) == STEPS and figures["update_ms"] > 0
        assert [set(row) for row in figures["per_layer"]] == [FIGURES | {"layer"}] * LAYERS
    later = FIGURES - set(STEPS_TO)
    assert result["sequence_floor"] is None
    assert set(result["hindsight"]) == later | {"sweeps", "maxvio", "per_layer"}
    assert [set(row) for row in result["hindsight"]["per_layer"]] == [later | {"layer"}] * LAYERS
    assert replay(recording(stream(12)), hindsight=False)["hindsight"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    names = top | FIGURES | {"update_ms", "maxvio", "per_layer", "sweeps"}
    for text in (
        sys.modules[replay.__module__].__doc__,
        (Path(cli.__file__).parents[2] / "docs/replay.md").read_text(),
    ):
        assert text and not [name for name in names if name not in text]


def test_fewer_than_eleven_steps_and_a_choice_that_is_none() -> None:
    short = replay(recording(stream(10)))
    missing = {"mean_over_floor", "worst_over_floor", "maxvio_mean", "maxvio_worst", "affinity_kept"}
    for figures in (*short["rules"].values(), short["hindsight"]):
        assert {name for name, value in figures.items() if value is None} - set(STEPS_TO) == missing
    assert "fewer than 11 steps" in format_table(short)
    everyone = replay(recording(stream(12), topk=EXPERTS))
    assert everyone["floor"] == 0 and everyone["rules"]["sign"]["mean_over_floor"] is None
    assert everyone["rules"]["sign"]["maxvio_mean"] == 0 and everyone["rules"]["sign"]["affinity_kept"] == 1
    format_table(everyone)


def test_a_rule_that_gives_no_number_leaves_the_bias_as_it_was() -> None:
    class Broken(rules.Rule):
        def step(self, bias: Tensor, stats: rules.Stats, state: rules.State) -> tuple[Tensor, rules.State]:
            return torch.full_like(bias, float("nan")), state

    player = ReplayedRule(Broken(), LAYERS, EXPERTS, Gating(TOPK))
    player.step(stream(1)[0])
    assert not player.bias_LE.any() and not player.n_L.any()


# -- floor and hindsight -------------------------------------------------------------------------------------------


def test_the_floor_is_simulated_and_at_any_size_quick() -> None:
    assert sampling_floor_at_any_size(200, 2, 8) == metrics.sampling_floor(200, 2, 8, draws=1000)
    simulated = metrics.sampling_floor(500_000, 4, 16, draws=60)
    assert sampling_floor_at_any_size(500_000, 4, 16) == pytest.approx(simulated, rel=0.1)  # 60 draws are good to 4%
    assert 0.9e-3 < sampling_floor_at_any_size(2_000_000, 8, 16) < 2e-3
    assert sampling_floor_at_any_size(2_000_000, 16, 16) == 0


def test_an_exact_move_gives_each_expert_the_mean_load_by_itself() -> None:
    scores = stream(1)[0, 0]
    bias = torch.linspace(-0.1, 0.1, EXPERTS)
    chosen = choose_experts(scores + bias, Gating(TOPK), with_margins=True)
    move = exact_move(chosen.margins(rules.Threshold.OWN), TOKENS * TOPK / EXPERTS)
    for expert in range(EXPERTS):
        alone = bias.clone()
        alone[expert] += move[expert]
        assert int(choose_experts(scores + alone, Gating(TOPK)).loads()[expert]) == TOKENS * TOPK // EXPERTS


def test_hindsight_is_far_below_the_floor_and_near_the_assignment_optimum() -> None:
    result = replay(recording(stream()))
    assert result["hindsight"]["worst_over_floor"] < 0.35
    assert result["hindsight"]["maxvio_worst"] < 0.1
    assert 0.5 < result["hindsight"]["affinity_kept"] < 1
    hindsight = HindsightBias(1, EXPERTS, Gating(TOPK))
    loads, _ = hindsight.step(torch.rand(1, 1, EXPERTS))  # one token: there is nothing to balance
    assert int(loads.sum()) == TOPK and hindsight.sweeps[0] <= 30


def test_group_limited_routing_stays_within_its_groups() -> None:
    scores = stream(12)
    gating = Gating(TOPK, "sigmoid", num_groups=4, group_topk=1)
    experts = choose_experts(scores[0, 0], gating).experts_TK
    assert torch.equal(experts[:, 0] // 2, experts[:, 1] // 2)
    result = replay(recording(scores, num_groups=4, group_topk=1))
    # a group of two is taken or left as one: each expert's own move would move it by both, and quantile swings for ever
    assert result["rules"]["quantile"]["maxvio_tail"] > 2
    assert result["rules"]["adaptive"]["mean_over_floor"] < 1.2 < result["rules"]["sign"]["mean_over_floor"]
    with pytest.raises(SettingError, match=r"--topk=3: must be a multiple of 1, at most 2"):
        replay(recording(scores, num_groups=4, group_topk=1), topk=3)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"scores": stream().half()}, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_the_command_prints_a_table_and_writes_json_and_picture(file: Path, capsys: Any) -> None:
    out, plot = file.with_name("r.json"), file.with_name("r.png")
    words = ["--rules", "sign:step_size=0.02,quantile:against=own;ema=0.8", "--json", str(out), "--plot", str(plot)]
    assert cli.main(["replay", str(file), "--topk", "2", *words]) == 0
    printed = capsys.readouterr()
    about, table, meanings, picture = printed.out.strip().split("\n\n")
    assert about.startswith("24 steps, 2 layers, 200 tokens a step, top-2 of 8 experts; sampling floor of MaxVio 0.")
    first = [line.split()[0] for line in table.splitlines()]
    assert [first[0], *first[2:]] == ["rule", "sign:step_size=0.02", "quantile:against=own;ema=0.8", "hindsight"]
    assert len(meanings.splitlines()) == 8 and picture == f"picture: {plot}"
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    direct = replay(open_scores(file), parse_rules(words[1]), topk=2)
    for label, figures in result["rules"].items():
        assert figures["mean_over_floor"] == direct["rules"][label]["mean_over_floor"]


def test_a_sequence_length_gives_the_sequence_floor(file: Path, capsys: Any) -> None:
    out = file.with_name("r.json")
    words = ["--topk", "2", "--sequence-length", "20", "--rules", "adaptive", "--json", str(out), "--no-hindsight"]
    assert cli.main(["replay", str(file), *words]) == 0
    assert ", sequence floor " in capsys.readouterr().out
    result = json.loads(out.read_text())
    # tokens of this stream are independent, and a batch is ten sequences: the floor is from one batch, so somewhat high
    assert 0.8 < result["sequence_floor"] / result["floor"] < 1.5
    assert result["rules"]["adaptive"]["steps_to_2x_sequence_floor"] < 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--topk=none: {file} does not hold it: give 1 to 8"),
        (["--topk", "0"], "--topk=0: must be at least 1"),
        (["--topk", "9"], "--topk=9: must be from 1 to the 8 experts of {file}"),
        (["--topk", "two"], "--topk=two: must be of type int"),
        (["--rules", ""], "--rules=nothing: must name at least one rule, and each once"),
        (["--rules", "sign,sign"], "--rules=sign,sign: must name at least one rule, and each once"),
        (["--rules", "sign,magic"], "--rules=magic: must be one of adaptive, "),
        (["--rules", "sign:a=3"], "--rules=sign:a=3: a: rule sign has no such knob; it has step_size"),
        (["--rules", "sign:step_size=-1"], "--rules=sign:step_size=-1: step_size: must be at least 0"),
        (["--rules", "quantile:ema"], "--rules=quantile:ema: ema must be name=value"),
        (["--json", "/nowhere/out.json"], "--json=/nowhere/out.json: must be a file in a folder that exists"),
        (["--plot", "p.png", "--topk", "8"], "--plot=p.png: shows nothing where every token takes all 8 experts"),
        (["--topk", "2", "--sequence-length", "64"], "--sequence-length=64: must divide the 200 tokens of step 10"),
        (["--plot", "/"], "--plot=/: must be a file in a folder that exists"),
    ],
)
def test_what_cannot_work_is_one_line(file: Path, capsys: Any, words: list[str], message: str) -> None:
    assert cli.main(["replay", str(file), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("alflb: " + message.format(file=file)) and error.count("\n") == 1


def test_an_announced_length_is_held(file: Path) -> None:
    short = Recording((1,), EXPERTS, 5, lambda: iter(stream(3)[:, :1]), Gating(TOPK))
    with pytest.raises(SettingError, match="holds 3 steps, not the 5 it announces"):
        replay(short)


def test_the_flags_are_documented() -> None:
    page = (Path(cli.__file__).parents[2] / "docs" / "replay.md").read_text(encoding="utf-8")
    assert markdown_table(ReplaySettings) in page


# -- recorded training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["none", "builtin"])
def test_only_our_router_records(rule: str) -> None:
    with pytest.raises(SettingError, match=rf"--record-scores=2: needs a rule of ours, not {rule}; .*--alflb-frozen"):
        resolve({"rule": rule, "record_scores": 2}, {}, {})


def test_a_resumed_run_does_not_record_again() -> None:
    saved = resolve({"record_scores": 2}, {}, {}).as_dict()
    assert resolve_resumed(saved, {"resume": True}, {}, {}).job.record_scores == 0


def train(out: Path, *words: str, nproc: int = 1) -> list[dict[str, Any]]:
    command = ["train", "--preset", "tiny", "--steps", "3", "--no-save", "--nproc", str(nproc)]
    command += ["--global-batch-size", "4", "--micro-batch-size", "1", "--validation-sequences", "4", *words]
    done = forked.alflb(*command, "--out", out, nproc=nproc)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(metrics_file.read_metrics(out))


def test_recorded_scores_and_the_bias_give_the_loads_of_the_run(tmp_path: Path) -> None:
    """Two data-parallel ranks, two micro-batches each, and a rule with margins; and recording changes nothing."""
    words = ("--ep", "2", "--rule", "quantile", "--gate", "softmax")
    steps = train(tmp_path / "run", *words, "--record-scores", "2", nproc=2)
    plain = train(tmp_path / "plain", *words, nproc=2)
    assert [step["loss"] for step in steps] == [step["loss"] for step in plain]
    assert [step["bias"] for step in steps] == [step["bias"] for step in plain]
    assert not (tmp_path / "plain" / "scores").exists()
    made = open_scores(tmp_path / "run")
    assert (made.steps, made.first_step, made.gating) == (2, 1, Gating(2, "softmax"))
    assert made.layout == Layout(256, 1) and replay(made, hindsight=False)["sequence_floor"] is not None
    assert list(made.layers) == steps[0]["layers"]
    player = ReplayedRule(rules.make("quantile"), len(made.layers), made.experts, made.gating)
    bias_LE = torch.zeros(len(made.layers), made.experts)
    for scores_LTE, step in zip(made, steps, strict=False):
        ranked_LTE = scores_LTE + bias_LE[:, None]
        loads = [
            torch.bincount(rows.topk(2).indices.reshape(-1), minlength=made.experts).tolist() for rows in ranked_LTE
        ]
        assert loads == step["loads"]
        assert player.step(scores_LTE)[0].tolist() == step["loads"]
        bias_LE = torch.tensor(step["bias"])
        assert torch.equal(player.bias_LE, bias_LE), "the replayed rule is the trained one, bit for bit"
    train(tmp_path / "run", "--ep", "1")
    assert not list((tmp_path / "run" / "scores").iterdir()), "another run's scores are not this one's"


def _tapped() -> dict[str, Any]:
    """What a tap sees of one counted pass with padding, one of evaluation and one after it is taken off."""
    from tests.distributed.jobs import SMALL
    from tests.distributed.test_router import _router

    with ranks.model_parallel():
        router, seen = _router(), []
        router.score_hooks = (seen.append,)
        logits = torch.randn(6, 2, SMALL["num_experts"], requires_grad=True)
        padding = torch.zeros(6, 2, dtype=torch.bool)
        padding[4:, 1] = True
        router.routing(logits, padding)
        router.eval()
        router.routing(logits)
        router.train()
        router.score_hooks = ()
        router.routing(logits)
        (scores,) = seen
        expected = torch.sigmoid(logits.detach().view(12, -1)[~padding.view(-1)])
        return {"equal": torch.equal(scores, expected), "gradient": scores.requires_grad, "rows": len(scores)}


def test_a_tap_sees_the_tokens_that_are_counted() -> None:
    assert ranks.run(1, _tapped) == [{"equal": True, "gradient": False, "rows": 10}]


def test_pipeline_stages_and_a_frozen_rule_are_recorded(tmp_path: Path) -> None:
    words = ("--pp", "2", "--ep", "1", "--alflb-frozen", "--recompute", "full")
    steps = train(tmp_path / "run", *words, "--record-scores", "3", nproc=2)
    made = open_scores(tmp_path / "run")
    assert made.steps == 3 and list(made.layers) == steps[0]["layers"]
    player = ReplayedRule(rules.make("sign", step_size=0.0), len(made.layers), made.experts, made.gating)
    assert [player.step(scores)[0].tolist() for scores in made] == [step["loads"] for step in steps]
