"""Biases moved inside the global batch: equal to today's with one micro-batch, right in every schedule."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from alflb_megatron import rules
from tests.distributed import jobs, ranks
from tests.distributed.test_split import _saved

MICRO = {"update_every": "micro-batch"}


def _trace(job: dict[str, Any], steps: int, alf: dict[str, Any]) -> jobs.Trace:
    return jobs.trace(jobs.plan({"nproc": 1, "rule": "adaptive", **job}, **alf), steps)


def _one_micro_batch() -> dict[str, str]:
    found = {}
    for rule in rules.names():
        job = {"rule": rule, "nproc": 2, "ep": 2, "global_batch_size": 8, "micro_batch_size": 4}
        found[rule] = _trace(job, 3, MICRO).differs_from(_trace(job, 3, {}))
    return found


def test_with_one_micro_batch_nothing_changes() -> None:
    for found in ranks.run(2, _one_micro_batch):
        assert found == dict.fromkeys(rules.names(), "")


def _vio(trace: jobs.Trace, steps: slice) -> float:
    from alflb_megatron.metrics import max_vio

    return float(torch.stack([max_vio(load) for loads in trace.loads[steps] for load in loads.values()]).mean())


def _better(rule: str) -> tuple[float, float]:
    job = {"rule": rule, "global_batch_size": 16, "micro_batch_size": 2}
    return _vio(_trace(job, 8, MICRO), slice(None)), _vio(_trace(job, 8, {}), slice(None))


@pytest.mark.parametrize("rule", ["adaptive", "quantile"])
def test_several_micro_batches_are_balanced_better(rule: str) -> None:
    ((micro, whole),) = ranks.run(1, _better, rule)
    assert micro < 0.7 * whole


def _recomputed(job: dict[str, Any]) -> dict[tuple[str, str], str]:
    found = {}
    for rule in ("adaptive", "sign"):
        cut = {"rule": rule, "global_batch_size": 16, "micro_batch_size": 2, **job}
        plain = _trace(cut, 3, MICRO)
        for recompute in ("full", "moe"):
            again = _trace({**cut, "recompute": recompute}, 3, MICRO)
            for trace in (plain, again):  # a recomputed layer routes twice: for `differs_from` a difference
                trace.maps = []
            found[rule, recompute] = again.differs_from(plain)
    return found


SPLITS = {
    "alone": {},
    "pipeline": {"nproc": 2, "pp": 2},
    "experts": {"nproc": 2, "ep": 2},
    "interleaved": {"nproc": 2, "pp": 2, "vpp": 2},
}


@pytest.mark.parametrize("split", SPLITS)
def test_recomputation_changes_nothing(split: str) -> None:
    for found in ranks.run(SPLITS[split].get("nproc", 1), _recomputed, SPLITS[split]):
        assert set(found.values()) == {""}, found


def _one_batch(folder: Path, job: dict[str, Any], rule: str) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
    """Loads and biases of one global batch of four micro-batches of four sequences, from the same weights."""
    from alflb_megatron.lab.training import checkpoint

    plan = jobs.plan({"global_batch_size": 16, **job, "rule": rule}, **MICRO)
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        checkpoint.load(runner.setup, plan, checkpoint.find(folder, "--load"), weights_only=True)
        runner.step(3)
        loads = {layer: row.tolist() for layer, row in runner.trace.loads[-1].items()}
        return loads, {layer: row.tolist() for layer, row in runner.trace.biases[-1].items()}


SAME_MICRO_BATCHES = {
    "data": {"nproc": 2, "micro_batch_size": 2},
    "experts": {"nproc": 2, "ep": 2, "micro_batch_size": 2},
    "tensor": {"nproc": 2, "tp": 2, "micro_batch_size": 4},
    "pipeline": {"nproc": 2, "pp": 2, "micro_batch_size": 4},
    "interleaved": {"nproc": 2, "pp": 2, "vpp": 2, "micro_batch_size": 4},
}


@pytest.mark.parametrize("rule", ["adaptive", "sign"])
def test_the_same_micro_batches_give_the_same_bias_at_every_split(rule: str, tmp_path: Path) -> None:
    ranks.run(1, _saved, tmp_path)
    ((loads, biases),) = ranks.run(1, _one_batch, tmp_path, {"nproc": 1, "micro_batch_size": 4}, rule)
    assert len(loads) == 3
    for name, job in SAME_MICRO_BATCHES.items():
        found = ranks.run(2, _one_batch, tmp_path, job, rule)
        assert {layer: row for rank in found for layer, row in rank[0].items()} == loads, name
        moved = {layer: row for rank in found for layer, row in rank[1].items()}
        if "tp" in job:  # sums in another order: scores differ in their last bit, and a margin may fall in the next bin
            assert {layer: pytest.approx(row, abs=1e-3) for layer, row in moved.items()} == biases, name
        else:
            assert moved == biases, name


def _ranks_agree() -> list[bytes]:
    trace = _trace({"nproc": 2, "global_batch_size": 16, "micro_batch_size": 2}, 4, MICRO)
    return [bias.numpy().tobytes() for bias in trace.biases[-1].values()]


def test_ranks_hold_the_same_bias_bit_for_bit() -> None:
    first, second = ranks.run(2, _ranks_agree)
    assert first == second


def _uneven(mine: tuple[int, int]) -> str:
    """Ranks with other numbers of micro-batches: what each raises, and that none waits for the other for ever."""
    from alflb_megatron.settings import SettingError
    from tests.distributed.test_abandoned import _training

    with _training(False, nproc=2, alf=MICRO) as trainer:
        trainer.step(2)
        try:
            trainer.step(mine[torch.distributed.get_rank()])
        except (SettingError, RuntimeError) as error:
            return str(error)
        return ""


@pytest.mark.parametrize("mine", [(2, 3), (3, 2), (1, 2), (4, 2)])
def test_other_numbers_of_micro_batches_are_refused_by_name_and_never_hang(mine: tuple[int, int]) -> None:
    said = ranks.run(2, _uneven, mine)
    named = [one.startswith("--alflb-update-every=micro-batch: needs as many micro-batches") for one in said]
    assert all(said) and (all(named) if abs(mine[0] - mine[1]) == 1 else any(named)), said


def _given_up(enabled: bool, place: str) -> list[Any]:
    """Loads and the batch's bias after a step that failed, for which no micro-batch of it may count."""
    from tests.distributed import test_abandoned
    from tests.distributed.test_identity import _routers

    with test_abandoned._training(enabled, alf=MICRO) as trainer:
        trainer.step(2)
        (router,) = _routers(trainer.chunks[0]).values()
        price = router.expert_bias.clone()
        with pytest.raises(test_abandoned.Failed), getattr(test_abandoned, place)(trainer):
            trainer.step(3)
        found: list[Any] = [torch.equal(router.expert_bias, price) or place == "_in_the_optimizer"]
        for micro_batches in (1, 2, 1):
            trainer.step(micro_batches)
            found += [trainer.loads(), int(router.alf_micro_batches)]
        return found


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("place", ["_in_forward", "_in_backward", "_in_gradient_reduction", "_in_the_optimizer"])
def test_a_batch_that_is_given_up_leaves_nothing(place: str, enabled: bool) -> None:
    assert ranks.run(1, _given_up, enabled, place) == [[True, 128, 1, 256, 2, 128, 1]]


