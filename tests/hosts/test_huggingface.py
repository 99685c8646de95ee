"""Expert biases to Hugging Face and back: the same experts chosen by its own modelling code, every bit kept."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
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
        huggingface.save(bias_of(runner.setup.chunks), Path(folder) / "bias.safetensors")
        seen = {}
        for layer, router in zip(runner.setup.balancer.layers, runner.routers, strict=True):
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
        if not isinstance(out, tuple):  # a gate that gives logits alone
            out = moe.route_tokens_to_experts(out)
        weights, indices = out[1:] if len(out) == 3 else reversed(out)  # later: logits, weights, indices
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
    model = type(_deepseek(None)).from_pretrained(tmp_path, dtype=torch.bfloat16)
    gates = {layer: model.model.layers[layer - 1].mlp.gate.e_score_correction_bias for layer in (2, 3, 4)}
    kept = bool(getattr(model, "_keep_in_fp32_modules_strict", None))  # by transformers, from 5 on
    assert all(torch.equal(bias, biases.rows[layer]) == kept for layer, bias in gates.items())
    index = json.loads((tmp_path / huggingface.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert not list(tmp_path.glob(".*")), "nothing half written stays"


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return dict(sorted(found.items()))


# -- files, without transformers ---------------------------------------------------------------------------------------


def _biases(*layers: int, **about: Any) -> Biases:
    return Biases({k: torch.randn(8, generator=torch.Generator().manual_seed(k)) for k in layers}, **about)


def _model(folder: Path, names: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A folder as save_pretrained leaves it, of two shards: biases of two layers and of an MTP layer, in bfloat16."""
    folder.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {
            "model.layers.1.mlp.gate.weight": torch.randn(8, 4).bfloat16(),
            "model.layers.1.mlp.gate.e_score_correction_bias": torch.randn(8).bfloat16(),
        },
        "model-00002-of-00002.safetensors": {
            "model.layers.2.mlp.gate.e_score_correction_bias": torch.randn(8).bfloat16(),
            "model.layers.3.mlp.gate.e_score_correction_bias": torch.randn(8).bfloat16(),
            **(names or {}),
        },
    }
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / huggingface.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3, **config}))
    return folder


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    biases = _biases(2, 3, 62, num_layers=61, score_function="sigmoid", num_groups=8)
    file = huggingface.save(biases, tmp_path / "bias.safetensors")
    read = huggingface.read(file)
    assert all(torch.equal(read.rows[layer], row) for layer, row in biases.rows.items())
    assert (read.num_layers, read.score_unit, read.score_function, read.num_groups) == (61, "score", "sigmoid", 8)
    with safe_open(file, framework="pt") as held:
        assert set(held.keys()) == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 61)}
        assert held.metadata()["format"] == "pt", "transformers asks for it"


def test_biases_on_logits_do_not_pass_for_hugging_faces(tmp_path: Path) -> None:
    biases = _biases(2, score_unit="logit")
    file = huggingface.save(biases, tmp_path / "bias.safetensors")
    assert list(load_file(file)) == ["decoder.layers.1.mlp.router.expert_bias"]
    read = huggingface.read(file)
    assert read.score_unit == "logit" and torch.equal(read.rows[2], biases.rows[2])
    with pytest.raises(SettingError, match="for the logit; the router adds its own to the score"):
        huggingface.put(biases, _model(tmp_path / "model"))


