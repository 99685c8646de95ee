"""The tables of docs/theory.md: `alflb theory --full`, its figures kept beside those of the other benchmarks.

python -m benchmarks.theory        (about a quarter of an hour on one core)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from alflb_megatron.runs import theory
from alflb_megatron.runs.record import write_json
from benchmarks import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "theory.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    results = theory.measure(full=True)
    results["machine"] = machine.describe()
    write_json(out, results)
    print(theory.format_table(results))


if __name__ == "__main__":
    main()
