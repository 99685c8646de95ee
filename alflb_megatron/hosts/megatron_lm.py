"""Megatron-LM: ALF-LB in `pretrain_gpt.py`, by `--spec` on an unmodified checkout or by flags after `alflb patch`.

*Unmodified*: `--spec alflb_megatron.hosts.megatron_lm block_spec`. Megatron-LM imports this module after it has parsed
its arguments and takes the object of that name; settings come from the environment (`ALFLB_RULE`, ...). *Patched*:
`pretrain_gpt.py` imports this module before anything is parsed and calls `add_arguments`, then `enable_from` (up to
0.17 through `enabling`); settings are flags, and `--alflb-rule` turns it on.

Read against Megatron-LM core_v0.16.1, 0.17.1, 0.18.2, 0.19.0 and main at d98e8a64dd (0.20 in development).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch import nn

from alflb_megatron import rules
from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.hosts import core, enable
from alflb_megatron.hosts.dataset_helpers import compile_for_this_python
from alflb_megatron.hosts.errors import exit_on_setting_error
from alflb_megatron.hosts.log import balance_metrics, log_line, writer_metrics
from alflb_megatron.settings import SettingError, add_flags, flag_of, given_environment, given_flags, knobs

logger = logging.getLogger(__name__)

RULE = flag_of("rule", PREFIX)
USE_THE_PATCH = "is not served by --spec in this version of Megatron-LM; use the patch (`alflb patch DIR`)"


# -- with the patch: flags -------------------------------------------------------------------------------------------


def add_arguments(provider: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    """An `extra_args_provider` that calls the given one, if any, and adds the flags of `ALFConfig`.

    Every flag has its default in the namespace, so that Megatron-LM prints it in its log of arguments; that of
    `--alflb-rule` is None, which is off.
    """

    def add(parser: Any) -> Any:
        parser = parser if provider is None else provider(parser)
        compile_for_this_python()  # arguments are read before the checkout compiles
        group = parser.add_argument_group("ALF-LB", "auxiliary-loss-free load balancing of the experts")
        group.add_argument(
            RULE, metavar=f"{{{','.join(rules.names())}}}", help="turns ALF-LB on, with this rule (default: off)"
        )
        add_flags(group, ALFConfig, PREFIX, skip=("rule",))
        parser.set_defaults(**{_attribute(flag): default for flag, default in _other_flags().items()})
        return parser

    return add


def _other_flags() -> dict[str, Any]:
    """The defaults of all flags but `--alflb-rule`."""
    return {flag_of(field.name, PREFIX): field.default for field, *_ in knobs(ALFConfig) if field.name != "rule"}


def _attribute(flag: str) -> str:
    """The name under which argparse keeps a flag."""
    return flag[2:].replace("-", "_")


def _flags_in_help() -> None:
    """Adds our flags to those that `--help` prints.

    `pretrain_gpt.py` has in-process restart parse the command line first, without extra arguments: there help is
    printed, and the program ends. Without `--help` nothing is changed.
    """
    arguments: Any = sys.modules.get("megatron.training.arguments")
    if arguments is not None and {"-h", "--help"} & set(sys.argv[1:]):
        arguments.add_megatron_arguments = add_arguments(arguments.add_megatron_arguments)


def enable_from(args: argparse.Namespace) -> None:
    """Turns ALF-LB on for the models built after this call, where `--alflb-rule` is given; without it, does nothing.

    Raises:
        SettingError: a setting that cannot work, a flag of ALF-LB that has no effect because `--alflb-rule` is not
            given, or `--spec` with our block spec in a patched `pretrain_gpt.py`.
    """
    if _is_our_spec(args):
        exit_on_setting_error()
        raise SettingError("--spec", " ".join(args.spec), f"is for an unpatched pretrain_gpt.py; here use {RULE}")
    if getattr(args, _attribute(RULE), None) is None:
        for flag, default in _other_flags().items():
            if (value := getattr(args, _attribute(flag), default)) != default:
                exit_on_setting_error()
                raise SettingError(flag, value, f"has no effect without {RULE}")
        return
    exit_on_setting_error()
    _enable(ALFConfig(**given_flags(args, ALFConfig, PREFIX)), args)


def enabling(model_provider: Callable[..., Any]) -> Callable[..., Any]:
    """A model provider that calls `enable_from` with Megatron-LM's arguments before it builds.

    Up to 0.17 `pretrain` parses them itself: between that and the model `pretrain_gpt.py` has its say nowhere else.
    """

    @functools.wraps(model_provider)
    def provide(*args: Any, **kwargs: Any) -> Any:
        enable_from(importlib.import_module("megatron.training").get_args())
        return model_provider(*args, **kwargs)

    return provide


def _enable(alf: ALFConfig, args: argparse.Namespace) -> None:
    if not args.num_experts:
        raise SettingError("--num-experts", args.num_experts, "ALF-LB balances experts: the model needs MoE layers")
    if args.moe_router_enable_expert_bias and getattr(args, "rank", 0) == 0:
        # Not refused: --use-checkpoint-args brings it back from a checkpoint of Megatron-LM's own bias, by force.
        logger.warning(
            "--moe-router-enable-expert-bias and its update rate move nothing while ALF-LB is on; "
            "leave it out to save its all-reduce"
        )
    enable.enable(alf)
    show_loads()


# -- without the patch: --spec ---------------------------------------------------------------------------------------


def _is_our_spec(args: argparse.Namespace) -> bool:
    return bool(args.spec) and args.spec[0] == __name__


def _parsed_arguments() -> argparse.Namespace | None:
    """Megatron-LM's arguments, None where they are not parsed yet or nothing of Megatron-LM has been imported."""
    training = sys.modules.get("megatron.training")
    try:
        return None if training is None else training.get_args()
    except (AssertionError, AttributeError):
        return None


