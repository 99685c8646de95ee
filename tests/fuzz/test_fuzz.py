"""The fuzz corpus: every file that we read, damaged in thousands of ways, ends in success or in one clear line.

ALFLB_LONG=1 reads all cases (over 10,000) and writes docs/results/fuzz.json; otherwise the first part of each kind.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

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


def test_every_case_ends_well(grown: Path) -> None:
    began = time.monotonic()
    todo = campaign.spans(SHARE)
    records = campaign.run(grown, todo)
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


def test_a_case_is_the_same_each_time(grown: Path) -> None:
    todo = [(name, 0, 6) for name in ("npz", "config", "flags")]
    first, second = (campaign.run(grown, todo) for _ in range(2))
    key = [sorted((r["kind"], r["case"], r["outcome"]) for r in records) for records in (first, second)]
    assert key[0] == key[1]