def _looked_at() -> dict[str, Any]:
    """The log, evaluation between steps, a frozen model, and what a checkpoint holds."""
    from alflb_megatron.hosts.core import balancer_of
    from alflb_megatron.hosts.log import WITHIN_BATCH_KEYS, balance_metrics
    from tests.distributed.test_identity import _routers

    with ranks.model_parallel():
        runner = jobs.Runner(jobs.plan({"rule": "adaptive", "nproc": 1, "global_batch_size": 8}, **MICRO))
        runner.step(0)
        chunks = runner.setup.chunks
        router = next(iter(_routers(chunks[0]).values()))
        before = router.expert_bias.clone()
        for chunk in chunks:
            chunk.eval()
        runner._maps = []
        with torch.no_grad():
            runner.forward_backward(1, forward_only=True)
        maps = runner._maps
        for chunk in chunks:
            chunk.train()
        runner.step(1)
        shown = balance_metrics(chunks)
        micro = balancer_of(chunks).last.micro_batches
        return {
            "keys": [name in shown for name in WITHIN_BATCH_KEYS],
            "count": micro.count,
            "worst at least the mean": bool((micro.vio_worst >= micro.vio_mean).all()),
            "evaluated": len(maps),
            "moved": not torch.equal(before, router.expert_bias),
            "begins at the price": float((router.batch_bias - before).abs().max()) > 0,
            "saved": sorted(name for name in router.state_dict() if "batch" in name),
        }


