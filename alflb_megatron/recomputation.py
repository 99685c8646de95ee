"""Which forward passes are second ones: activation recomputation runs a layer again during the backward pass.

The first pass of a layer is the one that counts; the second has to choose the experts of the first. Both stand inside
the same checkpoint, which is found by looking up the stack:

    reentrant       `forward` and `backward` of an autograd function share their `ctx` (Megatron-Core's, Transformer
                    Engine's, torch's); the first pass runs without gradients
    non-reentrant   `checkpoint` and, where backward asks for a saved tensor, `unpack_hook` share a frame object
                    (`torch.utils.checkpoint` with `use_reentrant=False`, Transformer Engine's); both have gradients

That needs no name of any library but these, and holds in any order of forward and backward passes.
"""

from __future__ import annotations

import sys
from collections import deque
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Checkpoint(NamedTuple):
    """A checkpoint around a forward pass: the object that stands for it in both of its passes, and which this is."""

    key: Any
    second: bool


def enclosing() -> list[Checkpoint]:
    """The checkpoints around the forward pass that calls this, innermost first, up to one in its second pass."""
    if torch.compiler.is_compiling():
        return []
    found: list[Checkpoint] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        checkpoint = _checkpoint_of(frame, bool(found))
        if checkpoint is not None:
            found.append(checkpoint)
            if checkpoint.second:
                break
        frame = frame.f_back
    return found


def _checkpoint_of(frame: FrameType, inside: bool) -> Checkpoint | None:
    """The checkpoint that a frame is of, if it trains; `inside`: there is one within it that does."""
    name = frame.f_code.co_name
    if name in ("forward", "backward") and frame.f_code.co_varnames[:1] == ("ctx",):
        ctx = frame.f_locals.get("ctx")
        # no edges: gradients are off around the checkpoint, or nothing needs any, and no backward pass will follow
        if not any(getattr(ctx, "needs_input_grad", ())) or not getattr(ctx, "next_functions", None):
            return None
        return Checkpoint(ctx, name == "backward")
    if name == "unpack_hook" and "frame" in frame.f_code.co_freevars:
        return Checkpoint(frame.f_locals.get("frame"), True)
    if name == "checkpoint":
        generator = frame.f_locals.get("gen")
        held = getattr(generator, "gi_frame", None)
        key = (held or frame).f_locals.get("new_frame")
        trains = inside or torch.is_grad_enabled()  # what it runs has the gradient mode around it
        return Checkpoint(key, False) if trains and key is not None else None
    return None


def is_first_pass(training: bool) -> bool:
    """Whether a forward pass trains on its tokens for the first time: the one that counts them.

    Left out are evaluation, passes without gradients that no backward pass follows, and second passes.
    """
    if not training:
        return False
    with_gradients = torch.is_grad_enabled()
    if with_gradients and not in_backward():
        return True
    checkpoints = enclosing()
    if checkpoints and checkpoints[-1].second:
        return False
    # In a backward pass a checkpoint of an unknown kind: its first pass, without gradients, was not seen as one.
    return with_gradients or bool(checkpoints)


def in_backward() -> bool:
    """Whether this runs inside a backward pass, as every second pass does."""
    return torch._C._current_graph_task_id() != -1


_KEPT = "_alflb_biases"


def keep_bias(checkpoints: list[Checkpoint], router: object, bias_E: Tensor) -> None:
    """Keeps the bias of a first pass with the checkpoints around it, for their second; it goes with their graph."""
    for checkpoint in checkpoints:
        if not checkpoint.second:
            kept: dict[int, deque[Tensor]] = getattr(checkpoint.key, _KEPT, {})
            setattr(checkpoint.key, _KEPT, kept)
            kept.setdefault(id(router), deque()).append(bias_E)


def kept_bias(checkpoint: Checkpoint, router: object) -> Tensor | None:
    """The bias that the first pass of this router in `checkpoint` had; call by call, where it has several."""
    biases = getattr(checkpoint.key, _KEPT, {}).get(id(router))
    if not biases:
        return None
    biases.rotate(-1)  # a graph that is kept is run again from the first
    return biases[-1]
