"""The fuzz corpus: every file that we read, damaged in thousands of ways, ends in success or in one clear line.

ALFLB_LONG=1 reads all cases (over 10,000) and writes docs/results/fuzz.json; otherwise the first part of each kind.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.versions import versions
from tests.fuzz import campaign, seeds
from tests.fuzz.kinds import KINDS

LONG = os.environ.get("ALFLB_LONG") == "1"
SHARE = 1.0 if LONG else 0.13


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeds.all_of(tmp_path_factory.mktemp("fuzz") / "seeds")


@pytest.fixture(scope="module")
def seen(grown: Path) -> tuple[list[dict[str, Any]], float]:
    """What came of every case, and when the campaign began."""
    began = time.monotonic()
    return campaign.run(grown, campaign.spans(SHARE)), began


def test_every_case_ends_well(seen: tuple[list[dict[str, Any]], float]) -> None:
    records, began = seen
    todo = campaign.spans(SHARE)
    assert len(records) == sum(end - first for _, first, end in todo)
    found = campaign.counts(records, began)
    if LONG:
        folder = seeds.ROOT / "docs" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "fuzz.json", {"versions": versions(), **found})
    assert campaign.defects(records) == []
    # A corpus of which nothing is read to its end, or nothing is refused, would test one path only.
    for name, row in found["kinds"].items():
        assert row["outcomes"].get("success") and row["outcomes"].get("refused"), (name, row)


def test_the_long_form_has_over_ten_thousand_cases() -> None:
    assert sum(cases for cases, _ in KINDS.values()) >= 10_000


def test_a_case_is_the_same_each_time(grown: Path, seen: tuple[list[dict[str, Any]], float]) -> None:
    kinds = ("npz", "config", "flags")
    again = campaign.run(grown, [(name, 0, 6) for name in kinds])
    before = [record for record in seen[0] if record["kind"] in kinds and record["case"] < 6]
    key = [sorted((r["kind"], r["case"], r["outcome"]) for r in records) for records in (before, again)]
    assert key[0] == key[1] and len(key[0]) == 18
