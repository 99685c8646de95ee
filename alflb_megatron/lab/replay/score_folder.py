"""The recording in a run folder: one file a step and rank, as `score_recorder.py` writes it.

RUN/scores/step_00000012.rank_00003.safetensors holds `layer_7`, float32 [tokens of that rank, experts], for each MoE
layer of that rank, and as metadata the keys of `Gating`, those of `Layout` where a rank has whole sequences, `step`,
`ranks` (how many files a step has) and `format`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from alflb_megatron.lab.replay.recording import FLAG, Gating, Layout, Recording, check_gating
from alflb_megatron.lab.replay.score_files import safetensors_file
from alflb_megatron.settings import SettingError

FOLDER = "scores"
FORMAT = "1"
FILE = "step_{step:08d}.rank_{rank:05d}.safetensors"
_FILE = re.compile(r"step_([0-9]{8})\.rank_([0-9]{5})\.safetensors")


def _files(folder: Path) -> dict[int, dict[int, Path]]:
    """step -> rank -> file, of the recorded files in RUN/scores."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted((folder / FOLDER).iterdir()) if (folder / FOLDER).is_dir() else ():
        if match := _FILE.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    return found


def _layers(path: Path) -> tuple[dict[int, tuple[int, int]], dict[str, str]]:
    """layer -> (tokens, experts) of one rank's file, and its metadata."""
    with safetensors_file(path) as file:
        about = dict(file.metadata() or {})
        if about.get("format") != FORMAT:
            raise SettingError(FLAG, path, f"is of format {about.get('format')}, this version reads {FORMAT}")
        shapes: dict[int, tuple[int, int]] = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            shape = part.get_shape()
            if not re.fullmatch(r"layer_(0|[1-9][0-9]{0,8})", name) or part.get_dtype() != "F32" or len(shape) != 2:
                raise SettingError(FLAG, path, f"{name} is no float32 [tokens, experts] of a layer_<number>")
            shapes[int(name[6:])] = (shape[0], shape[1])
    return shapes, about


def _check_step(
    folder: Path, step: int, files: Mapping[int, Path]
) -> tuple[tuple[int, ...], int, Gating, Layout | None]:
    """Layers, experts, gating and layout of one step; SettingError where a rank is missing or the layers do not fit."""
    tokens: dict[int, int] = {}
    widths: dict[int, int] = {}
    how, ranks = [], 0
    for path in files.values():
        shapes, about = _layers(path)
        try:
            how.append((Gating.from_metadata(about), Layout.from_metadata(about)))
            ranks = int(about["ranks"])
        except (KeyError, ValueError) as error:
            raise SettingError(FLAG, path, f"has metadata that cannot be read ({error})") from None
        if (missing := next((rank for rank in range(ranks) if rank not in files), None)) is not None:
            raise SettingError(FLAG, folder, f"step {step} is incomplete: rank {missing} of {ranks} wrote no file")
        for layer, (some, width) in shapes.items():
            tokens[layer] = tokens.get(layer, 0) + some
            if widths.setdefault(layer, width) != width:
                raise SettingError(FLAG, path, f"layer {layer} has {width} experts, on other ranks {widths[layer]}")
    if not widths or 0 in tokens.values() or 0 in widths.values():
        raise SettingError(FLAG, folder, f"step {step} is empty: it holds no token of an MoE layer")
    if len(set(widths.values())) > 1:
        text = ", ".join(f"layer {layer}: {width}" for layer, width in sorted(widths.items()))
        raise SettingError(FLAG, folder, f"is not replayed: its layers have different numbers of experts ({text})")
    if len(set(tokens.values())) > 1:
        text = ", ".join(f"layer {layer}: {some}" for layer, some in sorted(tokens.items()))
        raise SettingError(FLAG, folder, f"the layers of step {step} hold different numbers of tokens ({text})")
    if len(files) != ranks or len(set(how)) > 1:
        raise SettingError(FLAG, folder, f"the files of step {step} are of different runs")
    return tuple(sorted(widths)), next(iter(widths.values())), *how[0]


def open_score_folder(folder: Path) -> Recording:
    """The recording in a run folder; SettingError where a step, a rank or a layer is missing, or they do not fit."""
    files = _files(folder)
    if not files:
        raise SettingError(FLAG, folder, "holds no recorded scores; `alflb train --record-scores N` writes them")
    first, last = min(files), max(files)
    if (missing := next((step for step in range(first, last) if step not in files), None)) is not None:
        raise SettingError(FLAG, folder, f"step {missing} is missing between step {first} and step {last}")
    layers, experts, gating, layout = _check_step(folder, first, files[first])
    for step in range(first + 1, last + 1):
        if _check_step(folder, step, files[step]) != (layers, experts, gating, layout):
            raise SettingError(
                FLAG, folder, f"step {step} has other layers, experts, gating or sequences than step {first}"
            )
    check_gating(folder, gating, experts)

    def read() -> Iterator[Tensor]:
        for step in range(first, last + 1):
            rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            for rank in sorted(files[step]):
                with safetensors_file(files[step][rank]) as file:
                    for name in file.keys():  # noqa: SIM118
                        rows[int(name[6:])].append(file.get_tensor(name))
            yield torch.stack([torch.cat(parts) for parts in rows.values()])

    return Recording(layers, experts, last - first + 1, read, gating, str(folder), first, layout)


def remove_recorded_scores(folder: str | os.PathLike[str], after: int = 0) -> None:
    """Removes the recorded files of steps beyond `after` from a run folder, and nothing else."""
    for step, files in _files(Path(folder)).items():
        for path in files.values() if step > after else ():
            path.unlink()
