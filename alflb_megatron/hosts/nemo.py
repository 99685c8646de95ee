"""NeMo 2: a Lightning callback that turns ALF-LB on, the only thing to add to a recipe of `nemo.collections.llm`.

    recipe = llm.deepseek_v3.pretrain_recipe(...)
    recipe.trainer.callbacks.append(run.Config(ALFLB, rule="adaptive"))

Read against nemo-toolkit 2.7.3 on megatron-core 0.16.1. Where CUDA is missing, importing this module makes NeMo run
without it (`hosts/cpu/trainers.py:prepare_nemo`): NeMo-Run rebuilds a recipe in a new process, where this import is the
first line of ours that runs.
"""

# No `from __future__ import annotations`: overrides on nemo_run's command line need types, not their names.
import functools
import importlib
import importlib.util
import inspect
import logging
from typing import Any, Optional

from alflb_megatron.config import ALFConfig
from alflb_megatron.hosts.cpu.trainers import prepare_nemo
from alflb_megatron.settings import SettingError

logger = logging.getLogger(__name__)


def _need_nemo_2() -> None:
    """Raises ImportError where there is no `nemo.collections.llm`, and says why."""
    if importlib.util.find_spec("nemo") is None:
        raise ImportError("NeMo 2 is not installed: it is nemo-toolkit 2.7.x, `pip install 'nemo-toolkit>=2.7,<3'`")
    if importlib.util.find_spec("nemo.collections.llm") is None:
        raise ImportError(
            "this nemo-toolkit has no nemo.collections.llm: NeMo 3 has no LLM collection any more, and 2.7.x is the "
            "last line that has it. Install nemo-toolkit>=2.7,<3, or go over to its successor, Megatron-Bridge "
            "(alflb_megatron.recipes.bridge)"
        )


_need_nemo_2()
_too_late: RuntimeError | None = None
try:
    prepare_nemo()
except RuntimeError as error:
    # Recipes can still be built here and launched elsewhere: only training on this machine has to stop.
    _too_late = error

import lightning.pytorch as pl  # noqa: E402

from alflb_megatron.hosts import core, enable  # noqa: E402
from alflb_megatron.hosts.log import balance_metrics  # noqa: E402
from alflb_megatron.router import ALFRouter  # noqa: E402


def layer_spec(config: Any, vp_stage: int | None = None, *, spec: Any, alf: ALFConfig) -> Any:
    """What `spec` stands for, with our router in it.

    `spec` is what NeMo's `GPTConfig.transformer_layer_spec` holds: a layer spec, a block of them, or a function of
    (config) or (config, vp_stage) that returns one. NeMo derives its MTP layers from the same function.
    """
    if callable(spec) and not isinstance(spec, core.ModuleSpec):  # which can be called as well, and builds the module
        staged = "vp_stage" in inspect.signature(spec).parameters
        spec = spec(config, vp_stage=vp_stage) if staged else spec(config)
    return core.with_alflb(spec, alf, required=False)  # a pipeline stage may have no MoE layer


