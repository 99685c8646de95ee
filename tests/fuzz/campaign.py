"""Shares the cases among workers, and sees to it that one which hangs or dies is a finding and not the end."""

from __future__ import annotations

import itertools
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fuzz import worker
from tests.fuzz.kinds import KINDS

WORKERS = 2
START = 300.0
"""Seconds until a worker's first case: it imports Megatron-Core and builds a model, perhaps on a busy machine."""

Spans = list[tuple[str, int, int]]


def spans(share: float) -> Spans:
    """The first `share` of every kind's cases, in pieces that `WORKERS` workers can share."""
    found = []
    for name, (cases, _) in KINDS.items():
        count = max(1, round(cases * share))
        edges = [round(count * part / WORKERS) for part in range(WORKERS + 1)]
        found += [(name, first, end) for first, end in itertools.pairwise(edges) if first < end]
    return found


def run(seeds: Path, todo: Spans) -> list[dict[str, Any]]:
    """Every case's record, as the workers print them."""
    records: list[dict[str, Any]] = []
    threads = [threading.Thread(target=_drive, args=(seeds, todo[at::WORKERS], records)) for at in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return records


def _drive(seeds: Path, todo: Spans, records: list[dict[str, Any]]) -> None:
    left = list(todo)
    while left:
        process = worker.start(seeds, [f"{name}:{first}:{end}" for name, first, end in left])
        lines: queue.Queue[str | None] = queue.Queue()

        def listen(out: Any = process.stdout, lines: queue.Queue[str | None] = lines) -> None:
            for line in out:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=listen, daemon=True).start()
        patience = START
        while left:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                line = None
            name, first, end = left[0]
            if line is None:  # it hangs where no signal reaches it, or has died: so much for this case
                process.kill()
                code = process.wait()
                record = {"kind": name, "case": first, "outcome": f"killed its process ({code})", "text": ""}
                records.append(record | {"seconds": patience})
            else:
                record = json.loads(line)
                assert (record["kind"], record["case"]) == (name, first)
                records.append(record)
            left[0] = (name, first + 1, end)
            if first + 1 == end:
                left.pop(0)
            patience = worker.SECONDS + 30.0
            if line is None:
                break
        process.wait()


def defects(records: list[dict[str, Any]]) -> list[str]:
    """One line for each case that did not end as it must."""
    return [
        f"{r['kind']}:{r['case']}: {r['outcome']}: {r['text'][:200]}"
        for r in records
        if r["outcome"] not in worker.GOOD
    ]


def counts(records: list[dict[str, Any]], began: float) -> dict[str, Any]:
    """Cases, outcomes and seconds of each kind, and of all."""
    by_kind: dict[str, Any] = {}
    for name in KINDS:
        rows = [record for record in records if record["kind"] == name]
        by_kind[name] = _count(rows)
    return {
        "cases": len(records),
        "defects": len(defects(records)),
        "wall_seconds": round(time.monotonic() - began, 1),
    } | {
        "outcomes": _count(records)["outcomes"],
        "kinds": by_kind,
    }


def _count(rows: list[Mapping[str, Any]] | list[dict[str, Any]]) -> dict[str, Any]:
    outcomes = Counter("refused" if row["outcome"] in worker.GOOD[1:] else row["outcome"] for row in rows)
    return {
        "cases": len(rows),
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }
