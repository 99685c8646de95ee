"""Planted pickles: in place of each file that we read, and in every part of a real checkpoint that is unpickled."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from alflb_megatron.lab import cli
from alflb_megatron.lab.checkpoints.pickle_scan import PickledObject, UnsafePickleError, scan_pickle
from alflb_megatron.lab.checkpoints.scan import METADATA_GLOBALS, OBJECT_GLOBALS, scan_checkpoint
from alflb_megatron.lab.data import open_data
from alflb_megatron.lab.training import checkpoint
from alflb_megatron.lab.training.command import plan_of
from alflb_megatron.settings import SettingError
from tests import forked
from tests.fuzz import seeds

PACKAGE = seeds.ROOT / "alflb_megatron"
CHECKPOINT = Path("checkpoints", "step_00000002")


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def train(run: Path, *more: str, **changed: Any) -> subprocess.CompletedProcess[str]:
    """`alflb train` on one rank with a model of toy size, into the folder `run`."""
    flags = {**seeds.JOB, **seeds.SHAPE, "steps": 2, "rule": "adaptive", "out": run, **changed}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return forked.alflb("train", *words, *more)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("adam") / "run"
    done = train(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module", params=["adam", "distributed"])
def saved(request: pytest.FixtureRequest, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each optimizer."""
    if request.param == "distributed":
        run = tmp_path_factory.mktemp("distributed") / "run"
        done = train(run, optimizer="distributed")
        assert done.returncode == 0, done.stderr[-2000:]
    return run / CHECKPOINT


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other file that we read, each in the folder of its kind."""
    folder = tmp_path_factory.mktemp("readable")
    for name in ("scores", "indexed"):
        (folder / name).mkdir()
    seeds.scores(folder / "scores")
    seeds.run_folder(folder / "run")
    seeds.indexed(folder / "indexed")
    seeds.texts(folder / "texts")
    seeds.checkout(folder / "checkout")
    return folder


@pytest.fixture
def bait(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def test_the_bait_works(bait: Path) -> None:
    pickle.loads(pickle.dumps(Planted(bait)))
    assert bait.is_dir()


def test_a_real_checkpoint_passes(saved: Path) -> None:
    scan_checkpoint(saved, "--load")


def _archive(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _metadata(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def _write(folder: Path, metadata: Metadata) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_metadata(folder: Path, bait: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(bait)))


def _within_metadata(folder: Path, bait: Path) -> None:
    metadata = _metadata(folder)
    metadata.planner_data = Planted(bait)
    _write(folder, metadata)


def _in_common(folder: Path, bait: Path) -> None:
    (folder / "common.pt").write_bytes(_archive({"optimizer": Planted(bait)}))


def _in_common_of_old(folder: Path, bait: Path) -> None:
    (folder / "common.pt").write_bytes(pickle.dumps(Planted(bait)))


def _in_object(folder: Path, bait: Path, name: str = "rng_state", value: Any = None) -> None:
    """The random state, written anew at the end of its file, as another writer of the folder could."""
    metadata = _metadata(folder)
    (index,) = (index for index in metadata.storage_data if index.fqn.startswith(name))
    info = metadata.storage_data[index]
    data = _archive(Planted(bait) if value is None else value)
    info.offset, info.length = (folder / info.relative_path).stat().st_size, len(data)
    with (folder / info.relative_path).open("ab") as file:
        file.write(data)
    _write(folder, metadata)


def _in_a_tensor_called_object(folder: Path, bait: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = _metadata(folder)
    index = next(index for index in metadata.storage_data if index.fqn.endswith("expert_bias"))
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    _write(folder, metadata)
    _in_object(folder, bait, index.fqn)


def _in_another_file(folder: Path, bait: Path) -> None:
    metadata = _metadata(folder)
    (folder.parent / "elsewhere").write_bytes(_archive(Planted(bait)))
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = "../elsewhere", 0, 1000
    _write(folder, metadata)


def _in_extra_state(folder: Path, bait: Path) -> None:
    """Values that Transformer Engine would unpickle in its turn."""
    state = torch.tensor(list(pickle.dumps(Planted(bait))), dtype=torch.uint8)
    _in_object(folder, bait, "decoder.layers.0.mlp.linear_fc1._extra_state", state)


def _in_another_format(folder: Path, bait: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))


def _as_a_program(folder: Path, bait: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / "common.pt")


PLANTS = [
    _in_metadata, _within_metadata, _in_common, _in_common_of_old, _in_object, _in_a_tensor_called_object,
    _in_another_file, _in_extra_state, _in_another_format, _as_a_program,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_pickle_is_refused_and_never_run(
    plant: Callable[[Path, Path], None], saved: Path, tmp_path: Path, bait: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    shutil.copytree(saved, folder)
    plant(folder, bait)
    for path, flag in ((tmp_path / "run", "--resume"), (folder, "--load")):
        with pytest.raises(SettingError) as error:
            checkpoint.find(path, flag)
        assert str(error.value).startswith(f"{flag}={path}: holds a checkpoint that is not loaded: ")
    assert not bait.exists()


def test_without_the_check_it_would_be_run(run: Path, tmp_path: Path, bait: Path) -> None:
    """Megatron-Core really unpickles .metadata: the check is what stands between."""
    from torch.distributed.checkpoint import FileSystemReader

    folder = tmp_path / "step_00000002"
    shutil.copytree(run / CHECKPOINT, folder)
    _within_metadata(folder, bait)
    FileSystemReader(folder).read_metadata()
    assert bait.exists()


@pytest.mark.parametrize("words", [["--resume"], ["--load", "{planted}", "--out", "{other}"]])
def test_the_command_line_refuses_it_and_leaves_the_run_as_it_is(
    words: list[str], run: Path, tmp_path: Path, bait: Path
) -> None:
    planted = tmp_path / "run"
    shutil.copytree(run, planted)
    _within_metadata(planted / CHECKPOINT, bait)
    given = [word.format(planted=planted, other=tmp_path / "other") for word in words]
    before = {path: path.read_bytes() for path in planted.rglob("*") if path.is_file()}
    done = train(planted, *given, steps=3)
    assert done.returncode == 2, done.stderr[-1000:]
    (said,) = (text for text in done.stderr.splitlines() if text.startswith("alflb: "))
    assert "posix.mkdir" in said and "Traceback" not in done.stderr
    assert not bait.exists()
    assert {path: path.read_bytes() for path in planted.rglob("*") if path.is_file()} == before


# -- the scan of one pickle ------------------------------------------------------------------------------------------


def _global(name: bytes, arguments: bytes = b")") -> bytes:
    return b"\x80\x02c" + name + b"\n" + arguments + b"R."


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (_global(b"os\nsystem", b"X\x01\x00\x00\x00x\x85"), "os.system"),
        (_global(b"builtins\neval"), "builtins.eval"),
        (_global(b"torch\nSiz\\x65"), "backslash"),  # pickletools undoes it, pickle does not
        (b"\x80\x04\x8c\x05torch\x8c\x04Size\x93)\x81.", "a call of torch.Size"),  # a function, built as a class
        (b"\x80\x02}K\x01\x85K\x02\x86K\x03s.", "neither a text nor a number"),  # nested keys: exponential to hash
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "more memory"),
        (b"\x80\x02(X\x01\x00\x00\x00xios\nsystem\n.", "INST"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02ctorch\nSize\n}b.", "state given to what has none"),  # attributes of the class itself
        (b"\x80\x02]ctorch\nSize\na.", "torch.Size as a value"),
        (b"\x80\x02Q.", "damaged"),
        (b"\x80\x02NN.", "leaves something"),
        (b"\x80\x02N", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02(.", "leaves something|damaged|group"),
    ],
)
def test_what_a_pickle_must_not_hold(data: bytes, found: str) -> None:
    with pytest.raises(UnsafePickleError, match=found) as error:
        scan_pickle(data, OBJECT_GLOBALS)
    assert "\n" not in str(error.value)


def test_state_that_would_change_a_class_is_refused() -> None:
    name = b"ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n"
    for state in (b"}X\x09\x00\x00\x00__class__Ns", b"N}X\x09\x00\x00\x00__class__Ns\x86"):
        with pytest.raises(UnsafePickleError, match="no attributes"):
            scan_pickle(b"\x80\x02" + name + b")\x81" + state + b"b.", METADATA_GLOBALS)
    assert isinstance(scan_pickle(b"\x80\x02" + name + b")\x81}b.", METADATA_GLOBALS), PickledObject)


def test_allowed_names_mean_the_same_to_old_protocols() -> None:
    """Python renames Python 2's names when it unpickles protocols 0 to 2; none of ours is among them."""
    import _compat_pickle as old

    for name in METADATA_GLOBALS.names() | OBJECT_GLOBALS.names():
        module, attribute = name.split(" ")
        assert (module, attribute) not in old.NAME_MAPPING and module not in old.IMPORT_MAPPING


