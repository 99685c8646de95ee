"""What Megatron-Core takes from CUDA and is given something else for, each with the upstream function that needs it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Substitution:
    """One thing that Megatron-Core takes from CUDA and is given something else for.

    `needed_by` cites upstream as `file:function`, relative to `megatron/core`, several separated by ", ".
    `apply` makes the replacement and may be called again without effect.
    """

    name: str
    needed_by: str
    why: str
    apply: Callable[[], None]
    with_cuda: bool = False
    """Needed with CUDA too, where Transformer Engine is missing."""


def put(owner: Any, name: str, replacement: Any) -> None:
    """Sets `owner.name`, marked, so that a second call leaves the first replacement in place."""
    current = getattr(owner, name, None)
    if not getattr(current, "_alflb_cpu", False):
        replacement._alflb_cpu = True
        setattr(owner, name, replacement)


def _current_device() -> None:
    put(torch.cuda, "current_device", lambda: CPU)


def _device_literals() -> None:
    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return make

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    for name in ("tensor", "zeros", "ones", "empty", "rand", "full", "arange", "empty_like"):
        put(torch, name, on_cpu(getattr(torch, name)))
    put(torch.Tensor, "cuda", cuda)


def _tensor_type() -> None:
    plain = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    put(torch.Tensor, "type", type_)


def _random_state() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    put(torch.cuda, "get_rng_state", get_state)
    put(torch.cuda.random, "get_rng_state", get_state)
    put(torch.cuda, "manual_seed", manual_seed)
    put(random, "_set_cuda_rng_state", set_state)


class _Stream(torch.cpu.Stream):
    """PyTorch's null stream, whose events can be waited for."""

    def record_event(self) -> torch.cpu.Event:  # type: ignore[override]
        return torch.cpu.Event()


def _streams() -> None:
    put(torch.cuda, "Stream", _Stream)
    put(torch.cuda, "current_stream", lambda device=None: torch.cpu.current_stream())
    put(torch.cuda, "synchronize", lambda device=None: None)


