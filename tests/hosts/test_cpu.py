"""Megatron-Core without CUDA: each substitution is needed, is where it says, and does nothing where CUDA is."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alflb_megatron.hosts import cpu
from alflb_megatron.hosts.cpu import norm
from tests.distributed import jobs, ranks


def _train_save_load(folder: Path, nproc: int) -> list[float]:
    """On a rank: a step with the distributed optimizer, its checkpoint there and back in both ways; the losses.

    The last loss is of a model and optimizer that were built anew and read the checkpoint.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    from alflb_megatron.lab.training import checkpoint

    plan = jobs.plan({"rule": "sign", "nproc": nproc, "ep": nproc, "optimizer": "distributed"})
    losses = []
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        runner.step(0)
        saved = checkpoint.find(checkpoint.save(runner.setup, plan, 1, folder, ""), "--load")
        for step in (1, 2):
            runner.step(step)
        losses += runner.trace.losses[-1:]
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        checkpoint.load(runner.setup, plan, saved)
        runner.setup.scheduler.step(increment=1)
        for step in (1, 2):
            runner.step(step)
        losses += runner.trace.losses[-1:]
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        whole = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(saved.path)), group)
        dist_checkpointing.load(checkpoint._model_state(runner.setup), str(saved.path), whole)
        torch.distributed.barrier()
    return losses


def _gather_uneven(folder: Path, nproc: int) -> tuple[torch.Tensor, torch.Tensor]:
    """On a rank that holds 1 + 2 rank rows: Megatron's gather along the first dimension, and its gradient."""
    from megatron.core.tensor_parallel import mappings

    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    mine = torch.full((1 + 2 * rank, 2), float(rank + 1), requires_grad=True)
    gathered = mappings.gather_from_sequence_parallel_region(mine, True, group, [1 + 2 * r for r in range(nproc)])
    (gathered * torch.arange(8.0).view(4, 2) * (rank + 1)).sum().backward()
    assert mine.grad is not None
    return gathered.detach(), mine.grad


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw with all substitutions: one launch for the tests that share it."""
    return ranks.run(2, _all_of_two_ranks, tmp_path_factory.mktemp("checkpoint"))


def _all_of_two_ranks(folder: Path) -> dict[str, Any]:
    return {
        "resumed": _train_save_load(folder, 2),
        "gathered": _gather_uneven(folder, 2),
        "initial": _initial_weights(),
        "norms": _norm_weights(),
    }


def test_with_all_substitutions_the_distributed_optimizer_resumes_bit_for_bit(two_ranks: list[dict[str, Any]]) -> None:
    for uninterrupted, resumed in (rank["resumed"] for rank in two_ranks):
        assert uninterrupted == resumed


def test_uneven_shards_are_gathered_and_their_gradients_summed(two_ranks: list[dict[str, Any]]) -> None:
    (first, first_grad), (second, second_grad) = (rank["gathered"] for rank in two_ranks)
    assert first.tolist() == second.tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    assert torch.cat([first_grad, second_grad]).tolist() == (3 * torch.arange(8.0).view(4, 2)).tolist()


# How many ranks it takes to need a substitution, what they do, and what is said without it.
WITHOUT: dict[str, tuple[int, Callable[[Path, int], Any], str]] = {
    "current_device": (1, _train_save_load, "CUDA|NVIDIA"),
    "device_literals": (1, _train_save_load, "CUDA|NVIDIA"),
    "tensor_type": (1, _train_save_load, "torch.cuda.FloatTensor"),
    "random_state": (1, _train_save_load, "CUDA|NVIDIA"),
    "streams": (1, _train_save_load, "CUDA|NVIDIA"),
    "splits": (2, _train_save_load, "all_to_all_single"),
    "uneven_shards": (2, _gather_uneven, "invalid tensor size"),
    "router_gemm": (1, _train_save_load, "te_general_gemm"),
    "adam_step": (1, _train_save_load, "AssertionError|KeyError: 'step'"),
}


def test_every_substitution_is_left_out_here() -> None:
    assert set(WITHOUT) == {substitution.name for substitution in cpu.SUBSTITUTIONS}


def _needed_here() -> list[str]:
    # 0.17 and later define the name that `router_gemm` supplies.
    old = importlib.metadata.version("megatron-core").startswith("0.16.")
    return [name for name in WITHOUT if name != "router_gemm" or old]


@pytest.mark.parametrize("name", _needed_here())
def test_without_it_megatron_core_fails(name: str, tmp_path: Path) -> None:
    nproc, scenario, said = WITHOUT[name]
    with pytest.raises(ranks.RankError, match=said):
        ranks.run(nproc, scenario, tmp_path, nproc, without=(name,))


# What the cited functions hold that makes the substitution necessary.
EVIDENCE = {
    "current_device": ["torch.cuda.current_device()"],
    "device_literals": ["device='cuda'", 'device="cuda"', ".cuda()"],
    "tensor_type": ["'torch.cuda.FloatTensor'"],
    "random_state": [
        "torch.cuda.get_rng_state",
        "torch.cuda.random.get_rng_state",
        "_cuda_setRNGState",
        "cuda.manual_seed",
    ],
    "streams": ["torch.cuda.current_stream()", "torch.cuda.synchronize()"],
    "splits": ["tensor.is_cuda", "all_to_all_single"],
    "uneven_shards": ["torch.distributed.all_gather(", "torch.distributed.reduce_scatter("],
    "router_gemm": ["te_general_gemm is not None"],
    "adam_step": ['s["step"]', "in dst_tensors"],
}


@pytest.mark.parametrize("substitution", cpu.SUBSTITUTIONS, ids=lambda substitution: substitution.name)
def test_what_is_cited_stands_upstream(substitution: cpu.Substitution) -> None:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    for cited in substitution.needed_by.split(", "):
        file, _, name = cited.partition(":")
        source = (Path(spec.origin).parent / file).read_text(encoding="utf-8")
        bodies = [
            ast.get_source_segment(source, node) or ""
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        assert any(needle in body for body in bodies for needle in EVIDENCE[substitution.name]), cited


def test_the_table_has_a_row_a_substitution() -> None:
    rows = cpu.markdown_table().splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == [substitution.name for substitution in cpu.SUBSTITUTIONS]


def _switched_on(names: list[str]) -> dict[str, str]:
    """On a rank: what happens in a 16-bit step with each switch on; the empty name leaves all as they are."""
    plan = jobs.plan({"rule": "none", "nproc": 1, "dtype": "bf16"})
    answers = {}
    for name in names:
        switches = dict(cpu.SWITCHES)
        cpu.SWITCHES.update({name: True} if name else {})
        try:
            with ranks.model_parallel(**jobs.sizes(plan)):
                jobs.Runner(plan).step(0)
            answers[name] = "trains"
        except Exception as error:
            answers[name] = type(error).__name__
        cpu.SWITCHES.clear()
        cpu.SWITCHES.update(switches)
    return answers


def test_every_switch_has_to_be_off() -> None:
    (answers,) = ranks.run(1, _switched_on, ["", *cpu.SWITCHES])
    assert answers.pop("") == "trains"
    assert set(answers) == set(cpu.SWITCHES)
    assert "trains" not in answers.values(), answers


def _initial_weights() -> list[tuple[float, float]]:
    """On a rank: the sums of the absolute weights of its first expert and first router, twice: initialised as
    `hosts/cpu.py` has it, and with Megatron-Core's `use_cpu_initialization`."""
    plan = jobs.plan({"rule": "none", "nproc": 2, "ep": 2})
    sums = []
    for on_cpu in (False, True):
        cpu.SWITCHES["use_cpu_initialization"] = on_cpu
        with ranks.model_parallel(**jobs.sizes(plan)):
            (chunk,) = jobs.Runner(plan).setup.chunks
            weights = {name: float(weight.detach().double().abs().sum()) for name, weight in chunk.named_parameters()}
        expert = next(name for name in weights if "local_experts.0" in name)
        router = next(name for name in weights if name.endswith("router.weight"))
        sums.append((weights[expert], weights[router]))
    del cpu.SWITCHES["use_cpu_initialization"]
    return sums


