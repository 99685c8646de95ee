"""The manifest of a preparation, PREFIX.json, and whether the files are what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alflb_megatron.lab.data.digests import digests, sha256
from alflb_megatron.lab.data.errors import one_line
from alflb_megatron.lab.data.shards import ENDINGS, with_ending
from alflb_megatron.lab.records.files import read_json
from alflb_megatron.settings import SettingError

FORMAT = 1


def read_manifest(prefix: Path, flag: str) -> dict[str, Any] | None:
    """The manifest of `prefix`, None where there is none; SettingError where that file is something else."""
    path = with_ending(prefix, ".json")
    if not path.exists():
        return None
    manifest = read(path, flag)
    try:
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this release has {FORMAT}")
        whole = [manifest[name] for name in ("documents", "empty_documents", "tokens", "vocabulary")]
        whole += [manifest["bytes"][ending] for ending in ENDINGS]
        texts = [manifest["sha256"][ending] for ending in ENDINGS] + list(manifest["tokenizer_sha256"].values())
        if not all(type(number) is int for number in whole) or not all(isinstance(text, str) for text in texts):
            raise ValueError("counts or sums of another type")
        dict(manifest["settings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(flag, prefix, f"{path} is no manifest of `alflb data prepare` ({one_line(error)})") from None
    return dict(manifest)


def read(path: Path, flag: str) -> Any:
    """The content of a JSON file; SettingError naming `flag` where it cannot be read."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise SettingError(flag, path, f"cannot be read: {one_line(error)}") from None


def damage(prefix: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads all files of a preparation; its manifest, and a line for each file that is not as it was made."""
    manifest = read_manifest(prefix, "PREFIX")
    if manifest is None:
        raise SettingError("PREFIX", prefix, f"has no {prefix.name}.json; `alflb data prepare` writes one when it ends")
    found = []
    for ending in ENDINGS:
        path = with_ending(prefix, ending)
        try:
            size = path.stat().st_size
            if size != manifest["bytes"][ending]:
                found.append(f"{path} has {size} bytes, not {manifest['bytes'][ending]}")
            elif sha256(path) != manifest["sha256"][ending]:
                found.append(f"{path} has another SHA-256 than when it was made")
        except OSError as error:
            found.append(f"{path} cannot be read: {one_line(error)}")
    folder = with_ending(prefix, "-tokenizer")
    there, made = digests(folder), manifest["tokenizer_sha256"]
    found += [f"{folder / name} is not as it was made" for name in sorted(made) if there.get(name) != made[name]]
    return manifest, found