def _splits() -> None:
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    plain = dispatcher.maybe_move_tensor_to_cpu

    @functools.wraps(plain)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = plain(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    put(dispatcher, "maybe_move_tensor_to_cpu", move)


def _uneven_shards() -> None:
    plain_gather, plain_scatter = dist.all_gather, dist.reduce_scatter

    def uneven(shards: list[torch.Tensor], async_op: bool) -> bool:
        return not async_op and len({shard.shape for shard in shards}) > 1

    def padded(shard: torch.Tensor, shards: list[torch.Tensor]) -> torch.Tensor:
        longest = max(len(other) for other in shards)
        return torch.cat([shard, shard.new_zeros(longest - len(shard), *shard.shape[1:])])

    @functools.wraps(plain_gather)
    def all_gather(tensor_list: Any, tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if not uneven(tensor_list, async_op):
            return plain_gather(tensor_list, tensor, group=group, async_op=async_op)
        even = [padded(shard, tensor_list) for shard in tensor_list]
        plain_gather(even, padded(tensor, tensor_list), group=group)
        for shard, filled in zip(tensor_list, even, strict=True):
            shard.copy_(filled[: len(shard)])

    @functools.wraps(plain_scatter)
    def reduce_scatter(
        output: torch.Tensor, input_list: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if not uneven(input_list, async_op):
            return plain_scatter(output, input_list, op=op, group=group, async_op=async_op)
        filled = padded(output, input_list)
        plain_scatter(filled, [padded(shard, input_list) for shard in input_list], op=op, group=group)
        output.copy_(filled[: len(output)])

    put(dist, "all_gather", all_gather)
    put(dist, "reduce_scatter", reduce_scatter)


def _router_gemm() -> None:
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _adam_step() -> None:
    optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if optimizer.HAVE_APEX_OR_TE:
        return
    plain_state_dict = optimizer.DistributedOptimizer.state_dict
    plain_set = optimizer.DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(plain_state_dict)
    def state_dict(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return plain_state_dict(self)

    @functools.wraps(plain_set)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        # load_state_dict gave every parameter the same step tensor, which Adam would then advance once for each.
        state["step"] = state["step"].clone()
        with torch.no_grad():  # in float32 the main parameter is a view of the model's, which autograd guards
            plain_set(self, model_param, {**tensors, "step": state["step"]})

    put(optimizer.DistributedOptimizer, "state_dict", state_dict)
    put(optimizer.DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states)


SUBSTITUTIONS: tuple[Substitution, ...] = (
    Substitution(
        "current_device",
        "tensor_parallel/layers.py:__init__, transformer/moe/router.py:__init__, "
        "distributed/param_and_grad_buffer.py:__init__",
        "every parameter and buffer is made on `torch.cuda.current_device()`: it is the CPU",
        _current_device,
    ),
    Substitution(
        "device_literals",
        "pipeline_parallel/schedules.py:forward_backward_no_pipelining, optimizer/optimizer.py:__init__, "
        "transformer/utils.py:get_default_causal_mask, "
        "dist_checkpointing/exchange_utils.py:_get_empty_tensor_for_exchange, "
        "models/common/language_module/language_module.py:setup_embeddings_and_output_layer",
        '`device="cuda"` and `.cuda()` are written out: factories read the one as the CPU, the other does nothing',
        _device_literals,
    ),
    Substitution(
        "tensor_type",
        "optimizer/clip_grads.py:clip_grad_by_total_norm_fp32, optimizer/optimizer.py:__init__, "
        "optimizer/distrib_optimizer.py:_build_model_and_main_param_groups",
        "types are compared with 'torch.cuda.FloatTensor' and its kin: `Tensor.type()` answers so",
        _tensor_type,
    ),
    Substitution(
        "random_state",
        "tensor_parallel/random.py:add, tensor_parallel/random.py:_get_cuda_rng_state, "
        "tensor_parallel/random.py:_set_cuda_rng_state, tensor_parallel/random.py:model_parallel_cuda_manual_seed",
        "the CUDA generator is seeded, read and set, in part silently without effect: the CPU's takes its place",
        _random_state,
    ),
    Substitution(
        "streams",
        "transformer/moe/token_dispatcher.py:_maybe_dtoh_and_synchronize, "
        "pipeline_parallel/p2p_communication.py:_communicate, "
        "dist_checkpointing/strategies/filesystem_async.py:preload_tensors",
        "copies run on a side stream and are waited for: PyTorch's own null streams for the CPU",
        _streams,
    ),
    Substitution(
        "splits",
        "transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu, tensor_parallel/mappings.py:forward",
        "the all-to-all splits become NumPy arrays only when they leave a GPU: they become so here too",
        _splits,
    ),
    Substitution(
        "uneven_shards",
        "tensor_parallel/mappings.py:_gather_along_first_dim, "
        "tensor_parallel/mappings.py:_reduce_scatter_along_first_dim",
        "with ETP > 1 ranks hold different numbers of tokens, which NCCL gathers and gloo does not: they are padded",
        _uneven_shards,
    ),
    Substitution(
        "router_gemm",
        "transformer/moe/moe_utils.py:forward",
        "0.16 reads `te_general_gemm`, a name that exists only with Transformer Engine: it is None, as from 0.17 on",
        _router_gemm,
        with_cuda=True,
    ),
    Substitution(
        "adam_step",
        "optimizer/distrib_optimizer.py:state_dict, "
        "optimizer/distrib_optimizer.py:_set_main_param_and_optimizer_states",
        "torch's Adam counts steps by parameter, TE's and apex's by group: lets the distributed optimizer be loaded",
        _adam_step,
        with_cuda=True,
    ),
)


def markdown_table(substitutions: Sequence[Substitution] = SUBSTITUTIONS, where: str = "`megatron/core`") -> str:
    """Substitutions as a table for the documentation: name, what needs it, why."""
    rows = [f"| substitution | needed by (in {where}) | why |", "|---|---|---|"]
    for s in substitutions:
        cited = ", ".join(f"`{place}`" for place in s.needed_by.split(", "))
        rows.append(f"| `{s.name}` | {cited} | {s.why} |")
    return "\n".join(rows)
