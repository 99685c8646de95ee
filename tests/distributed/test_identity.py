"""A router is told from others by being that object and named by its path: wrapped copies, teachers, towers, stacks."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models import gpt  # noqa: F401  (imported before ranks are forked)

from tests.distributed import jobs, ranks

HAVE_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None
needs = {name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed here")
         for name in ("peft", "modelopt")}  # fmt: skip

Change = Callable[[Any, Callable[[], Any]], Any]
"""What is made of a GPTModel; the second argument builds one more."""


@contextlib.contextmanager
def changed(change: Change) -> Iterator[None]:
    """Within the block jobs train what `change` makes of their model."""
    from alflb_megatron.lab.training import build

    original = build.gpt_model
    build.gpt_model = lambda *args: change(original(*args), lambda: original(*args))  # type: ignore[assignment]
    try:
        yield
    finally:
        build.gpt_model = original


@contextlib.contextmanager
def running(change: Change, enabled: bool, nproc: int = 1, pp: int = 1, **alf: Any) -> Iterator[jobs.Runner]:
    """A job on two micro-batches of four sequences of 32 tokens; by one line, or with routers put in by name."""
    import alflb_megatron

    job = {"rule": "none" if enabled else alf["rule"], "nproc": nproc, "pp": pp, "micro_batch_size": 4}
    knobs = {} if enabled else {name: value for name, value in alf.items() if name != "rule"}
    plan = jobs.plan({**job, "global_batch_size": 8}, {"num_layers": 2 * pp}, **knobs)
    if enabled:
        alflb_megatron.enable(**alf)
    try:
        with ranks.model_parallel(**jobs.sizes(plan)), changed(change):
            yield jobs.Runner(plan)
    finally:
        alflb_megatron.disable()


def _routers(model: torch.nn.Module) -> dict[str, Any]:
    from megatron.core.transformer.moe.router import TopKRouter

    return {name: module for name, module in model.named_modules() if isinstance(module, TopKRouter)}


def _shown(chunks: list[Any], group: Any = None) -> dict[str, float]:
    from alflb_megatron.hosts.log import balance_metrics

    return {name: float(value) for name, value in balance_metrics(chunks, group).items()}


def _tokens(counter: Any) -> int:
    return int(counter.tokens_per_expert.sum())


# -- wrapped copies ----------------------------------------------------------------------------------------------------


def _wrap_routers(model: Any, build: Callable[[], Any]) -> Any:
    """`modules_to_save=["router"]`: a copy of every router is trained, the original kept."""
    from peft.utils import ModulesToSaveWrapper

    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router = ModulesToSaveWrapper(layer.mlp.router, "default")
    return model


def _adapted(enabled: bool) -> dict[str, Any]:
    from alflb_megatron.hosts.core import balancer_of
    from alflb_megatron.hosts.expert_bias import bias_of, load_bias

    found: dict[str, Any] = {"loads": [], "left": []}
    with running(_wrap_routers, enabled, rule="sign", step_size=0.01, log_layers=True) as runner:
        chunks = runner.setup.chunks
        routers = _routers(chunks[0])
        copies = [router for name, router in routers.items() if name.endswith("modules_to_save.default")]
        for step in range(4):
            runner.step(step)
            last = balancer_of(chunks).last
            loads = {id(r): int(of.sum()) for r, of in zip(balancer_of(chunks).routers, last.loads, strict=True)}
            found["loads"].append([loads[id(router)] for router in copies])
            found["left"].append(sum(_tokens(router.load_counter) for router in routers.values()))
        found["routers"] = len(routers), len(copies)
        found["n"] = [int(router.alf_n) for router in copies]
        found["originals"] = [router.expert_bias.any().item() for router in routers.values() if router not in copies]
        found["bias_of"] = {n: torch.equal(row, copies[0].expert_bias) for n, row in bias_of(chunks).rows.items()}
        found["shown"] = {key for key in _shown(chunks) if "layer" in key}
        found["paths"] = balancer_of(chunks).paths
        biases = bias_of(chunks)
        for row in biases.rows.values():
            row.copy_(torch.arange(8) / 8)
        load_bias(chunks, biases)
        found["loaded"] = [float(router.expert_bias[-1]) for router in routers.values()]
    return found


@needs["peft"]
@pytest.mark.parametrize("enabled", [True, False])
def test_of_a_wrapped_router_the_copy_in_use_counts_once(enabled: bool) -> None:
    (found,) = ranks.run(1, _adapted, enabled)
    assert found["routers"] == (2, 1)
    assert found["loads"] == [[512]] * 4
    assert found["left"] == [0] * 4
    assert found["n"] == [4] and found["originals"] == [False]
    assert found["bias_of"] == {2: True}
    assert "MaxVio layer 2" in found["shown"]
    path = "decoder.layers.1.mlp.router"
    assert found["paths"] == [f"{path}.original_module", f"{path}.modules_to_save.default"]
    assert found["loaded"] == [0.0, 0.875]


# -- a student and its teacher -----------------------------------------------------------------------------------------


def _with_teacher(model: Any, build: Callable[[], Any]) -> Any:
    """As distillation by hand: a frozen model of the same depth inside the trained one, run first."""
    teacher = build().eval().requires_grad_(False)
    with torch.no_grad():
        for router in _routers(teacher).values():
            router.weight.neg_()
    forward = model.forward

    def distilling(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            teacher.eval()(*args, **kwargs)
        return forward(*args, **kwargs)

    model.add_module("_teacher_model", teacher)
    model.forward = distilling
    return model


def _by_modelopt(model: Any, build: Callable[[], Any]) -> Any:
    import modelopt.torch.distill as distill

    settings = {"teacher_model": build(), "criterion": distill.LogitsDistillationLoss()}
    return distill.convert(model, mode=[("kd_loss", settings)])


def _distilled(by: Change, frozen: bool) -> dict[str, Any]:
    from alflb_megatron.hosts.expert_bias import bias_of, load_bias
    from alflb_megatron.settings import SettingError

    with running(by, True, rule="sign", step_size=0.01, frozen=frozen, log_layers=True) as runner:
        chunks = runner.setup.chunks
        routers = _routers(chunks[0])
        student = next(router for name, router in routers.items() if "_teacher_model" not in name)
        (teacher,) = (router for router in routers.values() if router is not student)
        before = teacher.state_dict()["expert_bias"].clone()
        runner.step(0)
        shown = _shown(chunks)
        biases = bias_of(chunks)
        found = {
            "counted": shown["MoE layers counted"],
            "dead": shown["dead experts"],
            "layers": sorted(key for key in shown if key.startswith("MaxVio layer")),
            "bias_of": torch.equal(biases.rows[2], student.expert_bias),
            "n": (int(student.alf_n), int(teacher.alf_n)),
            "teacher's bias stays": torch.equal(teacher.expert_bias, before),
        }
        biases.rows[2].copy_(torch.arange(8) / 8)
        load_bias(chunks, biases)
        found["loaded"] = float(student.expert_bias[-1]), float(teacher.expert_bias[-1])
        load_bias(chunks, biases, stack="_teacher_model.decoder")
        found["given to the teacher"] = float(teacher.expert_bias[-1])
        try:
            load_bias(chunks, biases, stack="nobody")
        except SettingError as error:
            found["refused"] = str(error)
        return found


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("by", [_with_teacher, pytest.param(_by_modelopt, marks=needs["modelopt"])])
def test_what_is_said_of_a_distilled_model_is_the_students(by: Change, frozen: bool) -> None:
    (found,) = ranks.run(1, _distilled, by, frozen)
    assert found["counted"] == 1 and found["dead"] < 8
    assert found["layers"] == ["MaxVio layer 2"]
    assert found["bias_of"] and found["teacher's bias stays"]
    assert found["n"] == (0 if frozen else 1, 0)
    assert found["loaded"] == (0.875, 0.0)
    assert found["given to the teacher"] == 0.875
    assert found["refused"] == "stack=nobody: must be one of _teacher_model.decoder, decoder"


# -- two towers --------------------------------------------------------------------------------------------------------


def _two_towers(frozen: bool) -> Change:
    def change(model: Any, build: Callable[[], Any]) -> Any:
        tower = build()
        if frozen:
            tower.requires_grad_(False)  # and left in training mode, run with gradients through it
        forward = model.forward

        def both(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) + 0 * tower(*args, **kwargs)

        model.add_module("tower", tower)
        model.forward = both
        return model

    return change


def _towers(frozen: bool) -> dict[str, Any]:
    from alflb_megatron.hosts.expert_bias import bias_of
    from alflb_megatron.settings import SettingError

    with running(_two_towers(frozen), False, rule="sign", step_size=0.01, log_layers=True) as runner:
        chunks = runner.setup.chunks
        runner.step(0)
        shown = _shown(chunks)
        found = {
            "counted": shown["MoE layers counted"],
            "n": {name.partition("module.")[2]: int(router.alf_n) for name, router in _routers(chunks[0]).items()},
            "keys": sorted(key for key in shown if key.startswith("MaxVio ") and key.endswith("mlp.router")),
        }
        try:
            found["bias_of"] = sorted(bias_of(chunks).rows)
        except SettingError as error:
            found["bias_of"] = str(error)
        found["of one"] = sorted(bias_of(chunks, stack="tower.decoder").rows)
        return found


def test_two_towers_that_train_are_told_apart() -> None:
    (found,) = ranks.run(1, _towers, False)
    paths = ["decoder.layers.1.mlp.router", "tower.decoder.layers.1.mlp.router"]
    assert found["counted"] == 2
    assert found["n"] == dict.fromkeys(paths, 1)
    assert found["keys"] == [f"MaxVio {path}" for path in paths]
    assert found["bias_of"].endswith("is for one stack of layers; say which: stack= one of decoder, tower.decoder")
    assert found["of one"] == [2]


def test_a_frozen_tower_is_counted_and_stands_still() -> None:
    (found,) = ranks.run(1, _towers, True)
    assert found["n"] == {"decoder.layers.1.mlp.router": 1, "tower.decoder.layers.1.mlp.router": 0}
    assert found["counted"] == 2
    assert found["bias_of"] == [2]


# -- stages, chunks and stacks that number their layers themselves ----------------------------------------------------


def _staged() -> dict[str, Any]:
    from megatron.core import parallel_state

    from alflb_megatron.hosts.core import balancer_of

    with running(lambda model, build: model, False, nproc=2, pp=2, rule="sign", log_layers=True) as runner:
        group = parallel_state.get_pipeline_model_parallel_group()
        before = _shown(runner.setup.chunks, group)
        runner.step(0)
        shown = _shown(runner.setup.chunks, group)
        return {
            "before": before,
            "paths": balancer_of(runner.setup.chunks).paths,
            "keys": sorted(key for key in shown if key.startswith("MaxVio layer")),
            "counted": shown["MoE layers counted"],
        }


def test_stages_name_their_routers_by_the_whole_models_layers() -> None:
    first, second = ranks.run(2, _staged)
    assert first["before"] == second["before"] == {}
    assert first["paths"] == ["decoder.layers.1.mlp.router"]
    assert second["paths"] == ["decoder.layers.2.mlp.router", "decoder.layers.3.mlp.router"]
    assert first["keys"] == second["keys"] == ["MaxVio layer 2", "MaxVio layer 3", "MaxVio layer 4"]
    assert first["counted"] == second["counted"] == 3


def _on_one_stage() -> dict[str, Any]:
    """Routers on the second stage alone, with a teacher of the same kind on both."""
    from megatron.core import parallel_state

    from alflb_megatron.hosts.expert_bias import bias_of, load_bias
    from alflb_megatron.settings import SettingError

    with running(_with_teacher, False, nproc=2, pp=2, rule="sign") as runner:
        chunks = runner.setup.chunks
        group = parallel_state.get_pipeline_model_parallel_group()
        if parallel_state.is_pipeline_first_stage():
            for layer in chunks[0].module.decoder.layers:
                layer.mlp = torch.nn.Identity()  # the student's are dense here; the teacher's are not
        found: dict[str, Any] = {"bias_of": sorted(bias_of(chunks, group).rows)}
        found["teacher"] = sorted(bias_of(chunks, group, stack="_teacher_model.decoder").rows)
        found["student"] = sorted(bias_of(chunks, group, stack="decoder").rows)
        biases = bias_of(chunks, group)
        found["loaded"] = sorted(load_bias(chunks, biases, stack="decoder", group=group))
        try:
            bias_of(chunks, group, stack="nobody")
        except SettingError as error:
            found["refused"] = str(error)
        return found


def test_stages_decide_together_which_stack_is_meant() -> None:
    first, second = ranks.run(2, _on_one_stage)
    for found in (first, second):
        assert found["bias_of"] == found["student"] == [3, 4]
        assert found["teacher"] == [2, 3, 4]
        assert found["refused"].startswith("stack=nobody: must be one of _teacher_model.decoder, decoder")
    assert (first["loaded"], second["loaded"]) == ([], [3, 4])


def _mtp() -> list[int]:
    from alflb_megatron.hosts.routers import named_routers

    plan = jobs.plan({"rule": "sign", "nproc": 1}, {"num_layers": 2, "mtp_layers": 3})
    with ranks.model_parallel():
        return [named.layer for named in named_routers(jobs.Runner(plan).setup.chunks)]


def test_more_mtp_depths_than_layers_have_numbers_of_their_own() -> None:
    assert ranks.run(1, _mtp) == [[2, 3, 4, 5]]


def _hybrid_spec(config: Any) -> Any:
    """Megatron-Core's stack of attention and experts, of its local layers: its own spec needs Transformer Engine."""
    import dataclasses

    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        MoETransformerLayer,
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    block = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    mtp = gpt_layer_specs.get_gpt_mtp_block_spec(config, block, use_transformer_engine=False)
    depths = [
        ModuleSpec(module=spec.module, submodules=dataclasses.replace(spec.submodules, mtp_model_layer=None))
        for spec in mtp.layer_specs
    ]
    layer = block.layer_specs[-1].submodules
    names = {
        "attention_layer": (TransformerLayer, ("input_layernorm", "self_attention", "self_attn_bda")),
        "moe_layer": (MoETransformerLayer, ("pre_mlp_layernorm", "mlp", "mlp_bda")),
    }
    parts: dict[str, Any] = {
        kind: ModuleSpec(
            module=module,
            submodules=TransformerLayerSubmodules(**{name: getattr(layer, name) for name in own}),
        )
        for kind, (module, own) in names.items()
    }
    parts["mtp_block_spec"] = ModuleSpec(module=MultiTokenPredictionBlock, submodules=type(mtp)(layer_specs=depths))
    return ModuleSpec(module=HybridStack, submodules=HybridStackSubmodules(**parts))


