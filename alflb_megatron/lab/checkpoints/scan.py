"""Scans a checkpoint's pickles before Megatron-Core loads them, so that a planted one is refused and never run.

A `torch_dist` checkpoint (Megatron-Core 0.16 to 0.19 on torch's distributed checkpointing) is unpickled like this:

    metadata.json    JSON; names the backend, which decides how all else is read
    .metadata        `pickle.load` on every rank (FileSystemReader.read_metadata): anything in it would run
    common.pt        `torch.load`, which keeps to safe types unless TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set; 0.18 and
                     later keep its content in an object `common_state` instead
    objects          `torch.load(weights_only=False)` (DefaultLoadPlanner.load_bytes): the slices of the .distcp files
                     that .metadata calls bytes: random state, `_extra_state`, `common_state`. Anything would run
    tensors          `torch.load(weights_only=True)`: torch's own restricted unpickler; not scanned here

`scan_checkpoint` follows each of them but the tensors without executing anything (`pickle_scan.py`), and lets through
only the globals that checkpoints of `alflb train` consist of: torch's plain data classes, and what rebuilds a tensor.

What this does not cover: a folder that somebody changes between the check and the load, which happen in the same
start of a run; a fault in torch's restricted unpickler; and checkpoints that Megatron-LM, Megatron-Bridge or NeMo load
by themselves. Transformer Engine unpickles the *values* of its FP8 state (`_extra_state`), which `alflb train` never
writes: such an object must be empty, and a checkpoint where one is not is refused.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alflb_megatron.lab.checkpoints.pickle_scan import (
    METADATA_INDEX,
    TENSOR_PROPERTIES,
    AllowedGlobals,
    PickledObject,
    UnsafePickleError,
    scan_pickle,
)
from alflb_megatron.lab.records.files import read_json, regular
from alflb_megatron.settings import SettingError

LARGEST_PICKLE = 2**30
"""Bytes of the largest pickle that is scanned. A .metadata has some hundred bytes for each shard of a tensor."""

_DCP = "torch.distributed.checkpoint."
_DTYPES = frozenset(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_STORAGES = frozenset(f"torch {name}" for name in vars(torch) if name.endswith("Storage")) | {
    "torch.storage UntypedStorage"
}
_TENSOR, _BYTES, _STORAGE_INFO, _METADATA = (
    f"{_DCP}metadata TensorStorageMetadata",
    f"{_DCP}metadata BytesStorageMetadata",
    f"{_DCP}filesystem _StorageInfo",
    f"{_DCP}metadata Metadata",
)

METADATA_GLOBALS = AllowedGlobals(
    classes=frozenset({
        _TENSOR, _BYTES, METADATA_INDEX, _STORAGE_INFO, _METADATA, TENSOR_PROPERTIES,
        f"{_DCP}metadata ChunkStorageMetadata",
        f"{_DCP}metadata StorageMeta",
        f"{_DCP}planner SavePlan",
        f"{_DCP}planner TensorWriteData",
        f"{_DCP}planner WriteItem",
    }),
    functions=frozenset({
        "torch Size",
        "torch.serialization _get_layout",
        f"{_DCP}metadata _MEM_FORMAT_ENCODING",
        f"{_DCP}planner WriteItemType",
    }),
    values=_DTYPES,
)  # fmt: skip
"""Globals in the .metadata of checkpoints, of one rank and several."""

OBJECT_GLOBALS = AllowedGlobals(
    classes=frozenset(),
    functions=frozenset({"collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor_v2"}),
    values=_DTYPES,
    storages=_STORAGES,
)
"""Globals in what `torch.save` writes of tensors, numbers, texts and their containers."""


class _StoredObject(NamedTuple):
    """Where a checkpoint keeps something that is loaded by unpickling it."""

    name: str
    file: Path
    offset: int
    length: int


def scan_checkpoint(folder: Path, flag: str, given: object = None) -> None:
    """Raises SettingError naming `flag` and `given` (by default the folder) if loading `folder` could execute anything.

    Reads all of .metadata and common.pt and the objects, none of the tensors. Safe on any content and any kind of file.
    """
    what = "metadata.json"
    objects: list[_StoredObject] = []
    try:
        _check_backend(folder / what)
        for path in sorted({folder / ".metadata", *folder.glob("*.metadata")}):  # of single ranks too
            what = path.name
            objects += _find_objects(folder, scan_pickle(_read_whole(path), METADATA_GLOBALS))
        what = "common.pt"
        if (folder / what).exists() or (folder / what).is_symlink():
            _scan_archive(_read_whole(folder / what), empty=False)
        for name, file, offset, length in objects:
            what = f"{name} in {file.name}"
            if length > LARGEST_PICKLE or offset + length > _size(file):
                raise UnsafePickleError("a place beyond the end of its file")
            with file.open("rb") as stream:
                stream.seek(offset)
                _scan_archive(stream.read(length), empty="_extra_state" in name)
    except UnsafePickleError as error:
        line = " ".join(what.split())[:200]
        allowed = f"holds a checkpoint that is not loaded: {line} has {error}"
    except OSError as error:
        allowed = f"holds a checkpoint that cannot be read: {what} ({error.strerror or 'no regular file'})"
    else:
        return
    raise SettingError(flag, folder if given is None else given, allowed)


def _size(path: Path) -> int:
    regular(path)
    return path.stat().st_size


def _read_whole(path: Path) -> bytes:
    if (size := _size(path)) > LARGEST_PICKLE:
        raise UnsafePickleError(f"{size} bytes, more than a pickle of a checkpoint can need")
    return path.read_bytes()


def _check_backend(path: Path) -> None:
    try:
        config = read_json(path)
    except ValueError:
        raise UnsafePickleError("no JSON") from None
    keys = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    keys |= {"common_backend": "torch", "common_backend_version": 1}
    if not isinstance(config, dict) or config.get("sharded_backend") != "torch_dist":
        raise UnsafePickleError("another format than torch_dist")
    for key, value in config.items():
        if key not in keys or type(value) is not type(keys[key]) or value != keys[key]:
            raise UnsafePickleError(f"{key[:50]} {str(value)[:50]!r}, which is not of this format")


def _find_objects(folder: Path, root: Any) -> Iterator[_StoredObject]:
    """Every entry that Megatron-Core would load as an object, not as a tensor."""
    fields = root.state if isinstance(root, PickledObject) and root.factory == _METADATA else None
    kinds, places = (fields.get(key) for key in ("state_dict_metadata", "storage_data")) if fields else (None, None)
    if not isinstance(kinds, Mapping) or not isinstance(places, Mapping):
        raise UnsafePickleError("no list of what the checkpoint holds")
    for kind in kinds.values():
        if not isinstance(kind, PickledObject) or kind.factory not in (_TENSOR, _BYTES):
            raise UnsafePickleError("an entry that is neither a tensor nor an object")
    for index, info in places.items():
        known = isinstance(index, PickledObject) and isinstance(info, PickledObject) and info.factory == _STORAGE_INFO
        if not known or info.state is None:
            raise UnsafePickleError("a place that is none")
        name, at = index.state["fqn"], info.state
        file, offset, length = (at.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not re.fullmatch(r"__\d+_\d+\.distcp", file):
            raise UnsafePickleError(f"a place outside the checkpoint: {' '.join(str(file).split())[:100]!r}")
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise UnsafePickleError("a place that is none")
        if at.get("transform_descriptors"):
            raise UnsafePickleError("data that is transformed when it is read")
        if name not in kinds or kinds[name].factory != _TENSOR:
            yield _StoredObject(name, folder / file, offset, length)


def _scan_archive(data: bytes, empty: bool) -> None:
    """Scans what `torch.save` wrote, with the reader by which `torch.load` finds its parts.

    With `empty` it must hold no value of a tensor: they would be unpickled once more.
    """
    if not data.startswith(b"PK\x03\x04"):
        raise UnsafePickleError("no archive as torch.save writes it")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(part.compress_type or part.file_size > len(data) for part in archive.infolist()):
                raise UnsafePickleError("compressed parts, which torch.save does not write")
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        records = reader.get_all_records()
        if "constants.pkl" in records:
            raise UnsafePickleError("a TorchScript program")
        scan_pickle(bytes(reader.get_record("data.pkl")), OBJECT_GLOBALS)
        if empty and any(record.startswith("data/") and len(reader.get_record(record)) for record in records):
            raise UnsafePickleError("values in a state that is unpickled once more when it is loaded")
    except (RuntimeError, zipfile.BadZipFile, NotImplementedError, EOFError, MemoryError, UnicodeDecodeError):
        raise UnsafePickleError("a damaged archive") from None
