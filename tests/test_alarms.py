"""Alarms: after how long, how often, and in which words."""

from __future__ import annotations

import torch

from alflb_megatron.alarms import READ_EVERY, REPEAT_AFTER, Alarms
from alflb_megatron.config import ALFConfig

EVEN, HUNGRY = torch.tensor([100, 100, 100, 100]), torch.tensor([133, 133, 133, 1])


def _watched(updates: int, *, loads: torch.Tensor = EVEN, spread: float = 0.1, refused: bool = False) -> Alarms:
    """Two layers, the first of them always well."""
    alarms = Alarms(["layer 2", "layer 3"], [ALFConfig(alarm_after=30, alarm_max_vio=0.3)] * 2, [True, True])
    for _ in range(updates):
        _count(alarms, loads, spread, refused)
    return alarms


def _count(alarms: Alarms, loads: torch.Tensor, spread: float = 0.1, refused: bool = False) -> None:
    vio = torch.tensor([0.0, float(loads.max() / loads.float().mean()) - 1], dtype=torch.float64)
    alarms.count([EVEN, loads], vio, torch.tensor([0.1, spread]), torch.tensor([False, refused]))


def test_nothing_is_said_while_all_is_well_or_before_the_time_is_up() -> None:
    assert _watched(100).due_lines(100) == []
    assert _watched(29, loads=HUNGRY, spread=5.0).due_lines(30) == []


def test_each_kind_has_its_line() -> None:
    starved, vio = _watched(30, loads=HUNGRY).due_lines(30)
    assert starved.startswith("layer 3: expert 3 has had less than 10% of the mean load for 30 updates in a row.")
    assert vio.startswith("layer 3: MaxVio has been above 0.3 for 30 updates in a row and is 0.33.")
    (spread,) = _watched(30, spread=1.5).due_lines(30)
    assert "further apart than 1 for 30 updates in a row, and are by 1.50" in spread
    (refused,) = _watched(1, refused=True).due_lines(10)
    assert refused.startswith("layer 3: updates refused since the last such line: 1. ")


def test_a_batch_in_which_all_is_well_begins_the_count_again() -> None:
    alarms = _watched(29, loads=HUNGRY)
    _count(alarms, EVEN)
    for _ in range(29):
        _count(alarms, HUNGRY)
    assert alarms.due_lines(60) == []
    _count(alarms, HUNGRY)
    assert len(alarms.due_lines(60)) == 2


def test_a_kind_is_given_now_and_then_only() -> None:
    alarms = _watched(0)
    given = []
    for update in range(1, 2 * REPEAT_AFTER + 1):
        _count(alarms, HUNGRY)
        if lines := alarms.due_lines(update):
            given.append((update, len(lines)))
    assert given == [(30, 2), (30 + REPEAT_AFTER, 2)]
    assert all(update % READ_EVERY == 0 for update, _ in given)


def test_refusals_between_two_lines_are_not_lost() -> None:
    alarms, lines = _watched(0), []
    for update in range(1, 2 * REPEAT_AFTER + 1):
        _count(alarms, EVEN, refused=update == 11 or update > 500)
        lines += [(update, line) for line in alarms.due_lines(update)]
    assert [update for update, _ in lines] == [20, 20 + REPEAT_AFTER]
    assert "such line: 1. " in lines[0][1]
    assert f"such line: {20 + REPEAT_AFTER - 500}. " in lines[1][1]


def test_layers_are_counted_and_the_worst_is_named() -> None:
    alarms = Alarms(["layer 2", "layer 3", "layer 7"], [ALFConfig(alarm_after=10)] * 3, [True] * 3)
    for update in range(20):
        loads = [EVEN if update < 5 else HUNGRY, HUNGRY, EVEN]
        alarms.count(loads, torch.zeros(3, dtype=torch.float64), torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    (line,) = alarms.due_lines(20)
    assert line.startswith("layer 3 (and 1 more): expert 3")


def test_biases_on_logits_have_no_limit_unless_one_is_set() -> None:
    for config, lines in ((ALFConfig(score_unit="logit"), 0), (ALFConfig(score_unit="logit", alarm_spread=4.0), 1)):
        alarms = Alarms(["layer 1"], [config], [True])
        for _ in range(100):
            alarms.count([EVEN], torch.zeros(1).double(), torch.tensor([9.0]), torch.zeros(1, dtype=torch.bool))
        assert len(alarms.due_lines(100)) == lines


def test_none_are_given_where_they_are_off_or_a_router_is_only_watched() -> None:
    for config in (ALFConfig(alarm_after=0), None):
        alarms = Alarms(["layer 1"], [config], [True])
        for _ in range(200):
            alarms.count([HUNGRY], torch.ones(1).double() * 9, torch.ones(1) * 9, torch.ones(1, dtype=torch.bool))
        assert alarms.due_lines(200) == []