def test_experts_differ_between_ranks_unless_initialised_on_the_cpu(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["initial"] for rank in two_ranks)
    for (expert_0, router_0), (expert_1, router_1), alike in zip(first, second, (False, True), strict=True):
        assert router_0 == router_1
        assert (expert_0 == expert_1) is alike


def _norms() -> None:
    """On a rank: what `SequenceParallelNorm` and `use_plain_norm` promise."""
    with ranks.model_parallel():
        _check_norms()


def _check_norms() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 4, "mtp_num_layers": 1}
    input_BH = torch.randn(3, 8)
    for kind in ("LayerNorm", "RMSNorm"):
        config = TransformerConfig(**sizes, normalization=kind, moe_layer_freq=[0, 1])
        theirs, ours = WrappedTorchNorm(config, 8, eps=1e-3), norm.SequenceParallelNorm(config, 8, eps=1e-3)
        assert torch.equal(theirs(input_BH), ours(input_BH)) and list(theirs.state_dict()) == list(ours.state_dict())
        config.sequence_parallel = True
        with pytest.raises(AssertionError, match="sequence parallel"):
            WrappedTorchNorm(config, 8)
        assert all(p.sequence_parallel for p in norm.SequenceParallelNorm(config, 8).parameters())

        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=kind)
        for block in (spec, get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)):
            before = repr(block)
            twin = norm.use_plain_norm(block, config)
            assert repr(block) == before and "WrappedTorchNorm" in before
            assert repr(twin) == before.replace(
                f"{WrappedTorchNorm.__module__}.WrappedTorchNorm", f"{norm.__name__}.SequenceParallelNorm"
            )
    assert norm.use_plain_norm(None, config) is None
    config.normalization = "L2Norm"
    with pytest.raises(ValueError, match="normalization=L2Norm: must be LayerNorm or RMSNorm"):
        norm.SequenceParallelNorm(config, 8)