def test_put_leaves_an_mtp_layer_it_has_no_bias_for(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    before = _tensors(folder)
    written = huggingface.put(_biases(2, 3), folder)
    assert [file.name for file in written] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    after, mtp = _tensors(folder), "model.layers.3.mlp.gate.e_score_correction_bias"
    assert after[mtp].dtype == torch.bfloat16 and torch.equal(after[mtp], before[mtp])
    read = huggingface.read(folder)
    assert torch.equal(read.rows[2], _biases(2).rows[2]) and list(read.rows) == [2, 3, 4]


@pytest.mark.parametrize(
    ("biases", "said"),
    [
        (_biases(2), "has no bias for layer 3"),
        (_biases(2, 3, 7), "has a bias for layer 7"),
        (_biases(2, 3, num_layers=61), "decoder of 61 layers; the model has 3"),
        (Biases({2: torch.zeros(8), 3: torch.zeros(16)}), "16 experts in layer 3; the model has 8"),
        (_biases(2, 3, score_function="softmax"), "softmax gate; the model has a sigmoid gate"),
    ],
)
def test_put_refuses_what_does_not_fit_and_writes_nothing(tmp_path: Path, biases: Biases, said: str) -> None:
    folder = _model(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(SettingError, match=f"^--into=biases: .*{said}"):
        huggingface.put(biases, folder, "--into")
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_put_writes_all_files_or_none(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    (folder / ".model-00002-of-00002.safetensors.part").mkdir()  # so that the second file cannot be written
    before = _tensors(folder)
    with pytest.raises(SettingError, match="cannot be written"):
        huggingface.put(_biases(2, 3), folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _tensors(folder).items())
    assert [path.name for path in folder.glob(".*")] == [".model-00002-of-00002.safetensors.part"]


def test_put_writes_nothing_where_the_index_cannot_be_written(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    index = json.loads((folder / huggingface.INDEX).read_text())
    (folder / huggingface.INDEX).write_text(json.dumps({**index, "metadata": {"total_size": 100.0}}))
    (blocked := folder / f".{huggingface.INDEX}.part").mkdir()
    before = _tensors(folder)
    with pytest.raises(SettingError, match="cannot be written"):
        huggingface.put(_biases(2, 3), folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _tensors(folder).items())
    blocked.rmdir()
    huggingface.put(_biases(2, 3), folder)
    assert json.loads((folder / huggingface.INDEX).read_text())["metadata"]["total_size"] == 100 + 2 * 8 * 2


def _index(folder: Path, weight_map: Any) -> None:
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": weight_map}))


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SHARD = "model-00001-of-00002.safetensors"
DAMAGE: dict[str, tuple[Any, str]] = {
    "index_no_json": (lambda f: (f / huggingface.INDEX).write_text("{"), "cannot be read as JSON"),
    "index_deep": (lambda f: (f / huggingface.INDEX).write_text("[" * 100_000), "cannot be read as JSON"),
    "index_list": (lambda f: (f / huggingface.INDEX).write_text("[]"), "must hold a JSON object"),
    "index_empty": (lambda f: (f / huggingface.INDEX).write_text("{}"), "must hold a weight_map"),
    "index_numbers": (lambda f: _index(f, {BIAS: 1}), "must hold a weight_map"),
    "index_outside": (lambda f: _index(f, {BIAS: "../x.safetensors"}), "no .safetensors file beside it"),
    "index_nul": (lambda f: _index(f, {BIAS: "\0.safetensors"}), "no .safetensors file beside it"),
    "index_surrogate": (lambda f: _index(f, {BIAS: "\ud800.safetensors"}), "cannot be read, truncated"),
    "index_pickle": (lambda f: _index(f, {BIAS: "x.bin"}), "no .safetensors file beside it"),
    "index_absent_file": (lambda f: _index(f, {BIAS: "x.safetensors"}), "cannot be read, truncated or no safetensors"),
    "index_absent_name": (lambda f: _index(f, {BIAS.replace("1", "9"): SHARD}), "which the index says it has"),
    "index_no_bias": (lambda f: _index(f, {"lm_head.weight": SHARD}), "holds no e_score_correction_bias"),
    "shard_cut": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-3]), "cannot be read, truncated"),
    "shard_empty": (lambda f: (f / SHARD).write_bytes(b""), "cannot be read, truncated"),
    "nan": (lambda f: save_file({BIAS: torch.full((8,), torch.nan)}, f / SHARD), "layer 2 holds a NaN"),
    "float64": (lambda f: save_file({BIAS: torch.zeros(8).double()}, f / SHARD), "must be float .experts., not F64"),
    "two_dimensions": (lambda f: save_file({BIAS: torch.zeros(1, 8)}, f / SHARD), "must be float .experts., not F32"),
    "empty": (lambda f: save_file({BIAS: torch.zeros(0)}, f / SHARD), "must be float32 .experts."),
    "shard_pipe": (lambda f: ((f / SHARD).unlink(), os.mkfifo(f / SHARD)), "must be a file"),
    "config_no_json": (lambda f: (f / "config.json").write_bytes(b"\xff"), "cannot be read as JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = _model(tmp_path / "model")
    huggingface.read(folder)
    act, said = DAMAGE[damage]
    act(folder)
    with pytest.raises(SettingError, match=said) as error:
        huggingface.read(folder, "--bias")
    assert str(error.value).startswith("--bias=") and "\n" not in str(error.value)


def test_a_layer_with_two_biases_is_refused(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model", {"model.layers.1.mlp.router.expert_bias": torch.zeros(8)})
    with pytest.raises(SettingError, match="layer 2 has more than one bias"):
        huggingface.read(folder)


def test_biases_of_two_stacks_are_not_taken_for_one(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model", {"mtp.layers.0.mlp.gate.e_score_correction_bias": torch.zeros(8)})
    with pytest.raises(SettingError, match=r"several stacks, model\.layers and mtp\.layers"):
        huggingface.read(folder)


def test_one_file_beside_an_index_is_the_model_as_for_transformers(tmp_path: Path) -> None:
    """What an earlier save left: shards and their index under a whole file, or an index whose shards are gone."""
    folder = _model(tmp_path / "model")
    whole = {f"model.layers.{i}.mlp.gate.e_score_correction_bias": torch.full((8,), float(i)) for i in (1, 2, 3)}
    save_file(whole, folder / huggingface.ONE_FILE, {"format": "pt"})
    assert torch.equal(huggingface.read(folder).rows[3], torch.full((8,), 2.0))
    assert huggingface.put(_biases(2, 3), folder) == [folder / huggingface.ONE_FILE]
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    assert torch.equal(huggingface.read(folder).rows[2], _biases(2).rows[2])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save(Trap(), tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(SettingError, match=r"never unpickled here; .*save_pretrained"):
            huggingface.read(source)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / name, weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap works"


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"score_unit": "x\ny"}, "in units of 'x"),
        ({"score_function": "x\ny"}, "of a gate 'x"),
        ({"num_layers": "-1"}, "num_layers is '-1'"),
        ({"num_groups": "many"}, "num_groups is 'many'"),
    ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, about: dict[str, str], said: str) -> None:
    save_file({BIAS: torch.zeros(8)}, tmp_path / "b.safetensors", {"alflb": "1", **about})
    with pytest.raises(SettingError, match=said) as error:
        huggingface.read(tmp_path / "b.safetensors")
    assert "\n" not in str(error.value)


def test_names_that_are_long_keep_nobody_waiting(tmp_path: Path) -> None:
    names = ["layers.1." * 20_000, "layers.1." * 20_000 + "e_score_correction_bias"]
    save_file({BIAS: torch.ones(8), **{name: torch.zeros(8) for name in names}}, tmp_path / "b.safetensors")
    assert list(huggingface.read(tmp_path / "b.safetensors").rows) == [2]


def test_other_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for source, said in (
        (tmp_path / "folder", "must hold model.safetensors"),
        (tmp_path / "x", "no such file"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(SettingError, match=said):
            huggingface.read(source)
    for path, said in ((tmp_path / "x.bin", "must end in"), (tmp_path / "no" / "x.safetensors", "cannot be written")):
        with pytest.raises(SettingError, match=said):
            huggingface.save(_biases(2), path)
    with pytest.raises(SettingError, match="must be the folder"):
        huggingface.put(_biases(2), tmp_path / "x")
