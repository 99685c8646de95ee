"""Megatron-Bridge: a provider with ALF-LB as a field, any provider made to balance, and what Bridge logs of it.

    cfg.model = ALFGPTModelProvider(..., alflb=ALFLB(rule="adaptive"))      # then `model.alflb.rule=sign` overrides it
    provider = balance(AutoBridge.from_hf_pretrained(...).to_megatron_provider(), rule="adaptive")
    pretrain(cfg, forward_step, callbacks=[ALFLBCallback()])                # MaxVio and loads in log, TensorBoard, W&B

Without CUDA, importing this module makes Bridge importable (hosts/cpu/trainers.py). Read against Megatron-Bridge 0.3.1
(megatron-core 0.16.1) and 0.6.2 (0.19.2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from alflb_megatron.config import ALFConfig
from alflb_megatron.settings import knobs

if not torch.cuda.is_available():
    from alflb_megatron.hosts.cpu import trainers

    _names = ", ".join(substitution.name for substitution in trainers.prepare_bridge())
    logging.getLogger(__name__).warning("no CUDA: Megatron-Bridge runs with substitutes for %s", _names)

from megatron.bridge.models.conversion import model_bridge, peft_bridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.utils import instantiate_utils
from megatron.core import parallel_state

from alflb_megatron.hosts.core import with_alflb
from alflb_megatron.hosts.enable import update_everywhere
from alflb_megatron.hosts.log import balance_metrics, log_line, writer_metrics
from alflb_megatron.hosts.watch import watch_loads
from alflb_megatron.router_state import STATE_PREFIX

Provider = TypeVar("Provider")

# Bridge tells from a module's class how its weights are split; a router's are the same on every rank.
AutoMapping.register_module_type("ALFRouter", "replicated")
if hasattr(instantiate_utils, "register_allowed_target_prefix"):
    # 0.6 builds from a checkpoint's run_config.yaml only what is on its list.
    instantiate_utils.register_allowed_target_prefix("alflb_megatron.")


def _without_our_state(plain: Callable[..., Iterator[tuple[str, Any]]]) -> Callable[..., Iterator[tuple[str, Any]]]:
    @functools.wraps(plain)
    def persistent_buffers(model: Any) -> Iterator[tuple[str, Any]]:
        for name, buffer in plain(model):
            if not name.rpartition(".")[2].startswith(STATE_PREFIX):
                yield name, buffer

    return persistent_buffers


# Bridge looks for every buffer's place in the Hugging Face model, and stops at one without: the bias has one
# (`e_score_correction_bias`), what our rules remember between steps has none.
for _module in (model_bridge, peft_bridge):
    _module.persistent_buffers = _without_our_state(_module.persistent_buffers)


ALFLB: Any = dataclasses.make_dataclass(
    "ALFLB",
    [
        (field.name, kind | None if optional else kind, dataclasses.field(default=field.default))
        for field, _, kind, optional in knobs(ALFConfig)
    ],
)
ALFLB.__module__ = __name__
ALFLB.__doc__ = (
    """The knobs of `ALFConfig`, which Bridge's command line can set one by one: an override assigns to a field."""
)


@dataclasses.dataclass
class ALFGPTModelProvider(GPTModelProvider):
    """Bridge's GPT provider whose MoE layers are balanced as `alflb` says; `model.alflb=null` leaves them to the host.

    Raises `SettingError` in `finalize()`, before a model is built, on a knob that cannot work.
    """

    alflb: ALFLB | None = dataclasses.field(default_factory=ALFLB)

    def finalize(self) -> None:
        """Checks the knobs and Bridge's own settings."""
        if self.alflb is not None:
            settings_of(self.alflb)
        super().finalize()

    def provide(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the model (one pipeline chunk of it), MTP layers included."""
        if self.alflb is None:
            return super().provide(*args, **kwargs)
        with _balanced(self, settings_of(self.alflb)):
            return super().provide(*args, **kwargs)


def settings_of(alflb: Any) -> ALFConfig:
    """The `ALFConfig` that an `ALFLB` stands for; raises `SettingError` on a knob that cannot work."""
    return ALFConfig(**dataclasses.asdict(alflb))


def balance(provider: Provider, alf: ALFConfig | None = None, **settings: Any) -> Provider:
    """Has every MoE layer that `provider` builds balanced; returns `provider`, changed.

    For any GPT provider of Bridge, such as one made from a Hugging Face model, whose `e_score_correction_bias` is then
    the bias that training starts from. `balance(provider, rule="sign")` or `balance(provider, ALFConfig(...))`.
    """
    wanted = dataclasses.replace(alf or ALFConfig(), **settings)
    spec: Any = provider.transformer_layer_spec  # type: ignore[attr-defined]
    provider.transformer_layer_spec = functools.partial(  # type: ignore[attr-defined]
        balanced_layer_spec, inner=spec, **dataclasses.asdict(wanted)
    )
    return provider


@contextlib.contextmanager
def _balanced(provider: Any, alf: ALFConfig) -> Iterator[None]:
    inner = provider.transformer_layer_spec
    balance(provider, alf)
    try:
        yield
    finally:
        provider.transformer_layer_spec = inner


def balanced_layer_spec(config: Any, vp_stage: int | None = None, *, inner: Any, **settings: Any) -> Any:
    """The layer spec that `inner` (a spec, or a function of the configuration) gives, with our router in it."""
    update_everywhere()  # Bridge sets finalize_model_grads_func itself, after this
    if callable(inner) and not dataclasses.is_dataclass(inner):
        takes_stage = "vp_stage" in inspect.signature(inner).parameters
        inner = inner(config, vp_stage=vp_stage) if takes_stage else inner(config)
    return with_alflb(inner, ALFConfig(**settings), required=False)  # a pipeline stage may hold dense layers alone


class ALFLBCallback(Callback):
    """Adds `hosts.log.log_line` to what Bridge logs of a step, and all other figures to its TensorBoard and W&B.

    Where Megatron-Core's own routers are in the model their loads are watched, for comparison; nothing of them changes.
    """

    def on_train_start(self, context: CallbackContext) -> None:
        """Once, before the first step."""
        update_everywhere()
        watch_loads(context.model)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Before Bridge logs the step, which it does from the same dictionary."""
        shown = balance_metrics(context.model, parallel_state.get_pipeline_model_parallel_group())
        if context.loss_dict is not None:
            context.loss_dict.update(log_line(shown))
        state = context.state
        step, every = state.train_state.step + 1, state.cfg.logger.tensorboard_log_interval  # it counts later
        if shown and every and step % every == 0:
            self._write(state, writer_metrics(shown), step)

    @staticmethod
    def _write(state: Any, shown: dict[str, float], step: int) -> None:
        """Hands figures to the writers that Bridge has on this rank, which is its last."""
        if (writer := state.tensorboard_logger) is not None:
            for name, value in shown.items():
                writer.add_scalar(name, value, step)
        if (wandb := state.wandb_logger) is not None:
            wandb.log(shown, step)
