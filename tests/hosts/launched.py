"""Starts a host's own entry point under torchrun, and reads what it printed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests import forked


def torchrun(nproc: int, *words: str, folder: Path, timeout: int = 300, **environment: str) -> str:
    """Runs `torchrun ... WORDS` in `folder`; stdout and stderr. Raises AssertionError with both where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc), "--standalone", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def ranks(nproc: int, *words: str, folder: Path, **environment: str) -> str:
    """The same from ranks that are forked with the host imported (`tests/forked.py`)."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        done = forked.python(*words, nproc=nproc, env={"PYTHONWARNINGS": "ignore", **environment})
    finally:
        os.chdir(before)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def logged(output: str, key: str) -> list[str]:
    """What the log lines of Megatron-LM or Bridge say of `key`, one text an iteration."""
    return re.findall(rf"\| {re.escape(key)}: (\S+) \|", output)
