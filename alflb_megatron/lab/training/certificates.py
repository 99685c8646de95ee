"""Takes a sample of router scores every so many steps and certifies the routing (`lab.theory.certificate`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from alflb_megatron.lab.records.files import write_atomically
from alflb_megatron.lab.theory.certificate import certify, regret_in_hindsight

SAMPLE = 16_384
"""Tokens of a sample at the most: the first that the rank routes in the step."""

POOLED, STEPS = 4_096, 64
"""Tokens in all, and certified steps at the most, that the regret of a run is measured on."""

FOLDER = "certified"
FILE = "step_{step:07d}.stage_{stage}.safetensors"


def farthest_off(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the certificates of a step say of the layer that is farthest from its best bias."""
    worst = max(rows, key=lambda row: row["gap"])
    u = "" if worst["harmonic_step"] is None else f"; u/n needs a u of about {worst['harmonic_step']:.2g}"
    return f"layer {worst['layer']} is {worst['gap']:.2e} of score a token from its best bias{u}"


class CertificateSampler:
    """Samples the router scores of one rank and certifies its layers.

    Args:
        routers: layer number -> `ALFRouter`.
        topk: K.
        every: steps between certificates.
        steps: of the whole run.
        folder: the run folder; what `regret` needs of each step is kept in it, for a run that is broken off.
        stage: pipeline stage of the rank.

    `begin_step` before a step, `finish_step` after it. The bias is that with which the sample was routed, not the
    updated one. Tokens come by position in the sequence, and scores depend on it: a sample is shuffled, seeded by its
    step, before any part of it is taken.
    """

    def __init__(
        self, routers: Mapping[int, Any], topk: int, every: int, steps: int, folder: Path, stage: int = 0
    ) -> None:
        self.routers, self.topk, self.every, self.stage = dict(routers), topk, every, stage
        self.certified = range(every, steps + 1, every)
        self.pooled = self.certified[:: max(1, math.ceil(len(self.certified) / STEPS))]
        self.kept = POOLED // max(1, len(self.pooled))
        self.folder = folder / FOLDER
        self._step = 0
        self._sample: dict[int, list[Tensor]] = {}
        self._bias: dict[int, Tensor] = {}
        for layer, router in self.routers.items():
            router.score_hooks = (*router.score_hooks, self._hook(layer, router))

    def _hook(self, layer: int, router: Any) -> Callable[[Tensor], None]:
        def hook(scores_TE: Tensor) -> None:
            parts = self._sample.get(layer)
            if parts is None or (left := SAMPLE - sum(map(len, parts))) <= 0:
                return
            if not parts:
                self._bias[layer] = router.expert_bias.detach().to("cpu", copy=True)
            parts.append(scores_TE[:left].to("cpu", torch.float32, copy=True))

        return hook

    def begin_step(self, step: int) -> None:
        """Takes samples of this step if it is one of those to be certified."""
        self._step = step
        self._sample = {layer: [] for layer in self.routers} if step in self.certified else {}

    def finish_step(self) -> list[dict[str, Any]]:
        """The certificates of the step, by layer; none where the step was not sampled or its scores are not finite."""
        rows = []
        kept: dict[str, Tensor] = {}
        for layer, parts in self._sample.items():
            scores_TE = torch.cat(parts) if parts else torch.empty(0, 1)
            if scores_TE.numel() and scores_TE.isfinite().all():
                shuffled = torch.randperm(len(scores_TE), generator=torch.Generator().manual_seed(self._step))
                scores_TE = scores_TE[shuffled]
                rows.append({"layer": layer, **certify(scores_TE, self.topk, self._bias[layer]).as_dict()})
                kept |= {f"scores_{layer}": scores_TE[: self.kept].clone(), f"bias_{layer}": self._bias[layer]}
        if kept and self._step in self.pooled:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(self._step), [save(kept)])
        self._sample = {}
        return rows

    def _file(self, step: int) -> Path:
        return self.folder / FILE.format(step=step, stage=self.stage)

    def regret(self) -> list[dict[str, Any]]:
        """The regret of each layer over the run's certified steps, those before a restart included.

        None for a layer of which a step is missing: its scores were not finite, or its file is gone or broken.
        """
        samples: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in self.routers}
        for step in self.pooled if self.routers else ():
            try:
                kept = load_file(self._file(step))
            except (OSError, SafetensorError):
                return []
            for layer, found in samples.items():
                if f"scores_{layer}" in kept:
                    found.append((kept[f"scores_{layer}"], kept[f"bias_{layer}"]))
        return [
            {"layer": layer, **regret_in_hindsight(found, self.topk).as_dict()}
            for layer, found in samples.items()
            if found and len(found) == len(self.pooled)
        ]
