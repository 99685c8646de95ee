"""A setting that cannot work ends a rank with one line; other errors keep their traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from alflb_megatron.hosts import errors

PROGRAM = """
from alflb_megatron.hosts import errors
from alflb_megatron.settings import SettingError
errors.exit_on_setting_error()
errors.SECONDS_FOR_RANK_0 = 0
try:
    raise SettingError("--a", 1, "must be 2")
except SettingError as error:
    {then}
"""


@pytest.mark.parametrize(
    ("then", "rank", "code", "said"),
    [
        ("raise", "0", 2, "alflb: --a=1: must be 2\n"),
        ("raise type(error)('as build_module does')", "0", 2, "alflb: --a=1: must be 2\n"),
        ("raise", "1", 2, ""),
    ],
)
def test_an_error_is_one_line(then: str, rank: str, code: int, said: str) -> None:
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(then=then)]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "RANK": rank})
    assert (done.returncode, done.stderr) == (code, said)


def test_other_errors_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    errors.exit_on_setting_error()
    errors.exit_on_setting_error()
    try:
        raise ZeroDivisionError("theirs")
    except ZeroDivisionError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    assert "ZeroDivisionError: theirs" in capsys.readouterr().err
