"""What a failure says in one line, and what a missing package says."""

from __future__ import annotations

import importlib.util

from alflb_megatron.settings import SettingError


def one_line(error: BaseException) -> str:
    """An error's first 200 characters on one line, for the text of a SettingError."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def cause(error: BaseException) -> str:
    """An error of `datasets` on one line: theirs say that something failed, their cause says what."""
    return one_line(error.__cause__ or error)


def need(package: str, flag: str, value: object) -> None:
    """SettingError where a package of the extra `data` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise SettingError(
            flag, value, f"needs the Python package {package}: pip install 'alflb_megatron[data]' brings it"
        )
