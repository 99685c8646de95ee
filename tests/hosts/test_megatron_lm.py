"""Megatron-LM's own `pretrain_gpt.py`, run on a CPU by torchrun: by `--spec` as it is, and with the patch.

Needs a checkout of Megatron-LM; its version has to fit the Python that runs the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from alflb_megatron.hosts import log
from alflb_megatron.lab.cli import main
from alflb_megatron.lab.tools.patch import SCRIPT, identify_checkout
from tests.hosts import saved
from tests.hosts.launched import logged

CHECKOUT = os.environ.get("MEGATRON_LM_PATH", "")
REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not Path(CHECKOUT, SCRIPT).is_file() or not CHECKOUT, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)

STEPS = 20
SPEC = ("--spec", "alflb_megatron.hosts.megatron_lm", "block_spec")
BUILT_IN = ("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "1e-3")
SIGN = ("--alflb-rule", "sign", "--alflb-step-size", "1e-3", "--no-alflb-centring")
SIGN_BY_ENVIRONMENT = {"ALFLB_RULE": "sign", "ALFLB_STEP_SIZE": "1e-3", "ALFLB_CENTRING": "false"}
ADAPTIVE = ("--alflb-rule", "adaptive")

TINY = """
    --distributed-backend gloo --transformer-impl local --num-layers 4 --hidden-size 32 --ffn-hidden-size 64
    --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
    --lr 3e-3 --init-method-std 0.1 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 127 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --num-experts 8 --moe-ffn-hidden-size 16 --moe-router-topk 2
    --moe-layer-freq [0,1,1,1] --moe-router-score-function sigmoid --moe-router-load-balancing-type none
    --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --moe-shared-expert-intermediate-size 16
    --no-gradient-accumulation-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion --no-masked-softmax-fusion
    --no-rope-fusion --no-persist-layer-norm --attention-dropout 0 --hidden-dropout 0 --disable-jit-fuser
    --no-check-for-nan-in-loss-and-grad --log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 0
