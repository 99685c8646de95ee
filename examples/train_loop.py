"""A small mixture-of-experts model trained with Megatron-Core, its experts balanced by ALF-LB: two ways to turn it on.

    python examples/train_loop.py --mode enable
    torchrun --nproc-per-node 2 examples/train_loop.py --mode explicit --ep 2

Everything but the lines marked ALF-LB is what a Megatron-Core training script holds anyway. Works without a GPU.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

import alflb_megatron
from alflb_megatron.hosts import cpu

STEPS, SEQUENCE, VOCABULARY = 30, 64, 128


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--mode", choices=("enable", "explicit"), default="enable")
    flags.add_argument("--ep", type=int, default=1)
    arguments = flags.parse_args()

    cpu.prepare()  # without CUDA only; must come before Megatron-Core is imported
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29555")):
        os.environ.setdefault(name, value)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=arguments.ep)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)

    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=64,
        moe_router_score_function="sigmoid",
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=arguments.ep,
        add_bias_linear=False,
        pipeline_dtype=torch.float32,
        **({} if torch.cuda.is_available() else cpu.SWITCHES),
    )
    config.finalize_model_grads_func = finalize_model_grads

    if arguments.mode == "enable":
        alflb_megatron.enable(rule="proportional")  # ALF-LB, one line: before the model is built
    layer_spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    if arguments.mode == "explicit":
        # ALF-LB, explicitly: the router goes into the layer spec, the update into the end of each global batch.
        layer_spec = alflb_megatron.with_alflb(layer_spec, alflb_megatron.ALFConfig(rule="proportional"))
        alflb_megatron.install(config)

    model = GPTModel(config, layer_spec, VOCABULARY, SEQUENCE, position_embedding_type="rope")
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    model.broadcast_params()
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3), [model])
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())

    def forward_step(iterator, model):  # type: ignore[no-untyped-def]
        tokens = next(iterator)
        positions = torch.arange(SEQUENCE, device=tokens.device).expand(tokens.shape[0], -1)
        losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
        return losses, lambda output: (output.mean(), {"loss": output.mean().detach()})

    def batches():  # type: ignore[no-untyped-def]
        while True:  # few tokens are frequent, as in text, so the experts start out unevenly loaded
            text = torch.rand(4, SEQUENCE + 1, generator=generator) ** 3 * VOCABULARY
            yield text.long().to(torch.cuda.current_device())

    from alflb_megatron.hosts.core import balancer_of

    data = batches()
    for step in range(1, STEPS + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=model,
            num_microbatches=2,
            seq_length=SEQUENCE,
            micro_batch_size=4,
            forward_only=False,
        )
        optimizer.step()
        if step % 5 == 0 and dist.get_rank() == 0:
            max_vio = balancer_of([model]).last.max_vio().mean()  # what the balancer saw in this global batch
            loss = sum(float(entry["loss"]) for entry in losses) / len(losses)
            print(f"step {step}  loss {loss:.3f}  MaxVio {max_vio:.3f}", flush=True)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
