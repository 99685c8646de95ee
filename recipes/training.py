"""How the recipes' models are trained, once for every host: batch, steps, learning rate, optimizer, GPUs.

Batch, steps, learning rate and warm-up are `alflb_megatron.models.PUBLISHED`, from Wang et al. 2024 (arXiv 2408.15664,
appendix). Where it is silent: AdamW with betas 0.9 and 0.95, weight decay 0.1 and gradients clipped at 1, as
DeepSeekMoE (arXiv 2401.06066) states for its own runs, and epsilon 1e-8. The 3B model's learning rate falls in steps
(7.8e-4, 2.47e-4, 7.8e-5), which no scheduler of Megatron-LM, Megatron-Bridge or NeMo does: in all recipes it falls from
the first to the last of them on a cosine. (`alflb train` has a scheduler of its own for it.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from alflb_megatron.models import PUBLISHED, Schedule
from alflb_megatron.settings import SettingError


@dataclass(frozen=True)
class Training(Schedule):
    """Sequences a global batch and a micro-batch, optimizer steps, the learning rate, cosine after a warm-up, and GPUs.

    `expert_parallel` None stands for as many as there are GPUs.
    """

    micro_batch_size: int
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    nodes: int = 1
    gpus: int = 8
    expert_parallel: int | None = 8


TRAINING: dict[str, Training] = {
    "tiny": Training(8, 200, warmup_steps=20, lr=3e-3, min_lr=3e-4, micro_batch_size=2, gpus=1, expert_parallel=None),
    "deepseek-moe-1b": Training(**asdict(PUBLISHED["deepseek-moe-1b"]), micro_batch_size=4),
    "deepseek-moe-3b": Training(**asdict(PUBLISHED["deepseek-moe-3b"]), micro_batch_size=2, nodes=2),
}
"""By the names of `alflb_megatron.models.PRESETS`. `tiny`, the micro-batches and the split over GPUs are ours."""

RECIPES: dict[str, str] = {
    "deepseek_moe_1b_alflb": "deepseek-moe-1b",
    "deepseek_moe_3b_alflb": "deepseek-moe-3b",
    "deepseek_moe_tiny_alflb": "tiny",
}
"""The recipes, under the same name for every host, and the preset of each."""


def preset_of(recipe: str) -> str:
    """Raises `SettingError` where there is no such recipe."""
    if recipe not in RECIPES:
        raise SettingError("recipe", recipe, f"must be one of {', '.join(RECIPES)}")
    return RECIPES[recipe]


def training_of(preset: str) -> Training:
    """Raises `SettingError` where no recipe trains this preset."""
    if preset not in TRAINING:
        raise SettingError("preset", preset, f"must be one of {', '.join(TRAINING)}")
    return TRAINING[preset]
