"""A step that Megatron-Core runs again begins where its first run did, biases too.

Where a result looks wrong, `rerun_state_machine` puts back the random state and runs forward and backward once more, to
tell a fault of the machine from one of the model, and may then save a checkpoint of the step's beginning. A bias that
the first run has moved would route the second one otherwise: the fault would look like one that comes and goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
from torch import Tensor, nn

from alflb_megatron.hosts.patching import Patch

_before: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
"""Router -> its own buffers as they were when the step began."""


@torch.no_grad()
def remember(routers: Iterable[nn.Module]) -> None:
    """Keeps the routers' state where a step begins that may be run again."""
    machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE  # asking for it would make one
    if machine is None or machine.get_mode() is RerunMode.DISABLED or machine.state is not RerunState.INITIAL_RUN:
        return
    for router in routers:
        _before[router] = [tensor.clone() for tensor in _own(router)]


def put_back_with_a_rerun() -> Patch:
    """Has the state put back wherever the machine puts back its own."""
    return Patch(RerunStateMachine, "_restore_state", _restoring)


def _restoring(original: Callable[..., Any]) -> Callable[..., Any]:
    @torch.no_grad()
    def _restore_state(self: RerunStateMachine) -> Any:
        for router, tensors in _before.items():
            for tensor, before in zip(_own(router), tensors, strict=True):
                tensor.copy_(before)
        return original(self)

    return _restore_state


def _own(router: nn.Module) -> list[Tensor]:
    return list(router.buffers(recurse=False))