def test_plain_values_are_read_as_they_are() -> None:
    value = {"a": [1, 2.5, None, True, "text", (1, 2), 2**40], 3: {"b": ()}}
    for protocol in (2, 4, 5):
        assert scan_pickle(pickle.dumps(value, protocol), OBJECT_GLOBALS) == value


# -- nothing is unpickled anywhere ------------------------------------------------------------------------------------


def _unpickles(source: str) -> list[str]:
    """Calls and imports in a module's source that could unpickle what they are given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {alias.name for alias in node.names} | ({module} if module else set())
            found += [name for name in names if name.split(".")[0] in ("pickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")]  # fmt: skip  # noqa: E501
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in ("weights_only", "allow_pickle")}
            if called.endswith(("torch.load", "jit.load")) and keywords.get("weights_only") != "True":
                found.append(called)
            if keywords.get("allow_pickle", "False") != "False" or called.endswith(
                ("read_array", "pandas.read_pickle")
            ):
                found.append(called)
    return found


def test_the_package_never_unpickles() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(seeds.ROOT / "recipes").glob("*.py")]
    assert len(sources) > 50
    assert {str(path): found for path in sources if (found := _unpickles(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "torch.load(x)", "torch.load(x, weights_only=False)",
     "np.load(x, allow_pickle=True)", "import dill.x"],
)  # fmt: skip
def test_the_check_can_fail(source: str) -> None:
    assert _unpickles(source)
    assert not _unpickles("torch.load(x, weights_only=True); np.load(x); import pickletools")


def _readers(seeds_: Path, folder: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Every file that we read beside checkpoints, and how."""

    def resumed() -> Any:
        words = ["train", "--resume", "--out", str(folder / "run")]
        return plan_of(cli.parse(words))

    def recorded() -> Any:
        from alflb_megatron.lab.records.run_folder import RunFolder

        return RunFolder(folder / "run", resume_step=3)

    def replayed(path: Path) -> Callable[[], int]:
        return lambda: cli.main(["replay", str(path), "--rules", "sign", "--no-hindsight"])

    def data(path: Path) -> Callable[[], Any]:
        return lambda: open_data(str(path), seq_length=8, vocab_size=256, seed=1)

    shutil.copytree(seeds_ / "run", folder / "run")
    for name in ("scores", "indexed", "texts", "checkout"):
        shutil.copytree(seeds_ / name, folder / name)
    step = folder / "scores" / "run" / "scores" / "step_00000002.rank_00001.safetensors"
    single = folder / "scores"
    return {
        "safetensors": (single / "recording.safetensors", replayed(single / "recording.safetensors")),
        "npz": (single / "recording.npz", replayed(single / "recording.npz")),
        "a step": (step, replayed(single / "run")),
        "config": (folder / "run" / "config.json", resumed),
        "metrics": (folder / "run" / "metrics.jsonl", recorded),
        "idx": (folder / "indexed" / "tokens.idx", data(folder / "indexed" / "tokens")),
        "text": (folder / "texts" / "part1.txt", data(folder / "texts")),
        "version": (
            folder / "checkout" / "megatron" / "core" / "package_info.py",
            lambda: cli.main(["patch", str(folder / "checkout")]),
        ),
        "script": (folder / "checkout" / "pretrain_gpt.py", lambda: cli.main(["patch", str(folder / "checkout")])),
    }