def _hybrid(pattern: str, depths: int) -> dict[str, Any]:
    """A hybrid model of attention and experts, with MTP depths of the same kind."""
    import dataclasses

    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from alflb_megatron.hosts.routers import named_routers
    from alflb_megatron.lab.training import build

    original = build.transformer_config

    def config_of(plan: Any) -> Any:
        return dataclasses.replace(
            original(plan),
            is_hybrid_model=True,
            mtp_num_layers=depths,
            num_layers=len(pattern.partition("/")[0]),
            moe_layer_freq=1,
        )

    def hybrid(model: Any, build_one: Callable[[], Any]) -> Any:
        config = config_of(jobs.plan({"rule": "none", "nproc": 1}))
        return HybridModel(
            config=config,
            hybrid_stack_spec=_hybrid_spec(config),
            vocab_size=64,
            max_sequence_length=32,
            hybrid_layer_pattern=pattern,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )

    norm = mock.patch("megatron.core.models.hybrid.hybrid_block.TENorm", WrappedTorchNorm)  # named there, no spec's
    with norm, running(hybrid, True, rule="sign", step_size=0.01, log_layers=True) as runner:
        chunks = runner.setup.chunks
        runner.step(0)
        return {
            "named": [(named.path, named.layer) for named in named_routers(chunks)],
            "keys": sorted(key for key in _shown(chunks) if key.startswith("MaxVio layer")),
            "n": [int(named.router.alf_n) for named in named_routers(chunks)],
        }