def test_what_is_seen_of_micro_batches() -> None:
    (found,) = ranks.run(1, _looked_at)
    assert found["keys"] == [True] * 3 and found["count"] == 4
    assert found["worst at least the mean"] and found["moved"] and found["begins at the price"]
    assert found["evaluated"] == 3 * 4
    assert found["saved"] == ["alf_micro_batches"]


def _resumed(rule: str) -> str:
    """Four steps, against two steps, a state dict through a new model, and two more."""
    plan = jobs.plan({"rule": rule, "nproc": 1, "global_batch_size": 8, "optimizer": "adam"}, **MICRO)
    whole = jobs.trace(plan, 4)
    with ranks.model_parallel():
        first = jobs.Runner(plan)
        for step in range(2):
            first.step(step)
        model, optimizer = first.setup.chunks[0].state_dict(), first.setup.optimizer.state_dict()
        second = jobs.Runner(plan)
        second.setup.chunks[0].load_state_dict(model)
        second.setup.optimizer.load_state_dict(optimizer)
        second.setup.scheduler.step(increment=2)
        second.trace = first.trace
        for step in range(2, 4):
            second.step(step)
        return second.trace.differs_from(whole)


@pytest.mark.parametrize("rule", ["adaptive", "rms"])
def test_a_resumed_run_is_the_same_run(rule: str) -> None:
    assert ranks.run(1, _resumed, rule) == [""]


def _broken(rule: str) -> dict[str, Any]:
    """A NaN in one micro-batch of three, a micro-batch of padding alone."""
    from alflb_megatron.balancer import Balancer
    from alflb_megatron.within_batch import WithinBatch
    from tests.distributed.test_router import _hidden, _router

    with ranks.model_parallel():
        router = _router({"rule": rule, **MICRO})
        within = WithinBatch([router], router.tp_dp_cp_group)
        balancer = Balancer([router], [1], router.tp_dp_cp_group)
        biases = []
        for seed, kind in enumerate(("sound", "broken", "padding", "sound")):
            hidden = _hidden(seed)
            if kind == "broken":
                hidden[3, 1] = float("nan")
            within.begin_micro_batch()
            biases.append(router.batch_bias.clone())
            router(hidden, torch.full((64, 2), kind == "padding"))
        within.begin_micro_batch()
        biases.append(router.batch_bias.clone())
        balancer.launch()
        record = balancer.commit()
        return {
            "moved": [not torch.equal(a, b) for a, b in pairwise(biases)],
            "rejected": bool(record.rejected.any()),
            "price": router.expert_bias.abs().max().item(),
            "finite": all(bool(bias.isfinite().all()) for bias in biases),
        }


@pytest.mark.parametrize("rule", ["adaptive", "sign"])
def test_a_micro_batch_that_is_broken_or_empty_moves_nothing(rule: str) -> None:
    (found,) = ranks.run(1, _broken, rule)
    assert found["finite"] and found["rejected"] and found["price"] == 0
    assert found["moved"] == [True, False, False, True]


def _refused_with_graphs() -> str:
    from tests.distributed.test_router import _refused

    with ranks.model_parallel():
        return _refused(update_every=MICRO["update_every"], cuda_graph_impl="transformer_engine")


def test_cuda_graphs_are_refused() -> None:
    (said,) = ranks.run(1, _refused_with_graphs)
    assert said.startswith("--alflb-update-every=micro-batch: needs Python in every forward pass")


# -- what is not the same on every rank, or not there ------------------------------------------------------------------


class _Layers(torch.nn.Module):
    """Two routers that a rank may call in any order, or not at all, as a tower without images is."""

    def __init__(self, **alf: Any) -> None:
        from tests.distributed.test_router import _router

        super().__init__()
        self.routers = torch.nn.ModuleList([_router({"rule": "sign", "step_size": 0.01, **MICRO, **alf}) for _ in "ab"])
        for number, router in enumerate(self.routers, 1):
            router.set_layer_number(number)
            torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(number))

    def forward(self, hidden: torch.Tensor, order: str) -> torch.Tensor:
        return sum((self.routers["ab".index(name)](hidden)[0].sum() for name in order), hidden.sum() * 0)


def _orders(rule: str, orders: tuple[tuple[str, ...], ...]) -> list[bytes]:
    """Biases after three global batches in which each rank called its routers in these orders."""
    from alflb_megatron.hosts.core import balancer_of
    from tests.distributed.test_router import _hidden

    rank = torch.distributed.get_rank()
    with ranks.model_parallel():
        model = _Layers(rule=rule, **({"step_size": None} if rule == "adaptive" else {}))
        balancer = balancer_of([model])
        for step in range(3):
            for number, order in enumerate(orders[rank]):
                model(_hidden(10 * step + number + 100 * rank), order)
            balancer.launch()
            balancer.commit()
        return [router.expert_bias.numpy().tobytes() for router in model.routers]


