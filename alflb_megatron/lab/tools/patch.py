"""`alflb patch`: puts the flags of ALF-LB into a checkout of Megatron-LM, and takes them out again.

One file of the checkout is changed, `pretrain_gpt.py`, by one of the patches in `patches/megatron-lm/`. `git apply`
works on a copy of it; the result then replaces the file in one step, so that no half of a patch is ever seen.
"""

from __future__ import annotations

import argparse
import errno
import importlib.resources
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from alflb_megatron.lab.records.files import regular
from alflb_megatron.settings import SettingError

SCRIPT = "pretrain_gpt.py"
VERSION_FILE = Path("megatron/core/package_info.py")

LARGEST = 2**24
"""Bytes of the largest file that is taken for one of a checkout's scripts."""

PATCHES: dict[tuple[int, int], str] = {
    (0, 16): "core_v0.16-0.17.patch",
    (0, 17): "core_v0.16-0.17.patch",
    (0, 18): "core_v0.18.patch",
    (0, 19): "core_v0.19.patch",
    (0, 20): "core_v0.19.patch",  # in development; read against main at d98e8a64dd
}
"""Which patch belongs to which version of Megatron-Core."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `alflb patch`."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="a checkout of Megatron-LM")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--check",
        action="store_true",
        help="change nothing; say which state DIR is in: exit code 0 patched, 1 not patched, 2 not known",
    )
    what.add_argument("--revert", action="store_true", help="take the patch out again")


def run(arguments: argparse.Namespace, argv: object = None) -> int:
    """Applies, checks or reverts; returns the exit code."""
    checkout = identify_checkout(arguments.directory)
    if arguments.check:
        print(f"{checkout.title}: {'patched' if checkout.patched else 'not patched'}")
        return 0 if checkout.patched else 1
    done = "not patched" if arguments.revert else "patched"
    if checkout.patched is not arguments.revert:
        print(f"{checkout.title}: {done} already")
        return 0
    try:
        _replace_file(checkout.script, checkout.other_text)
    except OSError as error:
        raise SettingError(
            "DIR", arguments.directory, f"{SCRIPT} cannot be written ({error.strerror or error})"
        ) from None
    print(f"{checkout.title}: {done} now ({checkout.patch})")
    return 0


@dataclass(frozen=True)
class Checkout:
    """A checkout that is known: its script, whether that is patched, and its text in the other state."""

    directory: Path
    version: str
    patch: str
    script: Path
    patched: bool
    other_text: bytes

    @property
    def title(self) -> str:
        return f"{self.directory}: Megatron-LM with Megatron-Core {self.version}"


def identify_checkout(directory: Path) -> Checkout:
    """Which checkout this is, by its version and by its patch, which has to apply or to be in.

    Raises:
        SettingError: no checkout of Megatron-LM, a version without a patch, a `pretrain_gpt.py` on which its patch
            neither applies nor can be taken back, or no git to try it with.
    """
    known = "known are " + ", ".join(f"{major}.{minor}" for major, minor in PATCHES)
    try:
        text, before = (_read(directory / name) for name in (VERSION_FILE, SCRIPT))
    except OSError as error:
        missing = error.filename or error
        raise SettingError("DIR", directory, f"must be a checkout of Megatron-LM; cannot read {missing}") from None
    parts = re.findall(rb"^(MAJOR|MINOR|PATCH) *= *([0-9]{1,9})\b", text, re.MULTILINE)
    found = {name.decode(): number.decode() for name, number in parts}
    version = ".".join(found.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
    patch = PATCHES.get((int(found.get("MAJOR", -1)), int(found.get("MINOR", -1))))
    if patch is None:
        raise SettingError("DIR", directory, f"holds Megatron-Core {version}, for which there is no patch; {known}")
    text_of_patch = (patches() / patch).read_bytes()
    script = (directory / SCRIPT).resolve()
    for patched, options in ((False, ()), (True, ("--reverse",))):
        other = _apply_patch(text_of_patch, before, *options)
        if other is not None:
            return Checkout(directory, version, patch, script, patched, other)
    raise SettingError(
        "DIR",
        directory,
        f"holds Megatron-Core {version}, but {patch} neither applies to its {SCRIPT} nor is in it: "
        f"the lines it changes read otherwise; {known}",
    )


def _read(path: Path) -> bytes:
    """A file's content; OSError where there is no regular file, or it is no script by its size."""
    regular(path)
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise OSError(errno.EFBIG, "too large", str(path))
    return content


def patches() -> Traversable:
    """The folder of Megatron-LM's patches: within the package when installed, beside it in the repository."""
    try:
        return importlib.resources.files("alflb_megatron.patches") / "megatron-lm"
    except ModuleNotFoundError:
        return Path(__file__).parents[3] / "patches" / "megatron-lm"


def _apply_patch(patch: bytes, before: bytes, *options: str) -> bytes | None:
    """The script with the patch applied by git to a copy of it, None where it does not apply."""
    git = shutil.which("git")
    if git is None:
        raise SettingError("PATH", os.environ.get("PATH", ""), "git must be found there: it applies the patch")
    # Neither a repository around the folder for temporary files nor one named by a git hook has a say.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    with tempfile.TemporaryDirectory(prefix="alflb-patch-") as folder:
        copy = Path(folder, SCRIPT)
        copy.write_bytes(before)
        done = subprocess.run(
            [git, "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", *options, "-"],
            cwd=folder,
            input=patch,
            capture_output=True,
            env=environment | {"GIT_CEILING_DIRECTORIES": str(Path(folder).resolve().parent)},
        )
        return copy.read_bytes() if done.returncode == 0 else None


def _replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one step, with the mode that it has; where that fails, nothing is left behind."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        shutil.copymode(path, name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
