"""Descent on the dual of one batch, every coordinate at once: fast, and near the optimum rather than at it.

Moving p_k alone to where expert k carries L tokens is the exact minimisation of D along p_k (`margins.exact_move`).
All experts move at once, so a move that did not help is halved. A piecewise linear function has kinks at which no
coordinate improves though a combination would: an exact method goes on from here (`solvers.minimum_cost_flow`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

Found = TypeVar("Found")


class Descent(NamedTuple, Generic[Found]):
    """Where a descent ended: the best bias, its merit, what was found there, and how many biases were tried."""

    bias: Tensor
    merit: float
    found: Found
    sweeps: int


def descend(
    evaluate: Callable[[Tensor], tuple[float, Found]],
    move: Callable[[Found], Tensor],
    bias_E: Tensor,
    enough: float,
    sweeps: int = 30,
    patience: int = 4,
) -> Descent[Found]:
    """The best of at most `sweeps` biases.

    Args:
        evaluate: bias [E] -> its merit, the lower the better, and what was found there.
        move: what was found -> by how much each expert's bias must move, alone, for its load to be right.
        bias_E: where to begin.
        enough: a merit that ends the search.
        patience: so many biases in a row without a better merit end it too.
    """
    merit, found = evaluate(bias_E)
    best, move_E = Descent(bias_E, merit, found, 1), move(found)
    gain, misses = 1.0, 0
    while best.merit > enough and misses < patience and best.sweeps < sweeps:
        bias_E = best.bias + gain * move_E
        merit, found = evaluate(bias_E)
        if merit < best.merit:
            best, move_E = Descent(bias_E, merit, found, best.sweeps + 1), move(found)
            gain, misses = min(1.0, 2 * gain), 0
        else:
            best = best._replace(sweeps=best.sweeps + 1)
            gain, misses = gain / 2, misses + 1
    return best