def test_norms_are_pytorchs_and_marked() -> None:
    ranks.run(1, _norms)


def _norm_weights() -> dict[str, torch.Tensor]:
    """On a rank: the norms' weights after three steps under sequence parallelism."""
    plan = jobs.plan({"rule": "none", "nproc": 2, "tp": 2})
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        for step in range(3):
            runner.step(step)
        (chunk,) = runner.setup.chunks
        return {name: weight.detach().clone() for name, weight in chunk.named_parameters() if "norm" in name}


def test_norms_stay_the_same_on_every_tensor_parallel_rank(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["norms"] for rank in two_ranks)
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(weight, torch.ones_like(weight)) for weight in first.values())


UNTOUCHED = """
import os, sys, torch, torch.distributed as dist
torch.cuda.is_available = lambda: True
owners = torch, torch.cuda, torch.cuda.random, torch.Tensor, dist
before = [dict(vars(owner)) for owner in owners]
from alflb_megatron.hosts import cpu
assert cpu.prepare() == ()
for owner, old in zip(owners, before):
    changed = [name for name in old if vars(owner)[name] is not old[name]]
    assert not changed, changed
assert "TORCHDYNAMO_DISABLE" not in os.environ and "megatron.core" not in sys.modules
"""

CUDA_ALONE = """
import torch, torch.distributed as dist
from alflb_megatron.hosts import cpu
cpu.prepare(skip={"router_gemm", "adam_step"})
import megatron.core.transformer.moe.moe_utils as moe_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
torch.cuda.is_available = lambda: True
owners = torch, torch.cuda, torch.cuda.random, torch.Tensor, dist
before = [dict(vars(owner)) for owner in owners]
tokens, weight = torch.rand(4, 8), torch.rand(3, 8)
names = [substitution.name for substitution in cpu.prepare_without_te()]
assert names == ["router_gemm", "adam_step"], names
assert moe_utils.te_general_gemm is None and DistributedOptimizer.state_dict._alflb_cpu
logits = moe_utils.router_gating_linear(tokens, weight, None, torch.float32)
assert torch.equal(logits, tokens @ weight.t())
for owner, old in zip(owners, before):
    changed = [name for name in old if vars(owner)[name] is not old[name]]
    assert not changed, changed
import megatron.core.extensions.transformer_engine as transformer_engine
transformer_engine.HAVE_TE = True
assert cpu.prepare_without_te() == ()
"""

TWICE = """
import torch, torch.distributed as dist
from alflb_megatron.hosts import cpu
first = cpu.prepare()
assert first == cpu.SUBSTITUTIONS
import megatron.core.transformer.moe.token_dispatcher as dispatcher
import megatron.core.tensor_parallel.random as random
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
owners = torch, torch.cuda, torch.cuda.random, torch.Tensor, dist, dispatcher, random, DistributedOptimizer
before = [dict(vars(owner)) for owner in owners]
assert cpu.prepare() == first
for owner, old in zip(owners, before):
    changed = [name for name in old if vars(owner)[name] is not old[name]]
    assert not changed, changed
from megatron.core.jit import jit_fuser
assert jit_fuser(repr) is repr  # nothing is compiled
"""

COMPILED = """
from alflb_megatron.hosts import cpu
cpu.ENVIRONMENT.clear()
cpu.prepare()
import torch
from megatron.core.jit import jit_fuser
try:
    jit_fuser(lambda x: x + 1)(torch.ones(3))
except Exception as error:
    assert "compiler" in str(error), error
else:
    raise AssertionError("it ran without a compiler")
"""

TOO_LATE = """
from alflb_megatron.hosts import cpu
cpu._hide_old_resiliency()  # Megatron-Core from 0.17 on could not be imported at all beside it
import megatron.core
try:
    cpu.prepare()
except RuntimeError as error:
    assert "call prepare() first" in str(error) and "TORCHDYNAMO_DISABLE=1" in str(error), error
else:
    raise AssertionError("no error")
"""

PROGRAMS = {
    "where CUDA is, nothing changes": UNTOUCHED,
    "where CUDA is without Transformer Engine, two stand in for it": CUDA_ALONE,
    "twice is once": TWICE,
    "a compiler would be needed": COMPILED,
    "too late is an error": TOO_LATE,
}


@pytest.mark.parametrize("title", PROGRAMS)
def test_prepare_in_a_process_of_its_own(title: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in cpu.ENVIRONMENT}
    environment |= {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[title]], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
