"""`python -m alflb_megatron.cli`, as jobs submitted by version 0.1 call it; the command line is `lab/cli.py`."""

from alflb_megatron.lab.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