def _block_spec_of(args: argparse.Namespace) -> Any:
    """What `--spec` is to give: from 0.19 on a function that is called when the model is built, before it the spec.

    From 0.19 on Megatron-LM takes the object before process groups stand, and calls it with its model's configuration
    (and `vp_stage`) once for every chunk. Before it a block is one object, for the stage of this rank.
    """
    alf = ALFConfig(**given_environment(os.environ, ALFConfig, PREFIX))
    if core.VERSION >= (0, 19):
        _enable(alf, args)
        layers = importlib.import_module("megatron.training.models.gpt").default_layer_spec

        def build(config: Any, vp_stage: int | None = None) -> Any:
            return core.with_alflb(layers(config, vp_stage), alf, required=False)

        return build
    _refuse_what_one_object_cannot_serve(args)
    _enable(alf, args)
    config = importlib.import_module("megatron.training.arguments").core_transformer_config_from_args(args)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=args.transformer_impl == "transformer_engine",
        normalization=args.normalization,
        qk_l2_norm=args.qk_l2_norm,
    )
    return core.with_alflb(block, alf, required=False)  # a pipeline stage may hold dense layers alone


def _refuse_what_one_object_cannot_serve(args: argparse.Namespace) -> None:
    if args.virtual_pipeline_model_parallel_size is not None:
        flag = "--num-layers-per-virtual-pipeline-stage"
        raise SettingError(flag, getattr(args, _attribute(flag), None), f"an interleaved pipeline {USE_THE_PATCH}")
    # gpt_builders.py reads for MTP a name that only its branch without --spec defines, and has branches of its own
    # for the attention variants.
    for flag in ("--mtp-num-layers", "--experimental-attention-variant", "--yaml-cfg"):
        value = getattr(args, _attribute(flag), None)
        if value is not None:
            raise SettingError(flag, value, USE_THE_PATCH)


# -- the log ---------------------------------------------------------------------------------------------------------


def show_loads() -> None:
    """Puts `log_line` into Megatron-LM's log line, all figures into its TensorBoard and W&B; twice is once.

    Two names that Megatron-LM looks up in `megatron.training.training` are replaced and marked `__alflb__`: `train`,
    which is given the model, and `training_log`, which every rank calls once per global batch.
    """
    training: Any = importlib.import_module("megatron.training.training")
    plain_train, plain_log = training.train, training.training_log
    if getattr(plain_log, "__alflb__", False):
        return
    trained: list[nn.Module] = []

    @functools.wraps(plain_train)
    def train(forward_step_func: Any, model: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
        trained[:] = model
        try:
            return plain_train(forward_step_func, model, *args, **kwargs)
        finally:
            trained.clear()

    signature = inspect.signature(plain_log)

    @functools.wraps(plain_log)
    def training_log(loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        shown = balance_metrics(trained, parallel_state.get_pipeline_model_parallel_group()) if trained else {}
        iteration = signature.bind(loss_dict, *args, **kwargs).arguments["iteration"]
        if shown and iteration % training.get_args().tensorboard_log_interval == 0:
            _write(training, writer_metrics(shown), iteration)
        return plain_log({**loss_dict, **log_line(shown)}, *args, **kwargs)

    for wrapper in (train, training_log):
        vars(wrapper)["__alflb__"] = True
        setattr(training, wrapper.__name__, wrapper)


def _write(training: Any, shown: dict[str, float], iteration: int) -> None:
    """Hands figures to the writers that Megatron-LM has on this rank, which is its last."""
    if (writer := training.get_tensorboard_writer()) is not None:
        for name, value in shown.items():
            writer.add_scalar(name, value, iteration)
    if (wandb := training.get_wandb_writer()) is not None:
        wandb.log(shown, iteration)


# -- the object of --spec --------------------------------------------------------------------------------------------


def _block_spec() -> Any:
    args = _parsed_arguments()
    if args is None:
        _flags_in_help()
        return None
    if not _is_our_spec(args):
        return None
    exit_on_setting_error()
    return _block_spec_of(args)


block_spec: Any = _block_spec()
"""For `--spec`; None where this module was imported before Megatron-LM parsed its arguments, as the patch does."""
