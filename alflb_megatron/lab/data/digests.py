"""SHA-256 of settings with contents, of a file, of the files in a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def fingerprint(settings: dict[str, Any], *contents: Any) -> str:
    """SHA-256, in hexadecimal, of settings and of bytes-like contents."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in `folder`, by name; empty where there is no such folder."""
    if not folder.is_dir():
        return {}
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
