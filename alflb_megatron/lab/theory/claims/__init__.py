"""What is claimed of the method, each claim an object that says its conditions and source, and measures itself.

    from alflb_megatron.lab.theory import claims

    finding = claims.make("lagrangian").check()
    for row in finding.rows:
        print(row.statement, row.measured, row.bound, row.verdict)

A claim is a frozen dataclass: what it tests (a step of the method, an oracle, a gradient) and how hard are its fields,
so that a test can plant a violation and see the check fail.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

Progress = Callable[[int, int], None]
"""Called with (done, of how many) while a check runs."""


class Verdict(StrEnum):
    """What a measurement says of a statement."""

    HOLDS = "holds"
    FAILS = "fails"
    CONDITIONAL = "conditional"
    """Neither always true nor always false: true exactly under the condition that the row names."""


@dataclass(frozen=True)
class Row:
    """One measured statement."""

    statement: str
    condition: str
    measured: str
    bound: str
    verdict: Verdict


@dataclass(frozen=True)
class Finding:
    """What a check measured: rows for the table, and `figures` (plain values and lists) for `theory.json`."""

    rows: list[Row]
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether no row fails."""
        return all(row.verdict is not Verdict.FAILS for row in self.rows)


@dataclass(frozen=True)
class Claim:
    """The contract."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    """Whose it is: the paper, or our derivation."""

    def check(self, progress: Progress | None = None) -> Finding:
        """Measures the claim."""
        raise NotImplementedError(f"{type(self).__name__} has no check")

    @classmethod
    def full(cls) -> Claim:
        """The claim at the effort of `alflb theory --full`."""
        return cls()


C = TypeVar("C", bound=type[Claim])
_REGISTRY: dict[str, type[Claim]] = {}
ORDER = ("lagrangian", "preference", "balance", "structure", "convexity", "regret", "within_batch")
"""As docs/theory.md tells them."""


def register(cls: C) -> C:
    """Class decorator: makes a claim known under its `name`."""
    _REGISTRY[cls.name] = cls
    return cls


def names() -> list[str]:
    """The claims, in the order of the exposition; others after them."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_REGISTRY, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def get(name: str) -> type[Claim]:
    """The claim's class; KeyError where there is none of that name."""
    names()
    return _REGISTRY[name]


def make(name: str, full: bool = False) -> Claim:
    """The claim with its default effort, or with that of `--full`."""
    return get(name).full() if full else get(name)()


def holds_if(condition: bool) -> Verdict:
    return Verdict.HOLDS if condition else Verdict.FAILS
