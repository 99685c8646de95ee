"""`alflb watch`: a running job in the terminal, from the metrics.jsonl that it writes."""

from __future__ import annotations

import io
import math
import os
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from alflb_megatron.lab.records.step_record import clean_text
from alflb_megatron.lab.watch.follow import FollowedRun
from alflb_megatron.lab.watch.view import render_frame, render_line
from alflb_megatron.settings import SettingError


def watch(run: str | os.PathLike[str], once: bool = False, every: float = 2.0, console: Console | None = None) -> None:
    """Shows the run folder `run` every `every` seconds until its summary.json is there; `once`: as it stands.

    On a terminal the same frame is drawn anew; elsewhere there is a line for each look that found something, and a
    frame at the end. SettingError: `--every` below 0.1, RUN where there is a file, or, with `once`, no record.
    """
    if not (math.isfinite(every) and every >= 0.1):
        raise SettingError("--every", every, "must be at least 0.1 seconds")
    console = console or Console(highlight=False, markup=False, emoji=False)
    if isinstance(console.file, io.TextIOWrapper):
        console.file.reconfigure(errors="replace")  # a name or an ellipsis that the terminal's encoding lacks
    followed = FollowedRun(Path(run))
    with followed.tail:
        if once:
            followed.read_new()
            if followed.history.last is None:
                raise SettingError("RUN", clean_text(run), "holds no whole record of a step yet")
            console.print(render_frame(followed, console, whole=not console.is_terminal))
        elif console.is_terminal:
            _live(followed, console, every)
        else:
            _plain(followed, console, every)


def _live(followed: FollowedRun, console: Console, every: float) -> None:
    with Live(console=console, auto_refresh=False, vertical_overflow="crop", transient=False) as live:
        while True:
            followed.read_new()
            live.update(render_frame(followed, console), refresh=True)
            if followed.history.ended() and followed.history.last is not None:
                return
            time.sleep(every)


def _plain(followed: FollowedRun, console: Console, every: float) -> None:
    waiting = False
    while True:
        steps = followed.read_new()
        for step in steps:
            for text in step.alarms:
                console.print(f"step {step.step}: alarm: {text}", soft_wrap=True)
        if followed.history.ended() and followed.history.last is not None:
            console.print(render_frame(followed, console, whole=True))
            return
        if steps:
            console.print(render_line(followed), soft_wrap=True)
        elif followed.history.last is None and not waiting:
            waiting = True
            console.print(f"waiting for {clean_text(followed.tail.path)}", soft_wrap=True)
        time.sleep(every)
