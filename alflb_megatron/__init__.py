"""Auxiliary-loss-free load balancing for Megatron-Core's mixture-of-experts layers.

One line before the model is built turns it on:

    import alflb_megatron
    alflb_megatron.enable(rule="sign")

or, explicitly and without touching anything of Megatron's:

    from alflb_megatron import ALFConfig, install, with_alflb
    layer_spec = with_alflb(layer_spec, ALFConfig(rule="sign"))
    install(config)            # wraps config.finalize_model_grads_func

Public names: `enable`, `disable`, `with_alflb`, `install`, `warm_start`, `ALFConfig`, `ALFRouter`, `Rule`, `register`,
`SettingError`. Megatron-Core is imported when the first of them that needs it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "enable": "alflb_megatron.hosts.enable",
    "disable": "alflb_megatron.hosts.enable",
    "with_alflb": "alflb_megatron.hosts.core",
    "install": "alflb_megatron.hosts.core",
    "warm_start": "alflb_megatron.calibration",
    "ALFRouter": "alflb_megatron.router",
    "ALFConfig": "alflb_megatron.config",
    "Rule": "alflb_megatron.rules",
    "register": "alflb_megatron.rules",
    "SettingError": "alflb_megatron.settings",
}

__all__ = [
    "ALFConfig",
    "ALFRouter",
    "Rule",
    "SettingError",
    "disable",
    "enable",
    "install",
    "register",
    "warm_start",
    "with_alflb",
]

if TYPE_CHECKING:
    from alflb_megatron.calibration import warm_start
    from alflb_megatron.config import ALFConfig
    from alflb_megatron.hosts.core import install, with_alflb
    from alflb_megatron.hosts.enable import disable, enable
    from alflb_megatron.router import ALFRouter
    from alflb_megatron.rules import Rule, register
    from alflb_megatron.settings import SettingError


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