def _objects(bait: Path) -> dict[str, bytes]:
    import numpy as np

    array = io.BytesIO()
    np.save(array, np.array([Planted(bait)], dtype=object), allow_pickle=True)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("scores.npy", array.getvalue())
    return {
        "pickle": pickle.dumps(Planted(bait), 0), "npy": array.getvalue(), "npz": packed.getvalue(),
        "torch": _archive(Planted(bait)),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["pickle", "npy", "npz", "torch"])
def test_a_pickle_in_place_of_any_file_is_not_run(form: str, readable: Path, tmp_path: Path, bait: Path) -> None:
    for name, (path, read) in _readers(readable, tmp_path / "files").items():
        assert path.is_file(), name
        path.write_bytes(_objects(bait)[form])
        with contextlib.suppress(SettingError):
            read()
        assert not bait.exists(), name


@pytest.mark.parametrize("form", ["pickle", "npy", "npz", "torch"])
def test_a_pickle_in_the_index_of_a_data_set_is_not_run(form: str, readable: Path, tmp_path: Path, bait: Path) -> None:
    """Megatron-Core keeps its index beside the data and reads it with allow_pickle=True."""
    shutil.copytree(readable / "indexed", tmp_path / "data")
    prefix = tmp_path / "data" / "tokens"
    open_data(str(prefix), seq_length=8, vocab_size=256, seed=1)
    index = sorted(prefix.rglob("*.npy"))
    assert index
    for path in index:
        path.write_bytes(_objects(bait)[form])
    with pytest.raises(SettingError, match="is no array of numbers"):
        open_data(str(prefix), seq_length=8, vocab_size=256, seed=1)
    assert not bait.exists()