@pytest.mark.parametrize("rule", ["adaptive", "sign"])
@pytest.mark.parametrize(
    "orders",
    [(("ab", "a"), ("ab", "ab")), (("ab", "ba"), ("ab", "ab")), (("b", "ab"), ("ab", "ab")), (("", "ab"), ("ab", "b"))],
    ids=["one is left out", "another order", "the first is left out", "none routes"],
)
def test_ranks_may_route_in_other_layers_or_another_order(rule: str, orders: Any) -> None:
    first, second = ranks.run(2, _orders, rule, orders)
    assert first == second


def _healed(rule: str) -> list[float]:
    """The largest difference of this rank's bias from rank 0's after each step; rank 1 flips it before the second."""
    from alflb_megatron.hosts.core import balancer_of
    from tests.distributed.test_router import _hidden

    rank = torch.distributed.get_rank()
    with ranks.model_parallel():
        model = _Layers(rule=rule, check_every=1, step_size=None)
        balancer, found = balancer_of([model]), []
        for step in range(4):
            if step == 1 and rank == 1:
                model.routers[0].expert_bias[5] += 0.1
            for number in range(3):
                model(_hidden(10 * step + number + 100 * rank), "ab")
            balancer.launch()
            balancer.commit()
            bias = model.routers[0].expert_bias.clone()
            torch.distributed.broadcast(bias, 0)
            found.append(float((bias - model.routers[0].expert_bias).abs().max()))
        return [*found, float(balancer.disagreements)]


@pytest.mark.parametrize("rule", ["adaptive", "sign"])
def test_a_bias_that_differs_is_healed(rule: str) -> None:
    for found in ranks.run(3, _healed, rule):
        assert found == [0.0, 0.0, 0.0, 0.0, 1.0]


def _own_group() -> list[Any]:
    """Loads summed over a group that the host gave: each rank alone."""
    from alflb_megatron.hosts.core import balancer_of
    from tests.distributed.test_router import _hidden

    rank = torch.distributed.get_rank()
    with ranks.model_parallel():
        groups = [torch.distributed.new_group([one]) for one in range(2)]
        model = _Layers()
        balancer = balancer_of([model], groups[rank])
        for number in range(2):
            model(_hidden(number + 100 * rank), "ab")
        balancer.launch()
        record = balancer.commit()
        return [
            int(record.loads[0].sum()),
            record.micro_batches.count,
            model.routers[0].within_batch.group is groups[rank],
        ]


def test_the_hosts_group_is_that_of_micro_batches_too() -> None:
    assert ranks.run(2, _own_group) == [[2 * 256, 2, True]] * 2


def _disabled() -> list[Any]:
    """Steps while ALF-LB is disabled: routed by the price, which nothing moves."""
    import alflb_megatron
    from tests.distributed.test_abandoned import _training
    from tests.distributed.test_identity import _routers

    with _training(True, alf=MICRO) as trainer:
        trainer.step(4)
        (router,) = _routers(trainer.chunks[0]).values()
        price = router.expert_bias.clone()
        alflb_megatron.disable()
        for _ in range(3):
            trainer.step(4)
        found: list[Any] = [torch.equal(router.expert_bias, price)]
        alflb_megatron.enable(rule="sign", **MICRO)
        trainer.step(1)
        return [*found, trainer.loads(), trainer.n(), bool((router.expert_bias - price).abs().max() < 2.1e-3)]


def test_while_disabled_the_price_routes_and_stands_still() -> None:
    assert ranks.run(1, _disabled) == [[True, 128, 2, True]]


