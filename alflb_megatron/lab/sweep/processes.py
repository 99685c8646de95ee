"""Trainings as processes: their output passed on as it comes and kept in a log, and the end of it for an error."""

from __future__ import annotations

import codecs
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def run_streaming(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Runs `command`; returns its exit code and what it wrote to standard output.

    Its standard error is passed on as it comes and kept in `log`. If ours is a terminal it gets a terminal
    too, so that it can draw a progress bar. The command is ended if we are interrupted.
    """
    terminal = sys.stderr.isatty()
    reader, writer = os.openpty() if terminal else os.pipe()
    if terminal:
        import termios

        termios.tcsetwinsize(writer, termios.tcgetwinsize(sys.stderr.fileno()))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with tempfile.TemporaryFile() as stdout, log.open("wb") as kept:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=writer)
        os.close(writer)
        try:
            while True:
                ended = process.poll() is not None
                # A rank that outlives the command keeps the pipe open: after the end, read only what is there.
                if not select.select([reader], [], [], 0 if ended else 0.2)[0]:
                    if ended:
                        break
                    continue
                try:
                    piece = os.read(reader, 65536)
                except OSError:  # how a pseudo-terminal reports that its other end was closed
                    piece = b""
                if not piece:
                    break
                kept.write(piece)
                sys.stderr.write(decoder.decode(piece))
                sys.stderr.flush()
            process.wait()
        finally:
            os.close(reader)
            if process.poll() is None:
                process.terminate()
                process.wait()
        stdout.seek(0)
        return process.returncode, stdout.read().decode(errors="replace")


def last_lines(text: str, count: int = 12) -> str:
    """The last `count` lines of what a program printed, indented; of a line drawn over by a bar, the last state."""
    lines = [re.split(r"\r+", line.rstrip("\r"))[-1].rstrip() for line in text.split("\n")]
    return "\n".join(f"    {line}" for line in [line for line in lines if line][-count:])
