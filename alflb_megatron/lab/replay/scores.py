"""Recorded router scores as `alflb replay` reads them: files, run folders, errors. No pickle anywhere.

A recording is one of

    a .safetensors or .npz file   `scores` [steps, tokens, experts] or [steps, layers, tokens, experts], float16 or
                                  float32 (in .safetensors also bfloat16), and, if you like, `topk`, an integer
    a run folder                  of `alflb train --record-scores N` (`score_recorder.py`):
                                  one file a step and rank (`score_folder.py`)

Scores are what the gate's activation gives, before any bias. A recording is read step by step, so memory does not
grow with the number of steps. Data-parallel ranks hold different tokens of the same layer, which are joined in the
order of the ranks; pipeline stages hold different layers. Every error is a one-line `SettingError`.
"""

from __future__ import annotations

import os
from pathlib import Path

from alflb_megatron.lab.replay.recording import FLAG, Recording
from alflb_megatron.lab.replay.score_files import open_npz, open_safetensors
from alflb_megatron.lab.replay.score_folder import open_score_folder
from alflb_megatron.settings import SettingError


def open_scores(path: str | os.PathLike[str]) -> Recording:
    """Opens a recording and checks all that can be checked without reading the scores; `SettingError` otherwise."""
    path = Path(path)
    try:
        if not path.exists():
            raise SettingError(FLAG, path, "there is no such file or folder")
        if path.is_dir():
            return open_score_folder(path)
    except OSError as error:
        raise SettingError(FLAG, path, f"cannot be read ({error.strerror})") from None
    openers = {".safetensors": open_safetensors, ".npz": open_npz}
    if path.suffix.lower() not in openers:
        raise SettingError(FLAG, path, "must be a .safetensors or .npz file, or a run folder with recorded scores")
    return openers[path.suffix.lower()](path)
