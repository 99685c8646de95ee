"""How the recipes' models are trained, once for every host: batch, steps, learning rate, optimizer, GPUs.

From Wang et al. 2024 (arXiv 2408.15664, appendix): batch, steps, peak and final learning rate, warm-up of the 1B model.
Where it is silent: AdamW with betas 0.9 and 0.95, weight decay 0.1 and gradients clipped at 1, as DeepSeekMoE
(arXiv 2401.06066) states for its own runs, and epsilon 1e-8; for the 3B model the 1B's warm-up. The 3B model's learning
rate falls in steps (7.8e-4, 2.47e-4, 7.8e-5), which no scheduler of Megatron-LM, Megatron-Bridge or NeMo does: in all
recipes it falls from the first to the last of them on a cosine. (`alflb train` has a scheduler of its own for it.)
"""

from __future__ import annotations

from dataclasses import dataclass

from alflb_megatron.settings import SettingError


@dataclass(frozen=True)
class Training:
    """Sequences a global batch and a micro-batch, optimizer steps, the learning rate, cosine after a warm-up, and GPUs.

    `expert_parallel` None stands for as many as there are GPUs.
    """

    global_batch_size: int
    micro_batch_size: int
    steps: int
    warmup_steps: int
    lr: float
    min_lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    nodes: int = 1
    gpus: int = 8
    expert_parallel: int | None = 8


TRAINING: dict[str, Training] = {
    "tiny": Training(8, 2, steps=200, warmup_steps=20, lr=3e-3, min_lr=3e-4, gpus=1, expert_parallel=None),
    "deepseek-moe-1b": Training(1152, 4, steps=40_000, warmup_steps=1000, lr=1e-3, min_lr=1e-4),
    "deepseek-moe-3b": Training(1728, 2, steps=56_514, warmup_steps=1000, lr=7.8e-4, min_lr=7.8e-5, nodes=2),
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
