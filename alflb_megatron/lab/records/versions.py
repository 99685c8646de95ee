"""What a run rests on: versions of packages, and the revision of the checkout."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a run rests on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "megatron-core", "alflb_megatron"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_revision(file: Path = Path(__file__)) -> str | None:
    """The commit of the checkout that tracks `file`, by default this package's, with `-dirty` if it was changed.

    None where there is no git, no commit, or where git does not track the file: an installed package may
    lie inside somebody else's checkout.
    """
    # Inside a git hook these would point every call at the hook's repository.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.resolve().parent), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
