"""Expert biases to Hugging Face and back: the same experts chosen by its own modelling code, every bit kept."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alflb_megatron.biases import Biases
from alflb_megatron.hosts import huggingface
from alflb_megatron.settings import SettingError
from tests.distributed import jobs, ranks

HIDDEN, EXPERTS, TOPK = jobs.SMALL["hidden_size"], 16, 4
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (make hosts)"
)


def _trained(num_groups: int | None, folder: str) -> dict[int, dict[str, Tensor]]:
    """Trains, moves all biases below zero and saves them; how each layer's router then routes random tokens."""
    from alflb_megatron.hosts.expert_bias import bias_of

    shape = {"num_experts": EXPERTS, "topk": TOPK, "num_groups": num_groups, "group_topk": num_groups and TOPK // 2}
    plan = jobs.plan({"rule": "proportional", "nproc": 1}, shape, step_size=0.3)
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        for step in range(6):
            runner.step(step)
        for router in runner.routers:
            router.expert_bias -= 1.0  # as far as a rule without centring may drift: no choice changes
        huggingface.save(bias_of(runner.trainee.chunks), Path(folder) / "bias.safetensors")
        seen = {}
        for layer, router in zip(runner.trainee.balancer.layers, runner.routers, strict=True):
            hidden = torch.randn(256, 1, HIDDEN, generator=torch.Generator().manual_seed(layer))
            with torch.no_grad():
                probs, chosen = router(hidden)
            bias = router.expert_bias.clone()
            seen[layer] = {"hidden": hidden, "probs": probs, "chosen": chosen, "weight": router.weight, "bias": bias}
        return {layer: {name: t.detach() for name, t in row.items()} for layer, row in seen.items()}


@pytest.fixture(scope="module", params=[None, 4], ids=["plain", "groups"])
def trained(request: Any, tmp_path_factory: Any) -> tuple[int | None, Path, dict[int, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("trained")
    return request.param, folder / "bias.safetensors", ranks.run(1, _trained, request.param, str(folder))[0]


# -- the real modelling code -------------------------------------------------------------------------------------------


def _deepseek(num_groups: int | None, layers: dict[int, dict[str, Tensor]] | None = None) -> Any:
    """A small DeepseekV3 with random weights, its gates those of `layers`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=jobs.SMALL["num_layers"],
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOPK,
        n_group=num_groups or 1,
        topk_group=TOPK // 2 if num_groups else 1,
        routed_scaling_factor=1.0,
        max_position_embeddings=64,
    )
    model = DeepseekV3ForCausalLM(config)
    for layer, row in (layers or {}).items():
        model.model.layers[layer - 1].mlp.gate.weight.data.copy_(row["weight"])
    return model


def _chosen(moe: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts their MoE layer chooses, bool [T, E], and their weights [T, E]."""
    with torch.no_grad():
        out = moe.gate(hidden)
        indices, weights = out if isinstance(out, tuple) else moe.route_tokens_to_experts(out)
    nothing = torch.zeros(len(indices), EXPERTS)
    return nothing.scatter(1, indices, 1.0).bool(), nothing.scatter(1, indices, weights)


def _masks_with_zero() -> bool:
    """Whether this transformers lets negative experts lose against those of excluded groups (its issue 45440)."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    return '"-inf"' not in inspect.getsource(modeling_deepseek_v3)


@needs_transformers
@pytest.mark.parametrize("shift", [False, True], ids=["as_it_is", "shifted"])
def test_deepseek_v3_chooses_the_same_experts(trained: Any, tmp_path: Path, shift: bool) -> None:
    num_groups, file, layers = trained
    biases = huggingface.read(file)
    assert biases.lowest < -1.0, "or a choice that fears negative scores is not put to the test"
    amount = biases.shift_needed() if shift else 0.0
    _deepseek(num_groups, layers).save_pretrained(tmp_path, max_shard_size="30KB")
    huggingface.put(biases.shifted(amount), tmp_path)
    model = type(_deepseek(num_groups)).from_pretrained(tmp_path)
    same = []
    for layer, row in layers.items():
        moe = model.model.layers[layer - 1].mlp
        assert torch.equal(moe.gate.e_score_correction_bias, row["bias"] + amount)
        chosen, weights = _chosen(moe, row["hidden"])
        same.append(torch.equal(chosen, row["chosen"]))
        if same[-1]:
            torch.testing.assert_close(weights, row["probs"])
        moe.gate.e_score_correction_bias.zero_()
        assert not torch.equal(_chosen(moe, row["hidden"])[0], row["chosen"]), "the bias decides nothing"
    broken = num_groups is not None and not shift and _masks_with_zero()
    assert all(same) != broken


@needs_transformers
@pytest.mark.parametrize("kind", ["DeepseekV3", "Glm4Moe"])
@pytest.mark.parametrize("shards", ["1GB", "30KB"], ids=["one_file", "sharded"])
def test_what_save_pretrained_wrote_is_read_bit_for_bit(tmp_path: Path, kind: str, shards: str) -> None:
    import transformers

    model = _deepseek(4)
    if kind == "Glm4Moe":
        same = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers")
        same += ("num_attention_heads", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")
        same += ("first_k_dense_replace", "max_position_embeddings", "n_group", "topk_group")
        fields = {name: getattr(model.config, name) for name in same}
        model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**fields, head_dim=8))
    expected = {}
    for index, layer in enumerate(model.model.layers):
        if index:
            gate = layer.mlp.gate
            expected[index + 1] = gate.e_score_correction_bias.copy_(torch.randn(EXPERTS)).clone()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / huggingface.INDEX).exists() == (shards == "30KB")
    biases = huggingface.read(tmp_path)
    assert biases.num_layers == jobs.SMALL["num_layers"] and biases.num_groups == 4
    assert list(biases.rows) == list(expected) == [2, 3, 4]
    assert all(torch.equal(row, expected[layer]) for layer, row in biases.rows.items())


@needs_transformers
def test_a_bfloat16_model_keeps_float32_biases_and_its_other_weights(tmp_path: Path) -> None:
    _deepseek(None).bfloat16().save_pretrained(tmp_path, max_shard_size="30KB")
    before = _tensors(tmp_path)
    biases = Biases({layer: torch.randn(EXPERTS) for layer in (2, 3, 4)})
    huggingface.put(biases, tmp_path)
    after = _tensors(tmp_path)
    assert list(before) == list(after)
    for name, tensor in after.items():
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
        assert name.endswith("correction_bias") or torch.equal(tensor, before[name])
    read = huggingface.read(tmp_path)
    assert all(torch.equal(row, biases.rows[layer]) for layer, row in read.rows.items())
    index = json.loads((tmp_path / huggingface.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert not list(tmp_path.glob(".*")), "nothing half written stays"


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return dict(sorted(found.items()))
