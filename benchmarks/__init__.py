"""Benchmarks: one module each, run by `python -m benchmarks.NAME`; figures go to `benchmarks/results/NAME.json`.

`python -m benchmarks.report` writes `docs/benchmarks.md` from those figures and nothing else.
"""
