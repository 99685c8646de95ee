"""Reads damaged files in a process of its own: `python -m tests.fuzz.worker SEEDS KIND:FIRST:END ...`.

Prints a JSON line a case: kind, case, outcome, text, seconds. An outcome is one of GOOD, or a defect: another
exception, a time limit passed, memory beyond the limit, an error of several lines, or something executed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from alflb_megatron.hosts import cpu

cpu.prepare()

from alflb_megatron.lab.checkpoints.scan import METADATA_GLOBALS, OBJECT_GLOBALS  # noqa: E402
from alflb_megatron.settings import SettingError  # noqa: E402
from tests.fuzz import loading_model  # noqa: E402
from tests.fuzz.kinds import KINDS  # noqa: E402

GOOD = ("success", "exit code", "SettingError", "ValueError")
SECONDS = 60
MEMORY = 3 * 2**30  # beyond what the imported packages take
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"}
KNOWN = METADATA_GLOBALS.names() | OBJECT_GLOBALS.names()
OWN = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.", "traceback")
"""Modules of what ranks send each other while they load."""

executed: list[str] = []


class TimeUp(BaseException):
    """A case takes too long."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's own account of what is executed and unpickled."""
    named = event == "pickle.find_class" and f"{arguments[0]} {arguments[1]}" not in KNOWN
    if named and event == "pickle.find_class":  # and the errors that they tell each other of
        error = getattr(sys.modules.get(arguments[0]), arguments[1], None)
        named = not (
            str(arguments[0]).startswith(OWN) or (isinstance(error, type) and issubclass(error, BaseException))
        )
    started = event == "subprocess.Popen" and Path(str(arguments[0])).name not in ("git", "file")
    if named or started or event in FORBIDDEN:
        executed.append(f"{event} {arguments!r}"[:200])


def _alarm(*_: object) -> None:
    raise TimeUp


def judge(name: str, case: int, seeds: Path, folder: Path) -> tuple[str, str]:
    """One case: its outcome and, where there is one, the error's text."""
    executed.clear()
    said = io.StringIO()
    outcome, text = "success", ""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = KINDS[name][1](random.Random(f"{name}:{case}"), seeds, folder)
        if isinstance(code, int) and code:
            outcome, text = "exit code", said.getvalue()
            if code not in (1, 2) or (code == 2 and not text):
                outcome = f"exit code {code}"
    except SystemExit as error:  # argparse
        outcome, text = "exit code" if error.code == 2 else f"exit code {error.code}", said.getvalue()
    except SettingError as error:
        outcome, text = "SettingError", str(error)
    except ValueError as error:
        outcome, text = (
            "ValueError" if name in ("metrics", "summary") else f"{type(error).__name__}, not documented",
            str(error),
        )
    except BaseException as error:
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = "" if at is None else f" at {at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
        outcome, text = f"{type(error).__name__}{where}", str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if outcome in GOOD and ("Traceback" in said.getvalue() or len(text.strip().splitlines()) > 1 or len(text) > 3000):
        outcome = "an error of several lines"
    if executed:
        outcome, text = "something executed", "; ".join(executed)
    return outcome, text


def main(words: list[str]) -> None:
    seeds = Path(words[0]).absolute()
    loading_model.plan_and_model()
    sys.addaudithook(_watch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _alarm)
    work = Path(tempfile.mkdtemp(prefix="alflb-fuzz-"))
    try:
        for word in words[1:]:
            name, first, end = word.split(":")
            for case in range(int(first), int(end)):
                folder = work / "case"
                folder.mkdir()
                os.chdir(folder)  # where a name without a folder is written
                began = time.perf_counter()
                outcome, text = judge(name, case, seeds, folder)
                line = {"kind": name, "case": case, "outcome": outcome, "text": text[:500]}
                print(json.dumps(line | {"seconds": round(time.perf_counter() - began, 3)}), flush=True)
                os.chdir(work)
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def start(seeds: Path, words: list[str]) -> subprocess.Popen[str]:
    """A worker as a child process, from the repository's root."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.worker", str(seeds), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


if __name__ == "__main__":
    main(sys.argv[1:])
