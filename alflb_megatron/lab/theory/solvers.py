"""Exact solvers of the assignment problem, each with its own proof of optimality.

    minimum_cost_flow   combinatorial, for real batches: seconds at 16,384 tokens and 64 experts
    linear_programme    the relaxation by HiGHS (SciPy), for thousands of entries
    integer_programme   the integer programme by HiGHS's branch and bound, likewise

The first two share nothing but the problem, so each checks the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import optimize, sparse
from scipy.sparse import csgraph
from torch import Tensor

from alflb_megatron import margins, metrics
from alflb_megatron.lab.theory.descent import descend
from alflb_megatron.lab.theory.problem import AssignmentProblem, Optimum, zero_sum
from alflb_megatron.margins import Threshold


class SolverError(RuntimeError):
    """A solver ended without an optimum; the text is its own."""


def _constraints(problem: AssignmentProblem) -> tuple[sparse.csr_array, np.ndarray]:
    """The T + E equalities over the T E entries of x, row by row: each token takes K, each expert carries L."""
    tokens, experts = problem.tokens, problem.experts
    per_token = sparse.kron(sparse.eye_array(tokens), np.ones((1, experts)))
    per_expert = sparse.kron(np.ones((1, tokens)), sparse.eye_array(experts))
    wanted = np.concatenate([np.full(tokens, problem.topk), np.full(experts, problem.load)])
    return sparse.csr_array(sparse.vstack([per_token, per_expert])), wanted


def linear_programme(problem: AssignmentProblem) -> Optimum:
    """The relaxation by HiGHS; p are the multipliers of the load constraints. SolverError where it finds no optimum."""
    matrix, wanted = _constraints(problem)
    found = optimize.linprog(
        -problem.scores.reshape(-1).numpy(), A_eq=matrix, b_eq=wanted, bounds=(0, 1), method="highs"
    )
    if not found.success:
        raise SolverError(found.message)
    x_TE = torch.from_numpy(found.x).view_as(problem.scores)
    # linprog minimises -s x: its multiplier is d(-value)/d(load), and ours d(value)/d(load) with the sign turned twice.
    bias_E = zero_sum(torch.from_numpy(np.asarray(found.eqlin.marginals[problem.tokens :])).clone())
    return Optimum(x_TE, bias_E, problem.value(x_TE), problem.dual(bias_E), int(found.nit))


def integer_programme(problem: AssignmentProblem) -> tuple[Tensor, float]:
    """The integer programme by HiGHS: x float64 [T, E] of zeros and ones, and its value.

    SolverError where there is none, which is so where E does not divide K T.
    """
    matrix, wanted = _constraints(problem)
    found = optimize.milp(
        -problem.scores.reshape(-1).numpy(),
        constraints=optimize.LinearConstraint(matrix, wanted, wanted),
        bounds=optimize.Bounds(0, 1),
        integrality=np.ones(matrix.shape[1]),
        options={"mip_rel_gap": 0.0},
    )
    if not found.success:
        raise SolverError(found.message)
    x_TE = torch.from_numpy(found.x.round()).view_as(problem.scores)
    return x_TE, problem.value(x_TE)


def near_optimum(problem: AssignmentProblem, bias_E: Tensor | None = None) -> Tensor:
    """A bias close to the optimum, by descent on MaxVio (`descent.descend`); float64 [E]."""
    if problem.topk == problem.experts or problem.tokens == 1:
        return torch.zeros(problem.experts, dtype=torch.float64)

    def maxvio_under(bias_E: Tensor) -> tuple[float, Tensor]:
        ranked_TE = problem.scores + bias_E
        top_TJ, experts_TJ = ranked_TE.topk(problem.topk + 1, dim=1)
        experts_TK = experts_TJ[:, : problem.topk]
        loads_E = torch.bincount(experts_TK.reshape(-1), minlength=problem.experts)
        return float(metrics.max_vio(loads_E)), margins.of_top(ranked_TE, top_TJ, experts_TK, Threshold.OWN)

    start_E = torch.zeros(problem.experts, dtype=torch.float64) if bias_E is None else bias_E.double()
    lowest = math.ceil(problem.load) / problem.load - 1
    return descend(maxvio_under, lambda found: margins.exact_move(found, problem.load), start_E, lowest).bias


def minimum_cost_flow(
    problem: AssignmentProblem, bias_E: Tensor | None = None, progress: Callable[[int, int], None] | None = None
) -> Optimum:
    """The relaxation by successive shortest paths (Jewell 1958; Busacker and Gowen 1960) over the E experts.

    Begins with the router's own choice x under a bias near the optimum: x is the best assignment for the loads it has.
    Then flow goes from experts above L to experts below, each time along the cheapest path. An edge k -> l costs the
    least score that a token loses by giving up k for l, s_ik - s_il over tokens with x_ik > 0 and x_il < 1. Under the
    bias every such token has s_ik + p_k >= s_il + p_l, so reduced costs are never negative (Dijkstra applies), and
    raising p by the distances keeps it so. When all loads are L, x is an optimum and p a dual one: the gap proves it.

    Entries are kept in multiples of 1 / `problem.units`, so a fractional L is met exactly.

    Args:
        bias_E: where the descent begins; the last batch's optimum, say.
        progress: called with (load moved, load to move) after each path.
    """
    tokens, experts, units = problem.tokens, problem.experts, problem.units
    scores_ET = problem.scores.t().contiguous()
    p = zero_sum(near_optimum(problem, bias_E))
    x_ET = (problem.choice(p).t() * units).to(torch.int64).contiguous()
    excess_E = x_ET.sum(dim=1) - problem.topk * tokens * units // experts
    cost_EE = torch.full((experts, experts), math.inf, dtype=torch.float64)
    token_EE = torch.zeros((experts, experts), dtype=torch.int64)

    def update_edges(k: int) -> None:
        """The edges out of expert k, from the tokens that it holds now."""
        tokens_T = x_ET[k].nonzero().squeeze(1)
        if not tokens_T.numel():
            cost_EE[k] = math.inf
            return
        lost = (scores_ET[k, tokens_T] - scores_ET[:, tokens_T]).masked_fill_(x_ET[:, tokens_T] == units, math.inf)
        cost_EE[k], at = lost.min(dim=1)
        token_EE[k] = tokens_T[at]

    for k in range(experts):
        update_edges(k)
    to_move, moved, paths = int(excess_E.clamp(min=0).sum()), 0, 0
    while moved < to_move:
        reduced_EE = (cost_EE + p[:, None] - p[None, :]).clamp(min=0)  # below zero by rounding alone
        distance_E, before = _shortest(reduced_EE, excess_E > 0)
        behind = (excess_E < 0).nonzero().squeeze(1)
        target = int(behind[distance_E[behind].argmin()])
        if math.isinf(float(distance_E[target])):
            raise SolverError("no path leads from an expert above the mean load to one below it")
        p += distance_E.clamp(max=distance_E[target])
        path = [target]
        while before[path[-1]] >= 0:
            path.append(before[path[-1]])
        path.reverse()
        edges = [(k, to, int(token_EE[k, to])) for k, to in itertools.pairwise(path)]
        amount = min(int(excess_E[path[0]]), -int(excess_E[target]))
        for k, to, token in edges:
            amount = min(amount, int(x_ET[k, token]), units - int(x_ET[to, token]))
        touched = set(path)
        for k, to, token in edges:
            x_ET[k, token] -= amount
            x_ET[to, token] += amount
            touched |= set(x_ET[:, token].nonzero().squeeze(1).tolist())
        excess_E[path[0]] -= amount
        excess_E[target] += amount
        for k in touched:
            update_edges(k)
        moved, paths = moved + amount, paths + 1
        if progress is not None:
            progress(moved, to_move)
    x_TE = x_ET.t().double() / units
    p = zero_sum(p)
    return Optimum(x_TE, p, problem.value(x_TE), problem.dual(p), paths)


def _shortest(cost_EE: Tensor, source_E: Tensor) -> tuple[Tensor, list[int]]:
    """Dijkstra's shortest distances [E] from the nearest source, and the node before each (-1 at a source)."""
    experts = cost_EE.shape[0]
    # As a sparse array with every entry stored: in a dense one SciPy takes a cost of zero for no edge.
    starts = np.arange(0, experts**2 + 1, experts, dtype=np.int32)
    ends = np.tile(np.arange(experts, dtype=np.int32), experts)
    graph = sparse.csr_array((cost_EE.numpy().reshape(-1), ends, starts), shape=(experts, experts))
    sources = np.flatnonzero(source_E.numpy())
    distance, before, _ = csgraph.dijkstra(graph, indices=sources, min_only=True, return_predecessors=True)
    return torch.from_numpy(distance), np.maximum(before, -1).tolist()
