"""Megatron-LM's dataset helpers, compiled for the Python that runs.

At its start a checkout of Megatron-LM compiles `megatron/core/datasets/helpers.cpp` with the `python3-config` and the
`python3` that are first on the PATH. Where they are of another Python, the run ends in `No module named
'megatron.core.datasets.helpers_cpp'`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from alflb_megatron.settings import SettingError

CONFIG = "python3-config"
MODULE = "megatron.core.datasets.helpers_cpp"


def compile_for_this_python() -> None:
    """Sees to it that `python3-config` on the PATH is this Python's; changes nothing where the helpers are there.

    Raises:
        SettingError: the helpers would be compiled for another Python, and this one's `python3-config` is not found.
    """
    if importlib.util.find_spec(MODULE) is not None:
        return
    found = shutil.which(CONFIG)
    if found is not None and _is_of_this_python(found):
        return
    # pybind11 is asked by `python3`, which is the environment's own in its folder of scripts.
    folders = (sysconfig.get_path("scripts"), str(Path(sys.base_prefix, "bin")), sysconfig.get_config_var("BINDIR"))
    if not any(folder and _is_of_this_python(str(Path(folder, CONFIG))) for folder in folders):
        raise SettingError(
            CONFIG,
            found,
            f"Megatron-LM compiles its dataset helpers with it, and it is not that of {sys.executable}; install this "
            "Python's headers (python3-dev), or put its python3-config first on the PATH",
        )
    os.environ["PATH"] = os.pathsep.join([*filter(None, folders), os.environ.get("PATH", "")])


def extension_suffix(config: str | None) -> str:
    """Ending of the extension modules that a `python3-config` compiles; empty where it says none."""
    try:
        done = subprocess.run([config or "", "--extension-suffix"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _is_of_this_python(config: str) -> bool:
    return extension_suffix(config) == sysconfig.get_config_var("EXT_SUFFIX")
