"""The one-line mode and the explicit one: the same training, and nothing left of the first once it is taken back."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import jobs, ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_loop.py"


ZEROED = "zero_grad_buffer"


def _attributes() -> list[tuple[str, Any]]:
    """Every attribute of Megatron-Core that `enable` replaces."""
    import megatron.core.distributed  # noqa: F401  (the module behind the function of the same name)
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.data_parallel_base import _BaseDataParallel
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import MegatronFSDP
    from megatron.core.transformer.moe.moe_layer import MoELayer

    finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]
    return [
        ("MoELayer.__init__", MoELayer.__init__),
        ("get_model_config", finalize.get_model_config),
        ("reset_model_temporary_tensors", finalize.reset_model_temporary_tensors),
        ("load", TorchDistLoadShardedStrategy.load),
        *((ZEROED, wrapper.zero_grad_buffer) for wrapper in (_BaseDataParallel, DistributedDataParallel, MegatronFSDP)),
    ]


def _modes() -> dict[str, Any]:
    """On a rank: what enable and disable do to Megatron-Core, and traces of the same training in each mode."""
    import alflb_megatron
    from alflb_megatron.router import ALFRouter

    found: dict[str, Any] = {}
    before = _attributes()
    explicit = jobs.trace(jobs.plan({"rule": "sqrt", "nproc": 2, "ep": 2}), 8)
    changed = {name for (name, now), (_, then) in zip(_attributes(), before, strict=True) if now is not then}
    found["explicit changes"] = changed

    plain = jobs.plan({"rule": "none", "nproc": 2, "ep": 2})
    without = jobs.trace(plain, 8)
    config = alflb_megatron.enable(rule="sqrt")
    try:
        found["marked"] = [getattr(value, "__alflb__", False) for _, value in _attributes()]
        after = _attributes()
        found["twice is once"] = alflb_megatron.enable(rule="sqrt") is config and _attributes() == after
        try:
            alflb_megatron.enable(rule="sign")
        except RuntimeError as error:
            found["other settings"] = str(error)
        # The plan knows nothing of our rule: the router and the update come from `enable` alone.
        hooked = jobs.trace(plain, 8)
        found["one line is explicit"] = hooked.differs_from(explicit)
        with ranks.model_parallel(**jobs.sizes(plain)):
            runner = jobs.Runner(plain)
            found["router"] = {type(router) is ALFRouter for router in runner.routers}
            found["direct"] = _finalized_by_hand(runner)
    finally:
        alflb_megatron.disable()
    now = {name for (name, now), (_, then) in zip(_attributes(), before, strict=True) if now is not then}
    found["undone"] = now == {ZEROED}  # which `install` has asked for
    alflb_megatron.disable()  # twice is once here, too
    found["off is off"] = jobs.trace(plain, 8).differs_from(without)
    found["a name imported early still updates"] = _imported_early()
    return found


def _finalized_by_hand(runner: jobs.Runner) -> list[int]:
    """Updates of a loop that calls finalize_model_grads itself, as Megatron-LM's own small examples do."""
    from megatron.core.distributed import finalize_model_grads

    setup = runner.setup
    setup.config.finalize_model_grads_func = None
    for step in range(2):
        for chunk in setup.chunks:
            chunk.zero_grad_buffer()
        runner.forward_backward(step)
        finalize_model_grads(setup.chunks)
        setup.optimizer.step()
    return [int(router.alf_n) for router in runner.routers]


def _imported_early() -> list[int]:
    """Updates where the trainer holds finalize_model_grads from before `enable`, bound in a partial."""
    from functools import partial

    from megatron.core.distributed import finalize_model_grads

    import alflb_megatron

    early = partial(finalize_model_grads, force_all_reduce=False)
    plan = jobs.plan({"rule": "none", "nproc": 2, "ep": 2})
    alflb_megatron.enable(rule="sign")
    try:
        with ranks.model_parallel(**jobs.sizes(plan)):
            runner = jobs.Runner(plan)
            runner.setup.config.finalize_model_grads_func = early
            for step in range(2):
                runner.step(step)
            return [int(router.alf_n) for router in runner.routers]
    finally:
        alflb_megatron.disable()


def test_one_line_or_explicit_is_the_same_and_can_be_taken_back() -> None:
    for found in ranks.run(2, _modes):
        assert found["explicit changes"] == {ZEROED}
        assert found["marked"] == [True] * 7
        assert found["twice is once"]
        assert "already" in found["other settings"]
        assert found["router"] == {True}
        assert found["one line is explicit"] == ""
        assert found["direct"] == [2, 2, 2]
        assert found["a name imported early still updates"] == [2, 2, 2]
        assert found["undone"]
        assert found["off is off"] == ""


def _with_the_builtin_flag() -> str:
    """On a rank: our router under moe_router_enable_expert_bias=True, where Megatron-Core's updater runs as well."""
    from alflb_megatron.lab.training import build

    plan = jobs.plan({"rule": "sign", "nproc": 2, "ep": 2}, step_size=0.01)
    once = jobs.trace(plan, 6)
    original = build.transformer_config

    def with_flag(plan_: Any) -> Any:
        config = original(plan_)
        config.moe_router_enable_expert_bias, config.moe_router_bias_update_rate = True, 0.01
        return config

    build.transformer_config = with_flag  # type: ignore[assignment]
    try:
        return jobs.trace(plan, 6).differs_from(once)
    finally:
        build.transformer_config = original


def test_megatron_cores_updater_does_not_move_our_bias_a_second_time() -> None:
    for difference in ranks.run(2, _with_the_builtin_flag):
        assert difference == ""


@pytest.mark.parametrize("mode", ["enable", "explicit"])
def test_the_example_runs(mode: str) -> None:
    with socket.socket() as free:  # another suite may run beside this one, and the example's own port is fixed
        free.bind(("localhost", 0))
        environment = {**os.environ, "MASTER_PORT": str(free.getsockname()[1])}
    words = [sys.executable, str(EXAMPLE), "--mode", mode]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    vio = [float(value) for value in re.findall(r"MaxVio (\S+)", done.stdout)]
    assert len(vio) == 6
    assert min(vio[3:]) < vio[0]
