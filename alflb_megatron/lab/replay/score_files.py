"""Recordings in one .safetensors or .npz file; `scores.py` says what is in them. Nothing is ever unpickled.

A file is read step by step, and what its header says of shapes and sizes is checked before any score is read.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alflb_megatron.lab.records.files import regular
from alflb_megatron.lab.replay.recording import FLAG, Gating, Recording, check_gating
from alflb_megatron.settings import SettingError

LARGEST_PACKED, MOST_PACKED = 2**28, 100
"""Bytes that an .npz may always unpack to, and how many times its own size beyond that: scores do not pack well."""

_SHAPES = "[steps, tokens, experts] or [steps, layers, tokens, experts]"


def _shape(path: Path, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(steps, layers, tokens, experts) of a single file's `scores`."""
    if len(shape) not in (3, 4):
        raise SettingError(FLAG, path, f"scores must have the shape {_SHAPES}, not {list(shape)}")
    if any(size < 1 for size in shape):
        raise SettingError(FLAG, path, f"is empty: scores have the shape {list(shape)}")
    steps, layers, tokens, experts = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
    return steps, layers, tokens, experts


# -- one .safetensors file -----------------------------------------------------------------------------------------


@contextmanager
def safetensors_file(path: Path) -> Iterator[Any]:
    """The open file, as `safe_open` gives it; SettingError where it is damaged or no such file."""
    try:
        regular(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingError(FLAG, path, f"cannot be read, truncated or no safetensors file ({reason})") from None


def open_safetensors(path: Path) -> Recording:
    """The recording in a .safetensors file; SettingError where there is none that can be replayed."""
    with safetensors_file(path) as file:
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
            # Anew each time: the pages of a mapping stay in memory while it is open.
            with safetensors_file(path) as file:
                part = file.get_slice("scores")[step : step + 1]
            yield part.float().reshape(layers, tokens, experts)

    gating = check_gating(path, Gating(topk), experts)
    return Recording(tuple(range(layers)), experts, steps, read, gating, str(path))


# -- one .npz file -------------------------------------------------------------------------------------------------


@contextmanager
def _npz_file(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        regular(path)
        with zipfile.ZipFile(path) as file:
            yield file
    except SettingError:
        raise
    except Exception as error:
        # zipfile and NumPy let out whatever their parsers meet: LZMAError, SyntaxError, KeyError
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


def open_npz(path: Path) -> Recording:
    """The recording in a .npz file; SettingError where there is none that can be replayed."""
    topk: int | None = None
    with _npz_file(path) as file:
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
        with _npz_file(path) as file, file.open("scores.npy") as member:
            _header(path, "scores", member)
            for _ in range(steps):
                step = np.frombuffer(_exactly(member, layers * tokens * experts * dtype.itemsize), dtype)
                yield torch.from_numpy(step.astype(np.float32)).view(layers, tokens, experts)

    gating = check_gating(path, Gating(topk), experts)
    return Recording(tuple(range(layers)), experts, steps, read, gating, str(path))


def _exactly(member: Any, size: int) -> bytes:
    data: bytes = member.read(size)
    if len(data) < size:
        raise EOFError(f"{size - len(data)} bytes are missing")
    return data
