"""Expert biases in Hugging Face's files: read from safetensors, written alone or into a model's folder. No pickle.

DeepSeek-V3, GLM-4.5 and others keep the bias of layer i, from 0 and with MTP layers after the decoder's last, as
`model.layers.{i}.mlp.gate.e_score_correction_bias`. Megatron-Core's layer is i + 1. A file of ours holds those names
alone and, as metadata, what `Biases` knows. Biases on logits, which Hugging Face's models cannot take, are written
under Megatron-Core's name instead, so that nobody takes one for the other.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alflb_megatron.biases import Biases
from alflb_megatron.settings import SettingError

NAME = "model.layers.{index}.mlp.gate.e_score_correction_bias"
LOGIT_NAME = "decoder.layers.{index}.mlp.router.expert_bias"
INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
_NAME = re.compile(r"(?:.+\.)?layers\.([0-9]{1,6})\.(?:.+\.)?(?:e_score_correction_bias|(?:gate|router)\.expert_bias)")
_LONGEST = 400
"""Characters of a name; a longer one is no bias, and would keep the pattern busy."""
_FUNCTIONS = ("sigmoid", "softmax", "sqrtsoftplus")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = ("F32", "BF16", "F16")
_ADVICE = "are never unpickled here; load the model in transformers and save_pretrained(DIR, safe_serialization=True)"


def _layer(name: str) -> int | None:
    """Megatron-Core's layer of a tensor that is a bias by its name, None of others."""
    match = _NAME.fullmatch(name) if len(name) <= _LONGEST else None
    return int(match[1]) + 1 if match else None


# -- reading -----------------------------------------------------------------------------------------------------------


def read(source: str | os.PathLike[str], flag: str = "source") -> Biases:
    """The expert biases in a .safetensors file or in the folder of a Hugging Face model, sharded or not.

    Of a model's shards only those that hold a bias are opened, and only the biases are read. bfloat16 and float16
    become float32, which is exact.

    Raises:
        SettingError: naming `flag`, `source` and what is wrong with it.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return _read_folder(path, flag)
        if not path.exists():
            raise SettingError(flag, source, "there is no such file or folder")
    except OSError as error:
        raise SettingError(flag, source, f"cannot be read ({error.strerror})") from None
    if path.suffix.lower() in _PICKLED:
        raise SettingError(flag, source, f"pickled weights ({path.suffix}) {_ADVICE}")
    rows, about = _rows_of(path, flag)
    biases = Biases(rows, **_described(path, about, flag), name=str(path))
    return biases.require_sound(flag)


def _read_folder(folder: Path, flag: str) -> Biases:
    rows: dict[int, Tensor] = {}
    stacks: set[str] = set()
    for file, names in _files(folder, flag).items():
        more, _ = _rows_of(file, flag, names, stacks)
        if again := sorted(set(rows) & set(more)):
            raise SettingError(flag, folder, f"layer {again[0]} has more than one bias")
        rows |= more
    if not rows:
        raise SettingError(flag, folder, "the model holds no e_score_correction_bias")
    config = _json(folder / "config.json", flag) if (folder / "config.json").is_file() else {}
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else config

    def number(key: str) -> int | None:
        value = text.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    function = text.get("scoring_func") if text.get("scoring_func") in _FUNCTIONS else None
    groups = number("n_group")
    limited = groups is not None and groups > 1 and (number("topk_group") or groups) < groups
    return Biases(
        rows, number("num_hidden_layers"), "score", function, groups if limited else None, str(folder)
    ).require_sound(flag)


def _files(folder: Path, flag: str) -> dict[Path, list[str] | None]:
    """The safetensors files of a model's folder that hold a bias, and the names of theirs (None: look)."""
    if (folder / ONE_FILE).is_file():  # first, as transformers does: an index may be left of an earlier save
        return {folder / ONE_FILE: None}
    if (folder / INDEX).is_file():
        files: dict[Path, list[str] | None] = {}
        for name, shard in _weight_map(folder, flag).items():
            if _layer(name):
                names = files.setdefault(folder / shard, [])
                assert names is not None
                names.append(name)
        return files
    if pickled := sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _PICKLED):
        raise SettingError(flag, folder, f"pickled weights ({pickled[0]}) {_ADVICE}")
    raise SettingError(flag, folder, f"must hold {ONE_FILE} or {INDEX}, as the folder of a Hugging Face model does")


def _weight_map(folder: Path, flag: str) -> dict[str, str]:
    found = _json(folder / INDEX, flag).get("weight_map")
    texts = isinstance(found, dict) and all(isinstance(shard, str) for shard in found.values())
    if not isinstance(found, dict) or not texts:
        raise SettingError(flag, folder / INDEX, "must hold a weight_map of names to files")
    for shard in set(found.values()):
        if shard != Path(shard).name or not shard.endswith(".safetensors") or "\0" in shard:
            raise SettingError(flag, folder / INDEX, f"names {shard!r}, which is no .safetensors file beside it")
    return found


