"""A global batch that ends early, wherever it does, leaves nothing behind that a later one counts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.distributed import finalize_model_grads

from tests.distributed import jobs, ranks


class Failed(Exception):
    """What the tests raise inside a step; trainers that go on catch it."""


def _plan(enabled: bool, micro_batches: int, **job: Any) -> Any:
    split = {"nproc": 1, "pp": 1, "vpp": 1, **job}
    size = 2 * micro_batches * split["nproc"] // split["pp"]
    rule = "none" if enabled else "sign"
    layers = 2 * split["pp"] * split["vpp"]
    alf = {} if enabled else split.pop("alf", {})
    split.pop("alf", None)
    job = {"rule": rule, "micro_batch_size": 2, "global_batch_size": size, **split}
    return jobs.plan(job, {"num_layers": layers}, **alf)


class Trainer:
    """Steps of given numbers of micro-batches of two sequences of 32 tokens, each token to two experts."""

    def __init__(self, enabled: bool, **job: Any) -> None:
        self.enabled, self.job = enabled, job
        self.runner = jobs.Runner(_plan(enabled, 2, **job))
        if enabled:  # what updates is the one line alone
            self.runner.setup.config.finalize_model_grads_func = finalize_model_grads
        self.chunks = self.runner.setup.chunks

    def step(self, micro_batches: int, zero: bool = True, optimizer: bool = True) -> None:
        self.runner.plan = _plan(self.enabled, micro_batches, **self.job)
        for chunk in self.chunks if zero else ():
            chunk.zero_grad_buffer()
        self.runner.forward_backward(micro_batches)
        if optimizer:
            self.runner.setup.optimizer.step()

    def loads(self) -> int:
        """Tokens of one layer in the last global batch, K=2 times."""
        from alflb_megatron.hosts.core import balancer_of

        return int(balancer_of(self.chunks).last.loads[0].sum())

    def n(self) -> int:
        from alflb_megatron.hosts.core import balancer_of

        return int(balancer_of(self.chunks).routers[0].alf_n)


@contextlib.contextmanager
def _training(enabled: bool, **job: Any) -> Iterator[Trainer]:
    import alflb_megatron

    if enabled:
        alflb_megatron.enable(rule="sign", **job.get("alf", {}))
    try:
        with ranks.model_parallel(**jobs.sizes(_plan(enabled, 2, **job))):
            yield Trainer(enabled, **job)
    finally:
        alflb_megatron.disable()


def _fail(*args: Any, **kwargs: Any) -> None:
    raise Failed


@contextlib.contextmanager
def _failing(owner: Any, name: str, after: int = 0) -> Iterator[None]:
    """Within the block a function works `after` times and then raises."""
    original = getattr(owner, name)
    calls = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return _fail() if calls > after else original(*args, **kwargs)

    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _in_forward(trainer: Trainer) -> Any:
    return _failing(trainer.runner, "_forward_step", after=2)


def _in_backward(trainer: Trainer) -> Any:
    from megatron.core.pipeline_parallel import schedules

    return _failing(schedules, "backward_step", after=1)


def _in_gradient_reduction(trainer: Trainer) -> Any:
    return _failing(trainer.chunks[0], "finish_grad_sync")


def _in_the_optimizer(trainer: Trainer) -> Any:
    return _failing(trainer.runner.setup.optimizer, "step")


PLACES = [_in_forward, _in_backward, _in_gradient_reduction, _in_the_optimizer]


def _abandoned(place: Callable[[Trainer], Any], enabled: bool, first: bool) -> list[int]:
    """Loads of steps of 1, 2, 1 micro-batches after one of 3 that failed; `first`: nothing went before it."""
    with _training(enabled) as trainer:
        if not first:
            trainer.step(2)
        with pytest.raises(Failed), place(trainer):
            trainer.step(3)
        found = []
        for micro_batches in (1, 2, 1):
            trainer.step(micro_batches)
            found.append(trainer.loads())
        return found


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_failed_leaves_nothing_for_the_next(place: Callable[[Trainer], Any], enabled: bool) -> None:
    for first in (True, False):
        (found,) = ranks.run(1, _abandoned, place, enabled, first)
        assert found == [128, 256, 128], f"first: {first}"


def _not_zeroed(enabled: bool) -> list[int]:
    """The gradient reduction fails, and the trainer goes on without zeroing its gradients."""
    with _training(enabled) as trainer:
        trainer.step(2)
        with pytest.raises(Failed), _in_gradient_reduction(trainer):
            trainer.step(3)
        found = []
        for micro_batches in (1, 2, 1):
            trainer.step(micro_batches, zero=False)
            found.append(trainer.loads())
        return found


@pytest.mark.parametrize("enabled", [True, False])
def test_nor_where_gradients_are_not_zeroed(enabled: bool) -> None:
    (found,) = ranks.run(1, _not_zeroed, enabled)
    assert found == [128, 256, 128]


def _zeroed_after_forward(**alf: Any) -> tuple[int, list[str]]:
    """Forward, gradients zeroed, backward: as many loops for torch have it. The loads, and what is said."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("alflb_megatron").addHandler(handler)
    with _training(True, alf=alf) as trainer:
        (chunk,) = trainer.chunks
        trainer.step(2)
        for _ in range(2):
            output, loss_of = trainer.runner._forward_step(iter(jobs.batches(trainer.runner.plan, 0, 0)), chunk)
            chunk.zero_grad_buffer()
            loss_of(output)[0].backward()
            finalize_model_grads([chunk])
        return trainer.loads(), [record.getMessage() for record in records]


