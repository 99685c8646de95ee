"""What `alflb train` refuses: one line with the flag, the value and what is allowed; exit code 2; no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alflb_megatron.lab import cli
from alflb_megatron.lab.training.job import Plan
from alflb_megatron.lab.training.resolve import resolve, resolve_resumed
from alflb_megatron.models import PRESETS, ModelShape
from alflb_megatron.settings import SettingError
from tests import forked

RULES = "none, builtin, adaptive, harmonic, proportional, quantile, rms, sign, smebu, sqrt"

REFUSED = [
    ("--rule magic", f"alflb: --rule=magic: must be one of {RULES}"),
    ("--preset huge", "alflb: --preset=huge: must be one of tiny, small, deepseek-moe-1b, deepseek-moe-3b"),
    ("--alflb-step-size -0.1", "alflb: --alflb-step-size=-0.1: must be at least 0"),
    ("--alflb-step-size quick", "alflb: --alflb-step-size=quick: must be of type float"),
    ("--rule none --alflb-step-size 0.1", "alflb: --alflb-step-size=0.1: has no meaning with --rule none"),
    ("--rule builtin --no-alflb-centring", "alflb: --alflb-centring=False: has no meaning with --rule builtin"),
    (
        "--alflb-rule-options a=1",
        "alflb: --alflb-rule-options a=1: rule adaptive has no such knob; it has none",
    ),
    (
        "--rule builtin --gate softmax",
        "alflb: --rule=builtin: Megatron-Core's own expert bias needs --gate sigmoid, not softmax",
    ),
    (
        "--gate softmax --router-fusion",
        "alflb: --router-fusion=True: the fused router takes a bias with --gate sigmoid only",
    ),
    ("--gate tanh", "alflb: --gate=tanh: must be one of sigmoid, softmax"),
    ("--topk 17", "alflb: --topk=17: must be at most the 16 experts"),
    (
        "--num-dense-layers 4",
        "alflb: --num-dense-layers=4: must be below --num-layers 4: without an MoE layer there is nothing to balance",
    ),
    ("--num-heads 3", "alflb: --num-heads=3: must divide --hidden-size 128"),
    ("--num-groups 4", "alflb: --num-groups=4: must be given together with --group-topk"),
    ("--num-groups 3 --group-topk 1", "alflb: --num-groups=3: must divide the 16 experts"),
    ("--num-groups 4 --group-topk 3", "alflb: --group-topk=3: must be at most --num-groups 4 and divide --topk 2"),
    ("--num-groups 16 --group-topk 1", "alflb: --group-topk=1: leaves too few experts in its groups for --topk 2"),
    ("--pre-softmax", "alflb: --pre-softmax=True: needs --gate softmax"),
    ("--num-experts 15", "alflb: --ep=2: must divide the experts (--num-experts), 15"),
    ("--nproc 3 --tp 2", "alflb: --nproc=3: must be a multiple of tp * pp = 2"),
    ("--nproc 2 --ep 4", "alflb: --ep=4: etp * ep * pp = 4 must divide the 2 ranks of --nproc"),
    ("--nproc 0", "alflb: --nproc=0: must be at least 1"),
    ("--nproc two", "alflb: --nproc=two: must be of type int"),
    ("--nproc 8 --tp 8 --ep 1", "alflb: --tp=8: must divide the attention heads (--num-heads), 4"),
    ("--pp 2 --ep 1 --num-layers 5", "alflb: --pp=2: must divide the layers (--num-layers), 5"),
    (
        "--pp 2 --vpp 2 --ep 1 --num-layers 6",
        "alflb: --vpp=2: times --pp 2 must divide the layers (--num-layers), 6",
    ),
    (
        "--gate softmax --topk 1",
        "alflb: --topk=1: needs --pre-softmax with --gate softmax: over one logit it gives 1 always",
    ),
    ("--vpp 2", "alflb: --vpp=2: needs --pp above 1"),
    (
        "--pp 2 --vpp 2 --ep 1 --global-batch-size 24",
        "alflb: --vpp=2: needs the 3 micro-batches a rank to be a multiple of --pp 2",
    ),
    (
        "--global-batch-size 6",
        "alflb: --global-batch-size=6: must be a multiple of micro-batch size * data-parallel ranks = 16",
    ),
    ("--aux-loss-type seq_aux_loss", "alflb: --aux-loss-type=seq_aux_loss: needs --aux-loss-coeff above 0"),
    ("--capacity-factor 0", "alflb: --capacity-factor=0.0: must be above 0"),
    ("--min-lr 1", "alflb: --min-lr=1.0: must be at most --lr 0.001"),
    ("--lr nan", "alflb: --lr=nan: must be a finite number, above 0"),
    ("--resume --load x", "alflb: --load=x: cannot be given with --resume"),
    ("--steps 1e3", "alflb: --steps=1e3: must be of type int"),
    ("--stpes 5", "alflb: unrecognized arguments: --stpes 5 (see alflb --help)"),
    ("--steps", "alflb train: --steps: expected one argument (see alflb train --help)"),
]


@pytest.mark.parametrize(("words", "line"), REFUSED, ids=[words for words, _ in REFUSED])
def test_a_setting_that_cannot_work_is_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["train", *words.split()])
    except SystemExit as stop:  # argparse's way out
        code = stop.code
    output = capsys.readouterr()
    assert (code, output.out, output.err) == (2, "", line + "\n")


# What only the ranks find out: the text, the run folder, the parts that are installed.
LATE = [
    (["--data", "nowhere/at/all"], "--data=nowhere/at/all: "),
    (["--tokenizer", "magic"], "--tokenizer=magic: "),
    (["--resume"], "--resume="),
    (["--load", "nowhere"], "--load=nowhere: must name a run with a checkpoint, or a checkpoint folder"),
    (["--dispatcher", "flex"], "--dispatcher=flex: needs CUDA and DeepEP; use alltoall or allgather"),
    (["--grouped-gemm"], "--grouped-gemm=True: needs CUDA and Transformer Engine"),
]


@pytest.mark.parametrize(("words", "begin"), LATE, ids=[words[0] for words, _ in LATE])
def test_what_the_ranks_find_is_one_line_too(words: list[str], begin: str, tmp_path: Path) -> None:
    """On two ranks: rank 0 says it and leaves, the other waits silently for the launcher to end it."""
    running = forked.Command(["train", "--steps", "1", "--out", tmp_path / "run", *words], nproc=2)
    running.processes[0].join(60)
    code, other = running.processes[0].exitcode, running.processes[1].exitcode
    running.kill()
    said = running.said()
    assert (code, other) == (2, None), said
    assert said[0].startswith("alflb: " + begin) and said[0].count("\n") == 1, said
    assert said[1] == ""


def test_a_launched_job_ends_with_the_line_of_its_ranks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `alflb`'s own launcher: the folder is refused by rank 0 alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("not a run", encoding="utf-8")
    assert cli.main(["train", "--steps", "1", "--out", str(tmp_path / "taken")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("alflb: --out=") and error.count("\n") == 1


def test_a_plan_survives_the_way_through_config_json() -> None:
    plan = resolve({"rule": "sqrt", "nproc": 1, "ep": 1}, {"num_experts": 8}, {"step_size": 0.5})
    assert Plan.from_dict(plan.as_dict()) == plan


def test_a_resumed_run_keeps_what_it_was_started_with() -> None:
    started = resolve({"rule": "sqrt", "nproc": 1, "ep": 1, "steps": 9}, {"num_experts": 8}, {"step_size": 0.5})
    saved = json.loads(json.dumps(started.as_dict()))
    on = resolve_resumed(saved, {"resume": True, "steps": 20, "nproc": 2, "ep": 2}, {}, {})
    assert (on.job.rule, on.job.steps, on.job.ep, on.shape.num_experts, on.alf) == ("sqrt", 20, 2, 8, started.alf)
    other = resolve_resumed(saved, {"rule": "sign"}, {}, {})
    assert other.alf is not None
    assert (other.alf.rule, other.alf.step_size) == ("sign", None)
    for job, shape, line in (
        ({"global_batch_size": 32}, {}, "--global-batch-size=32: must be 16, as this run was started with"),
        ({"seed": 5}, {}, "--seed=5: must be 1234, as this run was started with"),
        ({}, {"num_experts": 4}, "--num-experts=4: must be 8, as this run was started with"),
    ):
        with pytest.raises(SettingError) as caught:
            resolve_resumed(saved, job, shape, {})
        assert str(caught.value) == line


def test_a_preset_gives_way_to_what_is_given() -> None:
    plan = resolve({"preset": "small", "steps": 7}, {"num_experts": 64}, {})
    assert (plan.job.steps, plan.job.lr, plan.shape.num_experts, plan.shape.topk) == (7, 1e-3, 64, 4)


@pytest.fixture(scope="module")
def parameters() -> dict[str, int]:
    """Preset -> parameters of the model, built with Megatron-Core on the meta device."""
    (counted,) = forked.run(1, _parameters)
    return counted


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count_of_the_shape_is_that_of_the_model(preset: str, parameters: dict[str, int]) -> None:
    assert parameters[preset] == PRESETS[preset].parameters()
    assert PRESETS[preset].parameters(active_only=True) < parameters[preset]


def _parameters() -> dict[str, int]:
    import torch

    from alflb_megatron.lab.training import build
    from tests.distributed import ranks

    counted = {}
    job = {"nproc": 1, "ep": 1, "global_batch_size": 8, "optimizer": "adam", "dtype": "fp32"}
    with ranks.model_parallel():
        for preset in PRESETS:
            plan = resolve({**job, "preset": preset}, {}, {})
            config = build.transformer_config(plan)
            config.perform_initialization = False
            with torch.device("meta"):
                model = build.gpt_model(plan, config)
            counted[preset] = sum(parameter.numel() for parameter in model.parameters())
    return counted


def test_the_1b_model_is_the_one_of_wang_et_al() -> None:
    """The figures of the appendix (arXiv 2408.15664), and the size its name says."""
    shape: ModelShape = PRESETS["deepseek-moe-1b"]
    assert (shape.vocab_size, shape.hidden_size, shape.num_heads) == (32064, 1024, 8)
    assert (shape.num_experts, shape.topk, shape.num_shared_experts) == (64, 6, 2)
    assert shape.num_layers - shape.num_dense_layers == 9
    assert shape.ffn_hidden_size * 3 == shape.moe_ffn_hidden_size * 16
    assert 0.95e9 < shape.parameters() < 1.1e9
