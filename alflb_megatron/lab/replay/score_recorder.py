"""Writes the router scores of a training run, as `score_folder.py` reads them: one file a step and rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from alflb_megatron.lab.records.files import write_atomically
from alflb_megatron.lab.replay.recording import Gating, Layout
from alflb_megatron.lab.replay.score_folder import FILE, FOLDER, FORMAT


class ScoreRecorder:
    """Takes the scores of each global batch from the routers of one rank and writes them, one file a step.

    Args:
        folder: the run folder.
        routers: layer number -> `ALFRouter`; a pipeline stage may have none, and then writes files without layers.
        gating: how they choose.
        rank: this rank.
        ranks: how many there are.
        steps: how many global batches to write.
        layout: of the tokens that this rank routes; None where it has parts of sequences.

    A step's scores are held in memory (on the CPU) until `write`; after the last one the hooks are off.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        routers: Mapping[int, Any],
        gating: Gating,
        rank: int = 0,
        ranks: int = 1,
        steps: int = 1,
        layout: Layout | None = None,
    ) -> None:
        self.folder = Path(folder) / FOLDER
        self.rank, self.ranks, self.left = rank, ranks, steps
        self.about = {**gating.as_metadata(), **({} if layout is None else layout.as_metadata())}
        self.routers = dict(routers)
        self._seen: dict[int, list[Tensor]] = {layer: [] for layer in self.routers}
        self._hooks = {layer: self._hook(layer) for layer in self.routers}
        for layer, router in self.routers.items():
            router.score_hooks = (*router.score_hooks, self._hooks[layer])

    def _hook(self, layer: int) -> Callable[[Tensor], None]:
        def hook(scores_TE: Tensor) -> None:
            self._seen[layer].append(scores_TE.to("cpu", torch.float32, copy=True))

        return hook

    def write(self, step: int) -> None:
        """Writes what the hooks saw since the last call as step `step`, all of it or nothing; none once `steps` are."""
        if self.left == 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE.format(step=step, rank=self.rank)
        about = {"format": FORMAT, "step": str(step), "ranks": str(self.ranks), **self.about}
        tensors = {f"layer_{layer}": torch.cat(parts) for layer, parts in self._seen.items() if parts}
        write_atomically(path, [save(tensors, metadata=about)])
        for parts in self._seen.values():
            parts.clear()
        self.left -= 1
        if self.left == 0:
            for layer, router in self.routers.items():
                router.score_hooks = tuple(hook for hook in router.score_hooks if hook is not self._hooks[layer])