def _many_small_scores(experts: int) -> tuple[float, float]:
    """MaxVio with a softmax gate over many experts, whose scores are small, with micro-batches and without."""
    from alflb_megatron.balancer import Balancer
    from alflb_megatron.within_batch import WithinBatch
    from tests.distributed.test_router import _router

    found = []
    with ranks.model_parallel():
        for alf in (MICRO, {}):
            router = _router(
                {"rule": "adaptive", **alf},
                num_moe_experts=experts,
                moe_router_topk=8,
                moe_router_score_function="softmax",
            )
            within = WithinBatch([router], router.tp_dp_cp_group) if alf else None
            balancer = Balancer([router], [1], router.tp_dp_cp_group)
            skew = torch.linspace(0, 1, experts)
            vio = []
            for step in range(10):
                for number in range(4):
                    if within is not None:
                        within.begin_micro_batch()
                    generator = torch.Generator().manual_seed(100 * step + number)
                    router.routing((torch.randn(1024, 1, experts, generator=generator) * 0.3 + skew).requires_grad_())
                balancer.launch()
                vio.append(float(balancer.commit().max_vio()))
            found.append(sum(vio[3:]) / len(vio[3:]))
    return found[0], found[1]


def test_small_scores_of_many_experts_are_told_apart() -> None:
    ((micro, whole),) = ranks.run(1, _many_small_scores, 256)
    assert micro < 1.1 * whole


# -- what a fresh reader tried -----------------------------------------------------------------------------------------


def _moves(order: str, checkpointed: str = "") -> list[tuple[list[float], int]]:
    """The largest move of each router's bias in each of three global batches of two micro-batches; how many there were.

    `checkpointed`: what stands around the whole chunk.
    """
    from torch.utils.checkpoint import checkpoint

    from alflb_megatron.hosts.core import balancer_of
    from tests.distributed.test_router import _hidden

    with ranks.model_parallel():
        model = _Layers(centring=False)
        balancer = balancer_of([model])
        found = []
        for step in range(3):
            before = [router.expert_bias.clone() for router in model.routers]
            for number in range(2):
                hidden = _hidden(10 * step + number).requires_grad_()
                reentrant = {"use_reentrant": checkpointed == "reentrant"}
                output = checkpoint(model, hidden, order, **reentrant) if checkpointed else model(hidden, order)
                output.backward()
            balancer.launch()
            record = balancer.commit()
            moved = [float((r.expert_bias - old).abs().max()) for r, old in zip(model.routers, before, strict=True)]
            found.append(([round(move, 6) for move in moved], record.micro_batches.count))
        return found


@pytest.mark.parametrize("order", ["abb", "abab", "aab"])
def test_a_router_that_is_called_twice_in_a_micro_batch_takes_one_step_for_it(order: str) -> None:
    """The first global batch has no M yet: each of its micro-batches takes a whole step."""
    (found,) = ranks.run(1, _moves, order)
    assert [count for _, count in found] == [2, 2, 2]
    assert all(move <= 0.01 + 1e-6 for moves, _ in found[1:] for move in moves)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_a_checkpoint_around_the_whole_chunk_changes_nothing(kind: str) -> None:
    assert ranks.run(1, _moves, "ab", kind) == ranks.run(1, _moves, "ab")


def _told() -> list[float]:
    """The largest move of the first global batch, of four micro-batches, by sign."""
    from alflb_megatron.lab.training import build

    plan = jobs.plan({"rule": "sign", "nproc": 1, "global_batch_size": 8}, centring=False, step_size=0.01, **MICRO)
    with ranks.model_parallel():
        build.tell_micro_batches(plan.job)
        runner = jobs.Runner(plan)
        runner.step(0)
        return [float(router.expert_bias.abs().max()) for router in runner.routers]


def test_the_first_global_batch_takes_the_steps_of_as_many_micro_batches_as_megatron_core_was_told() -> None:
    (moves,) = ranks.run(1, _told)
    assert all(0 < move <= 0.01 + 1e-6 for move in moves)


def _given_up_unevenly(
    before: tuple[int, ...], given_up: int, after: tuple[int, int], micro_batches: int, failed: bool = False
) -> list[Any]:
    """Loads of steps after one that two data-parallel ranks gave up at other micro-batches, both going on.

    `before`: whole steps that went before; `failed`: and then one that failed on the first rank alone.
    """
    from tests.distributed import test_abandoned

    rank = torch.distributed.get_rank()
    with test_abandoned._training(True, nproc=2, alf=MICRO) as trainer:
        for whole in before:
            trainer.step(whole)
        if failed:
            with contextlib.suppress(test_abandoned.Failed), test_abandoned._failing_after_the_reduction():
                trainer.step(3, optimizer=False)
        with (
            pytest.raises(test_abandoned.Failed),
            test_abandoned._failing(trainer.runner, "_forward_step", after=after[rank]),
        ):
            trainer.step(given_up)
        found = []
        for _ in range(3):
            trainer.step(micro_batches)
            found.append((trainer.loads(), trainer.n()))
        return found


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("after", [(0, 2), (1, 2), (2, 0)])
def test_ranks_may_give_a_batch_up_at_other_micro_batches(after: tuple[int, int], micro_batches: int) -> None:
    """None waits for the other, and each of the next batches is counted with its own."""
    right = [(256 * micro_batches, 2 + step) for step in (1, 2, 3)]
    assert ranks.run(2, _given_up_unevenly, (3, 3), 3, after, micro_batches) == [right, right]


