"""`alflb report` as a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from alflb_megatron.lab.report.report import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `alflb report` to `parser`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder of alflb train; it may still be going on")
    parser.add_argument(
        "--out", default="", metavar="DIR", help="folder of the page (default: the run's; of several runs: report)"
    )
    parser.add_argument("--png", action="store_true", help="write the pictures alone, one PNG file each")


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """`report` with parsed flags; prints what it wrote and returns 0. SettingError for what cannot work."""
    for file in report(flags.runs, flags.out, flags.png):
        print(file)
    return 0
