"""The page of benchmarks says what the results say."""

from __future__ import annotations

import pytest

from benchmarks import balance, report


def test_the_pages_are_those_of_the_results() -> None:
    assert (report.DOCS / "benchmarks.md").read_text(encoding="utf-8") == report.page(), "run `make docs`"
    assert (report.DOCS / "theory.md").read_text(encoding="utf-8") == report.theory_page(), "run `make docs`"
    assert (report.DOCS / "rules.md").read_text(encoding="utf-8") == report.rules_page(), "run `make docs`"


def _row(stream: str, group: str, **mean_over_floor: float) -> dict[str, object]:
    figures = {
        rule: {"mean_over_floor": mean, "steps_to_2x_floor": 3, "affinity_kept": 0.9}
        for rule, mean in mean_over_floor.items()
    }
    return {"stream": stream, "group": group, "rules": figures}


@pytest.mark.parametrize(
    ("group", "adaptive", "quantile", "expected"),
    [
        ("slow", 1.2, 1.19, []),
        ("slow", 1.3, 1.4, ["at the floor"]),
        ("fast", 1.3, 1.4, []),
        ("fast", 1.3, 1.2, ["lowest of all rules"]),
        ("recorded", 9.0, 9.5, []),
        ("beyond", 9.0, 1.0, []),
    ],
)
def test_a_target_that_is_missed_is_named(group: str, adaptive: float, quantile: float, expected: list[str]) -> None:
    found = balance.verdicts([_row("x", group, adaptive=adaptive, quantile=quantile)])
    assert [target for target, where in found["missed"].items() if where] == expected


def test_a_slow_start_and_lost_affinity_are_missed_targets() -> None:
    row = _row("x", "slow", adaptive=1.0, quantile=1.2)
    row["rules"]["adaptive"].update(steps_to_2x_floor=6, affinity_kept=0.8)  # type: ignore[index]
    missed = balance.verdicts([row])["missed"]
    assert missed["cold start"] == missed["affinity"] == ["x"]