@pytest.mark.parametrize(
    ("before", "given_up", "after", "failed"),
    [((), 3, (0, 2), False), ((1,), 4, (0, 3), False), ((2, 2), 6, (1, 5), False), ((), 3, (0, 2), True)],
    ids=["first", "ramp-up", "ramp-up-later", "after-a-finalize-that-failed"],
)
def test_also_where_no_batch_of_that_size_was_whole_before(
    before: tuple[int, ...], given_up: int, after: tuple[int, int], failed: bool
) -> None:
    found = ranks.run(2, _given_up_unevenly, before, given_up, after, 3, failed)
    for rank, steps in enumerate(found):
        done = len(before) + (rank if failed else 0)
        assert steps == [(768, done + step) for step in (1, 2, 3)]


def _left_to_the_price() -> dict[str, Any]:
    """`disable()` between forward and backward of a recomputed layer, and where `install` serves another model."""
    from types import SimpleNamespace

    import alflb_megatron
    from alflb_megatron.balancer import Balancer
    from alflb_megatron.hosts.core import install
    from alflb_megatron.within_batch import WithinBatch
    from tests.distributed import test_abandoned
    from tests.distributed.test_identity import _routers
    from tests.distributed.test_places import KINDS
    from tests.distributed.test_router import _hidden, _router

    same = []
    with ranks.model_parallel():
        for kind in KINDS[1:]:
            router = _router({"rule": "sign", "step_size": 0.05, **MICRO})
            within = WithinBatch([router], router.tp_dp_cp_group)
            Balancer([router], [1], router.tp_dp_cp_group)
            maps: list[torch.Tensor] = []
            router.register_forward_hook(lambda _, __, output, maps=maps: maps.append(output[1].clone()))
            for number in range(4):
                within.begin_micro_batch()
                maps.clear()
                loss = kind(router, _hidden(number).requires_grad_()).square().sum()
            first = maps[0]
            alflb_megatron.disable()
            loss.backward()
            same.append(all(torch.equal(chosen, first) for chosen in maps))
    with test_abandoned._training(True, alf=MICRO) as trainer:
        install(SimpleNamespace(finalize_model_grads_func=None))
        trainer.step(4)
        (router,) = _routers(trainer.chunks[0]).values()
        alflb_megatron.disable()
        price = router.expert_bias.clone()
        trainer.step(4)
        moved = router.within_batch is not None or not torch.equal(router.expert_bias, price)
    return {"same": same, "moved": moved}


def test_a_router_that_is_left_to_its_price_recomputes_as_it_routed_and_stays_there() -> None:
    (found,) = ranks.run(1, _left_to_the_price)
    assert all(found["same"]) and len(found["same"]) == 6 and not found["moved"]


def _frozen_meanwhile(rule: str) -> list[Any]:
    """A router whose weights are trained in some micro-batches only: what holds at the beginning holds to the end."""
    from alflb_megatron.hosts.core import balancer_of
    from tests.distributed.test_identity import _routers

    plan = jobs.plan({"rule": rule, "nproc": 1, "global_batch_size": 8}, {"num_layers": 3}, **MICRO)
    with ranks.model_parallel():
        runner = jobs.Runner(plan)
        one, *others = _routers(runner.setup.chunks[0]).values()
        runner.step(0)
        plain, passes = runner._forward_step, []

        def toggled(rows: Any, model: Any) -> Any:
            passes.append(1)
            one.weight.requires_grad_(len(passes) % 2 == 0)
            return plain(rows, model)

        runner._forward_step = toggled  # type: ignore[method-assign]
        runner.step(1)
        loads = [int(of.sum()) for of in balancer_of(runner.setup.chunks).last.loads]
        return [int(one.alf_n), [int(other.alf_n) for other in others], len(set(loads))]


@pytest.mark.parametrize("rule", ["sign", "adaptive"])
def test_who_moves_is_settled_when_a_global_batch_begins(rule: str) -> None:
    assert ranks.run(1, _frozen_meanwhile, rule) == [[1, [2], 1]]
