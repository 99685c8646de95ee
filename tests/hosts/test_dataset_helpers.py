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


@pytest.fixture
def in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package with a Makefile beside it, as in a checkout; the wheel of Megatron-Core has none."""
    package = tmp_path / "as_in_a_checkout"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "Makefile").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(dataset_helpers, "PACKAGE", "as_in_a_checkout")


def _config_of(folder: Path, suffix: str) -> None:
    folder.mkdir()
    (folder / CONFIG).write_text(f"#!/bin/sh\necho {suffix}\n", encoding="utf-8")
    (folder / CONFIG).chmod(0o755)


@pytest.mark.usefixtures("in_a_checkout")
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


@pytest.mark.usefixtures("in_a_checkout")
def test_this_pythons_under_its_name_with_the_version_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _config_of(tmp_path / "other", ".cpython-27-x86_64-linux-gnu.so")
    _config_of(tmp_path / "bin", str(sysconfig.get_config_var("EXT_SUFFIX")))
    (tmp_path / "bin" / CONFIG).rename(tmp_path / "bin" / f"python3.{sys.version_info.minor}-config")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "other"), str(tmp_path / "bin")]))
    compile_for_this_python()
    first = shutil.which(CONFIG)
    assert first is not None and dataset_helpers._is_of_this_python(first)


@pytest.mark.usefixtures("in_a_checkout")
def test_without_this_pythons_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _config_of(tmp_path / "other", ".cpython-27-x86_64-linux-gnu.so")
    monkeypatch.setattr(dataset_helpers, "_own_config", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    compile_for_this_python()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{CONFIG}={tmp_path}/other/{CONFIG}: Megatron-LM compiles") and sys.executable in line
    assert os.environ["PATH"] == str(tmp_path / "other")


def test_a_wheel_has_them_compiled_and_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compile_for_this_python()
    assert os.environ["PATH"] == str(tmp_path)
