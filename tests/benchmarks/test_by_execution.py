"""Planners that move tokens and weights: loads worked by hand, and what each promises whatever the loads."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import by_execution, local_updates
from benchmarks.by_execution import PLANNERS, exact, least_loaded, planned


def test_moves_by_hand():
    # Two experts a rank, mean 10 a rank. The fullest expert of rank 0 gives rank 1 its 4, and rank 2 its 6.
    assert exact([17, 3, 4, 2, 1, 3], 3) == [(0, 2, 6), (0, 1, 4)]
    plan = planned("exact", [17, 3, 4, 2, 1, 3], ranks=3)
    assert (plan.overload, plan.copies) == (1.0, 2)
    # Ten tokens of expert 0 fill its rank, ten go to the emptiest; expert 1 has no room at home either.
    assert planned("none", [20, 4, 0, 0, 6, 0], ranks=3).overload == 2.4
    assert least_loaded([20, 4, 0, 0, 6, 0], 3, smallest=1) == [(0, 1, 10), (1, 2, 4)]
    # Below the threshold nothing moves.
    assert least_loaded([12, 0, 10, 0, 8, 0], 3) == []


@given(st.lists(st.integers(0, 500), min_size=16, max_size=16), st.sampled_from([2, 4, 8]))
def test_what_a_planner_promises(loads, ranks):
    home, mean = len(loads) // ranks, sum(loads) / ranks
    for name, planner in PLANNERS.items():
        moves = planner(loads, ranks)
        assert all(count > 0 and rank != expert // home for expert, rank, count in moves)
        for expert, load in enumerate(loads):
            assert sum(count for moved, _, count in moves if moved == expert) <= load
        if mean:
            overload = planned(name, loads, ranks).overload
            most = {"exact": 1.0, "to 1.04": 1.04}.get(name)
            assert most is None or overload * mean <= most * mean + 1
            assert overload <= max(planned("none", loads, ranks).overload, 1.3 + 32 / mean + 1e-9)


def test_the_page_says_what_is_left_and_what_moves():
    of = {"overload": 1.25, "worst": 2.0, "copies": 3.0}
    rows = {"no bias": {span: dict.fromkeys(PLANNERS, of) for span in by_execution.SPANS}}
    page = by_execution.table({"tokens": 2048, "even": 1.05, "rows": rows})
    assert "| no bias | 1.25 (2.00) | 1.25 (2.00) | 1.25 (2.00) | 1.25 (2.00) | 3.0 | 3.0 | 3.0 |" in page
    assert "A copy is 3.1 MiB of the 1B model, 84.0 MiB of DeepSeek-V3 (bf16)" in page


def test_ranks_that_count_alone_are_a_row_beside_those_that_sum():
    figures = {name: {"mean": 0.25, "sd": None} for name in local_updates.FIGURES}
    page = local_updates.table(
        {"steps": 200, "seeds": [1], "rules": {"quantile": dict.fromkeys(local_updates.SUMS, figures)}}
    )
    assert "| quantile | each rank's own | 0.25 | 0.25 | 0.25 | 0.25 | 0.25 |" in page
    assert local_updates.folder(Path("x"), local_updates.options("sign, u = 0.01", True, 7)) == Path(
        "x/sign-u0.01-local-7"
    )


@pytest.mark.parametrize("row", by_execution.ROWS)
def test_every_row_is_a_training_that_can_run(row):
    job, alf = by_execution.ROWS[row]
    plan = by_execution.resolve(
        {"preset": "small", "nproc": 1, "ep": 1, **by_execution.SIZES, **job}, by_execution.SHAPE, alf
    )
    assert plan.shape.num_experts % by_execution.EP == 0
