"""`alflb watch` as a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from alflb_megatron.lab.records.step_record import as_number
from alflb_megatron.lab.watch.watch import watch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `alflb watch` to `parser`."""
    parser.add_argument("run_folder", metavar="RUN", help="the run folder of a job; it may not have begun yet")
    parser.add_argument("--once", action="store_true", help="show the run as it stands, and end")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: %(default)s)"
    )


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """`watch` with parsed flags; returns 0. SettingError for what cannot work."""
    watch(flags.run_folder, flags.once, as_number(flags.every))
    return 0
