"""Real process groups for the tests: a function, run as N gloo ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.forked import RankError, run

__all__ = ["RankError", "model_parallel", "run"]


@contextmanager
def model_parallel(**sizes: int | None) -> Iterator[None]:
    """Megatron-Core's process groups of the given sizes, with its random state seeded."""
    from megatron.core import parallel_state

    from alflb_megatron.lab.training import build

    parallel_state.initialize_model_parallel(**sizes)
    build.seed_ranks(1234)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