@pytest.mark.parametrize("alf", [{}, {"update_every": "micro-batch"}])
def test_loads_that_are_forgotten_with_the_gradients_of_the_same_batch_are_said_once(alf: dict[str, Any]) -> None:
    ((loads, said),) = ranks.run(1, partial(_zeroed_after_forward, **alf))
    assert loads == 0
    assert len([line for line in said if "Zero gradients before the first forward pass" in line]) == 1


def _rerun(enabled: bool, report: bool, fatal: bool, every: str) -> dict[str, Any]:
    """Three steps under the rerun state machine, whose second one looks wrong (or all of them are run twice)."""
    from megatron.core import rerun_state_machine as module

    mode = module.RerunMode.REPORT_DETERMINISM_STATS if report else module.RerunMode.VALIDATE_RESULTS
    with _training(enabled, alf={"update_every": every}) as trainer:
        module.destroy_rerun_state_machine()
        module.initialize_rerun_state_machine(mode=mode)
        machine = module.get_rerun_state_machine()
        machine._maybe_report_stats = lambda: None  # it fails in 0.16.1
        maps: list[list[list[Any]]] = []
        before: list[torch.Tensor] = []
        for step in range(3):
            maps.append([])
            before = [router.expert_bias.clone() for router in trainer.runner.routers]
            while machine.should_run_forward_backward(None):
                trainer.runner._maps.clear()
                trainer.step(2, optimizer=False)
                maps[-1].append([chosen.tolist() for chosen in trainer.runner._maps])
                if step == 1 and not report:
                    machine.rerun_requested = True  # as `validate_result` does
                    machine.continue_requested, machine.checkpoint_requested = not fatal, fatal
            if machine.should_checkpoint_and_exit()[0]:
                break
            trainer.runner.setup.optimizer.step()
        now = [router.expert_bias for router in trainer.runner.routers]
        module.destroy_rerun_state_machine()
        return {
            "runs": [len(runs) for runs in maps],
            "same": all(run == runs[0] for runs in maps for run in runs),
            "n": trainer.n(),
            "moved": any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)),
        }