@pytest.mark.skipif(not HAVE_HYBRID, reason="this Megatron-Core has no HybridModel")
@pytest.mark.parametrize(
    ("pattern", "depths", "layers"),
    [("*E*E/*E", 1, [2, 4, 6]), ("*E*E/*E/*E", 2, [2, 4, 6, 8]), ("E*/EE", 1, [1, 3, 4])],
)
def test_each_layer_of_a_hybrid_model_has_a_number_of_its_own(pattern: str, depths: int, layers: list[int]) -> None:
    (found,) = ranks.run(1, _hybrid, pattern, depths)
    assert [layer for _, layer in found["named"]] == layers
    assert len({path for path, _ in found["named"]}) == len(layers)
    assert found["keys"] == [f"MaxVio layer {layer}" for layer in layers]
    assert found["n"] == [1] * len(layers)


# -- names -----------------------------------------------------------------------------------------------------------


def _names(change: str) -> list[tuple[str, int, str]]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from alflb_megatron.hosts.routers import named_routers
    from alflb_megatron.lab.training import build

    plan = jobs.plan({"rule": "sign", "nproc": 1}, {"num_layers": 3, "mtp_layers": 1})
    with ranks.model_parallel():
        model: Any = build.gpt_model(plan, build.transformer_config(plan))
        if change == "compiled":
            model.decoder, model.mtp = (
                torch._dynamo.OptimizedModule(model.decoder, lambda m: m),
                torch._dynamo.OptimizedModule(model.mtp, lambda m: m),
            )
        elif change == "checkpointed":
            for layers in (model.decoder.layers, model.mtp.layers):
                for index, layer in enumerate(layers):
                    layers[index] = checkpoint_wrapper(layer)
        elif change == "towers":
            other = build.gpt_model(plan, build.transformer_config(plan))
            model = torch.nn.ModuleDict(
                {"towers": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([model, other])})}
            )
        elif change == "copied":
            import copy

            model.decoder.layers[2].mlp.router = copy.deepcopy(model.decoder.layers[1].mlp.router)
        return [(named.path, named.layer, named.stack) for named in named_routers([model])]


@pytest.mark.parametrize("change", ["compiled", "checkpointed"])
def test_what_wraps_layers_is_no_part_of_a_name(change: str) -> None:
    assert ranks.run(1, _names, change) == ranks.run(1, _names, "")


def test_towers_in_a_list_of_layers_are_stacks_of_their_own() -> None:
    (plain,), (found,) = ranks.run(1, _names, ""), ranks.run(1, _names, "towers")
    assert [stack for *_, stack in found] == [f"towers.layers.{tower}.decoder" for tower in (0, 1) for _ in plain]
    assert len({path for path, *_ in found}) == len(found) == 2 * len(plain)
    assert [layer for _, layer, _ in found] == 2 * [layer for _, layer, _ in plain]


def test_a_copy_that_keeps_its_originals_number_has_a_path_of_its_own() -> None:
    (plain,), (found,) = ranks.run(1, _names, ""), ranks.run(1, _names, "copied")
    assert [path for path, *_ in found] == [path for path, *_ in plain]
