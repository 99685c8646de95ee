"""Shows how a training goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from alflb_megatron.lab.records.summary import maxvio_text


class Progress:
    """Shows a run's progress on `stream` (standard error, so that standard output can carry JSON).

    A terminal gets a progress bar; anything else gets a plain line at the first step, every `every` steps
    and the last. The rate in a line is that of the steps since the line before.
    """

    def __init__(self, total: int, start: int = 0, every: int = 25, stream: TextIO | None = None) -> None:
        self.total, self.every = total, max(1, every)
        self.stream = sys.stderr if stream is None else stream
        self._first, self._tokens, self._seconds = start + 1, 0, 0.0
        self._bar: Any = None
        if self.stream.isatty():
            from tqdm import tqdm

            layout = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            try:
                known = 0 not in os.get_terminal_size(self.stream.fileno())
            except OSError:
                known = False
            # A terminal that gives its size as zero (often a container's) would get an empty bar.
            size: dict[str, Any] = {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
            self._bar = tqdm(total=total, initial=start, file=self.stream, bar_format=layout, **size)

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows the record of a step (keys step, loss, maxvio_mean, tokens, seconds)."""
        step = record["step"]
        self._tokens += record["tokens"]
        self._seconds += record["seconds"]
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(record), refresh=False)
            self._bar.update()
        elif step == self._first or step == self.total or step % self.every == 0:
            print(f"step {step}/{self.total}  {self._figures(record)}", file=self.stream, flush=True)
        else:
            return
        self._tokens, self._seconds = 0, 0.0

    def _figures(self, record: Mapping[str, Any]) -> str:
        loss, maxvio = (math.nan if record[key] is None else record[key] for key in ("loss", "maxvio_mean"))
        rate = self._tokens / self._seconds if self._seconds > 0 else math.nan
        speed = f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"
        return f"loss {loss:.3f}  MaxVio {maxvio_text(maxvio)}  {speed} tokens/s"

    def note(self, text: str) -> None:
        """Prints a line of text, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class SilentProgress:
    """In place of `Progress` on ranks that show nothing."""

    def step(self, record: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(self, *error: object) -> None: ...
