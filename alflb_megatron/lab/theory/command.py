"""`alflb theory`: measures the claims of the theory, prints one table, writes `theory.json` and the figures.

`theory.json` holds, by the claim's name: title, source, statement (the claim's docstring), seconds, the rows of the
table, and `figures`, the numbers behind the pictures (`alflb_megatron.lab.theory.claims` says what is in them).
"""

from __future__ import annotations

import argparse
import errno
import inspect
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.versions import versions
from alflb_megatron.lab.theory.tables import format_table
from alflb_megatron.settings import SettingError

FILE = "theory.json"


def _claims() -> Any:
    try:
        from alflb_megatron.lab.theory import claims
    except ImportError as error:  # SciPy
        raise SettingError("alflb theory", "cannot start", f"needs SciPy (pip install scipy): {error}") from None
    return claims


def _check(names: Sequence[str]) -> Sequence[str]:
    """The names of all claims; SettingError where one of `names` is none of them."""
    known: Sequence[str] = _claims().names()
    for name in names:
        if name not in known:
            raise SettingError("CLAIM", name, f"must be one of {', '.join(known)}")
    return known


def measure(names: Sequence[str] = (), full: bool = False, stream: Any = None) -> dict[str, Any]:
    """Checks the claims (all of them where none is named); returns what `theory.json` holds.

    SettingError for a name that is no claim's. `stream` shows the progress; standard error by default.
    """
    claims, known = _claims(), _check(names)
    results: dict[str, Any] = {"full": full, "versions": versions(), "claims": {}}
    for name in [name for name in known if not names or name in names]:
        claim = claims.make(name, full)
        began = time.perf_counter()
        with _ProgressBar(claim.title, sys.stderr if stream is None else stream) as bar:
            finding = claim.check(bar)
        results["claims"][name] = {
            "title": claim.title,
            "source": claim.source,
            "statement": inspect.cleandoc(claim.__doc__ or ""),
            "seconds": round(time.perf_counter() - began, 1),
            "rows": [{**asdict(row), "verdict": str(row.verdict)} for row in finding.rows],
            "figures": finding.figures,
        }
    return results


class _ProgressBar:
    """A progress bar on a terminal, one line elsewhere; called with (done, of)."""

    def __init__(self, title: str, stream: Any) -> None:
        self.title, self.stream, self._bar = title, stream, None

    def __enter__(self) -> _ProgressBar:
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=self.title, file=self.stream, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}")
        else:
            print(f"{self.title} ...", file=self.stream, flush=True)
        return self

    def __call__(self, done: int, of: int) -> None:
        if self._bar is not None:
            self._bar.total = of
            self._bar.update(done - self._bar.n)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def failed(results: Mapping[str, Any]) -> list[str]:
    """The statements whose verdict is `fails`."""
    return [
        f"{name}: {row['statement']}"
        for name, claim in results["claims"].items()
        for row in claim["rows"]
        if row["verdict"] == "fails"
    ]


def theory(out: str | Path, names: Sequence[str] = (), full: bool = False) -> dict[str, Any]:
    """Measures, prints the table, writes `out`/theory.json and a picture for each claim that has one."""
    out = Path(out)
    _check(names)  # before the folder is made
    try:
        if out.exists() and not out.is_dir():
            raise SettingError("--out", out, "must be a folder, and this is a file")
        out.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no right to write")
    except OSError as error:
        raise SettingError("--out", out, f"must be a folder that can be written ({error.strerror})") from None
    results = measure(names, full)
    write_json(out / FILE, results)
    from alflb_megatron.lab.theory.plots import draw

    pictures = draw(results, out)
    print(format_table(results))
    print("\n".join(f"picture: {path.resolve()}" for path in pictures))
    print(f"figures: {(out / FILE).resolve()}")
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command to `parser`."""
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="which claims; all by default")
    parser.add_argument("--full", action="store_true", help="the sizes of docs/theory.md: about a quarter of an hour")
    parser.add_argument("--out", default="runs/theory", metavar="DIR", help="folder to write to (default: %(default)s)")


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """`theory` with parsed flags; the exit code is 1 if a verdict is `fails`."""
    results = theory(flags.out, flags.claims, flags.full)
    for statement in failed(results):
        print(f"alflb theory: fails: {statement}", file=sys.stderr)
    return 1 if failed(results) else 0
