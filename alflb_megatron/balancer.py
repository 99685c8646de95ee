"""Once per global batch: gather the loads, sum them, move the biases by their rule, centre, commit, report.

The update does not wait for the optimizer's: loads were measured and hold whether the weights move or not. So where a
loss scaler skips a step, the biases move all the same, on every rank alike, as Megatron-Core's own do.

`launch` starts one all-reduce for all layers; `commit` waits for it and writes the biases. Between the two the host
finishes its gradient reduction, which hides ours. Both are idempotent within a global batch, so a host may reach them
by more than one way.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alflb_megatron import agreement, margins, metrics
from alflb_megatron.agreement import DisagreementError
from alflb_megatron.alarms import Alarms
from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.loads import LoadAllReduce, LoadCounter, LoadCounts
from alflb_megatron.rules import State, Stats, keep_where

logger = logging.getLogger(__name__)


class BalancedRouter(Protocol):
    """A router the balancer serves: `ALFRouter`, or any router that only has its loads watched (`alf` is None)."""

    load_counter: LoadCounter
    alf: ALFConfig | None
    expert_bias: Tensor | None

    def read_state(self) -> tuple[Tensor, State]: ...
    def write_state(self, bias_E: Tensor, n: Tensor, state: State) -> None: ...


@dataclass(frozen=True)
class Record:
    """What the routers did in one global batch, on the device; reading a number from it synchronises.

    layers: layer numbers as Megatron-Core counts them, from 1; MTP layers go on after the decoder's last.
    loads: int64 [E] a layer, summed over the reduce group. bias: float32 [E] a layer after the update, None where
    the router has none. rejected: bool [layers], True where the update was refused and the bias stayed as it was.
    drift: float32 [layers], the largest move of a bias, score units. gain: float32 [layers], the rule's gain, NaN where
    it has none. curvature: float64 [layers], mean eigenvalue of the dual's Hessian on the zero-sum subspace per token
    (lab/theory/curvature.py: the modulus of strong convexity is at most that), NaN where margins are not measured.
    alarms: lines given after this update.
    """

    layers: tuple[int, ...]
    loads: tuple[Tensor, ...]
    bias: tuple[Tensor | None, ...]
    rejected: Tensor
    drift: Tensor
    gain: Tensor
    curvature: Tensor
    alarms: tuple[str, ...] = ()

    def max_vio(self) -> Tensor:
        """MaxVio of each layer, float64 [layers]."""
        return metrics.of_layers(metrics.max_vio, self.loads)

    def spread(self) -> Tensor:
        """Spread of the bias of each layer, float32 [layers]; 0 where the router has none."""
        zero = self.drift.new_zeros(1)
        return metrics.of_layers(metrics.bias_spread, [zero if bias is None else bias for bias in self.bias])


class Balancer:
    """Serves the routers of one model: launch, commit, and the record of the last global batch."""

    def __init__(
        self, routers: Iterable[nn.Module], layers: Sequence[int], group: dist.ProcessGroup | None = None
    ) -> None:
        self.routers: list[BalancedRouter] = [cast(BalancedRouter, router) for router in routers]
        self.layers = tuple(layers)
        self.group = group
        self.last: Record | None = None
        self.updates = 0
        self.rejections: Tensor | int = 0  # updates refused so far, int64 [layers] once there was one to judge
        self.disagreements = 0  # checks so far that found ranks with different biases or rule state
        self._sum: LoadAllReduce | None = None
        self._digests: list[Tensor] = []
        self._alarms: Alarms | None = None
        self._indices: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def launch(self) -> None:
        """Starts the all-reduce of this global batch's loads. Nothing happens while one is under way."""
        if self._sum is None and self.routers:
            self._digests = (
                [agreement.digest(_replicated_state(router)) for router in self._ours()] if self._is_checked() else []
            )
            checksum = agreement.checksum(self._digests) if self._digests else None
            self._sum = LoadAllReduce([router.load_counter for router in self.routers], self.group, piggyback=checksum)

    @torch.no_grad()
    def commit(self) -> Record | None:
        """Waits for the loads, moves every bias that is not frozen, empties the counters; None if none was launched.

        Raises:
            DisagreementError: ranks hold different biases or rule state and a layer's settings say to stop on that.
                Every rank of the group raises it; other pipeline stages are ended by the launcher.
        """
        if self._sum is None:
            return None
        seen, sent_from_here = self._sum.wait(), self._sum.sent
        checksum, self._sum = self._sum.piggyback, None
        disagreement = self._check(checksum) if self._digests else ""
        device = seen[0].nonfinite.device
        outcome = _Outcome.of_nothing(len(seen), device)
        for config, routers in self._alike():
            rows = _update(config, [self.routers[i] for i in routers], [seen[i] for i in routers])
            outcome.put(self._index(tuple(routers), device), rows)
        for router, sent in zip(self.routers, sent_from_here, strict=True):
            router.load_counter.subtract(sent)
        self.updates += 1
        self.rejections = self.rejections + outcome.rejected
        self.last = Record(
            layers=self.layers,
            loads=tuple(layer.loads_E for layer in seen),
            bias=tuple(None if router.expert_bias is None else router.expert_bias.clone() for router in self.routers),
            **vars(outcome),
        )
        self._raise_alarms(disagreement)
        self._log()
        return self.last

    def discard(self) -> None:
        """Forgets what was counted since the last commit, and an all-reduce under way; no bias moves."""
        if self._sum is not None:
            self._sum.wait()
            self._sum = None
        for router in self.routers:
            router.load_counter.reset()

    def _alike(self) -> list[tuple[ALFConfig, list[int]]]:
        """Indices of the routers that can be stepped as one [L, E] stack: same settings, same width."""
        stacks: dict[tuple[ALFConfig, int], list[int]] = defaultdict(list)
        for index, router in enumerate(self.routers):
            # `frozen_expert_bias` is how Megatron-LM freezes a router (--freeze-all-layers).
            frozen = router.alf is None or router.alf.frozen or getattr(router, "frozen_expert_bias", False)
            if not frozen and router.alf is not None:
                stacks[router.alf, router.load_counter.tokens_per_expert.numel()].append(index)
        return [(config, indices) for (config, _), indices in stacks.items()]

    def _index(self, routers: tuple[int, ...], device: torch.device) -> Tensor:
        """Indices of routers on the device, made once: a copy to it waits for it."""
        if routers not in self._indices:
            self._indices[routers] = torch.tensor(routers, device=device)
        return self._indices[routers]

    # -- what may be wrong -------------------------------------------------------------------------------------------

    def _ours(self) -> list[BalancedRouter]:
        return [router for router in self.routers if router.alf is not None]

    def _is_checked(self) -> bool:
        """Whether the update that begins now looks for ranks that differ; every rank has the same settings."""
        every = max((router.alf.check_every for router in self.routers if router.alf), default=0)
        alone = not dist.is_initialized() or dist.get_world_size(self.group) == 1
        return every > 0 and not alone and self.updates % every == 0

    def _check(self, checksum: Tensor) -> str:
        """Finds ranks that differ and makes them equal, or raises; what is to be said of it, "" where all agree."""
        digests, self._digests = self._digests, []
        if agreement.all_agree(checksum, dist.get_world_size(self.group)):
            return ""
        self.disagreements += 1
        found = agreement.locate(digests, self.group)
        ours = self._ours()
        numbers = [layer for layer, router in zip(self.layers, self.routers, strict=True) if router.alf is not None]
        where = agreement.describe(found, numbers, self.group)
        text = f"ranks hold other biases or rule state than most ranks do ({where})"
        if any(cast(ALFConfig, ours[index].alf).on_disagreement == "stop" for index in found.layers):
            raise DisagreementError(
                f"{text}. Look at what those ranks loaded, and at their memory; --{PREFIX}on-disagreement heal goes on"
            )
        for index, source in found.source.items():
            agreement.broadcast_from(_replicated_state(ours[index]), source, self.group)
        return f"{text}: they have taken over what most hold. Look at what they loaded, and at their memory."

    def _raise_alarms(self, disagreement: str) -> None:
        """Counts what may be wrong and gives the lines that are due."""
        assert self.last is not None
        if self._alarms is None:
            bounded = [getattr(router, "score_function", "") in ("sigmoid", "softmax") for router in self.routers]
            self._alarms = Alarms(self.layers, [router.alf for router in self.routers], bounded)
        alarms: list[str] = []
        if any(config is not None and config.alarm_after for config in self._alarms.configs):
            last = self.last
            self._alarms.count(last.loads, last.max_vio(), last.spread(), last.rejected)
            alarms = self._alarms.due_lines(self.updates)
        if disagreement and self._alarms.is_due("disagreement", self.updates):
            alarms.append(disagreement)
        if alarms:
            self.last = replace(self.last, alarms=tuple(alarms))
            if self._is_logging_rank():
                for line in alarms:
                    level = logging.ERROR if line is disagreement else logging.WARNING
                    logger.log(level, "update %d: %s", self.updates, line)

    def _is_logging_rank(self) -> bool:
        """Whether this rank is the one of its group that logs."""
        return not dist.is_initialized() or dist.get_rank(self.group) == 0

    def _log(self) -> None:
        every = max((router.alf.log_every for router in self.routers if router.alf), default=0)
        if self._is_logging_rank() and every and self.updates % every == 0 and self.last is not None:
            vio = self.last.max_vio()
            logger.info("global batch %d: MaxVio mean %.4f max %.4f", self.updates, vio.mean(), vio.max())


