"""Recipes: the DeepSeekMoE models of Wang et al. 2024, for each host. Installed as `alflb_megatron.recipes`."""
