"""What the fuzz corpus grows from: every file that we read, written by the part that writes it in earnest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from alflb_megatron.lab.records.run_folder import RunFolder
from alflb_megatron.lab.replay.recording import Gating
from alflb_megatron.lab.replay.score_recorder import ScoreRecorder
from alflb_megatron.lab.tools.patch import SCRIPT, VERSION_FILE, patches
from alflb_megatron.lab.training.resolve import resolve
from tests import forked

ROOT = Path(__file__).parents[2]
SHAPE = {
    "hidden_size": 16, "num_heads": 2, "num_layers": 2, "num_experts": 4, "ffn_hidden_size": 16,
    "moe_ffn_hidden_size": 8, "seq_length": 16,
}  # fmt: skip
JOB = {"steps": 4, "nproc": 1, "ep": 1, "global_batch_size": 4, "micro_batch_size": 2, "validation_sequences": 4}


class _Router:
    """The one thing of a router that a `ScoreRecorder` needs."""

    def __init__(self) -> None:
        self.score_hooks: tuple[Any, ...] = ()


def scores(folder: Path) -> None:
    """`recording.safetensors`, `recording.npz` and the run folder `run` with two layers, two ranks, three steps."""
    generator = torch.Generator().manual_seed(0)
    stream_SLTE = torch.rand(4, 2, 16, 4, generator=generator)
    save_file({"scores": stream_SLTE, "topk": torch.tensor(2)}, folder / "recording.safetensors")
    np.savez(folder / "recording.npz", scores=stream_SLTE.numpy(), topk=np.int64(2))
    np.savez_compressed(folder / "packed.npz", scores=stream_SLTE.numpy().astype(np.float16), topk=np.int64(2))
    for rank in range(2):
        routers = {layer: _Router() for layer in (2, 3)}
        recorder = ScoreRecorder(folder / "run", routers, Gating(2, "sigmoid"), rank=rank, ranks=2, steps=3)
        for step in range(1, 4):
            for router in routers.values():
                for tap in router.score_hooks:
                    tap(torch.rand(8, 4, generator=generator))
            recorder.write(step)


def run_folder(folder: Path) -> None:
    """A run of six steps with config.json and metrics.jsonl."""
    plan = resolve({**JOB, "steps": 6, "rule": "sign", "out": str(folder)}, SHAPE, {})
    generator = torch.Generator().manual_seed(1)
    with RunFolder(folder) as run:
        settings = plan.as_dict()
        run.write_config(settings, settings["alflb"], {"router": "ours"}, {"total": 10, "active": 5})
        for step in range(1, 7):
            loads = torch.randint(0, 40, (1, 4), generator=generator).tolist()
            run.append({
                "step": step, "loss": 5.5 - step / 10, "lr": 1e-3, "grad_norm": None, "seconds": 0.25, "tokens": 64,
                "tokens_per_second": 256.0, "maxvio_mean": 0.5, "maxvio_max": 0.5, "bias_spread": 0.0, "layers": [2],
                "loads": loads, "bias": [[0.0, 0.25, -0.25, 0.0]],
            })  # fmt: skip


def indexed(folder: Path) -> None:
    """`tokens.bin` and `tokens.idx` of 40 sequences, by Megatron-Core's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(2)
    builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=np.uint8)
    for _ in range(40):
        builder.add_document(torch.from_numpy(random.integers(0, 256, 12)), [12])
    builder.finalize(str(folder / "tokens.idx"))


def texts(folder: Path) -> None:
    """A folder of text files in two languages, and a single one."""
    folder.mkdir()
    for number in range(5):
        (folder / f"part{number}.txt").write_text(f"Schöne Wörter und 言葉, number {number}.\n" * 8, encoding="utf-8")


def checkout(folder: Path) -> None:
    """What `alflb patch` reads of a Megatron-LM: the version, and a script made of a patch's own lines."""
    (folder / VERSION_FILE).parent.mkdir(parents=True)
    (folder / VERSION_FILE).write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\nPRE_RELEASE = ''\n", encoding="utf-8")
    patch = (patches() / "core_v0.16-0.17.patch").read_text(encoding="utf-8").splitlines()
    lines: list[str] = []
    for line in patch:
        if line.startswith("@@"):
            start = int(line.split()[1][1:].split(",")[0])
            lines += [f"# line {number}" for number in range(len(lines) + 1, start)]
        elif line.startswith((" ", "-")) and not line.startswith("---"):
            lines.append(line[1:])
    (folder / SCRIPT).write_text("\n".join(lines) + "\n", encoding="utf-8")


def checkpoint(folder: Path, optimizer: str = "adam") -> Path:
    """A run of `alflb train` with one real checkpoint; returns the checkpoint's folder."""
    flags = {**JOB, **SHAPE, "steps": 2, "optimizer": optimizer, "rule": "adaptive", "out": str(folder)}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = forked.alflb("train", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "checkpoints" / "step_00000002"


def all_of(folder: Path) -> Path:
    """Every seed below `folder`, each in the folder of its kind."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("scores", "indexed"):
        (folder / name).mkdir(parents=True)
    scores(folder / "scores")
    run_folder(folder / "run")
    indexed(folder / "indexed")
    texts(folder / "texts")
    checkout(folder / "checkout")
    checkpoint(folder / "trained")
    (folder / "done.json").write_text(json.dumps({}), encoding="utf-8")
    return folder
