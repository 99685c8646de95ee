"""Megatron-Bridge: its own `pretrain` trains, balances, saves and resumes what the recipes give it."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alflb_megatron.hosts import log
from alflb_megatron.hosts.cpu import trainers
from tests import forked
from tests.distributed import jobs
from tests.distributed import ranks as distributed_ranks
from tests.hosts.launched import free_port, logged, ranks, torchrun
from tests.hosts.saved import biases, same, tensors

# Looking for `megatron.bridge` itself would import `megatron`, which is a namespace: harmless.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="megatron-bridge is not installed (make hosts)"
)

RATE = "0.01"
VARIANTS = {
    "builtin": [
        "model.alflb=null",
        "model.moe_router_enable_expert_bias=true",
        f"model.moe_router_bias_update_rate={RATE}",
    ],
    "sign": ["model.alflb.rule=sign", f"model.alflb.step_size={RATE}", "model.alflb.centring=false"],
    "adaptive": ["model.alflb.rule=adaptive"],
}

Run = Callable[[str, int], tuple[str, Path]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a variant once for all tests: what was printed, and the folder of its checkpoints."""

    @functools.cache
    def once(variant: str, nproc: int) -> tuple[str, Path]:
        folder = tmp_path_factory.mktemp(f"{variant}-{nproc}")
        wandb = ["logger.wandb_project=alflb", "logger.wandb_exp_name=test", f"logger.wandb_save_dir={folder}"]
        start = torchrun if (variant, nproc) == ("sign", 2) else ranks
        words = [*VARIANTS[variant], *wandb * (variant == "adaptive")]
        return train(nproc, folder, *words, start=start), folder / "checkpoints"

    return once


def train(nproc: int, folder: Path, *overrides: str, start: Callable[..., str] = ranks) -> str:
    """20 steps of the tiny recipe through its launcher, saved every 10, metrics to TensorBoard."""
    return start(
        nproc,
        "-m",
        "alflb_megatron.recipes.bridge",
        "deepseek_moe_tiny_alflb",
        "train.train_iters=20",
        "checkpoint.save_interval=10",
        f"checkpoint.save={folder}/checkpoints",
        f"checkpoint.load={folder}/checkpoints",
        f"logger.tensorboard_dir={folder}/tensorboard",
        *overrides,
        folder=folder,
        WANDB_MODE="offline",
    )


@pytest.mark.parametrize("nproc", [1, 2])
def test_sign_gives_the_biases_of_the_built_in(run: Run, nproc: int) -> None:
    (theirs, built_in), (ours, sign) = run("builtin", nproc), run("sign", nproc)
    losses = logged(theirs, "lm loss")
    assert len(losses) == 20 and losses == logged(ours, "lm loss")
    expected, found = biases(built_in / "iter_0000020"), biases(sign / "iter_0000020")
    assert expected.keys() == found.keys() and len(found) == 3
    assert all(torch.equal(expected[name], found[name]) and expected[name].any() for name in expected)


@pytest.mark.parametrize("nproc", [1, 2])
def test_adaptive_balances_better_and_is_logged(run: Run, nproc: int) -> None:
    vio = {}
    for variant in VARIANTS:
        seen = [float(value) for value in logged(run(variant, nproc)[0], "MaxVio")]
        assert len(seen) == 20
        vio[variant] = sum(seen[-5:]) / 5
    assert vio["adaptive"] < 0.8 * vio["builtin"] and vio["sign"] == vio["builtin"]


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(run: Run, tmp_path: Path, nproc: int) -> None:
    output, uninterrupted = run("adaptive", nproc)
    half = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted / "iter_0000010", half / "iter_0000010")
    shutil.copy(half / "iter_0000010" / "train_state.pt", half / "latest_train_state.pt")
    (half / "latest_checkpointed_iteration.txt").write_text("10")
    rest = train(nproc, tmp_path, *VARIANTS["adaptive"])
    assert logged(rest, "lm loss") == logged(output, "lm loss")[10:]
    assert same(tensors(tmp_path / "checkpoints" / "iter_0000020"), tensors(uninterrupted / "iter_0000020"))


@pytest.mark.parametrize("nproc", [1, 2])
def test_off_is_what_bridge_does_without_this_package(run: Run, tmp_path: Path, nproc: int) -> None:
    output, off = run("builtin", nproc)
    config = str(off / "iter_0000020" / "run_config.yaml")
    plain = ranks(
        nproc, str(Path(__file__).with_name("bridge_plain.py")), config, str(tmp_path / "checkpoints"), folder=tmp_path
    )
    assert logged(plain, "lm loss") == logged(output, "lm loss") and "MaxVio" not in plain
    assert same(tensors(tmp_path / "checkpoints" / "iter_0000020"), tensors(off / "iter_0000020"))


