"""Recorded router scores as `alflb replay` reads them: files, run folders, errors. No pickle anywhere.

A recording is one of

    a .safetensors or .npz file   `scores` [steps, tokens, experts] or [steps, layers, tokens, experts], float16 or
                                  float32 (in .safetensors also bfloat16), and, if you like, `topk`, an integer
    a run folder                  of `alflb train --record-scores N` (`lab/training/score_recorder.py`):
                                  RUN/scores/step_00000012.rank_00003.safetensors, one file a step and rank: `layer_7`
                                  float32 [tokens of that rank, experts] for each MoE layer of that rank, and as
                                  metadata the keys of `Gating`, `step`, `ranks` (how many files a step has) and
                                  `format`

Scores are what the gate's activation gives, before any bias. A recording is read step by step, so memory does not
grow with the number of steps. Data-parallel ranks hold different tokens of the same layer, which are joined in the
order of the ranks; pipeline stages hold different layers. Every error is a one-line `SettingError`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alflb_megatron.lab.records.files import regular
from alflb_megatron.settings import SettingError

FLAG = "SCORES"
FOLDER = "scores"
FORMAT = "1"
FILE = "step_{step:08d}.rank_{rank:05d}.safetensors"
_FILE = re.compile(r"step_([0-9]{8})\.rank_([0-9]{5})\.safetensors")
LARGEST_PACKED, MOST_PACKED = 2**28, 100
"""Bytes that an .npz may always unpack to, and how many times its own size beyond that: scores do not pack well."""
_SHAPES = "[steps, tokens, experts] or [steps, layers, tokens, experts]"


@dataclass(frozen=True)
class Gating:
    """How the recorded router chose: what a replay needs beside the scores."""

    topk: int | None = None
    score_function: str = ""
    num_groups: int | None = None
    group_topk: int | None = None

    def as_metadata(self) -> dict[str, str]:
        return {name: str(value) for name, value in dataclasses.asdict(self).items() if value is not None}

    @staticmethod
    def from_metadata(texts: Mapping[str, str]) -> Gating:
        """ValueError where a number is none."""
        numbers = {name: int(texts[name]) for name in ("topk", "num_groups", "group_topk") if name in texts}
        return Gating(score_function=texts.get("score_function", ""), **numbers)


@dataclass(frozen=True)
class Recording:
    """Scores of several layers over several steps; to go through it is to read it, one step at a time.

    layers: their numbers; 0, 1, ... in a single file, Megatron's (from 1) in a run folder. experts: E. steps: how many.
    read: gives the scores of each step, float32 [layers, tokens, E]; the number of tokens may change from step to step.
    first_step: the number of the first step in messages. name: of the file or folder.
    """

    layers: tuple[int, ...]
    experts: int
    steps: int
    read: Callable[[], Iterator[Tensor]]
    gating: Gating = Gating()
    name: str = "recording"
    first_step: int = 0

    @property
    def topk(self) -> int | None:
        return self.gating.topk

    def __iter__(self) -> Iterator[Tensor]:
        """Each step's scores; SettingError at the first that are not [layers, tokens, E] or hold a NaN or infinity."""
        for step, scores_LTE in enumerate(self.read(), self.first_step):
            layers, tokens, experts = scores_LTE.shape
            if (layers, experts) != (len(self.layers), self.experts) or tokens == 0:
                raise SettingError(FLAG, self.name, f"step {step} has scores of shape {list(scores_LTE.shape)}")
            if not scores_LTE.sum(dtype=torch.float64).isfinite():  # no sum of finite float32 overflows float64
                sound_L = scores_LTE.isfinite().flatten(1).all(dim=1).tolist()
                layer = self.layers[sound_L.index(False)]
                raise SettingError(FLAG, self.name, f"step {step}, layer {layer} holds a score that is NaN or infinite")
            yield scores_LTE


def open_scores(path: str | os.PathLike[str]) -> Recording:
    """Opens a recording and checks all that can be checked without reading the scores; `SettingError` otherwise."""
    path = Path(path)
    try:
        if not path.exists():
            raise SettingError(FLAG, path, "there is no such file or folder")
        if path.is_dir():
            return _open_run(path)
    except OSError as error:
        raise SettingError(FLAG, path, f"cannot be read ({error.strerror})") from None
    openers = {".safetensors": _open_safetensors, ".npz": _open_npz}
    if path.suffix.lower() not in openers:
        raise SettingError(FLAG, path, "must be a .safetensors or .npz file, or a run folder with recorded scores")
    return openers[path.suffix.lower()](path)


