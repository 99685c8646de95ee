"""NeMo 2 itself, `llm.train` and `nemo llm pretrain`, on gloo: parity with its own bias, balance, resume, overrides."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alflb_megatron.hosts import log
from tests.hosts.launched import free_port
from tests.hosts.launched import ranks as ranks_of

NEMO = importlib.util.find_spec("nemo") is not None and importlib.util.find_spec("nemo_run") is not None
needs_nemo = pytest.mark.skipif(not NEMO, reason="NeMo 2 (nemo-toolkit 2.7.x and nemo-run) is not installed here")

STEPS = 20
SIGN = {"rule": "sign", "step_size": 1e-3, "centring": False}


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Runs a command in `folder`; returns what it printed, and fails the test with it where the command failed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NEMORUN_HOME": str(folder / "nemorun"), **environment}
    with open(folder / "printed.txt", "w", encoding="utf-8") as printed:
        done = subprocess.run(command, cwd=folder, env=env, stdout=printed, stderr=subprocess.STDOUT, timeout=600)
    text = (folder / "printed.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, text[-6000:]
    return text


def train(folder: Path, ranks: int, jobs: dict[str, dict[str, Any]]) -> None:
    """Runs the jobs one after the other, each in its own folder below `folder`."""
    for name, job in jobs.items():
        (folder / name).mkdir()
        job.update(folder=str(folder / name), ep=ranks, port=free_port())
        job.setdefault("steps", STEPS)
    printed = ranks_of(ranks, "-m", "tests.hosts.nemo_job", json.dumps(list(jobs.values())), folder=folder)
    (folder / "printed.txt").write_text(printed, encoding="utf-8")


def parity(folder: Path) -> dict[str, dict[str, Any]]:
    """NeMo alone, with our package imported, with the callback, that run resumed from its checkpoint, and adaptive."""
    checkpoint = str(folder / "sign" / "run" / "*" / "checkpoints" / "step=9")
    return {
        "alone": {"builtin": 1e-3},
        "imported": {"builtin": 1e-3, "imported": True},
        "sign": {"callback": dict(SIGN), "save": True},
        "resumed": {"callback": dict(SIGN), "resume": checkpoint},
        "adaptive": {"callback": {"rule": "adaptive"}},
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, and the callback added too late."""
    folder = tmp_path_factory.mktemp("one")
    train(
        folder,
        1,
        {
            **parity(folder),
            "late": {"callback": dict(SIGN), "late": True, "fails": True, "steps": 1},
        },
    )
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that share the experts."""
    folder = tmp_path_factory.mktemp("two")
    train(folder, 2, parity(folder))
    return folder


def metric(folder: Path, name: str) -> list[str]:
    """A metric of each step, as Lightning's CSV logger wrote it: all digits."""
    return [row[name] for row in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))]


def assert_same_end(first: Path, second: Path) -> None:
    ends = [torch.load(folder / "end.pt") for folder in (first, second)]
    for kind in ("biases", "weights"):
        assert ends[0][kind].keys() == ends[1][kind].keys()
        assert [name for name, value in ends[0][kind].items() if not torch.equal(value, ends[1][kind][name])] == []
    assert all(bias.abs().max() > 0 for bias in ends[0]["biases"].values())
    assert len(ends[0]["biases"]) == 2


@pytest.fixture(params=["one", "two"])
def folder(request: pytest.FixtureRequest) -> Path:
    """What the runs left, at one rank and at two."""
    return request.getfixturevalue(request.param)


@needs_nemo
def test_sign_is_the_builtin_bit_for_bit(folder: Path) -> None:
    assert_same_end(folder / "alone", folder / "sign")
    losses = metric(folder / "alone", "reduced_train_loss")
    assert len(losses) == STEPS
    assert metric(folder / "sign", "reduced_train_loss") == losses


@needs_nemo
def test_imported_and_unused_it_changes_nothing(folder: Path) -> None:
    assert_same_end(folder / "alone", folder / "imported")
    assert metric(folder / "alone", "reduced_train_loss") == metric(folder / "imported", "reduced_train_loss")


@needs_nemo
def test_added_after_the_model_was_built_it_stops_the_run(one: Path) -> None:
    assert "ALFLB was added after the model was built" in (one / "late" / "error.txt").read_text(encoding="utf-8")


@needs_nemo
def test_adaptive_balances_better_than_sign(folder: Path) -> None:
    last = {rule: [float(vio) for vio in metric(folder / rule, "alflb/MaxVio")[-5:]] for rule in ("sign", "adaptive")}
    assert sum(last["adaptive"]) < 0.8 * sum(last["sign"]), last