class ALFLB(pl.Callback):
    """Balances the experts of the model that this trainer builds, and logs how balanced they are.

    The knobs are those of `ALFConfig`. Put it among the trainer's callbacks before `fit`; nothing else is needed, and
    `moe_router_enable_expert_bias` may stay off. The loads of each global batch go to Lightning's loggers as
    `alflb/MaxVio`, `alflb/load max` and so on, and MaxVio to the progress line.

    Checkpoints record the router with the model, so that a model restored from one routes by the bias it has learnt.

    Raises:
        SettingError: a knob that cannot work; when training starts, a model without experts.
    """

    def __init__(
        self,
        rule: str = "adaptive",
        step_size: Optional[float] = None,  # noqa: UP045  (nemo_run's overrides do not know float | None)
        rule_options: str = "",
        score_unit: str = "score",
        update_every: str = "global-batch",
        centring: bool = True,
        frozen: bool = False,
        stop_after: int = 0,
        fade: int = 0,
        check_every: int = 10,
        on_disagreement: str = "heal",
        alarm_after: int = 100,
        alarm_max_vio: float = 2.0,
        alarm_spread: Optional[float] = None,  # noqa: UP045
        log_layers: bool = False,
        log_every: int = 0,
    ) -> None:
        super().__init__()
        self.alf = ALFConfig(
            rule=rule,
            step_size=step_size,
            rule_options=rule_options,
            score_unit=score_unit,
            update_every=update_every,
            centring=centring,
            frozen=frozen,
            stop_after=stop_after,
            fade=fade,
            check_every=check_every,
            on_disagreement=on_disagreement,
            alarm_after=alarm_after,
            alarm_max_vio=alarm_max_vio,
            alarm_spread=alarm_spread,
            log_layers=log_layers,
            log_every=log_every,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts our router into the model's layer spec. Lightning calls it before the model is built.

        Raises:
            SettingError: the model has no experts.
            TypeError: its layers do not come from a `transformer_layer_spec`.
            RuntimeError: it has been built already, with another router; or, without CUDA, this module was imported
                after `megatron.core`.
        """
        if _too_late is not None:
            raise _too_late
        config: Any = getattr(pl_module, "config", None)
        if not hasattr(config, "transformer_layer_spec"):
            raise TypeError(
                f"{type(pl_module).__name__} has no config.transformer_layer_spec: ALFLB cannot reach its routers"
            )
        if not getattr(config, "num_moe_experts", None):
            raise SettingError("num_moe_experts", config.num_moe_experts, "ALFLB needs a model with experts")
        self._refuse_built(pl_module)
        accept_removed_optimizer_arguments()
        enable.update_everywhere()
        config.transformer_layer_spec = functools.partial(
            layer_spec, spec=_inner(config.transformer_layer_spec), alf=self.alf
        )
        if hasattr(pl_module, "__io__"):
            self._record(pl_module.__io__.config)

    def _record(self, config: Any) -> None:
        """Puts the router into the Fiddle configuration of the model as well.

        NeMo builds the further chunks of an interleaved pipeline from it (megatron_parallel.py:MegatronParallel), and
        writes it to checkpoints.
        """
        fdl = importlib.import_module("fiddle")
        knobs = {name: getattr(self.alf, name) for name in inspect.signature(ALFConfig).parameters}
        config.transformer_layer_spec = fdl.Partial(
            layer_spec, spec=_inner(config.transformer_layer_spec), alf=fdl.Config(ALFConfig, **knobs)
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises RuntimeError where the model was built without us: `setup` was never called."""
        self._refuse_built(pl_module)

    def _refuse_built(self, pl_module: pl.LightningModule) -> None:
        for name, module in pl_module.named_modules():
            if isinstance(module, core.TopKRouter) and not isinstance(module, ALFRouter):
                raise RuntimeError(
                    f"ALFLB was added after the model was built: {name} is a {type(module).__name__}. "
                    "Give it to the trainer before fit and before configure_model"
                )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the loads of the global batch; NeMo's batch is a global one."""
        parallel_state = importlib.import_module("megatron.core.parallel_state")
        chunks = list(trainer.strategy.megatron_parallel)
        for name, value in balance_metrics(chunks, parallel_state.get_pipeline_model_parallel_group()).items():
            pl_module.log(f"alflb/{name}", value, prog_bar=name == "MaxVio", batch_size=1)


def _inner(spec: Any) -> Any:
    """The layer spec without what an earlier `ALFLB` put around it: the later one's knobs count."""
    return spec.keywords["spec"] if isinstance(spec, functools.partial) and spec.func is layer_spec else spec


REMOVED_OPTIMIZER_ARGUMENTS = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}
"""Arguments that `get_megatron_optimizer` lost in Megatron-Core 0.16, NeMo 2.7.3 still passes, and their defaults."""


def accept_removed_optimizer_arguments() -> None:
    """Lets NeMo 2.7.3 build its optimizer on Megatron-Core 0.16 and later; `ALFLB` calls it. Twice is once.

    nemo/lightning/_strategy_lib.py:setup_megatron_optimizer passes arguments that are gone. They are left out while
    they have their defaults; a `SettingError` is raised where one has not, for it would have no effect.
    """
    optimizer: Any = importlib.import_module("megatron.core.optimizer")
    plain = optimizer.get_megatron_optimizer
    gone = [name for name in REMOVED_OPTIMIZER_ARGUMENTS if name not in inspect.signature(plain).parameters]
    if not gone or getattr(plain, "__alflb__", False):
        return

    @functools.wraps(plain)
    def get_megatron_optimizer(*args: Any, **kwargs: Any) -> Any:
        for name in gone:
            if (value := kwargs.pop(name, REMOVED_OPTIMIZER_ARGUMENTS[name])) != REMOVED_OPTIMIZER_ARGUMENTS[name]:
                raise SettingError(name, value, "Megatron-Core has no such setting any more, so it must stay unset")
        return plain(*args, **kwargs)

    get_megatron_optimizer.__alflb__ = True  # type: ignore[attr-defined]
    optimizer.get_megatron_optimizer = get_megatron_optimizer