def _shape(path: Path, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(steps, layers, tokens, experts) of a single file's `scores`."""
    if len(shape) not in (3, 4):
        raise SettingError(FLAG, path, f"scores must have the shape {_SHAPES}, not {list(shape)}")
    if any(size < 1 for size in shape):
        raise SettingError(FLAG, path, f"is empty: scores have the shape {list(shape)}")
    steps, layers, tokens, experts = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
    return steps, layers, tokens, experts


def _check_gating(path: Path, gating: Gating, experts: int) -> Gating:
    topk, groups, chosen = gating.topk, gating.num_groups, gating.group_topk
    if topk is not None and not 1 <= topk <= experts:
        raise SettingError(FLAG, path, f"holds topk {topk}, which must be from 1 to the {experts} experts")
    if groups is None and chosen is None:
        return gating
    if groups is None or chosen is None or groups < 1 or experts % groups or not 1 <= chosen <= groups:
        allowed = f"holds num_groups {groups} and group_topk {chosen}, which do not fit its {experts} experts"
        raise SettingError(FLAG, path, allowed)
    if topk is not None and (topk % chosen or topk > chosen * (experts // groups)):
        raise SettingError(FLAG, path, f"holds topk {topk}, which {chosen} of {groups} groups of experts do not allow")
    return gating


# -- one .safetensors file -----------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        regular(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingError(FLAG, path, f"cannot be read, truncated or no safetensors file ({reason})") from None


def _open_safetensors(path: Path) -> Recording:
    with _reading(path) as file:
        names = list(file.keys())
        if "scores" not in names:
            raise SettingError(FLAG, path, f"holds no tensor named scores; there are {', '.join(names) or 'none'}")
        part = file.get_slice("scores")
        if part.get_dtype() not in ("F32", "F16", "BF16"):
            raise SettingError(FLAG, path, f"scores must be float32, float16 or bfloat16, not {part.get_dtype()}")
        steps, layers, tokens, experts = _shape(path, part.get_shape())
        topk = None
        if "topk" in names:
            k_dtype, k_shape = file.get_slice("topk").get_dtype(), file.get_slice("topk").get_shape()
            if not re.fullmatch(r"[IU]\d+", k_dtype) or math.prod(k_shape) != 1:
                raise SettingError(FLAG, path, f"topk must be one integer, not {k_dtype} {k_shape}")
            topk = int(file.get_tensor("topk"))

    def read() -> Iterator[Tensor]:
        for step in range(steps):
            with _reading(path) as file:  # anew each time: the pages of a mapping stay in memory while it is open
                part = file.get_slice("scores")[step : step + 1]
            yield part.float().reshape(layers, tokens, experts)

    gating = _check_gating(path, Gating(topk), experts)
    return Recording(tuple(range(layers)), experts, steps, read, gating, str(path))


# -- one .npz file -------------------------------------------------------------------------------------------------


@contextmanager
def _unzipping(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        regular(path)
        with zipfile.ZipFile(path) as file:
            yield file
    except SettingError:
        raise
    except (
        Exception
    ) as error:  # zipfile and NumPy let out whatever their parsers meet: LZMAError, SyntaxError, KeyError
        reason = " ".join(str(error).split())[:200]
        raise SettingError(FLAG, path, f"cannot be read, truncated or no npz file ({reason})") from None


def _header(path: Path, name: str, member: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array whose values come next in `member`. Nothing but numbers is let through."""
    form = np.lib.format
    readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    version = form.read_magic(member)
    if version not in readers:
        raise SettingError(FLAG, path, f"{name} is written in version {version} of the npy format; write numbers")
    shape, fortran, dtype = readers[version](member)
    if not all(type(size) is int for size in shape):
        raise SettingError(FLAG, path, f"{name} has a shape that is none")
    if dtype.hasobject:
        raise SettingError(FLAG, path, f"{name} is an array of Python objects, which are never unpickled here")
    if fortran and len(shape) > 1:
        raise SettingError(FLAG, path, f"{name} is in Fortran order; save numpy.ascontiguousarray({name})")
    return shape, dtype


def _open_npz(path: Path) -> Recording:
    topk: int | None = None
    with _unzipping(path) as file:
        names = [name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")]
        if "scores" not in names:
            raise SettingError(FLAG, path, f"holds no array named scores; there are {', '.join(names) or 'none'}")
        with file.open("scores.npy") as member:
            shape, dtype = _header(path, "scores", member)
            about = file.getinfo("scores.npy")
            held = about.file_size - member.tell()
        if about.file_size > max(LARGEST_PACKED, MOST_PACKED * about.compress_size):
            times = about.file_size // max(1, about.compress_size)
            raise SettingError(
                FLAG, path, f"is packed {times}-fold: scores are not, and unpacked it may fill the memory"
            )
        if dtype.kind != "f" or dtype.itemsize not in (2, 4):
            raise SettingError(FLAG, path, f"scores must be float32 or float16, not {dtype}")
        steps, layers, tokens, experts = _shape(path, shape)
        if (missing := math.prod(shape) * dtype.itemsize - held) > 0:
            raise SettingError(FLAG, path, f"is truncated: {missing} bytes of scores are missing")
        if "topk" in names:
            with file.open("topk.npy") as member:
                k_shape, k_dtype = _header(path, "topk", member)
                if k_dtype.kind not in "iu" or math.prod(k_shape) != 1:
                    raise SettingError(FLAG, path, f"topk must be one integer, not {k_dtype} {list(k_shape)}")
                topk = int(np.frombuffer(_exactly(member, k_dtype.itemsize), k_dtype)[0])

    def read() -> Iterator[Tensor]:
        with _unzipping(path) as file, file.open("scores.npy") as member:
            _header(path, "scores", member)
            for _ in range(steps):
                step = np.frombuffer(_exactly(member, layers * tokens * experts * dtype.itemsize), dtype)
                yield torch.from_numpy(step.astype(np.float32)).view(layers, tokens, experts)

    gating = _check_gating(path, Gating(topk), experts)
    return Recording(tuple(range(layers)), experts, steps, read, gating, str(path))


def _exactly(member: Any, size: int) -> bytes:
    data: bytes = member.read(size)
    if len(data) < size:
        raise EOFError(f"{size - len(data)} bytes are missing")
    return data


# -- a run folder --------------------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[int, dict[int, Path]]:
    """step -> rank -> file, of the recorded files in RUN/scores."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted((folder / FOLDER).iterdir()) if (folder / FOLDER).is_dir() else ():
        if match := _FILE.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    return found


def _layers(path: Path) -> tuple[dict[int, tuple[int, int]], dict[str, str]]:
    """layer -> (tokens, experts) of one rank's file, and its metadata."""
    with _reading(path) as file:
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


def _look(folder: Path, step: int, files: Mapping[int, Path]) -> tuple[tuple[int, ...], int, Gating]:
    """Layers, experts and gating of one step; SettingError where a rank is missing or the layers do not fit."""
    tokens: dict[int, int] = {}
    widths: dict[int, int] = {}
    gatings, ranks = [], 0
    for path in files.values():
        shapes, about = _layers(path)
        try:
            gatings.append(Gating.from_metadata(about))
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
    if len(files) != ranks or len(set(gatings)) > 1:
        raise SettingError(FLAG, folder, f"the files of step {step} are of different runs")
    return tuple(sorted(widths)), next(iter(widths.values())), gatings[0]


def _open_run(folder: Path) -> Recording:
    files = _files(folder)
    if not files:
        raise SettingError(FLAG, folder, "holds no recorded scores; `alflb train --record-scores N` writes them")
    first, last = min(files), max(files)
    if (missing := next((step for step in range(first, last) if step not in files), None)) is not None:
        raise SettingError(FLAG, folder, f"step {missing} is missing between step {first} and step {last}")
    layers, experts, gating = _look(folder, first, files[first])
    for step in range(first + 1, last + 1):
        if _look(folder, step, files[step]) != (layers, experts, gating):
            raise SettingError(FLAG, folder, f"step {step} has other layers, experts or gating than step {first}")
    _check_gating(folder, gating, experts)

    def read() -> Iterator[Tensor]:
        for step in range(first, last + 1):
            rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            for rank in sorted(files[step]):
                with _reading(files[step][rank]) as file:
                    for name in file.keys():  # noqa: SIM118
                        rows[int(name[6:])].append(file.get_tensor(name))
            yield torch.stack([torch.cat(parts) for parts in rows.values()])

    return Recording(layers, experts, last - first + 1, read, gating, str(folder), first)


def clear(folder: str | os.PathLike[str], after: int = 0) -> None:
    """Removes the recorded files of steps beyond `after` from a run folder, and nothing else."""
    for step, files in _files(Path(folder)).items():
        for path in files.values() if step > after else ():
            path.unlink()
