"""One attribute of a host replaced, marked `__alflb__`, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Patch:
    """One attribute of Megatron's replaced, and put back."""

    def __init__(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name)
        replacement = functools.wraps(self.original)(wrap(self.original))
        replacement.__alflb__ = True  # type: ignore[attr-defined]
        setattr(owner, name, replacement)

    def undo(self) -> None:
        setattr(self.owner, self.name, self.original)
