"""How a trainer's ranks end on a setting that cannot work: one line from rank 0, and no traceback."""

from __future__ import annotations

import os
import sys
import time
import types
from typing import NoReturn

from alflb_megatron.settings import SettingError

SECONDS_FOR_RANK_0 = 20.0
"""How long other ranks wait: the launcher ends all at the first that leaves, and rank 0 has to have said why."""


def exit_on_setting_error() -> None:
    """A SettingError that nobody catches ends the program with its one line and exit code 2; twice is once.

    Others go to the hook that was there. Megatron-Core's `build_module` raises errors of a layer anew and cannot for
    one whose constructor takes more than a text, so the error is looked for among the causes too.
    """
    plain = sys.excepthook
    if getattr(plain, "__alflb__", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        found: BaseException | None = error
        while found is not None and not isinstance(found, SettingError):
            found = found.__cause__ or found.__context__
        if found is None:
            plain(kind, error, trace)
        else:
            exit_with_error(found)

    hook.__alflb__ = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def exit_with_error(error: SettingError) -> NoReturn:
    """Ends this rank with the line of the error, said once, and exit code 2.

    An error leaves a process group standing, for other ranks may be inside a collective. Its threads can then outlive
    the interpreter's orderly end, which C++ answers by aborting: the exit code would say a crash, not what went wrong.
    """
    # sys.stderr may not be the real one: with a process group PyTorch's own hook collects what other hooks say, and
    # would print it when we have left.
    if error.seen_by_one_rank or os.environ.get("RANK", "0") == "0":
        print(f"alflb: {error}", file=sys.__stderr__, flush=True)
    else:
        time.sleep(SECONDS_FOR_RANK_0)
    sys.stdout.flush()
    os._exit(2)
