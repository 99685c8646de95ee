"""Which forward passes are second ones: activation recomputation runs a layer again during the backward pass.

Reentrant checkpointing (Megatron-Core's, Transformer Engine's) runs the first pass without gradients, so the second is
the one to count. Non-reentrant checkpointing (`torch.utils.checkpoint` with `use_reentrant=False`) runs both with
gradients, so there the second must not be counted again.
"""

from __future__ import annotations

import sys

import torch


def repeats_a_pass_with_gradients() -> bool:
    """Whether the forward pass that calls this is the second one of non-reentrant checkpointing.

    Such a pass begins where the backward pass asks for a saved tensor (`unpack_hook`), a reentrant one in the
    `backward` of a function; nested ones are told by the nearer.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("unpack_hook", "backward"):
            return frame.f_code.co_name == "unpack_hook"
        frame = frame.f_back  # type: ignore[assignment]
    return False