"""


@dataclass(frozen=True)
class Run:
    """What a run said and left."""

    code: int
    output: str
    folder: Path

    def series(self, name: str) -> list[str]:
        """The values of one entry of the log lines, as they were printed.

        The second line of a start is left out: Megatron-LM does not reset its sums after the first iteration of a
        start, so the second line is the mean of two.
        """
        printed = logged(self.output, name)
        return printed[:1] + printed[2:]

    def checkpoint(self, step: int = STEPS) -> dict[str, torch.Tensor]:
        """All tensors of a torch_dist checkpoint, by name."""
        return saved.tensors(self.folder / "checkpoints" / f"iter_{step:07d}")


def run(tree: Path, folder: Path, nproc: int, *flags: str, steps: int = STEPS, **environment: str) -> Run:
    """`pretrain_gpt.py` of `tree` on `nproc` ranks; raises nothing when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ALFLB_")}
    settings = {"PYTHONPATH": f"{tree}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    script = ["-m", "alflb_megatron.hosts.cpu", str(tree / SCRIPT), *TINY.split(), "--train-iters", str(steps), *flags]
    process = subprocess.Popen(
        [*launcher, *script],
        env={**kept, "CUDA_DEVICE_MAX_CONNECTIONS": "1", **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its ranks
        output = process.communicate()[0] + "\nkilled: it took too long"
    return Run(process.returncode, output, folder)


@pytest.fixture(scope="module")
def checkout() -> Path:
    return Path(CHECKOUT).resolve()


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """The checkout with the patch: links to all of it beside a `pretrain_gpt.py` of its own."""
    tree = tmp_path_factory.mktemp("patched")
    for entry in checkout.iterdir():
        if entry.name != SCRIPT:
            (tree / entry.name).symlink_to(entry)
    (tree / SCRIPT).write_bytes((checkout / SCRIPT).read_bytes())
    assert main(["patch", str(tree)]) == 0
    return tree


Trained = Callable[[str, int], Run]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, checkout: Path, patched: Path) -> Trained:
    """Runs by name and number of ranks, each made once."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def make(name: str, nproc: int) -> Run:
        place = folder / f"{name}-{nproc}"
        every = "10" if name == "adaptive" else str(STEPS)
        ranks = ("--expert-model-parallel-size", str(nproc), "--ckpt-format", "torch_dist", "--save-interval", every)
        common = (*ranks, "--save", str(place / "checkpoints"))
        # Megatron-LM's flag for its own bias beside ours moves nothing: at two ranks it is on.
        beside = BUILT_IN if nproc == 2 else ()
        if name == "resumed":
            (place / "half").mkdir(parents=True)
            half = make("adaptive", nproc).folder / "checkpoints" / "iter_0000010"
            (place / "half" / half.name).symlink_to(half)
            (place / "half" / "latest_checkpointed_iteration.txt").write_text("10")
            result = run(patched, place, nproc, *common, *ADAPTIVE, "--load", str(place / "half"))
        elif name == "spec":
            result = run(checkout, place, nproc, *common, *SPEC, **SIGN_BY_ENVIRONMENT)
        else:
            tree, flags = {
                "built-in": (checkout, BUILT_IN),
                "off": (patched, BUILT_IN),
                "sign": (patched, (*SIGN, *beside)),
                "adaptive": (patched, (*ADAPTIVE, "--tensorboard-dir", str(place / "tensorboard"))),
            }[name]
            result = run(tree, place, nproc, *common, *flags)
        assert result.code == 0, result.output[-6000:]
        return result

    return make


def of_megatron(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint without what only this package writes."""
    return {name: value for name, value in state.items() if ".router.alf_" not in name}


ranks = pytest.mark.parametrize("nproc", [1, 2])


@ranks
@pytest.mark.parametrize("way", ["spec", "sign"])
def test_sign_gives_the_biases_of_megatron_bit_for_bit(trained: Trained, way: str, nproc: int) -> None:
    theirs, ours = trained("built-in", nproc), trained(way, nproc)
    biases = {name: value for name, value in theirs.checkpoint().items() if "expert_bias" in name}
    assert len(biases) == 3 and all(bias.any() for bias in biases.values())
    assert len(ours.series("lm loss")) == STEPS - 1
    assert ours.series("lm loss") == theirs.series("lm loss")
    assert saved.same(of_megatron(ours.checkpoint()), theirs.checkpoint())


@ranks
def test_without_the_rule_a_patched_tree_is_as_it_was(trained: Trained, nproc: int) -> None:
    before, after = trained("built-in", nproc), trained("off", nproc)
    assert after.series("lm loss") == before.series("lm loss")
    assert saved.same(after.checkpoint(), before.checkpoint())
    assert "MaxVio" not in after.output
    assert re.search(r"alflb_rule \.* None\n", after.output)


@ranks
def test_adaptive_balances_better_than_sign(trained: Trained, nproc: int) -> None:
    last = {rule: [float(v) for v in trained(rule, nproc).series("MaxVio")][-5:] for rule in ("sign", "adaptive")}
    assert sum(last["adaptive"]) < 0.9 * sum(last["sign"])


def _from_step_11(series: list[str]) -> list[str]:
    return series[9:10] + series[11:]


@ranks
def test_a_resumed_run_ends_as_an_uninterrupted_one(trained: Trained, nproc: int) -> None:
    whole, resumed = trained("adaptive", nproc), trained("resumed", nproc)
    assert resumed.series("lm loss") == _from_step_11(whole.series("lm loss"))
    assert resumed.series("MaxVio") == _from_step_11(whole.series("MaxVio"))
    assert saved.same(resumed.checkpoint(), whole.checkpoint())


@ranks
def test_loads_stand_in_the_log_line_and_in_tensorboard(trained: Trained, nproc: int) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trained("adaptive", nproc)
    printed = run.series("MaxVio")
    assert len(printed) == STEPS - 1
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    written = [f"{event.value:.6E}" for event in events.Scalars("MaxVio")]
    assert written[:1] + written[2:] == printed
    keys = {
        name if name in log.LOG_LINE_KEYS else f"alflb/{name}"
        for name in log.DESCRIPTIONS
        if name not in log.WITHIN_BATCH_KEYS
    }
    assert keys <= set(events.Tags()["scalars"])
    assert len(keys) <= 24
    # 8 sequences of 64 tokens with 2 experts each over 8 experts.
    assert float(run.series("load max")[0]) == pytest.approx(128 * (1 + float(printed[0])), rel=1e-5)


INTERLEAVED = ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")
WITH_MTP = ("--mtp-num-layers", "1")


def _version(tree: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in identify_checkout(tree).version.split(".")[:2])


def _mtp(tree: Path) -> tuple[str, ...]:
    """MTP where it runs without Transformer Engine: in 0.20 it asks for types that only Transformer Engine defines."""
    return WITH_MTP if _version(tree) < (0, 20) else ()


def test_interleaved_pipelines_and_mtp_work_with_the_patch(patched: Path, tmp_path: Path) -> None:
    piped = run(patched, tmp_path, 2, *INTERLEAVED, *_mtp(patched), *ADAPTIVE, steps=4)
    assert piped.code == 0, piped.output[-6000:]
    assert len(piped.series("MaxVio")) == 3
    assert len(set(piped.series("expert bias spread"))) == 3


def test_an_interleaved_pipeline_by_spec_works_from_019_on(checkout: Path, tmp_path: Path) -> None:
    from_019_on = _version(checkout) >= (0, 19)
    result = run(checkout, tmp_path, 2, *INTERLEAVED, *(_mtp(checkout) if from_019_on else ()), *SPEC, steps=3)
    if from_019_on:  # the object may be a function there, which is called for each chunk
        assert result.code == 0, result.output[-6000:]
        assert len(result.series("MaxVio")) == 2
    else:
        assert result.code != 0
        assert len(re.findall(rf"^alflb: {INTERLEAVED[-2]}=1: .*alflb patch DIR", result.output, re.MULTILINE)) == 1
        assert "SettingError" not in result.output  # no traceback of a rank's; the launcher prints one of its own


def test_a_pipeline_by_spec(checkout: Path, tmp_path: Path) -> None:
    """The first stage holds dense layers alone."""
    layers = ("--moe-layer-freq", "[0,0,1,1]", "--pipeline-model-parallel-size", "2")
    result = run(checkout, tmp_path, 2, *layers, *SPEC, steps=3, ALFLB_RULE="sign")
    assert result.code == 0, result.output[-6000:]
    assert len(result.series("MaxVio")) == 2


def test_what_cannot_work_ends_with_one_line(patched: Path, tmp_path: Path) -> None:
    result = run(patched, tmp_path, 1, "--alflb-step-size", "0.1", steps=1)
    assert result.code != 0
    assert result.output.count("alflb: --alflb-step-size=0.1: has no effect without --alflb-rule\n") == 1
    assert "SettingError" not in result.output


def test_the_flags_stand_in_help_and_in_the_log_of_arguments(patched: Path, trained: Trained, tmp_path: Path) -> None:
    helped = run(patched, tmp_path, 1, "--help")
    if _version(patched) >= (0, 20):  # its own help fails, on a text that is not ours
        assert "unsupported format character" in helped.output
    else:
        assert helped.code == 0
        for flag in ("--alflb-rule", "--alflb-step-size", "--alflb-centring", "--alflb-score-unit"):
            assert flag in helped.output
    output = trained("sign", 1).output
    assert re.search(r"alflb_rule \.* sign\n", output) and re.search(r"alflb_step_size \.* 1e-3\n", output)
    assert re.search(r"alflb_centring \.* False\n", output) and re.search(r"alflb_score_unit \.* score\n", output)
