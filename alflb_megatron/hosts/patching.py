"""One attribute of a host replaced, marked `__alflb__`, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Patch:
    """One attribute of Megatron's replaced, and put back.

    Patches of one attribute may be undone in any order: one that lies under another does nothing from then on, and goes
    with it.
    """

    def __init__(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.owner, self.name, self.undone = owner, name, False
        self.original = original = getattr(owner, name)
        wrapped = wrap(original)

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return (original if self.undone else wrapped)(*args, **kwargs)

        replacement.__alflb__ = True  # type: ignore[attr-defined]
        self.replacement = replacement
        _patches.append(self)
        setattr(owner, name, replacement)

    def undo(self) -> None:
        self.undone = True
        while top := next((patch for patch in _patches if patch.undone and patch._is_on_top()), None):
            setattr(top.owner, top.name, top.original)
            _patches.remove(top)

    def _is_on_top(self) -> bool:
        return getattr(self.owner, self.name) is self.replacement


_patches: list[Patch] = []
