"""Megatron-LM's dataset helpers, compiled for the Python that runs.

At its start a checkout of Megatron-LM compiles `megatron/core/datasets/helpers.cpp` with the `python3-config` and the
`python3` that are first on the PATH. Where they are of another Python, the run ends in `No module named
'megatron.core.datasets.helpers_cpp'`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

CONFIG = "python3-config"
PACKAGE = "megatron.core.datasets"


def compile_for_this_python() -> None:
    """Sees to it that `python3-config` on the PATH is this Python's; changes nothing where a wheel brings the helpers.

    Where this Python's is not found one line says so, for the run may do without the helpers.
    """
    found_spec = importlib.util.find_spec(PACKAGE)
    folders = [] if found_spec is None else found_spec.submodule_search_locations or []
    if not any(Path(folder, "Makefile").is_file() for folder in folders):  # a wheel has none
        return
    found, own = shutil.which(CONFIG), _own_config()
    if own is None:
        logger.warning(
            "%s=%s: Megatron-LM compiles its dataset helpers with it, and it is not that of %s; install this Python's "
            "headers, or put its python3-config first on the PATH",
            CONFIG,
            found,
            sys.executable,
        )
        return
    # What the first on the PATH answers here says nothing: pyenv's answers by the folder that it is called in, and a
    # checkout of Megatron-LM names a Python of its own in a file.
    if found is not None and Path(found).resolve() == own.resolve():
        return
    folder = Path(tempfile.mkdtemp(prefix="python3-config-"))
    (folder / CONFIG).symlink_to(own)
    # pybind11 is asked by `python3`, which is the environment's own in its folder of scripts.
    os.environ["PATH"] = os.pathsep.join([str(folder), sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def _own_config() -> Path | None:
    """This Python's config script, also under its name with the version, as distributions of Linux have it."""
    names = (CONFIG, f"python{sys.version_info.major}.{sys.version_info.minor}-config")
    folders = (sysconfig.get_path("scripts"), str(Path(sys.base_prefix, "bin")), sysconfig.get_config_var("BINDIR"))
    places = [Path(folder, name) for folder in folders if folder for name in names]
    places += [Path(found) for found in map(shutil.which, names) if found]
    return next((place for place in places if _is_of_this_python(str(place))), None)


def extension_suffix(config: str | None) -> str:
    """Ending of the extension modules that a `python3-config` compiles; empty where it says none."""
    try:
        done = subprocess.run([config or "", "--extension-suffix"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _is_of_this_python(config: str) -> bool:
    return extension_suffix(config) == sysconfig.get_config_var("EXT_SUFFIX")
