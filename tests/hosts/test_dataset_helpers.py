"""Megatron-LM's dataset helpers are compiled for the Python that runs, or one line says what is missing."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from alflb_megatron.hosts import dataset_helpers
from alflb_megatron.hosts.dataset_helpers import CONFIG, compile_for_this_python
from alflb_megatron.settings import SettingError


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh checkout; the wheel of Megatron-Core brings the helpers compiled."""
    monkeypatch.setattr(dataset_helpers, "MODULE", "megatron.core.datasets.helpers_that_are_not_there")


def _config_of(folder: Path, suffix: str) -> None:
    folder.mkdir()
    (folder / CONFIG).write_text(f"#!/bin/sh\necho {suffix}\n", encoding="utf-8")
    (folder / CONFIG).chmod(0o755)


@pytest.mark.usefixtures("not_compiled")
def test_another_pythons_config_gives_way_to_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _config_of(tmp_path / "other", ".cpython-27-x86_64-linux-gnu.so")
    _config_of(tmp_path / "bin", str(sysconfig.get_config_var("EXT_SUFFIX")))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "other"), os.environ["PATH"]]))
    compile_for_this_python()
    first = shutil.which(CONFIG)
    assert first is not None and dataset_helpers._is_of_this_python(first)
    path = os.environ["PATH"]
    compile_for_this_python()
    assert os.environ["PATH"] == path, "the second rank of a process, or a second call, changes nothing"


@pytest.mark.usefixtures("not_compiled")
def test_without_this_pythons_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _config_of(tmp_path / "other", ".cpython-27-x86_64-linux-gnu.so")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    real = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path) if name == "BINDIR" else real(name))
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    with pytest.raises(SettingError, match=f"^{CONFIG}=.*other/{CONFIG}: .* is not that of .*python") as refused:
        compile_for_this_python()
    assert "\n" not in str(refused.value)
    assert os.environ["PATH"] == str(tmp_path / "other")


def test_where_the_helpers_are_there_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compile_for_this_python()
    assert os.environ["PATH"] == str(tmp_path)
