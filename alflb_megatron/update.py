"""One step of a rule for routers that are stepped alike: what is moved, what is refused, what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from alflb_megatron import margins
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import LoadCounter, LoadCounts
from alflb_megatron.rules import State, Stats, keep_where


class BalancedRouter(Protocol):
    """A router the balancer serves: `ALFRouter`, or any router that only has its loads watched (`alf` is None)."""

    load_counter: LoadCounter
    alf: ALFConfig | None
    expert_bias: Tensor | None

    def read_state(self) -> tuple[Tensor, State]: ...
    def write_state(self, bias_E: Tensor, n: Tensor, state: State) -> None: ...


@dataclass
class Outcome:
    """What came of one update, a row a layer, as in `Record`."""

    rejected: Tensor
    drift: Tensor
    gain: Tensor
    curvature: Tensor

    @staticmethod
    def of_nothing(layers: int, device: torch.device) -> Outcome:
        """For layers that were not updated."""
        nan = torch.full((layers,), float("nan"), device=device)
        drift = torch.zeros(layers, device=device)
        return Outcome(torch.zeros(layers, dtype=torch.bool, device=device), drift, nan.clone(), nan.double())

    def put(self, layers: Tensor, rows: Outcome) -> None:
        """Puts in the rows of some layers, in place."""
        for name, whole in vars(self).items():
            whole.index_copy_(0, layers, getattr(rows, name))


def update(config: ALFConfig, routers: Sequence[BalancedRouter], seen: Sequence[LoadCounts]) -> Outcome:
    """One step of the rule for routers that share settings and width.

    A layer that saw no token is left as it is, and one where somebody else dictated the choice of a token on any rank
    (router replay): no bias moves a load that is not chosen by it. So is one whose step is refused: some token's scores
    were NaN or infinite on any rank, counts overflowed, or the rule itself gave a number that is not finite.
    """
    rows = [router.read_state() for router in routers]
    state: State = {name: torch.stack([row[1][name] for row in rows]) for name in rows[0][1]}
    bias_LE = torch.stack([cast(Tensor, router.expert_bias) for router in routers])
    loads_LE = torch.stack([layer.loads_E for layer in seen])
    histograms = [layer.histogram_EB for layer in seen if layer.histogram_EB is not None]
    histogram_LEB = torch.stack(histograms) if histograms else None
    some_L1 = loads_LE.sum(dim=-1, keepdim=True) > 0
    n_L1 = torch.stack([row[0] for row in rows]) + 1
    moved_LE, moved = config.rule_knobs.step(bias_LE, Stats(loads_LE, n_L1.squeeze(-1), histogram_LEB), state)
    if config.centring:
        moved_LE = moved_LE - moved_LE.mean(dim=-1, keepdim=True)
    nonfinite_L1 = torch.stack([layer.nonfinite for layer in seen]) > 0
    overflown_L1 = (loads_LE < 0).any(dim=-1, keepdim=True)
    refused_L1 = nonfinite_L1 | overflown_L1 | ~moved_LE.isfinite().all(dim=-1, keepdim=True)
    dictated_L1 = torch.stack([layer.dictated for layer in seen]) > 0
    commit_L1 = some_L1 & ~refused_L1 & ~dictated_L1
    if config.stop_after:
        moved_LE, going_L1 = _scheduled(config, bias_LE, moved_LE, n_L1)
        commit_L1 = commit_L1 & going_L1
    moved_LE = torch.where(commit_L1, moved_LE, bias_LE)
    n_L1 = n_L1 - 1 + commit_L1
    after = {name: keep_where(commit_L1, rows, state[name]) for name, rows in moved.items()}
    for row, router in enumerate(routers):
        router.write_state(moved_LE[row], n_L1[row], {name: rows[row] for name, rows in after.items()})
    drift_L = (moved_LE - bias_LE).abs().amax(dim=-1)
    nan_L = torch.full_like(drift_L, float("nan"))
    curvature_L = nan_L.double()
    if histogram_LEB is not None:
        experts = loads_LE.shape[1]
        curvature_L = margins.density_at_tie(histogram_LEB, loads_LE) * experts / max(experts - 1, 1)
    gain_L = after["gain"].mean(dim=-1) if "gain" in after else nan_L
    return Outcome(refused_L1.squeeze(-1), drift_L, gain_L, curvature_L)


def _scheduled(config: ALFConfig, bias_LE: Tensor, moved_LE: Tensor, n_L1: Tensor) -> tuple[Tensor, Tensor]:
    """The move of update n under `stop_after` and `fade`, and whether there is one at all, bool [L, 1].

    It follows from n alone, so a resumed run goes on where it was. DeepSeek-V3 (arXiv 2412.19437, section 4.2) sets the
    step to zero for the last 500B of its 14.8T tokens.
    """
    left_L1 = config.stop_after + 1 - n_L1  # updates left, this one included
    if config.fade:
        share_L1 = (left_L1 / (config.fade + 1)).clamp(max=1.0)
        moved_LE = torch.where(share_L1 < 1, bias_LE + share_L1 * (moved_LE - bias_LE), moved_LE)
    return moved_LE, left_L1 > 0