@pytest.mark.parametrize("every", ["global-batch", "micro-batch"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_that_is_run_again_begins_with_the_bias_that_it_had(enabled: bool, every: str) -> None:
    """It routes as its first run did, counts once, and a checkpoint of its beginning has the bias of its beginning."""
    (found,) = ranks.run(1, _rerun, enabled, False, False, every)
    assert found == {"runs": [1, 2, 1], "same": True, "n": 3, "moved": True}
    (found,) = ranks.run(1, _rerun, enabled, False, True, every)
    assert found == {"runs": [1, 2], "same": True, "n": 1, "moved": False}
    (found,) = ranks.run(1, _rerun, enabled, True, False, every)
    assert found == {"runs": [2, 2, 2], "same": True, "n": 3, "moved": True}


def _interleaved(place: Callable[[Trainer], Any]) -> list[int]:
    with _training(True, nproc=2, pp=2, vpp=2) as trainer:
        with pytest.raises(Failed), place(trainer):
            trainer.step(4)
        trainer.step(2)
        return [trainer.loads(), sum(_left(chunk) for chunk in trainer.chunks)]


@pytest.mark.parametrize("place", [_in_gradient_reduction, _in_the_optimizer])
def test_nor_one_of_an_interleaved_pipeline(place: Callable[[Trainer], Any]) -> None:
    assert ranks.run(2, _interleaved, place) == [[256, 0]] * 2


def _left(chunk: torch.nn.Module) -> int:
    from alflb_megatron.loads import LoadCounter

    return sum(int(module.tokens_per_expert.sum()) for module in chunk.modules() if isinstance(module, LoadCounter))


def _disabled_meanwhile() -> dict[str, Any]:
    import alflb_megatron

    with _training(True) as trainer:
        trainer.step(2)
        alflb_megatron.disable()
        for _ in range(3):
            trainer.step(2)
        before = trainer.n()
        alflb_megatron.enable(rule="sign")
        trainer.step(1, zero=False)
        return {"n while disabled": before, "n": trainer.n(), "loads": trainer.loads()}


def test_steps_while_disabled_are_not_counted_once_it_is_enabled_again() -> None:
    (found,) = ranks.run(1, _disabled_meanwhile)
    assert found == {"n while disabled": 1, "n": 2, "loads": 128}


def _disagreed() -> dict[str, Any]:
    """A check that stops on a bias that differs, which the trainer catches."""
    import dataclasses

    from alflb_megatron.agreement import DisagreementError
    from alflb_megatron.hosts.core import balancer_of

    with _training(False, nproc=2) as trainer:
        balancer = balancer_of(trainer.chunks)
        router: Any = balancer.routers[0]
        router.alf = dataclasses.replace(router.alf, check_every=1, on_disagreement="stop")
        trainer.step(2)
        whole = trainer.loads()
        if torch.distributed.get_rank() == 0:
            router.expert_bias += 1
        with pytest.raises(DisagreementError):
            trainer.step(4)
        left = _left(trainer.chunks[0])
        router.expert_bias.zero_()
        trainer.step(2, zero=False)
        return {"left": left, "whole": whole, "loads": trainer.loads()}


def test_a_disagreement_that_stops_leaves_nothing_either() -> None:
    for found in ranks.run(2, _disagreed):
        assert found["left"] == 0
        assert found["loads"] == found["whole"] == 512


def _first_chunk_is_dense() -> list[int]:
    """An interleaved pipeline by the one line alone: the first chunk of rank 0 holds no router."""
    from alflb_megatron.hosts import core

    with _training(True, nproc=2, pp=2, vpp=2) as trainer:
        core._BALANCERS.clear()  # a trainer has made none
        found = []
        for _ in range(3):
            trainer.step(4)
            found.append(trainer.n())
        return found


def test_the_first_global_batch_counts_where_the_first_chunk_is_dense() -> None:
    assert ranks.run(2, _first_chunk_is_dense) == [[1, 2, 3]] * 2


def _two_models() -> list[int]:
    """The gradient reduction of one fails, the other trains on, and the first goes on without zeroing."""
    with _training(True) as one:
        other = Trainer(True)
        one.step(2)
        other.step(2)
        with pytest.raises(Failed), _in_gradient_reduction(one):
            one.step(3)
        other.step(2)
        found = [other.loads()]
        for micro_batches in (1, 2, 1):
            one.step(micro_batches, zero=False)
            found.append(one.loads())
        return found


def test_another_model_in_the_process_makes_no_difference() -> None:
    assert ranks.run(1, _two_models) == [[256, 128, 256, 128]]


def _enabled_meanwhile() -> int:
    import alflb_megatron

    with _training(False) as trainer:
        alflb_megatron.enable(rule="sign")
        alflb_megatron.disable()
        with pytest.raises(Failed), _in_forward(trainer):
            trainer.step(3)
        trainer.step(2)
        return trainer.loads()


def test_what_install_put_in_is_not_taken_away_by_disable() -> None:
    assert ranks.run(1, _enabled_meanwhile) == [256]


@contextlib.contextmanager
def _failing_after_the_reduction() -> Iterator[None]:
    """On the first rank alone, once loads and gradients have been summed."""
    import sys

    module = sys.modules["megatron.core.distributed.finalize_model_grads"]
    with _failing(module, "_allreduce_word_embedding_grads", after=1000 * torch.distributed.get_rank()):
        yield


def _failed_on_one_rank(enabled: bool, every: str) -> dict[str, Any]:
    """Neither rank calls its optimizer then, and both go on."""
    from alflb_megatron.hosts.core import balancer_of

    with _training(enabled, nproc=2, alf={"update_every": every, "check_every": 3}) as trainer:
        trainer.step(2)
        with contextlib.suppress(Failed), _failing_after_the_reduction():
            trainer.step(2, optimizer=False)
        loads = []
        for _ in range(7):
            trainer.step(2)
            loads.append(trainer.loads())
        return {"loads": loads, "n": trainer.n(), "healed": balancer_of(trainer.chunks).disagreements}


@pytest.mark.parametrize("every", ["global-batch", "micro-batch"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_that_failed_on_one_rank_alone_is_found_by_the_next_check_and_healed(enabled: bool, every: str) -> None:
    first, second = ranks.run(2, _failed_on_one_rank, enabled, every)
    assert first == second
    assert first["loads"] == [512] * 7 and first["healed"] == 1
