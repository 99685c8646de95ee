"""The Megatron-LM recipe: its arguments, the script it prints, what it refuses, and runs of each kind of checkout."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from alflb_megatron.lab.cli import main as alflb
from alflb_megatron.recipes import megatron_lm
from alflb_megatron.recipes.megatron_lm import Launch, main
from alflb_megatron.recipes.megatron_lm_arguments import arguments, recipe_of
from tests.hosts.launched import logged
from tests.recipes.text import SPLIT, corpus

CHECKOUT = os.environ.get("MEGATRON_LM_PATH", "")
needs_checkout = pytest.mark.skipif(
    not CHECKOUT or not Path(CHECKOUT, megatron_lm.SCRIPT).is_file(),
    reason="MEGATRON_LM_PATH names no Megatron-LM checkout",
)
TINY, ONE, THREE = "deepseek_moe_tiny_alflb", "deepseek_moe_1b_alflb", "deepseek_moe_3b_alflb"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def untouched(tmp_path: Path) -> Path:
    """As much of a checkout as is looked at before the start."""
    (tmp_path / "of lm").mkdir()
    (tmp_path / "of lm" / megatron_lm.SCRIPT).write_text("from gpt_builders import gpt_builder\n", encoding="utf-8")
    return tmp_path / "of lm"


@pytest.fixture
def patched(untouched: Path) -> Path:
    with (untouched / megatron_lm.SCRIPT).open("a", encoding="utf-8") as script:
        script.write(f"{megatron_lm.PATCHED} as alflb\n")
    return untouched


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], dict[str, str]]:
    """The words of the command that the printed script runs, and its variables, both as bash reads them."""
    assert main([*words[:1], "--dryrun", *words[1:]]) == 0
    script = capsys.readouterr().out
    shown = script.replace("\nexec torchrun", "\nprintf '%s\\0' torchrun") + "\nprintf '\\n'; env -0"
    done = subprocess.run(["bash", "-c", shown], env={"PATH": os.defpath}, capture_output=True, text=True, check=True)
    command, _, variables = done.stdout.partition("\0\n")
    return command.split("\0"), dict(v.split("=", 1) for v in variables.split("\0") if "=" in v)


def value(command: list[str], flag: str) -> str:
    """The value that argparse would take: the last."""
    return command[len(command) - command[::-1].index(flag)]


GPUS = ("--device", "cuda")


def test_an_untouched_checkout_is_served_by_spec(untouched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--rule", "sign", "--step-size", "0.002", "--no-alflb-centring", "--alflb-rule-options", ""]
    command, variables = printed(capsys, ONE, "--megatron-lm", str(untouched), *GPUS, *given)
    assert command[:5] == ["torchrun", "--standalone", "--nproc-per-node", "8", str(untouched / megatron_lm.SCRIPT)]
    spec = command.index("--spec")
    assert command[spec + 1 : spec + 3] == ["alflb_megatron.hosts.megatron_lm", "block_spec"]
    ours = {name: text for name, text in variables.items() if name.startswith("ALFLB_")}
    assert ours == {"ALFLB_RULE": "sign", "ALFLB_STEP_SIZE": "0.002", "ALFLB_CENTRING": "False"}
    assert variables["PYTHONPATH"] == str(untouched)
    assert not any(word.startswith("--alflb") for word in command)


def test_a_patched_one_by_flags(patched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--rule", "sign", "--step-size", "0.002", "--no-alflb-centring", "--alflb-log-layers"]
    command, variables = printed(capsys, ONE, "--megatron-lm", str(patched), *GPUS, *given)
    flags = command[command.index("--alflb-rule") :]
    assert flags == ["--alflb-rule", "sign", "--alflb-step-size", "0.002", "--no-alflb-centring", "--alflb-log-layers"]
    assert "--spec" not in command and not any(name.startswith("ALFLB_") for name in variables)


@pytest.mark.parametrize("rule", ["none", "builtin"])
def test_without_our_rules_nothing_of_ours_is_there(
    rule: str, untouched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, variables = printed(capsys, ONE, "--megatron-lm", str(untouched), *GPUS, "--rule", rule)
    assert not {"--spec", "--alflb-rule", "ALFLB_RULE"} & {*command, *variables}
    assert ("--moe-router-enable-expert-bias" in command) == (rule == "builtin")


def test_what_is_given_arrives(untouched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machines = ["--nodes", "4", "--gpus", "8", "--rendezvous", "head:29500", "--tp", "2", "--pp", "2"]
    data = ["--data", "/data/te, xt", "--tokenizer", "some/name", "--out", "/runs/a b"]
    training = ["--gate", "softmax", "--steps", "500", "--global-batch-size", "64", "--micro-batch-size", "1"]
    further = ["--", "--split", "99,1,0", "--lr", "2e-3"]
    command, _ = printed(
        capsys,
        THREE,
        "--megatron-lm",
        str(untouched),
        *GPUS,
        *machines,
        *data,
        *training,
        "--precision",
        "fp32",
        *further,
    )
    expected = {
        "--nnodes": "4",
        "--nproc-per-node": "8",
        "--rdzv-endpoint": "head:29500",
        "--tensor-model-parallel-size": "2",
        "--pipeline-model-parallel-size": "2",
        "--expert-model-parallel-size": "8",
        "--data-path": "/data/te, xt",
        "--tokenizer-model": "some/name",
        "--padded-vocab-size": "32064",
        "--save": "/runs/a b/checkpoints",
        "--moe-router-score-function": "softmax",
        "--train-iters": "500",
        "--lr-decay-iters": "500",
        "--lr-warmup-iters": "499",
        "--global-batch-size": "64",
        "--micro-batch-size": "1",
        "--split": "99,1,0",
        "--lr": "2e-3",
    }
    assert {flag: value(command, flag) for flag in expected} == expected
    assert "--sequence-parallel" in command and "--mock-data" not in command and "--bf16" not in command


def test_gpus_decide_layers_precision_and_the_default_split() -> None:
    for device, present, absent in (("cuda", "--bf16", "gloo"), ("cpu", "gloo", "--bf16")):
        words = arguments(recipe_of(ONE, Launch("DIR", device=device)))
        assert present in words and absent not in words
    for gpus, ep in ((1, "1"), (4, "4"), (6, "2"), (16, "8")):
        words = arguments(recipe_of(ONE, Launch("DIR", gpus=gpus, global_batch_size=1152, device="cuda")))
        assert value(words, "--expert-model-parallel-size") == ep


def test_the_learning_rate_of_the_3b_model_is_a_cosine() -> None:
    words = arguments(recipe_of(THREE, Launch("DIR", device="cuda")))
    flags = ("--lr-decay-style", "--lr", "--min-lr")
    assert [value(words, flag) for flag in flags] == ["cosine", "0.00078", "7.8e-05"]


def test_under_a_launcher_the_ranks_are_its_own(
    untouched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert recipe_of(THREE, Launch("DIR", device="cuda")).ranks == 16  # two machines that need no --rendezvous
    assert main([ONE, "--megatron-lm", str(untouched), *GPUS]) == 2
    assert "--gpus=8: times --nodes must be the launcher's 16 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["deepseek_moe_2b"], "recipe=deepseek_moe_2b: must be one of deepseek_moe_1b_alflb"),
        ([ONE, "--rule", "fast"], "--rule=fast: must be one of none, builtin, adaptive"),
        ([ONE, "--step-size", "-1"], "--step-size=-1.0: must be at least 0"),
        ([ONE, "--rule", "none", "--step-size", "1"], "--step-size=1.0: has no meaning with --rule none"),
        ([ONE, "--rule", "none", "--alflb-frozen"], "--alflb-frozen=True: has no meaning with --rule none"),
        ([ONE, "--rule", "builtin", "--gate", "softmax"], "--rule=builtin: needs --gate sigmoid"),
        ([ONE, "--gate", "relu"], "--gate=relu: must be one of sigmoid, softmax"),
        ([ONE, "--precision", "fp8"], "--precision=fp8: must be one of bf16, fp32"),
        ([ONE, "--ep", "6", "--gpus", "6"], "--num-experts=64: must be a multiple of --ep 6"),
        ([ONE, "--gpus", "6", "--ep", "4"], "--gpus=6: times --nodes, 6 ranks, must be a multiple of tp * pp * ep = 4"),
        ([ONE, "--tp", "3", "--gpus", "3", *GPUS], "--num-heads=8: must be a multiple of --tp 3"),
        ([ONE, "--pp", "4", *GPUS], "--num-layers=10: must be a multiple of --pp 4"),
        ([ONE, "--global-batch-size", "100"], "--global-batch-size=100: must be a multiple of micro-batch size"),
        ([ONE, "--tp", "2", "--device", "cpu"], "--tp=2: needs CUDA"),
        ([THREE], "--rendezvous=: 2 machines need a HOST:PORT"),
        ([ONE, "--data", "/nowhere/text"], "--data=/nowhere/text: needs the file /nowhere/text.bin"),
        ([ONE, "--megatron-lm", "/nowhere"], "--megatron-lm=/nowhere: must be a checkout of Megatron-LM"),
        ([ONE, "--megatron-lm", ""], "--megatron-lm=: needs the folder of a checkout"),
    ],
)
def test_what_cannot_work_ends_with_one_line(
    words: list[str], said: str, untouched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], "--megatron-lm", str(untouched), *words[1:]]) == 2
    assert capsys.readouterr().err.startswith(f"alflb: {said}")


def start(checkout: Path, folder: Path, *words: str) -> str:
    """Runs the tiny recipe, with a variable that must not reach it; what it printed."""
    folder.mkdir()
    command = [sys.executable, "-m", "alflb_megatron.recipes.megatron_lm", TINY, "--megatron-lm", str(checkout), *words]
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "ALFLB_STEP_SIZE": "wrong"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, shlex.join(command) + done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@needs_checkout
def test_it_trains_the_same_by_spec_and_with_the_patch(tmp_path: Path) -> None:
    """Two ranks that share the experts, real text, a softmax gate; a checkpoint from which the run goes on."""
    checkout, tree = Path(CHECKOUT).resolve(), tmp_path / "patched"
    tree.mkdir()
    for entry in checkout.iterdir():
        if entry.name != megatron_lm.SCRIPT:
            (tree / entry.name).symlink_to(entry)
    (tree / megatron_lm.SCRIPT).write_bytes((checkout / megatron_lm.SCRIPT).read_bytes())
    assert alflb(["patch", str(tree)]) == 0
    data, tokenizer = corpus(tmp_path)
    given = ["--rule", "sign", "--step-size", "0.01", "--gate", "softmax", "--gpus", "2", "--steps", "4"]
    given += ["--data", data, "--tokenizer", tokenizer, "--", "--split", SPLIT]
    runs = [start(checkout, tmp_path / "a", *given), start(tree, tmp_path / "b", "--out", "out dir", *given)]
    for key in ("lm loss", "MaxVio", "expert bias spread"):
        series = [logged(output, key) for output in runs]
        assert len(series[0]) == 4 and series[0] == series[1]
    assert (tmp_path / "b" / "out dir" / "checkpoints" / "iter_0000004").is_dir()
    assert "validation loss at iteration 4" in runs[0]
    assert "ALFLB" not in runs[1]


@needs_checkout
def test_a_rank_of_another_launcher(tmp_path: Path) -> None:
    """As `recipes/launch.py` starts it: torchrun outside, the recipe within."""
    words = ["-m", "alflb_megatron.recipes.megatron_lm", TINY, "--megatron-lm", CHECKOUT, "--gpus", "2", "--steps", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(launcher, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert len(logged(done.stdout, "MaxVio")) == 2
