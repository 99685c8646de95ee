"""torch_dist checkpoints that lack our state: written by Megatron-Core alone, or by another rule.

dist_checkpointing raises on a key that a checkpoint lacks, so absent keys of ours are taken out of the request first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.dist_checkpointing.strategies import torch as torch_dist

from alflb_megatron.hosts.patching import Patch
from alflb_megatron.router_state import STATE_PREFIX


def tolerating_absent_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, sharded_state_dict: dict[str, Any], checkpoint_dir: Any, *later: Any, **named: Any) -> Any:
        stored = self.load_sharded_metadata(checkpoint_dir)
        return original(self, without_absent_state(sharded_state_dict, stored), checkpoint_dir, *later, **named)

    return load


@contextlib.contextmanager
def absent_state_allowed() -> Iterator[None]:
    """Within the block a torch_dist checkpoint may lack state of ours, as one written by Megatron-Core alone does."""
    loads = torch_dist.TorchDistLoadShardedStrategy
    patch = Patch(loads, "load", tolerating_absent_state)
    try:
        yield
    finally:
        patch.undo()


def without_absent_state(sharded: Any, stored: dict[str, Any]) -> Any:
    """A copy of a sharded state dict without entries of ours that `stored` (a checkpoint's metadata) lacks."""

    def absent(value: Any) -> bool:
        key = str(getattr(value, "key", ""))
        return key not in stored and key.rpartition(".router.")[2].startswith((STATE_PREFIX, "expert_bias"))

    if isinstance(sharded, dict):
        return {name: without_absent_state(value, stored) for name, value in sharded.items() if not absent(value)}
    if isinstance(sharded, list):
        return [without_absent_state(value, stored) for value in sharded if not absent(value)]
    return sharded
