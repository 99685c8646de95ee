"""Patches of the hosts that need one; `alflb patch` applies them."""
