"""One step of a rule for routers that are stepped alike: what is moved, what is refused, what came of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from alflb_megatron import margins
from alflb_megatron.config import ALFConfig
from alflb_megatron.loads import LoadCounter, LoadCounts
from alflb_megatron.rules import State, Stats, keep_where


@dataclass
class MicroBatches:
    """What the micro-batches of one global batch did, a row a router; 0 where none was counted.

    count: how many. vio_mean, vio_worst: of their MaxVio, float64 [routers]. overload: the most that the fullest
    expert-parallel rank of one of them had to do, over the mean, float64 [routers].
    """

    count: int
    vio_mean: Tensor
    vio_worst: Tensor
    overload: Tensor

    @staticmethod
    def of_none(routers: int, device: torch.device) -> MicroBatches:
        return MicroBatches(0, *(torch.zeros(routers, dtype=torch.float64, device=device) for _ in range(3)))

    def put(self, rows: Tensor, part: MicroBatches) -> None:
        """Puts in the rows of some routers, in place."""
        self.count = max(self.count, part.count)
        for name in ("vio_mean", "vio_worst", "overload"):
            getattr(self, name).index_copy_(0, rows, getattr(part, name))


@dataclass(frozen=True)
class Shown:
    """What the micro-batches of a global batch showed of some routers.

    stats: of the tokens as they would have been routed under the bias at its beginning. moved: for a rule that was
    stepped on each micro-batch, its bias [L, E] and state after the last.
    """

    stats: Stats
    moved: tuple[Tensor, State] | None = None


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


def alike(routers: Sequence[BalancedRouter]) -> list[tuple[ALFConfig, list[int]]]:
    """Indices of the routers that move and can be stepped as one [L, E] stack: same settings, width and chunk."""
    stacks: dict[tuple[ALFConfig, int, object], list[int]] = defaultdict(list)
    for index, router in enumerate(routers):
        if router.alf is not None and not getattr(router, "stands_still", router.alf.frozen):
            within = getattr(router, "within_batch", None)  # chunks matter where each has a message of its own
            stacks[router.alf, router.load_counter.tokens_per_expert.numel(), within].append(index)
    return [(config, indices) for (config, *_), indices in stacks.items()]


def stacked_state(routers: Sequence[BalancedRouter]) -> tuple[Tensor, Tensor, State]:
    """Bias float32 [L, E], the number of the update that comes int64 [L, 1], and rule state of some routers."""
    rows = [router.read_state() for router in routers]
    bias_LE = torch.stack([cast(Tensor, router.expert_bias) for router in routers])
    n_L1 = torch.stack([row[0] for row in rows]) + 1
    return bias_LE, n_L1, {name: torch.stack([row[1][name] for row in rows]) for name in rows[0][1]}


def update(
    config: ALFConfig, routers: Sequence[BalancedRouter], seen: Sequence[LoadCounts], shown: Shown | None = None
) -> Outcome:
    """One step of the rule for routers that share settings and width.

    `shown`: what micro-batches showed of the rows of these routers, where they moved the bias meanwhile
    (`within_batch`).

    A layer that saw no token is left as it is, and one where somebody else dictated the choice of a token on any rank
    (router replay): no bias moves a load that is not chosen by it. So is one whose step is refused: some token's scores
    were NaN or infinite on any rank, counts overflowed, or the rule itself gave a number that is not finite.
    """
    bias_LE, n_L1, state = stacked_state(routers)
    loads_LE = torch.stack([layer.loads_E for layer in seen])
    histograms = [layer.histogram_EB for layer in seen if layer.histogram_EB is not None]
    histogram_LEB = torch.stack(histograms) if histograms else None
    some_L1 = loads_LE.sum(dim=-1, keepdim=True) > 0
    if shown is not None and shown.moved is not None:
        moved_LE, moved = shown.moved
    else:
        stats = shown.stats if shown is not None else Stats(loads_LE, n_L1.squeeze(-1), histogram_LEB)
        histogram_LEB = stats.histogram
        moved_LE, moved = step(config, bias_LE, stats, state)
    nonfinite_L1 = torch.stack([layer.nonfinite for layer in seen]) > 0
    overflown_L1 = (loads_LE < 0).any(dim=-1, keepdim=True)
    refused_L1 = nonfinite_L1 | overflown_L1 | ~moved_LE.isfinite().all(dim=-1, keepdim=True)
    commit_L1 = some_L1 & ~refused_L1
    dictated = [layer.dictated for layer in seen if layer.dictated is not None]
    if dictated:  # one configuration makes all layers of a model
        commit_L1 = commit_L1 & (torch.stack(dictated) == 0)
    if config.stop_after:
        if shown is None or shown.moved is None:
            moved_LE = faded(config, bias_LE, moved_LE, n_L1)
        commit_L1 = commit_L1 & (n_L1 <= config.stop_after)
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
        curvature_L = margins.density_at_tie(histogram_LEB) * experts / max(experts - 1, 1)
    gain_L = after["gain"].mean(dim=-1) if "gain" in after else nan_L
    return Outcome(refused_L1.squeeze(-1), drift_L, gain_L, curvature_L)


def step(config: ALFConfig, bias_LE: Tensor, stats: Stats, state: State) -> tuple[Tensor, State]:
    """One step of the rule, centred."""
    moved_LE, after = config.rule_knobs.step(bias_LE, stats, state)
    return centred(config, moved_LE), after


def centred(config: ALFConfig, bias_LE: Tensor) -> Tensor:
    return bias_LE - bias_LE.mean(dim=-1, keepdim=True) if config.centring else bias_LE


def faded(config: ALFConfig, bias_LE: Tensor, moved_LE: Tensor, n_L1: Tensor) -> Tensor:
    """What of the move of update n is left under `stop_after` and `fade`.

    It follows from n alone, so a resumed run goes on where it was. DeepSeek-V3 (arXiv 2412.19437, section 4.2) sets the
    step to zero for the last 500B of its 14.8T tokens.
    """
    if not config.stop_after:
        return moved_LE
    left_L1 = config.stop_after + 1 - n_L1  # updates left, this one included
    share_L1 = (left_L1 / (config.fade + 1)).clamp(0.0, 1.0)
    return torch.where(share_L1 < 1, bias_LE + share_L1 * (moved_LE - bias_LE), moved_LE)
