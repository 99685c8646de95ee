"""A Hugging Face model through Bridge and back: what its experts' biases are on the way. Run as a script: FOLDER."""

import os
import sys
from pathlib import Path

from alflb_megatron.hosts.bridge import balance  # first: makes Bridge importable
from alflb_megatron.hosts.cpu import SWITCHES


def small_model(folder: Path) -> dict[str, "torch.Tensor"]:
    """Saves a GLM-4.5 of two MoE layers in `folder`; its biases by name."""
    config = transformers.Glm4MoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
        use_qk_norm=True,
    )
    model = transformers.Glm4MoeForCausalLM(config)
    biases = {name: bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")}
    for bias in biases.values():
        bias.copy_(torch.randn_like(bias))
    model.save_pretrained(folder)
    return biases


def leave_out_unmapped() -> None:
    """Bridge maps the names of Transformer Engine's layers: without it those weights have no task, and it stops."""
    plain = model_bridge.MegatronModelBridge.build_conversion_tasks

    def mapped(*args, **kwargs):
        return [task for task in plain(*args, **kwargs) if task is not None]

    model_bridge.MegatronModelBridge.build_conversion_tasks = mapped


if __name__ == "__main__":
    import torch
    import transformers
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion import model_bridge

    leave_out_unmapped()
    folder = Path(sys.argv[1])
    expected = small_model(folder)
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = balance(bridge.to_megatron_provider(load_weights=False), rule="sign")
    off = ("moe_grouped_gemm", "moe_shared_expert_overlap", "bias_dropout_fusion", "bias_activation_fusion", "bf16")
    for field, value in {**SWITCHES, **dict.fromkeys(off, False), "params_dtype": torch.float32}.items():
        setattr(provider, field, value)
    provider.moe_router_load_balancing_type = "none"
    provider.finalize()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": sys.argv[2], "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo")
    provider.initialize_model_parallel(seed=0)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.load_hf_weights(model)

    routers = [module for module in model[0].modules() if type(module).__name__ == "ALFRouter"]
    assert len(routers) == len(expected) == 2
    for router, bias in zip(routers, expected.values(), strict=True):
        assert router.expert_bias.dtype == torch.float32 and torch.equal(router.expert_bias, bias)
        router.expert_bias.add_(0.1 * torch.randn_like(bias))  # as training would
    exported = {n: w for n, w in bridge.export_hf_weights(model, cpu=True, show_progress=False) if n in expected}
    for router, name in zip(routers, expected, strict=True):
        assert exported[name].dtype == torch.float32 and torch.equal(exported[name], router.expert_bias)
    print("biases kept:", len(exported))
