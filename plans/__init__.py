"""Plans of `alflb reproduce`, to reproduce and to extend the papers. Installed as `alflb_megatron.plans`."""
