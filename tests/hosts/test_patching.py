"""Attributes of a host that are replaced by several, and put back in any order."""

from __future__ import annotations

from typing import Any

import pytest

from alflb_megatron.hosts.patching import Patch


class Host:
    def said(self) -> list[str]:
        return ["host"]


def adding(word: str) -> Any:
    return lambda original: lambda self: [*original(self), word]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_patches_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    original, words = Host.said, ["one", "two", "three"]
    patches = [Patch(Host, "said", adding(word)) for word in words]
    assert Host().said() == ["host", *words]
    left = list(words)
    for index in order:
        patches[index].undo()
        left.remove(words[index])
        assert Host().said() == ["host", *left]
    assert Host.said is original


def test_what_somebody_else_put_over_it_stays() -> None:
    original = Host.said
    patch = Patch(Host, "said", adding("ours"))
    ours = Host.said
    theirs: Any = lambda self: [*ours(self), "theirs"]  # noqa: E731
    Host.said = theirs  # type: ignore[method-assign]
    patch.undo()
    assert Host.said is theirs and Host().said() == ["host", "theirs"]
    Host.said = original  # type: ignore[method-assign]
