"""Trains what a checkpoint's run_config.yaml says with Megatron-Bridge alone: nothing of ours but `hosts/cpu`.

torchrun ... bridge_plain.py RUN_CONFIG SAVE
"""

import functools
import sys
from pathlib import Path
from typing import Any

from alflb_megatron.hosts.cpu.trainers import prepare_bridge


def take_over(config: Any, settings: dict[str, Any]) -> None:
    """Sets the plain values; what is neither (dtypes, functions, process groups) is left as it is."""
    for name, value in settings.items():
        if value is None or isinstance(value, bool | int | float | str | list):
            setattr(config, name, value)


if __name__ == "__main__":
    prepare_bridge(skip=sys.argv[3:])
    import torch
    import yaml
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.recipes.common import _pretrain_common
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    settings = yaml.safe_load(Path(sys.argv[1]).read_text())
    assert settings["model"].pop("alflb") is None
    model = settings["model"]
    cfg = _pretrain_common()
    cfg.model = GPTModelProvider(
        **{name: model[name] for name in ("num_layers", "hidden_size", "num_attention_heads")},
        activation_func=torch.nn.functional.silu,
        transformer_layer_spec=functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=False),
    )
    cfg.mixed_precision = None
    for section, values in settings.items():
        if isinstance(values, dict) and getattr(cfg, section, None) is not None:
            take_over(getattr(cfg, section), {k: v for k, v in values.items() if not k.startswith("_")})
    cfg.model.pipeline_dtype = cfg.model.params_dtype = cfg.optimizer.params_dtype = torch.float32
    cfg.checkpoint.save, cfg.checkpoint.load = sys.argv[2], None
    pretrain(cfg, forward_step)
    ours = sorted(name for name in sys.modules if name.startswith("alflb_megatron") and ".cpu" not in name)
    assert ours == ["alflb_megatron", "alflb_megatron.hosts"], ours