@needs_nemo
def test_resumed_it_ends_where_the_uninterrupted_run_ends(folder: Path) -> None:
    assert_same_end(folder / "sign", folder / "resumed")
    for name in ("reduced_train_loss", "alflb/MaxVio", "consumed_samples"):
        resumed = metric(folder / "resumed", name)
        assert len(resumed) == STEPS // 2
        assert metric(folder / "sign", name)[STEPS // 2 :] == resumed


@needs_nemo
def test_metrics_reach_lightnings_loggers(folder: Path) -> None:
    for name in log.DESCRIPTIONS.keys() - set(log.WITHIN_BATCH_KEYS):
        values = [float(value) for value in metric(folder / "adaptive", f"alflb/{name}")]
        assert len(values) == STEPS
        may_be_zero = name in ("dead experts", "starved experts", "updates refused", "disagreements", "load min")
        assert may_be_zero or max(values) > 0, name


UNITS = """
import sys
from alflb_megatron.hosts import nemo
from alflb_megatron.hosts.core import RouterBuilder
from alflb_megatron.settings import SettingError
from megatron.core import optimizer
from megatron.core.models.gpt import gpt_layer_specs
from nemo.collections import llm
from nemo.lightning import io
from alflb_megatron.recipes import nemo as recipes

def refused(call, text):
    try:
        call()
    except SettingError as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)

import inspect
from alflb_megatron.config import ALFConfig
from alflb_megatron.settings import knobs
ours = inspect.signature(nemo.ALFLB).parameters
assert {name: ours[name].default for name in ours} == {field.name: field.default for field, *_ in knobs(ALFConfig)}

refused(lambda: nemo.ALFLB(rule="bogus"), "--alflb-rule=bogus")
refused(lambda: recipes.deepseek_moe_1b_alflb(rule="bogus"), "--alflb-rule=bogus")
refused(lambda: recipes.deepseek_moe_1b_alflb(gate="relu"), "gate=relu")

class Module:
    config = llm.GPTConfig(num_layers=2, hidden_size=8, num_attention_heads=1)

refused(lambda: nemo.ALFLB().setup(None, Module(), "fit"), "num_moe_experts=None")

nemo.accept_removed_optimizer_arguments()
refused(lambda: optimizer.get_megatron_optimizer(None, [], lr_mult=2.0), "lr_mult=2.0")

# Every form of a layer spec, and NeMo's MTP layers, which it derives from the same function.
layer = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False)
config = llm.GPTConfig(num_layers=2, hidden_size=8, num_attention_heads=1, num_moe_experts=8, mtp_num_layers=1)
alf = nemo.ALFLB(rule="sign").alf
for spec in (layer, lambda config: layer, lambda config, vp_stage=None: layer):
    ours = nemo.layer_spec(config, 0, spec=spec, alf=alf)
    assert isinstance(ours.submodules.mlp.submodules.router, RouterBuilder)
    assert not isinstance(layer.submodules.mlp.submodules.router, RouterBuilder)
import functools
import torch.distributed
from megatron.core import parallel_state
from nemo.collections.llm.gpt.model.base import mtp_block_spec
config.transformer_layer_spec = functools.partial(nemo.layer_spec, spec=layer, alf=alf)
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
parallel_state.initialize_model_parallel()
assert "RouterBuilder" in repr(mtp_block_spec(config, vp_stage=None))

# A checkpoint's context builds a model that routes by the bias.
model = io.load_context(sys.argv[1], subpath="model")
assert model.config.transformer_layer_spec.func is nemo.layer_spec
assert model.config.transformer_layer_spec.keywords["alf"].rule == "sign"
"""


@needs_nemo
def test_refusals_layer_specs_and_contexts(two: Path, tmp_path: Path) -> None:
    (context,) = (two / "sign").glob("run/*/checkpoints/step=9/context")
    (tmp_path / "units.py").write_text(UNITS, encoding="utf-8")
    run([sys.executable, "units.py", str(context)], tmp_path)


def test_nemo_3_is_named(tmp_path: Path) -> None:
    (tmp_path / "nemo" / "collections" / "asr").mkdir(parents=True)
    for package in ("nemo", "nemo/collections", "nemo/collections/asr"):
        (tmp_path / package / "__init__.py").touch()
    program = "import sys; sys.path.insert(0, '.'); import alflb_megatron.hosts.nemo"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert "ImportError: this nemo-toolkit has no nemo.collections.llm" in done.stderr
    assert "Megatron-Bridge" in done.stderr


NEMO_COMMAND = [str(Path(sys.executable).with_name("nemo")), "llm", "pretrain", "--factory"]


@needs_nemo
def test_the_command_line_shows_a_recipe(tmp_path: Path) -> None:
    shown = run([*NEMO_COMMAND, "deepseek_moe_1b_alflb(rule='sign', step_size=0.002)", "--dryrun"], tmp_path)
    for text in ("ALFLB(rule='sign', step_size=0.002)", "num_moe_experts=64", "max_steps=40000", "Tokens(size=32064)"):
        assert text in shown


@needs_nemo
def test_overrides_of_the_command_line_are_run(tmp_path: Path) -> None:
    recipe = f"deepseek_moe_tiny_alflb(dir='{tmp_path}', rule='sign')"
    overrides = ["trainer.max_steps=2", "data.global_batch_size=4", "trainer.callbacks[0].step_size=0.25"]
    printed = run([*NEMO_COMMAND, recipe, "--yes", *overrides], tmp_path, TORCHDYNAMO_DISABLE="1")
    assert "`max_steps=2` reached" in printed
    assert "global_batch_size: 4 | global_step: 1" in printed
    assert "alflb/MaxVio" in printed


@needs_nemo
def test_without_its_environment_a_machine_without_cuda_is_told(tmp_path: Path) -> None:
    program = "import megatron.core, alflb_megatron.hosts.nemo as host; host.ALFLB().setup(None, None, 'fit')"
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert "set TORCHDYNAMO_DISABLE=1 in the environment" in done.stderr
