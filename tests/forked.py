"""Ranks and `alflb` commands, forked from one process that has imported Megatron-Core once.

Importing torch and Megatron-Core costs a process several seconds; a fork of one that has them costs milliseconds, and
leaves as little behind as a process of its own would. What must start from nothing (a substitution left out, the
launcher itself) is started as a process by the test that is about it.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = os.environ.get("ALFLB_TESTS_PRELOAD", "tests.preloaded")
"""What the server imports; `make test-hosts` names another for each host."""
SECONDS = 300.0
"""How long ranks may take together."""


class RankError(Exception):
    """A rank raised; the text is its traceback."""


def _server() -> Any:
    """The context whose processes are forked from the one that has imported `PRELOADED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """The server is started on the first call: by then it has to find the tests, and one thread a process is enough."""
    before = dict(os.environ)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(paths), TORCHDYNAMO_DISABLE="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start(targets: Sequence[tuple[Any, ...]]) -> list[tuple[Any, Connection]]:
    """A process and the end of its pipe for each of `targets`: a function, then its arguments."""
    context, started = _server(), []
    for function, *arguments in targets:
        ours, theirs = context.Pipe(duplex=False)
        packed = pickle.dumps((function, arguments, dict(os.environ), os.getcwd(), list(sys.path)))
        process = context.Process(target=_child, args=(packed, theirs))
        with _importable():
            process.start()
        theirs.close()
        started.append((process, ours))
    return started


def _child(packed: bytes, pipe: Connection) -> None:
    if PRELOADED not in sys.modules:
        importlib.import_module(PRELOADED)
    function, arguments, environment, folder, path = pickle.loads(packed)
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
    os.chdir(folder)
    sys.path[:] = path
    try:
        answer = (True, function(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()


def _gather(started: Sequence[tuple[Any, Connection]], seconds: float) -> list[Any]:
    """What each process returned. The first that fails ends all; `RankError` has its traceback."""
    answers: dict[int, Any] = {}
    ends = {pipe: index for index, (_, pipe) in enumerate(started)}
    deadline = time.monotonic() + seconds
    try:
        while len(answers) < len(started):
            ready = wait([pipe for pipe, index in ends.items() if index not in answers], deadline - time.monotonic())
            if not ready:
                raise RankError(f"no answer within {seconds:.0f} seconds")
            for pipe in ready:
                index = ends[pipe]  # type: ignore[index]
                try:
                    sound, answers[index] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    started[index][0].join(10)
                    raise RankError(f"rank {index} ended with exit code {started[index][0].exitcode}") from None
                if not sound:
                    raise RankError(f"rank {index}:\n{answers[index]}")
        return [answers[index] for index in range(len(started))]
    finally:
        for process, pipe in started:
            if len(answers) < len(started):
                process.kill()
            process.join(30)
            if process.is_alive():
                process.kill()
            pipe.close()


# -- ranks -------------------------------------------------------------------------------------------------------------


def run(nproc: int, function: Callable[..., Any], *args: Any, without: tuple[str, ...] = ()) -> list[Any]:
    """Calls `function(*args)` on `nproc` ranks with a process group (gloo); returns what each returned, by rank.

    `function` has to be importable. A rank's exception is raised here as a `RankError` with its traceback. `without`
    names substitutions of `hosts/cpu` to leave out.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = (nproc, os.path.join(folder, "store"), without)
        return _gather(_start([(_rank, rank, *place, function, args) for rank in range(nproc)]), SECONDS)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function(*args)` in a process of its own, prepared as a rank is but without a process group."""
    return _gather(_start([(_prepared, function, *args)]), SECONDS)[0]


def bare(function: Callable[..., Any], *args: Any) -> Any:
    """The same with nothing substituted for CUDA."""
    return _gather(_start([(function, *args)]), SECONDS)[0]


def _prepared(function: Callable[..., Any], *args: Any) -> Any:
    from alflb_megatron.hosts import cpu

    cpu.prepare()
    return function(*args)


def _rank(
    rank: int, nproc: int, store: str, without: tuple[str, ...], function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    import torch.distributed as dist

    from alflb_megatron.hosts import cpu

    cpu.prepare(skip=without)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=nproc, timeout=timedelta(seconds=180)
    )
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


# -- commands ----------------------------------------------------------------------------------------------------------


class Command:
    """`alflb WORDS`, or `python WORDS`, while it runs: in one process, or on `nproc` ranks as under torchrun."""

    def __init__(
        self,
        words: Sequence[str | os.PathLike[str]],
        nproc: int = 1,
        env: Mapping[str, str] | None = None,
        program: Callable[[list[str]], Any] | None = None,
        launched: bool = False,
    ) -> None:
        self.words = [os.fspath(word) for word in words]
        self._folder = tempfile.TemporaryDirectory()
        outer = _launched(nproc) if nproc > 1 or launched else [{}]
        places = [os.path.join(self._folder.name, str(rank)) for rank in range(nproc)]
        started = _start(
            [
                (_captured, program or _alflb, self.words, {**(env or {}), **ranked}, place)
                for ranked, place in zip(outer, places, strict=True)
            ]
        )
        self.processes = [process for process, _ in started]
        for _, pipe in started:
            pipe.close()

    def poll(self) -> int | None:
        """The exit code, or None while a process is running."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else max(codes, key=abs)

    def kill(self) -> None:
        """SIGKILL to all at once, as a power cut would."""
        for process in self.processes:
            process.kill()

    def said(self) -> list[str]:
        """What each rank wrote to standard error so far."""
        files = [Path(self._folder.name, f"{rank}.err") for rank in range(len(self.processes))]
        return [file.read_text(errors="replace") if file.exists() else "" for file in files]

    def finish(self, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
        """Waits for all, `seconds` at the most, then kills; output is that of all ranks, one after the other."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                self.kill()
                process.join()
        texts = [
            "".join(file.read_text(errors="replace") for file in sorted(Path(self._folder.name).glob(f"*.{name}")))
            for name in ("out", "err")
        ]
        self._folder.cleanup()
        code = self.poll()
        assert code is not None
        return subprocess.CompletedProcess(self.words, code, *texts)


def alflb(
    *words: str | os.PathLike[str], nproc: int = 1, env: Mapping[str, str] | None = None, seconds: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Runs `alflb WORDS` to its end, as `subprocess.run(..., capture_output=True, text=True)` would."""
    return Command(words, nproc, env).finish(seconds)


def python(
    *words: str | os.PathLike[str],
    nproc: int = 1,
    env: Mapping[str, str] | None = None,
    launched: bool = True,
    seconds: float = SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE ...` or `python SCRIPT ...` to its end, each rank as torchrun would start it."""
    return Command(words, nproc, env, _python, launched).finish(seconds)


def _launched(nproc: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    everyone = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [{k: str(v) for k, v in {**everyone, "RANK": r, "LOCAL_RANK": r}.items()} for r in range(nproc)]


def _alflb(words: list[str]) -> Any:
    from alflb_megatron.lab import cli

    sys.argv = ["alflb", *words]
    return cli.main(words)


def _python(words: list[str]) -> Any:
    import runpy

    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _captured(
    program: Callable[[list[str]], Any], words: list[str], environment: Mapping[str, str], place: str
) -> None:
    os.environ.update(environment)
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, number)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    code: Any = 1
    try:
        code = program(words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._exit_function()  # ends the process that Megatron-Core's checkpoint writer has started
    os._exit(code if isinstance(code, int) else int(bool(code)))
