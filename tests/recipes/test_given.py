"""What the Bridge and NeMo recipes are given: rule, u, gate, data, tokenizer, split, GPUs, precision; and real text."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts.launched import logged, torchrun
from tests.recipes.text import SPLIT, corpus

needs_bridge = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="megatron-bridge is not installed (make hosts)"
)
needs_nemo = pytest.mark.skipif(
    importlib.util.find_spec("nemo") is None or importlib.util.find_spec("nemo_run") is None,
    reason="NeMo 2 (nemo-toolkit 2.7.x and nemo-run) is not installed here",
)

BRIDGE = r"""
import torch
from alflb_megatron.recipes.bridge import recipe_config
from alflb_megatron.settings import SettingError

def holds(word, **expected):
    cfg = recipe_config("deepseek_moe_1b_alflb", word.split(";"))
    for path, value in expected.items():
        found = cfg
        for name in path.split("__"):
            found = getattr(found, name)
        assert found == value and type(found) is type(value), (word, path, found)

holds("rule=sign;step_size=0.002", model__alflb__rule="sign", model__alflb__step_size=0.002)
holds("model.alflb=null", model__alflb=None)
holds("gate=softmax", model__moe_router_score_function="softmax")
holds("data=/te, xt's \\ {a}", dataset__blend=[["/te, xt's \\ {a}"], None])
holds("dataset.blend=[[/a,/b],[0.3,0.7]]", dataset__blend=[["/a", "/b"], [0.3, 0.7]])
holds("tokenizer=/to, ken", tokenizer__tokenizer_type="HuggingFaceTokenizer", tokenizer__tokenizer_model="/to, ken")
holds("tp=2", model__tensor_model_parallel_size=2, model__sequence_parallel=True)
holds("tp=1", model__tensor_model_parallel_size=1, model__sequence_parallel=False)
holds("pp=5;ep=4", model__pipeline_model_parallel_size=5, model__expert_model_parallel_size=4)
holds("steps=9;global_batch_size=16", train__train_iters=9, train__global_batch_size=16)
holds("micro_batch_size=2", train__micro_batch_size=2)
holds("seq_length=128", model__seq_length=128, dataset__sequence_length=128)
holds("precision=bf16", mixed_precision="bf16_mixed", model__pipeline_dtype=torch.bfloat16)
holds("precision=bf16;precision=fp32", mixed_precision=None, model__params_dtype=torch.float32,
      model__pipeline_dtype=torch.float32, model__bf16=False, optimizer__bf16=False)
for word in ("gate=relu", "precision=fp8", "step=1", "+rule=sign"):
    try:
        recipe_config("deepseek_moe_1b_alflb", [word])
    except SettingError as error:
        assert word.split("=")[0].strip("+") in str(error)
    else:
        raise AssertionError(word)
print("held")
"""

NEMO = r"""
import torch
from alflb_megatron.recipes import nemo
from alflb_megatron.settings import SettingError

given = dict(rule="sign", step_size=0.002, gate="softmax", data="/te, xt", tokenizer="some/name")
split = dict(num_nodes=4, num_gpus_per_node=8, tensor_parallel=2, pipeline_parallel=2, expert_parallel=4)
recipe = nemo.deepseek_moe_3b_alflb(**given, **split, precision="fp32")
alflb, trainer = recipe.trainer.callbacks[0], recipe.trainer
assert (alflb.rule, alflb.step_size, recipe.model.config.moe_router_score_function) == ("sign", 0.002, "softmax")
assert recipe.data.paths == "/te, xt" and recipe.data.tokenizer.pretrained_model_name == "some/name"
assert (trainer.num_nodes, trainer.devices) == (4, 8)
strategy = trainer.strategy
assert (strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size) == (2, 2)
assert (strategy.expert_model_parallel_size, strategy.sequence_parallel) == (4, True)
assert trainer.plugins is None and strategy.pipeline_dtype is torch.float32 and not recipe.optim.config.bf16
recipe = nemo.deepseek_moe_1b_alflb()
assert recipe.trainer.plugins.precision == "bf16-mixed" and recipe.optim.config.bf16
assert recipe.trainer.strategy.pipeline_dtype is torch.bfloat16
assert recipe.data.tokenizer.size == 32064
try:
    nemo.deepseek_moe_1b_alflb(precision="fp8")
except SettingError as error:
    assert "precision=fp8: must be one of bf16, fp32" in str(error)
else:
    raise AssertionError
print("held")
"""


@pytest.mark.parametrize(
    "program", [pytest.param(BRIDGE, marks=needs_bridge, id="bridge"), pytest.param(NEMO, marks=needs_nemo, id="nemo")]
)
def test_what_is_given_arrives(program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.endswith("held\n"), done.stderr[-4000:]


SMALL = {"global_batch_size": 4, "seq_length": 128}


@needs_bridge
def test_bridge_trains_on_real_text(tmp_path: Path) -> None:
    data, tokenizer = corpus(tmp_path)
    words = ["gate=softmax", "steps=3", f"data={data}", f"tokenizer={tokenizer}", f"dataset.split='{SPLIT}'"]
    words += [f"{name}={value}" for name, value in SMALL.items()]
    recipe = ["-m", "alflb_megatron.recipes.bridge", "deepseek_moe_tiny_alflb"]
    output = torchrun(1, *recipe, *words, "checkpoint.save=null", "checkpoint.load=null", folder=tmp_path)
    assert len(logged(output, "MaxVio")) == 3


@needs_nemo
def test_nemo_trains_on_real_text_in_bf16(tmp_path: Path) -> None:
    data, tokenizer = corpus(tmp_path)
    for name in (data, tokenizer):  # nemo_run's command line takes no comma within an argument
        for path in tmp_path.glob(Path(name).name + "*"):
            path.rename(path.with_name(path.name.replace(", ", "-")))
    data, tokenizer = data.replace(", ", "-"), tokenizer.replace(", ", "-")
    given = {"dir": str(tmp_path), "gate": "softmax", "data": data, "tokenizer": tokenizer, "precision": "bf16"}
    factory = ", ".join(f"{name}={value!r}" for name, value in {**given, **SMALL, "max_steps": 3}.items())
    nemo = [str(Path(sys.executable).with_name("nemo")), "llm", "pretrain", "--yes"]
    command = [*nemo, "--factory", f"deepseek_moe_tiny_alflb({factory})", "trainer.enable_checkpointing=False"]
    env = {**os.environ, "NEMORUN_HOME": str(tmp_path / "nemorun"), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [*command, "log.ckpt=None"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    assert "`max_steps=3` reached" in done.stdout + done.stderr and "alflb/MaxVio" in done.stdout + done.stderr
