"""Whether two training runs are one: every file of theirs that says how training went, bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TIMES = ("seconds", "tokens_per_second", "seconds_per_step")
"""What depends on the clock alone."""


def differences(mine: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Places where two structures of tensors, numbers and containers differ; types and bits have to be equal."""
    if isinstance(mine, torch.Tensor) or isinstance(theirs, torch.Tensor):
        if not (isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor)):
            yield f"{where}: {type(mine).__name__} and {type(theirs).__name__}"
        elif mine.dtype != theirs.dtype or mine.shape != theirs.shape or _bits(mine) != _bits(theirs):
            yield f"{where}: tensors differ"
    elif type(mine) is not type(theirs):
        yield f"{where}: {type(mine).__name__} and {type(theirs).__name__}"
    elif isinstance(mine, dict):
        for key in sorted(mine.keys() ^ theirs.keys(), key=str):
            yield f"{where}.{key}: in one of them only"
        for key in mine.keys() & theirs.keys():
            yield from differences(mine[key], theirs[key], f"{where}.{key}")
    elif isinstance(mine, list | tuple):
        if len(mine) != len(theirs):
            yield f"{where}: {len(mine)} and {len(theirs)} entries"
        for index, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            yield from differences(a, b, f"{where}[{index}]")
    elif mine != theirs and not (mine != mine and theirs != theirs):
        yield f"{where}: {mine!r} and {theirs!r}"


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def content(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint folder holds, by name: weights, optimizer, biases and rule state, random state, job.json.

    Tensors are put together from all ranks' files, without a process group.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found: dict[str, Any] = {}
    reader, planner = FileSystemReader(checkpoint), _EmptyStateDictLoadPlanner()
    _load_state_dict(found, storage_reader=reader, planner=planner, no_dist=True)
    for name, value in found.items():
        if isinstance(value, io.BytesIO):
            found[name] = torch.load(value, weights_only=False)  # our own file of a moment ago
    found["common.pt"] = torch.load(checkpoint / "common.pt", weights_only=False)
    for name in ("job.json", "metadata.json"):
        found[name] = json.loads((checkpoint / name).read_text())
    return found


def checkpoints(run: Path) -> dict[str, Path]:
    """The checkpoint folders of a run that have their final name."""
    return {path.name: path for path in sorted((run / "checkpoints").glob("step_*")) if path.suffix != ".part"}


def checkpoint(mine: Path, theirs: Path, name: str) -> list[str]:
    """Differences of one checkpoint of two runs; that it cannot be read is one."""
    from torch.distributed.checkpoint.api import CheckpointException  # is no Exception

    try:
        return list(differences(content(checkpoints(mine)[name]), content(checkpoints(theirs)[name]), name))
    except (Exception, CheckpointException) as error:  # whatever a half-written file raises
        return [f"{name}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"]


def records(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without the clock's figures; every line must be whole."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def summary(run: Path) -> dict[str, Any]:
    values = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key not in (*TIMES, "run", "checkpoint")}


def runs(mine: Path, theirs: Path) -> list[str]:
    """Differences of two finished runs: names, records, validation and summary, every checkpoint."""
    found = list(differences(records(mine), records(theirs), "metrics.jsonl"))
    found += differences(summary(mine), summary(theirs), "summary.json")
    left = sorted(path.name for path in (mine / "checkpoints").iterdir())
    if left != sorted(checkpoints(theirs)):
        found.append(f"checkpoints: {left} and {sorted(checkpoints(theirs))}")
    for name in checkpoints(mine).keys() & checkpoints(theirs).keys():
        found += checkpoint(mine, theirs, name)
    return found