def _replicated_state(router: BalancedRouter) -> list[Tensor]:
    """The tensors that have to be the same on all ranks: bias, n, rule state."""
    n, state = router.read_state()
    return [cast(Tensor, router.expert_bias), n, *state.values()]


@dataclass
class _Outcome:
    """What came of one update, a row a layer, as in `Record`."""

    rejected: Tensor
    drift: Tensor
    gain: Tensor
    curvature: Tensor

    @staticmethod
    def of_nothing(layers: int, device: torch.device) -> _Outcome:
        """For layers that were not updated."""
        nan = torch.full((layers,), float("nan"), device=device)
        drift = torch.zeros(layers, device=device)
        return _Outcome(torch.zeros(layers, dtype=torch.bool, device=device), drift, nan.clone(), nan.double())

    def put(self, layers: Tensor, rows: _Outcome) -> None:
        """Puts in the rows of some layers, in place."""
        for name, whole in vars(self).items():
            whole.index_copy_(0, layers, getattr(rows, name))


def _update(config: ALFConfig, routers: Sequence[BalancedRouter], seen: Sequence[LoadCounts]) -> _Outcome:
    """One step of the rule for routers that share settings and width.

    A layer that saw no token is left as it is. So is one whose step is refused: some token's scores were NaN or
    infinite on any rank, counts overflowed, or the rule itself gave a number that is not finite.
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
    commit_L1 = some_L1 & ~refused_L1
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
    return _Outcome(refused_L1.squeeze(-1), drift_L, gain_L, curvature_L)


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
