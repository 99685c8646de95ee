"""Once per global batch: gather the loads, sum them, move the biases by their rule, centre, commit, report.

The update does not wait for the optimizer's: loads were measured and hold whether the weights move or not. So where a
loss scaler skips a step, the biases move all the same, on every rank alike, as Megatron-Core's own do.

`launch` starts one all-reduce for all layers; `commit` waits for it and writes the biases. Between the two the host
finishes its gradient reduction, which hides ours. Both are idempotent within a global batch, so a host may reach them
by more than one way.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alflb_megatron import agreement, metrics
from alflb_megatron.agreement import DisagreementError
from alflb_megatron.alarms import Alarms
from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.loads import LoadAllReduce, reset, subtract
from alflb_megatron.update import BalancedRouter, MicroBatches, Outcome, Shown, alike, update
from alflb_megatron.within_batch import WithinBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What the routers did in one global batch, on the device; reading a number from it synchronises.

    layers: layer numbers as Megatron-Core counts them, from 1; MTP layers go on after the decoder's last.
    loads: int64 [E] a layer, summed over the reduce group. bias: float32 [E] a layer after the update, None where
    the router has none. rejected: bool [layers], True where the update was refused and the bias stayed as it was.
    drift: float32 [layers], the largest move of a bias, score units. gain: float32 [layers], the rule's gain, NaN where
    it has none. curvature: float64 [layers], mean eigenvalue of the dual's Hessian on the zero-sum subspace per token
    (lab/theory/curvature.py: the modulus of strong convexity is at most that), NaN where margins are not measured.
    alarms: lines given after this update. micro_batches: what they did, where they move the bias
    (`--alflb-update-every micro-batch`), else None.
    """

    layers: tuple[int, ...]
    loads: tuple[Tensor, ...]
    bias: tuple[Tensor | None, ...]
    rejected: Tensor
    drift: Tensor
    gain: Tensor
    curvature: Tensor
    alarms: tuple[str, ...] = ()
    micro_batches: MicroBatches | None = None

    def counted(self) -> Tensor:
        """Whether a layer saw any token, bool [layers]: one in evaluation mode, or a copy not in use, saw none."""
        return metrics.of_layers(lambda loads: loads.sum(-1) != 0, self.loads)

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
        self,
        routers: Iterable[nn.Module],
        layers: Sequence[int],
        group: dist.ProcessGroup | None = None,
        paths: Sequence[str] = (),
        labels: Sequence[str] = (),
    ) -> None:
        """`paths`: of the routers in the model. `labels`: what lines of text call them; both by default `layer N`."""
        self.routers: list[BalancedRouter] = [cast(BalancedRouter, router) for router in routers]
        self.layers = tuple(layers)
        self.labels = list(labels) or [f"layer {layer}" for layer in layers]
        self.paths = list(paths) or self.labels
        self.group = group
        self.last: Record | None = None
        self.updates = 0
        self._launches = 0  # as many on every rank, where updates may not be: a step can fail on one of them
        self.rejections: Tensor | int = 0  # updates refused so far, int64 [layers] once there was one to judge
        self.disagreements = 0  # checks so far that found ranks with different biases or rule state
        self._sum: LoadAllReduce | None = None
        self._digests: list[Tensor] = []
        self._alarms: Alarms | None = None
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self.forgotten = False  # whether forward passes were forgotten since the last update

    @property
    def under_way(self) -> LoadAllReduce | None:
        """What was launched and not yet committed."""
        return self._sum

    @torch.no_grad()
    def launch(self) -> None:
        """Starts the all-reduce of this global batch's loads. Nothing happens while one is under way."""
        if self._sum is None and self.routers:
            self._say_what_was_forgotten()
            for within in self._within:
                within.finish()
            self._digests = (
                [agreement.digest(_replicated_state(router)) for router in self._ours()] if self._is_checked() else []
            )
            checksum = agreement.checksum(self._digests) if self._digests else None
            counters = [router.load_counter for router in self.routers]
            self._sum = LoadAllReduce(counters, self.group, self._needs_histograms(), checksum)
            self._launches += 1

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
        # first: whatever is raised below leaves nothing for a later batch
        subtract([router.load_counter for router in self.routers], sent_from_here)
        disagreement = self._check(checksum) if self._digests else ""
        device = seen[0].nonfinite.device
        outcome = Outcome.of_nothing(len(seen), device)
        for config, indices in alike(self.routers):
            routers = [self.routers[i] for i in indices]
            shown = self._shown(routers)
            if shown is not None and disagreement:
                continue  # ranks that were healed saw other micro-batches: this batch moves nothing
            rows = update(config, routers, [seen[i] for i in indices], shown)
            outcome.put(self._index(tuple(indices), device), rows)
        self.updates += 1
        self.rejections = self.rejections + outcome.rejected
        self.last = Record(
            layers=self.layers,
            loads=tuple(layer.loads_E for layer in seen),
            bias=tuple(None if router.expert_bias is None else router.expert_bias.clone() for router in self.routers),
            micro_batches=self._micro_batches(device),
            **vars(outcome),
        )
        for within in self._within:
            within.end(committed=True)
        self._raise_alarms(disagreement)
        self._log()
        return self.last

    def _say_what_was_forgotten(self) -> None:
        if self.forgotten and not any(router.load_counter.passes for router in self.routers):
            _warn_once(
                "no router has counted a token in this global batch since its gradients were zeroed, and some had "
                "before: loads are forgotten with the gradients. Zero gradients before the first forward pass"
            )
        self.forgotten = False

    def _needs_histograms(self) -> bool:
        """Whether a rule is to be shown margins that micro-batches have not shown it already."""

        def shown(router: BalancedRouter) -> bool:
            within = _within_of(router)
            return within is not None and within.micro_batches > 1

        return not all(router.load_counter.histogram_EB is None or shown(router) for router in self.routers)

    def _micro_batches(self, device: torch.device) -> MicroBatches | None:
        """What was seen of micro-batches, a row a router; None where they move no bias."""
        found = MicroBatches.of_none(len(self.routers), device)
        for within in self._within:
            rows = [index for index, router in enumerate(self.routers) if _within_of(router) is within]
            found.put(self._index(tuple(rows), device), within.figures())
        return found if found.count else None

    def _shown(self, routers: list[BalancedRouter]) -> Shown | None:
        within = _within_of(routers[0])
        return None if within is None else within.shown(routers)

    def discard(self) -> None:
        """Forgets what was counted since the last commit, and an all-reduce under way; no bias moves."""
        self.withdraw()
        for within in self._within:
            within.end(committed=False)
        reset([router.load_counter for router in self.routers])

    def abandon(self) -> None:
        """Forgets an all-reduce under way and what it sums, if there is one; what was counted since then stays."""
        if self._sum is not None:
            subtract([router.load_counter for router in self.routers], self._sum.sent)
            for within in self._within:
                within.end(committed=False)
            self.withdraw()

    def withdraw(self) -> None:
        """Forgets an all-reduce under way, as if it had not been launched."""
        if self._sum is not None:
            self._sum.wait()
            self._sum = None

    @property
    def _within(self) -> list[WithinBatch]:
        """What moves biases inside the global batch, one a chunk that has such routers."""
        found = dict.fromkeys(_within_of(router) for router in self.routers)
        return [within for within in found if within is not None]

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
        return every > 0 and not alone and self._launches % every == 0

    def _check(self, checksum: Tensor) -> str:
        """Finds ranks that differ and makes them equal, or raises; what is to be said of it, "" where all agree."""
        digests, self._digests = self._digests, []
        if agreement.all_agree(checksum, dist.get_world_size(self.group)):
            return ""
        self.disagreements += 1
        found = agreement.locate(digests, self.group)
        ours = self._ours()
        labels = [label for label, router in zip(self.labels, self.routers, strict=True) if router.alf is not None]
        where = agreement.describe(found, labels, self.group)
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
            self._alarms = Alarms(self.labels, [router.alf for router in self.routers], bounded)
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
            counted = self.last.counted()
            if not counted.any():
                logger.info("global batch %d: no router counted a token (evaluation mode?)", self.updates)
                return
            vio = self.last.max_vio()[counted]
            logger.info("global batch %d: MaxVio mean %.4f max %.4f", self.updates, vio.mean(), vio.max())


def _within_of(router: BalancedRouter) -> WithinBatch | None:
    return getattr(router, "within_batch", None)


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _replicated_state(router: BalancedRouter) -> list[Tensor]:
    """The tensors that have to be the same on all ranks: bias, n, rule state."""
    n, state = router.read_state()
    return [cast(Tensor, router.expert_bias), n, *state.values()]