def _json(path: Path, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(flag, path, f"cannot be read as JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(value, dict):
        raise SettingError(flag, path, "must hold a JSON object")
    return value


@contextmanager
def _reading(path: Path, flag: str) -> Iterator[Any]:
    try:
        if path.exists() and not path.is_file():
            raise SettingError(flag, path, "must be a file")  # a pipe would be waited for
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        reason = " ".join(str(error).split())
        raise SettingError(flag, path, f"cannot be read, truncated or no safetensors file ({reason})") from None


def _rows_of(
    path: Path, flag: str, names: Sequence[str] | None = None, stacks: set[str] | None = None
) -> tuple[dict[int, Tensor], dict[str, str]]:
    """The biases of one file by Megatron-Core's layer, float32, and its metadata; refuses those of several `stacks`."""
    rows: dict[int, Tensor] = {}
    stacks = set() if stacks is None else stacks
    with _reading(path, flag) as file:
        about = dict(file.metadata() or {})
        held = list(file.keys())
        for name in names if names is not None else held:
            layer = _layer(name)
            if layer is None:
                continue
            if name not in held:
                raise SettingError(flag, path, f"has no {name}, which the index says it has")
            part = file.get_slice(name)
            if part.get_dtype() not in _DTYPES or len(part.get_shape()) != 1:
                text = f"{name} must be float [experts], not {part.get_dtype()} {part.get_shape()}"
                raise SettingError(flag, path, text)
            if layer in rows:
                raise SettingError(flag, path, f"layer {layer} has more than one bias")
            stacks.add(name.rpartition("layers.")[0])
            if len(stacks) > 1:
                both = " and ".join(f"{stack}layers" for stack in sorted(stacks))
                raise SettingError(flag, path, f"has biases of several stacks, {both}: give a file that holds one")
            rows[layer] = file.get_tensor(name).float()
    return rows, about


def _described(path: Path, about: Mapping[str, str], flag: str) -> dict[str, Any]:
    """What the metadata of a file of ours says; nothing is known of another's."""
    if "alflb" not in about:
        return {}
    unit, function = about.get("score_unit", "score"), about.get("score_function")
    if unit not in ("score", "logit"):
        raise SettingError(flag, path, f"has biases in units of {unit!r}; they must be score or logit")
    if function is not None and function not in _FUNCTIONS:
        raise SettingError(flag, path, f"has biases of a gate {function!r}; it must be {', '.join(_FUNCTIONS)}")
    numbers = {}
    for name in ("num_layers", "num_groups"):
        text = about.get(name)
        if text is not None and not re.fullmatch(r"[1-9]\d{0,5}", text):
            raise SettingError(flag, path, f"says {name} is {text!r}, which must be a number")
        numbers[name] = None if text is None else int(text)
    return {"score_unit": unit, "score_function": function, **numbers}


# -- writing -----------------------------------------------------------------------------------------------------------


def save(biases: Biases, path: str | os.PathLike[str], flag: str = "path") -> Path:
    """Writes `biases` to a .safetensors file, float32, all of it or nothing; a file that is there is replaced.

    Raises:
        SettingError: naming `flag`, where the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise SettingError(flag, path, "must end in .safetensors")
    biases = biases.require_sound(flag)
    form = NAME if biases.score_unit == "score" else LOGIT_NAME
    tensors = {form.format(index=layer - 1): row.contiguous() for layer, row in biases.rows.items()}
    about = {"format": "pt", "alflb": "1", "score_unit": biases.score_unit}
    for name in ("num_layers", "score_function", "num_groups"):
        if (value := getattr(biases, name)) is not None:
            about[name] = str(value)
    _commit({path: _part(path, partial(save_file, tensors, metadata=about), flag)})
    return path


def put(biases: Biases, folder: str | os.PathLike[str], flag: str = "folder") -> list[Path]:
    """Puts `biases` in the place of those of the Hugging Face model in `folder`, as float32 whatever it has.

    Files that hold a bias are written anew, each whole or not at all, and its other weights are left bit for bit; so is
    a bias of an MTP layer that `biases` lacks. A shard has to fit into memory.

    Returns:
        The files that were written.

    Raises:
        SettingError: naming `flag`, where there is no such model, its layers or experts are others, or its gate is no
            sigmoid; nothing is written then.
    """
    folder, biases = Path(folder), biases.require_sound(flag)
    if not folder.is_dir():
        raise SettingError(flag, folder, "must be the folder of a Hugging Face model")
    there = _read_folder(folder, flag)
    biases.require_gate("score", there.score_function or "sigmoid", flag)
    decoder = there.num_layers or biases.num_layers or max(there.rows)
    kept = [layer for layer in there.rows if layer > decoder and layer not in biases.rows]
    wanted = {layer: row.numel() for layer, row in there.rows.items() if layer not in kept}
    biases.require_fit(wanted, decoder, flag)
    parts: dict[Path, Path] = {}
    grown = 0
    try:
        for file, names in _files(folder, flag).items():
            with _reading(file, flag) as shard:
                about = dict(shard.metadata() or {}) or None
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
            for name in names if names is not None else list(tensors):
                layer = _layer(name)
                if layer is not None and layer in biases.rows:
                    grown += biases.rows[layer].nbytes - tensors[name].nbytes
                    tensors[name] = biases.rows[layer].contiguous()
            parts[file] = _part(file, partial(save_file, tensors, metadata=about), flag)
        if grown and folder / ONE_FILE not in parts and (index := _resized_index(folder, grown, flag)):
            parts[folder / INDEX] = index
    except BaseException:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise
    _commit(parts)
    return [path for path in parts if path.name != INDEX]


def _resized_index(folder: Path, grown: int, flag: str) -> Path | None:
    """Writes the index whose total is `grown` bytes more beside the one there is; None where that states no total."""
    index = _json(folder / INDEX, flag)
    about = index.get("metadata")
    if not isinstance(about, dict) or not isinstance(about.get("total_size"), int | float):
        return None
    about["total_size"] += grown
    text = json.dumps(index, indent=2) + "\n"
    return _part(folder / INDEX, lambda part: part.write_text(text, encoding="utf-8"), flag)


def _part(path: Path, write: Callable[[Path], object], flag: str) -> Path:
    """Has `write` make the file beside `path` that is to take its place, and returns it."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            part.chmod(path.stat().st_mode)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise SettingError(flag, path, f"cannot be written ({' '.join(str(error).split())})") from None
    return part


def _commit(parts: Mapping[Path, Path]) -> None:
    for path, part in parts.items():
        os.replace(part, path)
