"""The tables of docs/theory.md: `alflb theory --full`, its figures kept beside those of the other benchmarks.

python -m benchmarks.theory               (about a quarter of an hour on one core)
python -m benchmarks.theory structure     that claim again, the others as they were
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.theory import command as theory
from alflb_megatron.lab.theory.tables import format_table
from benchmarks import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "theory.json")
    arguments = parser.parse_args()
    out = arguments.out
    torch.set_num_threads(1)
    results = theory.measure(arguments.claims, full=True)
    if arguments.claims:
        before = json.loads(out.read_text(encoding="utf-8"))
        results = {**before, "claims": {**before["claims"], **results["claims"]}}
    else:
        results["machine"] = machine.describe()
    write_json(out, results)
    print(format_table(results))


if __name__ == "__main__":
    main()
