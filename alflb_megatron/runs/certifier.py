"""Takes a sample of router scores every so many steps and certifies the routing (`theory.certificate`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from alflb_megatron.theory.certificate import certify

SAMPLE = 16_384
"""Tokens of a sample at the most: the first that the rank routes in the step."""


class Certifier:
    """Certifies the routers of one rank.

    Args:
        routers: layer number -> `ALFRouter`.
        topk: K.
        every: steps between certificates.

    `begin` before a step, `finish` after it. The bias is that with which the sample was routed, not the updated one.
    """

    def __init__(self, routers: Mapping[int, Any], topk: int, every: int) -> None:
        self.routers, self.topk, self.every = dict(routers), topk, every
        self._sample: dict[int, list[Tensor]] = {}
        self._bias: dict[int, Tensor] = {}
        for layer, router in self.routers.items():
            router.score_taps = (*router.score_taps, self._tap(layer, router))

    def _tap(self, layer: int, router: Any) -> Callable[[Tensor], None]:
        def tap(scores_TE: Tensor) -> None:
            parts = self._sample.get(layer)
            if parts is None or (left := SAMPLE - sum(map(len, parts))) <= 0:
                return
            if not parts:
                self._bias[layer] = router.expert_bias.detach().to("cpu", copy=True)
            parts.append(scores_TE[:left].to("cpu", torch.float32, copy=True))

        return tap

    def begin(self, step: int) -> None:
        """Takes samples of this step if it is one of those to be certified."""
        self._sample = {layer: [] for layer in self.routers} if step % self.every == 0 else {}

    def finish(self) -> list[dict[str, Any]]:
        """The certificates of the step, by layer; none where the step was not sampled or its scores are not finite."""
        rows = []
        for layer, parts in self._sample.items():
            scores_TE = torch.cat(parts) if parts else torch.empty(0, 1)
            if scores_TE.numel() and scores_TE.isfinite().all():
                rows.append({"layer": layer, **certify(scores_TE, self.topk, self._bias[layer]).as_dict()})
        self._sample = {}
        return rows
