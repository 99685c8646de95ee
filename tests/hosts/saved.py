"""Reads the tensors of a torch_dist checkpoint, whichever host wrote it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint in `folder`, by name."""
    stored = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(wanted, checkpoint_id=str(folder), no_dist=True)
    return wanted


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def biases(folder: Path) -> dict[str, torch.Tensor]:
    """The expert biases of the checkpoint, by name, float32 [layers, E] or [E]."""
    found = {name: value for name, value in tensors(folder).items() if name.endswith("expert_bias")}
    assert found and all(value.dtype == torch.float32 for value in found.values())
    return found
