"""The recipes' models at full size on the meta device, as one host builds them; a program of its own for each host.

    python -m tests.recipes.built core|bridge|nemo RESULT
    PYTHONPATH=CHECKOUT python -m tests.recipes.built megatron_lm RESULT CHECKOUT

RESULT becomes a JSON file with, for each recipe, configuration, parameters by name and how the recipe trains. Nearly
all of a model is shapes alone: `torch.device("meta")` reaches factories, and `torch.cuda.current_device`, where
Megatron-Core puts what it places by itself, is the meta device too. Norms and routers, below 1% of it, stay real.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from alflb_megatron.models import ModelShape
from alflb_megatron.recipes.training import RECIPES

OF_THE_MODEL = ("vocab_size", "max_sequence_length", "position_embedding_type", "share_embeddings_and_output_weights")
"""What Megatron-Core's `GPTModel` holds beside its configuration; its base of RoPE is read from what it computes."""

OF_THE_CONFIG = (
    *ModelShape().transformer_fields(),
    *("activation_func", "kv_channels", "num_query_groups", "qk_layernorm", "add_qkv_bias", "rotary_interleaved"),
    *(
        "moe_router_load_balancing_type",
        "moe_router_dtype",
        "moe_token_dispatcher_type",
        "moe_router_enable_expert_bias",
    ),
    *("moe_expert_capacity_factor", "moe_z_loss_coeff", "moe_apply_probs_on_input", "mtp_num_layers"),
    *("multi_latent_attention", "apply_residual_connection_post_layernorm", "layernorm_zero_centered_gamma"),
)
"""Fields of `TransformerConfig` that say what the model computes."""


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Modules built within it have shapes and no memory."""
    with mock.patch.object(torch.cuda, "current_device", lambda: torch.device("meta")), torch.device("meta"):
        yield


def alone() -> None:
    """Process groups of one rank, and seeds."""
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    parallel_state.initialize_model_parallel()
    importlib.import_module("megatron.core.tensor_parallel").model_parallel_cuda_manual_seed(1)


def plain(value: Any) -> Any:
    """A value that JSON has, the same for what means the same."""
    return getattr(value, "__name__", None) or (value if isinstance(value, (int, float, str, list)) else str(value))


def described(model: Any, training: dict[str, Any]) -> dict[str, Any]:
    """What is compared of a `GPTModel` and of how it is trained."""
    routers = [module for module in model.modules() if type(module).__name__ == "ALFRouter"]
    fields = {name: plain(getattr(model.config, name)) for name in OF_THE_CONFIG}
    fields |= {name: plain(getattr(model, name)) for name in OF_THE_MODEL}
    return {
        "fields": fields | {"rotary_base": model.rotary_base, "routers of ours": len(routers)},
        "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "real": sum(p.numel() for p in model.parameters() if not p.is_meta),
        "training": {name: plain(value) for name, value in training.items()},
    }


def of_optimizer(config: Any) -> dict[str, Any]:
    """What is compared of Megatron-Core's `OptimizerConfig`, or of arguments with the same names."""
    names = ("lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    return {
        {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_eps": "eps"}.get(n, n): getattr(config, n) for n in names
    }


def core() -> dict[str, Any]:
    importlib.import_module("alflb_megatron.hosts.cpu").prepare()
    build, resolve = (importlib.import_module(f"alflb_megatron.lab.training.{name}") for name in ("build", "resolve"))
    alone()
    found = {}
    for recipe, preset in RECIPES.items():
        one = {"nproc": 1, "ep": 1, "dtype": "fp32", "optimizer": "adam"}
        plan = resolve.resolve({"preset": preset, "rule": "adaptive", **one}, {}, {})
        with on_meta():
            model = build.gpt_model(plan, build.transformer_config(plan))
        steps = {name: getattr(plan.job, name) for name in ("global_batch_size", "steps", "warmup_steps", "min_lr")}
        found[recipe] = described(model, {**steps, **of_optimizer(build.optimizer_config(plan.job))})
    return found


def bridge() -> dict[str, Any]:
    recipes = importlib.import_module("alflb_megatron.recipes.bridge")
    alone()
    found = {}
    for recipe in RECIPES:
        cfg = recipes.recipe_config(recipe, ["model.expert_model_parallel_size=1"])
        cfg.model.finalize()
        with on_meta():
            model = cfg.model.provide(pre_process=True, post_process=True)
        steps = {"steps": cfg.train.train_iters, "warmup_steps": cfg.scheduler.lr_warmup_iters}
        batch = {name: getattr(cfg.train, name) for name in ("global_batch_size", "micro_batch_size")}
        found[recipe] = described(
            model, {**batch, **steps, "min_lr": cfg.optimizer.min_lr, **of_optimizer(cfg.optimizer)}
        )
    return found


def nemo() -> dict[str, Any]:
    recipes = importlib.import_module("alflb_megatron.recipes.nemo")
    fdl = importlib.import_module("fiddle")
    alone()
    found = {}
    for recipe in RECIPES:
        made = getattr(recipes, recipe)()
        model, tokenizer = fdl.build(made.model), fdl.build(made.data.tokenizer)
        fdl.build(made.trainer.callbacks[0]).setup(None, model, "fit")
        with on_meta():
            built = model.config.configure_model(tokenizer)
        schedule = made.optim.lr_scheduler
        batch = {name: getattr(made.data, name) for name in ("global_batch_size", "micro_batch_size")}
        steps = {"steps": made.trainer.max_steps, "warmup_steps": schedule.warmup_steps, "min_lr": schedule.min_lr}
        found[recipe] = described(built, {**batch, **steps, **of_optimizer(made.optim.config)})
    return found


def of_megatron_lm(args: Any) -> Any:
    """The model, by what `pretrain_gpt.py` of this checkout builds it with."""
    core = importlib.import_module("alflb_megatron.hosts.core")
    if core.VERSION < (0, 19):
        config = importlib.import_module("megatron.training.arguments").core_transformer_config_from_args(args)
        return importlib.import_module("gpt_builders").gpt_builder(args, True, True, config=config)
    config = importlib.import_module("megatron.training.argument_utils").gpt_config_from_args(args)
    groups = importlib.import_module("megatron.core.process_groups_config").ProcessGroupCollection
    builder = importlib.import_module("megatron.training.models.gpt").GPTModelBuilder
    return builder(config).build_model(groups.use_mpu_process_groups())


def megatron_lm(checkout: str) -> dict[str, Any]:
    sys.path.insert(0, checkout)
    importlib.import_module("alflb_megatron.hosts.cpu.trainers").prepare_megatron_lm()
    recipes = importlib.import_module("alflb_megatron.recipes.megatron_lm")
    of = importlib.import_module("megatron.training.arguments")
    alone()
    found = {}
    for recipe in RECIPES:
        launch = recipes.Launch(megatron_lm=checkout, nodes=1, gpus=1, ep=1, device="cpu")
        made = recipes.command(recipes.recipe_of(recipe, launch))
        os.environ.update(made.environment)
        sys.argv = made.script[2:]
        args = of.parse_args()
        of.validate_args(args)
        variables = importlib.import_module("megatron.training.global_vars")
        variables.unset_global_variables()
        variables.set_args(args)
        sys.modules.pop("alflb_megatron.hosts.megatron_lm", None)  # it gives its spec for the arguments that it finds
        with on_meta():
            model = of_megatron_lm(args)
        steps = {"steps": args.train_iters, "warmup_steps": args.lr_warmup_iters, "min_lr": args.min_lr}
        batch = {name: getattr(args, name) for name in ("global_batch_size", "micro_batch_size")}
        found[recipe] = described(model, {**batch, **steps, **of_optimizer(args)})
    return found


HOSTS: dict[str, Callable[..., dict[str, Any]]] = {f.__name__: f for f in (core, bridge, nemo, megatron_lm)}

if __name__ == "__main__":
    host, result, *further = sys.argv[1:]
    Path(result).write_text(json.dumps(HOSTS[host](*further)), encoding="utf-8")