# What is said without each of the substitutions that Bridge needs beside Megatron-Core's.
WITHOUT = {
    "devices": "model-parallel-rng is not added",
    "transformer_engine": "No module named 'transformer_engine'",
    "allow_no_cuda": "Megatron requires CUDA",
    "compile_helpers": "no makefile found",
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_it_bridge_fails(name: str, run: Run, tmp_path: Path) -> None:
    _, off = run("builtin", 1)
    config = str(off / "iter_0000020" / "run_config.yaml")
    plain = str(Path(__file__).with_name("bridge_plain.py"))
    with pytest.raises(AssertionError, match=WITHOUT[name]):
        start = torchrun if name == "transformer_engine" else ranks  # a fork has its name already
        start(1, plain, config, str(tmp_path / "checkpoints"), name, folder=tmp_path)


def test_every_substitution_is_left_out_here() -> None:
    assert set(WITHOUT) == {substitution.name for substitution in (*trainers.COMMON, *trainers.BRIDGE)}


def test_a_hugging_face_model_keeps_its_biases_both_ways(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("bridge_hf.py"))
    done = forked.python(script, str(tmp_path), str(free_port()), launched=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "biases kept: 2" in done.stdout
    unmapped = re.findall(r"No mapping found for megatron_param: (\S+)", done.stdout + done.stderr)
    assert any("local_experts" in name for name in unmapped)  # what Transformer Engine's layers call otherwise
    assert not any(".router." in name for name in unmapped)


def test_a_pipeline_whose_first_stage_is_dense(tmp_path: Path) -> None:
    stages = ["model.pipeline_model_parallel_size=2", "model.expert_model_parallel_size=1"]
    output = train(2, tmp_path, *stages, "model.moe_layer_freq=[0,0,1,1]", "train.train_iters=3")
    assert len(logged(output, "MaxVio")) == 3


KEYS = [
    name if name in log.LOG_LINE_KEYS else f"alflb/{name}"
    for name in log.DESCRIPTIONS
    if name not in log.WITHIN_BATCH_KEYS
]


def test_wandb_has_loads_and_maxvio(run: Run) -> None:
    _, checkpoints = run("adaptive", 2)
    (recorded,) = checkpoints.parent.glob("wandb/offline-run-*/*.wandb")
    history = recorded.read_bytes()
    assert all(history.count(key.encode()) >= 20 for key in KEYS)


def test_tensorboard_has_loads_and_maxvio(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, checkpoints = run("adaptive", 2)
    events = EventAccumulator(str(checkpoints.with_name("tensorboard")))
    events.Reload()
    for key in KEYS:
        assert len(events.Scalars(key)) == 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["deepseek_moe_2b"], "recipe=deepseek_moe_2b: must be one of deepseek_moe_1b_alflb"),
        (["deepseek_moe_tiny_alflb", "model.alflb.rule=fast"], "--alflb-rule=fast: must be one of adaptive"),
        (["deepseek_moe_tiny_alflb", "model.alflb.step=1"], "override=model.alflb.step=1: "),
        (["deepseek_moe_tiny_alflb", "+model.alflb.step=1"], r"override=\+model.alflb.step=1: Bridge ignores it"),
    ],
)
def test_a_wrong_word_ends_with_one_line(words: list[str], said: str) -> None:
    done = forked.python("-m", "alflb_megatron.recipes.bridge", *words, launched=False)
    assert done.returncode == 2
    assert re.match("alflb: " + said, done.stderr.splitlines()[-1]), done.stderr
    assert "recipes/bridge.py" not in done.stderr  # no traceback through us; Bridge 0.6 prints some of its own


def test_two_ranks_say_it_once_also_when_the_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failed:
        train(2, tmp_path, "model.moe_router_load_balancing_type=sinkhorn", start=torchrun)
    assert str(failed.value).count("alflb: --moe-router-load-balancing-type=sinkhorn: chooses experts by itself") == 1


def _watched_under_an_adapter() -> list[int]:
    """Tokens counted of Megatron-Core's router, by itself and under LoRA, each shown 64 of two experts."""
    import dataclasses

    trainers.prepare_bridge()
    try:
        from megatron.bridge.peft.lora_layers import LoRATopKRouter
    except ImportError:
        return []
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    from alflb_megatron.hosts.watch import watch_loads
    from alflb_megatron.lab.training import build

    with distributed_ranks.model_parallel():
        config = dataclasses.replace(build.transformer_config(jobs.plan({"rule": "builtin", "nproc": 1})))
        plain, adapted = (TopKRouter(config=config, pg_collection=get_default_pg_collection()) for _ in range(2))
        for number, router in enumerate((plain, adapted), 1):
            router.set_layer_number(number)
        adapter = torch.nn.Linear(config.hidden_size, config.num_moe_experts, bias=False)
        model = torch.nn.ModuleList([plain, LoRATopKRouter(adapted, adapter)])
        watch_loads([model])
        for module in model:
            module(torch.randn(32, 2, config.hidden_size))
        return [int(router.load_counter.tokens_per_expert.sum()) for router in (plain, adapted)]


def test_the_loads_of_a_router_under_an_adapter_are_watched() -> None:
    (counted,) = distributed_ranks.run(1, _watched_under_an_adapter)
    if not counted:
        pytest.skip("this Megatron-Bridge has no adapter of routers")
    assert counted == [128, 128]
