"""How each kind of file is damaged and read: one function a kind, `read(random, seeds, folder)`.

Each copies its seed into the empty `folder`, damages it, and reads it as the command line does. What it raises is
judged by `worker.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.lab import cli
from alflb_megatron.lab.data import open_data
from alflb_megatron.lab.records.files import read_json
from alflb_megatron.lab.records.metrics_file import read_metrics
from alflb_megatron.lab.records.run_folder import RunFolder, is_run_folder
from alflb_megatron.lab.records.summary import summarise
from alflb_megatron.lab.training.command import plan_of
from alflb_megatron.settings import from_mapping, given_environment
from tests.fuzz import mutate
from tests.fuzz.mutate import Random

Read = Callable[[Random, Path, Path], Any]
KINDS: dict[str, tuple[int, Read]] = {}
"""Name -> cases of the long form, and how one is read."""


def kind(cases: int) -> Callable[[Read], Read]:
    def add(read: Read) -> Read:
        KINDS[read.__name__] = (cases, read)
        return read

    return add


def _damage(random: Random, path: Path, how: Callable[[Random, bytes], bytes] = mutate.damaged) -> Path:
    data = path.read_bytes()
    if not mutate.place(random, path):
        path.write_bytes(how(random, data))
    return path


def _replay(random: Random, path: Path) -> int:
    extra = random.choice(([], [], ["--topk", "2"]))
    return cli.main(["replay", str(path), "--rules", "sign", "--no-hindsight", *extra])


@kind(1500)
def safetensors(random: Random, seeds: Path, folder: Path) -> int:
    path = shutil.copy(seeds / "scores" / "recording.safetensors", folder)
    return _replay(random, _damage(random, Path(path)))


@kind(1800)
def npz(random: Random, seeds: Path, folder: Path) -> int:
    name = random.choice(("recording.npz", "packed.npz"))
    return _replay(random, _damage(random, Path(shutil.copy(seeds / "scores" / name, folder))))


@kind(1000)
def scores_run(random: Random, seeds: Path, folder: Path) -> int:
    run = folder / "run"
    shutil.copytree(seeds / "scores" / "run", run)
    files = sorted((run / "scores").iterdir())
    for path in random.sample(files, random.choice((1, 1, 2))):
        what = random.random()
        if what < 0.7:
            _damage(random, path)
        elif what < 0.8:
            path.unlink()
        else:
            step, rank = random.choice((0, 2, 5, 99999999)), random.choice((0, 1, 2, 99999))
            os.replace(path, path.with_name(f"step_{step:08d}.rank_{rank:05d}.safetensors"))
    return _replay(random, run)


@kind(1400)
def config(random: Random, seeds: Path, folder: Path) -> Any:
    run = folder / "run"
    shutil.copytree(seeds / "run", run)
    _damage(random, run / "config.json", mutate.json_text)
    is_run_folder(run)
    words = random.choice(([], ["--steps", "9"], ["--rule", "quantile"], ["--nproc", "2"]))
    return plan_of(cli.parse(["train", "--resume", "--out", str(run), *words]))


@kind(1400)
def metrics(random: Random, seeds: Path, folder: Path) -> Any:
    run = folder / "run"
    shutil.copytree(seeds / "run", run)
    _damage(random, run / "metrics.jsonl", mutate.json_lines)
    if random.random() < 0.5:
        try:
            return summarise(read_metrics(run))
        except OSError as error:  # as documented
            raise ValueError(str(error)) from error
    with RunFolder(run, resume_step=random.choice((3, 6))) as resumed:
        return summarise(resumed.records()) if resumed.metrics.stat().st_size else None


@kind(300)
def summary(random: Random, seeds: Path, folder: Path) -> Any:
    path = folder / "summary.json"
    path.write_bytes((seeds / "trained" / "summary.json").read_bytes())
    try:
        return read_json(_damage(random, path, mutate.json_text))
    except OSError as error:  # as documented
        raise ValueError(str(error)) from error


@kind(500)
def job(random: Random, seeds: Path, folder: Path) -> Any:
    from alflb_megatron.lab.training import checkpoint

    found = folder / "checkpoints" / "step_00000002"
    shutil.copytree(seeds / "trained" / "checkpoints" / found.name, found)
    _damage(random, found / random.choice(("job.json", "job.json", "metadata.json")), mutate.json_text)
    return checkpoint.find(folder, "--resume")


@kind(700)
def checkpoint(random: Random, seeds: Path, folder: Path) -> Any:
    """The pickles and tensors of a checkpoint, up to the state of a real model and optimizer where they pass."""
    from alflb_megatron.lab.training import checkpoint as module
    from tests.fuzz import loading_model

    shutil.copytree(seeds / "trained" / "checkpoints" / "step_00000002", folder / "step_00000002")
    found = folder / "step_00000002"
    names = [
        ".metadata",
        ".metadata",
        *sorted(path.name for path in found.iterdir() if path.suffix in (".pt", ".distcp")),
    ]
    _damage(random, found / random.choice(names))
    saved = module.find(found, "--load")
    plan, model = loading_model.plan_and_model()
    return module.load(model, plan, saved, weights_only=random.random() < 0.3)


@kind(500)
def indexed(random: Random, seeds: Path, folder: Path) -> Any:
    shutil.copytree(seeds / "indexed", folder / "data")
    prefix = folder / "data" / "tokens"
    if random.random() < 0.2:  # the index that Megatron-Core made of it
        open_data(str(prefix), seq_length=8, vocab_size=256, seed=1)
        _damage(random, random.choice(sorted(prefix.rglob("*.npy"))))
    else:
        _damage(random, prefix.with_name(random.choice(("tokens.idx", "tokens.idx", "tokens.idx", "tokens.bin"))))
    training, validation = open_data(str(prefix), seq_length=8, vocab_size=256, seed=1)
    return [training.sample(index) for index in range(len(training) + 3)], validation.sample(0)


@kind(400)
def text(random: Random, seeds: Path, folder: Path) -> Any:
    shutil.copytree(seeds / "texts", folder / "texts")
    files = sorted((folder / "texts").iterdir())
    for path in random.sample(files, random.choice((1, 3))):
        _damage(random, path)
    if random.random() < 0.2:
        (folder / "texts" / os.fsdecode(random.randbytes(8).replace(b"/", b"").replace(b"\0", b""))).write_text("words")
    source = random.choice((folder / "texts", files[0]))
    training, _ = open_data(str(source), seq_length=8, vocab_size=256, seed=1)
    return training.sample(len(training) - 1)


def _value(random: Random) -> str:
    value = random.choice(
        (*mutate.VALUES, *mutate.NUMBERS, "none", "true", "[" * 5000, "9" * 5000, "0.5", "-3", "1e400")
    )
    return str(value).replace("\0", "0") if not isinstance(value, int) or abs(value) < 10**300 else "1" + "0" * 400


@kind(1200)
def flags(random: Random, seeds: Path, folder: Path) -> Any:
    """`alflb train` with wrong values, up to where the ranks would be started; `alflb replay` as a whole."""
    if random.random() < 0.2:
        path = str(random.choice((seeds / "scores" / "recording.npz", folder, _value(random) or "x")))
        name, value = random.choice((("--topk", None), ("--rules", None), ("--json", None), ("--nonsense", None)))
        return cli.main(["replay", "--no-hindsight", f"{name}={value or _value(random)}", "--", path])
    known = [
        "--alflb-step-size", "--alflb-rule-options", "--alflb-score-unit", "--alflb-log-every", "--rule",
        "--steps", "--lr",
        "--topk", "--num-experts", "--num-groups", "--group-topk", "--seq-length", "--ep", "--tp", "--pp", "--vpp",
        "--etp",
        "--nproc", "--seed", "--data", "--tokenizer", "--out", "--preset", "--gate", "--hidden-size", "--num-layers",
        "--micro-batch-size", "--global-batch-size", "--capacity-factor", "--router-dtype", "--save-every",
    ]  # fmt: skip
    words = []
    for name in random.sample(known, random.choice((1, 1, 2, 3))):
        value = _value(random)
        if name == "--alflb-rule-options":
            value = ",".join(f"{random.choice(('step_size', 'ema', 'against', 'x', ''))}={value}" for _ in range(2))
        words.append(f"{name}={value}")
    return plan_of(cli.parse(["train", *words]))


@kind(400)
def environment(random: Random, seeds: Path, folder: Path) -> Any:
    names = ["RULE", "STEP_SIZE", "RULE_OPTIONS", "SCORE_UNIT", "CENTRING", "FROZEN", "LOG_EVERY", "NONSENSE", ""]
    given = {f"ALFLB_{name}": _value(random) for name in random.sample(names, random.choice((1, 2)))}
    return from_mapping(ALFConfig, given_environment(given, ALFConfig, PREFIX), PREFIX)


@kind(500)
def patch(random: Random, seeds: Path, folder: Path) -> int:
    tree = folder / "tree"
    shutil.copytree(seeds / "checkout", tree)
    _damage(random, tree / random.choice(("pretrain_gpt.py", "megatron/core/package_info.py")))
    return cli.main(["patch", str(tree), *random.choice(([], ["--check"], ["--revert"]))])
