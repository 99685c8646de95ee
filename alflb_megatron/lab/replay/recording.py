"""What a recording of router scores is, whatever file it comes from: scores step by step, and how the router chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alflb_megatron.settings import SettingError

FLAG = "SCORES"
"""By what an error names a recording: the argument of `alflb replay`."""


@dataclass(frozen=True)
class Gating:
    """How the recorded router chose: what a replay needs beside the scores."""

    topk: int | None = None
    score_function: str = ""
    num_groups: int | None = None
    group_topk: int | None = None

    def as_metadata(self) -> dict[str, str]:
        return {name: str(value) for name, value in dataclasses.asdict(self).items() if value is not None}

    @staticmethod
    def from_metadata(texts: Mapping[str, str]) -> Gating:
        """ValueError where a number is none."""
        numbers = {name: int(texts[name]) for name in ("topk", "num_groups", "group_topk") if name in texts}
        return Gating(score_function=texts.get("score_function", ""), **numbers)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one sequence are: micro-batch after micro-batch, in each position after position."""

    sequence_length: int
    micro_batch_size: int = 1

    def as_metadata(self) -> dict[str, str]:
        return {name: str(value) for name, value in dataclasses.asdict(self).items()}

    @staticmethod
    def from_metadata(texts: Mapping[str, str]) -> Layout | None:
        """None where it is not written; ValueError where a number is none or below 1."""
        if "sequence_length" not in texts:
            return None
        found = Layout(int(texts["sequence_length"]), int(texts.get("micro_batch_size", "1")))
        if min(found.sequence_length, found.micro_batch_size) < 1:
            raise ValueError(f"sequence_length and micro_batch_size must be at least 1: {found}")
        return found

    def sequences(self, scores_TE: Tensor) -> Tensor | None:
        """The tokens of each sequence, [N, sequence_length, E]; None where T is no whole number of micro-batches."""
        length, size, experts = self.sequence_length, self.micro_batch_size, scores_TE.shape[-1]
        if scores_TE.shape[0] % (length * size):
            return None
        return scores_TE.reshape(-1, length, size, experts).transpose(1, 2).reshape(-1, length, experts)


@dataclass(frozen=True)
class Recording:
    """Scores of several layers over several steps; to go through it is to read it, one step at a time.

    layers: their numbers; 0, 1, ... in a single file, Megatron's (from 1) in a run folder. experts: E. steps: how many.
    read: gives the scores of each step, float32 [layers, tokens, E]; the number of tokens may change from step to step.
    first_step: the number of the first step in messages. name: of the file or folder. layout: where the tokens of one
    sequence are, None where that is not known.
    """

    layers: tuple[int, ...]
    experts: int
    steps: int
    read: Callable[[], Iterator[Tensor]]
    gating: Gating = Gating()
    name: str = "recording"
    first_step: int = 0
    layout: Layout | None = None

    @property
    def topk(self) -> int | None:
        return self.gating.topk

    def __iter__(self) -> Iterator[Tensor]:
        """Each step's scores; SettingError at the first that are not [layers, tokens, E] or hold a NaN or infinity."""
        for step, scores_LTE in enumerate(self.read(), self.first_step):
            layers, tokens, experts = scores_LTE.shape
            if (layers, experts) != (len(self.layers), self.experts) or tokens == 0:
                raise SettingError(FLAG, self.name, f"step {step} has scores of shape {list(scores_LTE.shape)}")
            if not scores_LTE.sum(dtype=torch.float64).isfinite():  # no sum of finite float32 overflows float64
                sound_L = scores_LTE.isfinite().flatten(1).all(dim=1).tolist()
                layer = self.layers[sound_L.index(False)]
                raise SettingError(FLAG, self.name, f"step {step}, layer {layer} holds a score that is NaN or infinite")
            yield scores_LTE


def check_gating(path: object, gating: Gating, experts: int) -> Gating:
    """`gating`, if it fits that many experts; SettingError naming `path` otherwise."""
    topk, groups, chosen = gating.topk, gating.num_groups, gating.group_topk
    if topk is not None and not 1 <= topk <= experts:
        raise SettingError(FLAG, path, f"holds topk {topk}, which must be from 1 to the {experts} experts")
    if groups is None and chosen is None:
        return gating
    if groups is None or chosen is None or groups < 1 or experts % groups or not 1 <= chosen <= groups:
        allowed = f"holds num_groups {groups} and group_topk {chosen}, which do not fit its {experts} experts"
        raise SettingError(FLAG, path, allowed)
    if topk is not None and (topk % chosen or topk > chosen * (experts // groups)):
        raise SettingError(FLAG, path, f"holds topk {topk}, which {chosen} of {groups} groups of experts do not allow")
    return gating
