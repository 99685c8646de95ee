"""Megatron's own indexed dataset, read by Megatron-Core."""

from __future__ import annotations

import importlib.util
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from alflb_megatron.lab.data.digests import fingerprint
from alflb_megatron.lab.data.errors import one_line
from alflb_megatron.lab.data.samples import (
    VALIDATION_SHARE,
    Sample,
    TextData,
    check_vocabulary,
)
from alflb_megatron.lab.records.files import regular
from alflb_megatron.settings import SettingError

TOKENIZERS = "must be byte, null:VOCABULARY, huggingface:NAME_OR_PATH or sentencepiece:PATH"

# The head of an .idx file (megatron/core/datasets/indexed_dataset.py:_IndexWriter): magic, version, type code, number
# of sequences, number of document bounds. Then int32 lengths and int64 byte offsets of the sequences, int64 bounds.
_HEAD, _MAGIC, _VERSION = struct.Struct("<9sQBQQ"), b"MMIDIDX\0\0", 1
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # the integer types, by their code in indexed_dataset.py:DType


class IndexedText(TextData):
    """One epoch of a `GPTDataset`, and after it the same samples in other orders."""

    def __init__(self, dataset: Any, source: str, tokenizer: str, vocabulary: int, seed: int, shuffled: bool) -> None:
        # GPTDataset has put the first epoch in an order of its own.
        super().__init__(seed, 1 if shuffled else None)
        self._dataset, self._source, self._tokenizer, self._vocabulary = dataset, source, tokenizer, vocabulary

    def __len__(self) -> int:
        return len(self._dataset)

    def _window(self, index: int) -> Sample:
        try:
            item = self._dataset[index]
            tokens, labels = item["tokens"], item["labels"]
        except Exception as error:  # damage that the lengths do not show, or an index of ours that was changed
            held = f"Megatron-Core cannot read its sample {index}: {one_line(error)}"
            raise SettingError("--data", self._source, held) from error
        for ids in (tokens, labels):
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self._vocabulary:
                held = f"--data={self._source} holds token {low if low < 0 else high}, it has {self._vocabulary} tokens"
                raise SettingError("--tokenizer", self._tokenizer, f"must be the one the data was made with: {held}")
        return Sample(tokens, labels, item["loss_mask"])


def prefix_of(source: str) -> Path | None:
    """The path prefix where `source` names an indexed dataset, by prefix or by one of its files; None for others.

    Raises SettingError where one of the two files is there without the other and nothing else bears the name.
    """
    path = Path(source).expanduser()
    if path.suffix in (".bin", ".idx") and path.with_suffix(".bin").is_file() and path.with_suffix(".idx").is_file():
        return path.with_suffix("")
    if not path.name:
        return None
    files = [path.with_name(path.name + ending) for ending in (".bin", ".idx")]
    there = [file.is_file() for file in files]
    if any(there) and not all(there) and not path.exists():
        missing = files[there.index(False)].name
        raise SettingError("--data", source, f"{missing} is missing; needs PREFIX.bin and PREFIX.idx")
    return path if all(there) else None


def open_indexed(
    source: str, prefix: Path, tokenizer: str, vocab_size: int, seq_length: int, seed: int, cache_dir: Path | None
) -> tuple[TextData, TextData]:
    """`data.open_data` for an indexed dataset."""
    lengths, digest = _check_files(source, prefix)
    mcore_tokenizer = _build_tokenizer(tokenizer)
    check_vocabulary(tokenizer, mcore_tokenizer.vocab_size, vocab_size)
    held_out = max(1, len(lengths) - round((1 - VALIDATION_SHARE) * len(lengths)))
    counts = (len(lengths) - held_out, held_out)
    # Megatron-Core's key to its index files holds the path and the settings but not the content: without the digest in
    # the folder's name, a dataset written anew under the same name would be read by the old one's index.
    cache = (cache_dir or prefix / "cache") / digest[:16]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _check_cache(source, cache)
    except OSError as error:
        raise SettingError("--data", source, f"no folder for its index can be made: {one_line(error)}") from error

    splits = []
    for split, name in enumerate(("training", "validation")):
        part = lengths[: counts[0]] if split == 0 else lengths[counts[0] :]
        total = int(part.sum(dtype=np.int64))
        if total <= seq_length:
            found = f"its {name} part has {total} tokens in {len(part)} sequences"
            raise SettingError("--data", source, f"{found}; --seq-length={seq_length} needs {seq_length + 1} or more")
        # Validation is drawn with a seed of its own, so that runs of different seeds are measured on the same samples.
        drawn = seed if split == 0 else 0
        try:
            dataset = _gpt_dataset(prefix.absolute(), split, counts, mcore_tokenizer, seq_length, drawn, cache)
        except Exception as error:
            raise SettingError("--data", source, f"Megatron-Core cannot read it: {one_line(error)}") from error
        data = IndexedText(dataset, source, tokenizer, mcore_tokenizer.vocab_size, seed, shuffled=split == 0)
        data.description = f"{name} part of {prefix}, {len(part)} of {len(lengths)} sequences, {total} tokens"
        order = {"kind": "indexed", "split": name, "seq_length": seq_length, "seed": drawn, "content": digest}
        data.fingerprint = fingerprint(order)
        data.sample(0)  # a tokenizer that does not suit is mostly seen here
        splits.append(data)
    return splits[0], splits[1]


def _check_cache(source: str, cache: Path) -> None:
    """Raises SettingError where a file of the index is no plain array of numbers.

    A data set may come with such a folder, and Megatron-Core reads it with `numpy.load(allow_pickle=True)`
    (gpt_dataset.py), which unpickles, and so executes, whatever is not of NumPy's format.
    """
    for path in sorted(cache.glob("*.npy")):
        try:
            regular(path)
            if not isinstance(np.load(path, mmap_mode="r", allow_pickle=False), np.ndarray):
                raise ValueError("an archive")
        except Exception as error:  # NumPy's header is parsed as Python's literals: SyntaxError, TypeError, ...
            held = f"{path} is no array of numbers ({one_line(error)}); it is made anew when that folder is removed"
            raise SettingError("--data", source, held) from error


def _gpt_dataset(
    prefix: Path, split: int, counts: tuple[int, int], tokenizer: Any, seq_length: int, seed: int, cache: Path
) -> Any:
    """One epoch of one split. Collective over all ranks where torch.distributed is initialised."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split=f"{counts[0]},{counts[1]},0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(cache),
    )
    assert config.split_matrix is not None
    config.split_matrix = [part if place == split else None for place, part in enumerate(config.split_matrix)]
    # Without a number of samples GPTDataset makes one epoch, whose order does not depend on how long the run is.
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()[split]
    # GPTDataset masks the padding of the first sample in the mask that it caches for all (gpt_dataset.py:__getitem__).
    dataset.masks_and_position_ids_are_cacheable = False
    return dataset


def _check_files(source: str, prefix: Path) -> tuple[np.ndarray[Any, Any], str]:
    """The lengths of the sequences, int32 [N], and a digest of the content.

    The digest covers the whole .idx and, of the .bin, the size and the first and last MiB: a .bin can be terabytes.

    Raises SettingError where the files are damaged: Megatron-Core checks less, and fails when it meets the damage.
    """

    def damaged(why: str) -> SettingError:
        return SettingError("--data", source, f"{why}; needs PREFIX.bin and PREFIX.idx as Megatron-Core writes them")

    idx, bin_ = (prefix.with_name(prefix.name + ending) for ending in (".idx", ".bin"))
    try:
        with idx.open("rb") as stream:
            head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size or _HEAD.unpack(head)[:2] != (_MAGIC, _VERSION):
            raise damaged(f"{idx.name} is not an index file of version {_VERSION}")
        *_, code, sequences, ends = _HEAD.unpack(head)
        if code not in _ITEM_BYTES:
            raise damaged(f"{idx.name} has tokens of type code {code}, which is no integer type")
        if sequences < 2 or idx.stat().st_size < _HEAD.size + 12 * sequences + 8 * ends:
            raise damaged(f"{idx.name} is cut off or has fewer than 2 sequences ({sequences})")
        content = np.memmap(idx, mode="r")
        lengths = np.frombuffer(content, np.int32, sequences, _HEAD.size)
        offsets = np.frombuffer(content, np.int64, sequences, _HEAD.size + lengths.nbytes)
        size = bin_.stat().st_size
        bounds = np.frombuffer(content, np.int64, ends, _HEAD.size + 12 * sequences)
        if ends < 2 or bounds[0] != 0 or bounds[-1] != sequences or (bounds[1:] < bounds[:-1]).any():
            raise damaged(f"{idx.name} has document bounds that do not rise from 0 to its {sequences} sequences")
        if offsets.max() > size:  # before they are added to: a sum beyond int64 would be negative
            raise damaged(f"{idx.name} has a sequence at byte {offsets.max()} of {bin_.name}, which has {size}")
        bytes_needed = int((offsets + lengths.astype(np.int64) * _ITEM_BYTES[code]).max())
        if lengths.min() < 0 or offsets.min() < 0 or bytes_needed > size:
            raise damaged(f"{idx.name} needs {bytes_needed} bytes of {bin_.name}, which has {size}")
        with bin_.open("rb") as stream:
            first = stream.read(2**20)
            stream.seek(max(0, size - 2**20))
            return lengths, fingerprint({"bytes": size}, content, first, stream.read())
    except OSError as error:
        raise damaged(one_line(error)) from error


def check_tokenizer_name(spec: str) -> tuple[str, str]:
    """`--tokenizer` in its two parts, the second empty for `byte`; raises SettingError where it is none of these."""
    kind, _, name = spec.partition(":")
    needs_name = {"byte": False, "null": True, "huggingface": True, "sentencepiece": True}
    if needs_name.get(kind) is not bool(name) or (kind == "null" and not re.fullmatch(r"[2-9]|[1-9][0-9]{1,17}", name)):
        raise SettingError("--tokenizer", spec, TOKENIZERS)
    return kind, name


def _build_tokenizer(spec: str) -> Any:
    """Megatron-Core's tokenizer of that name, of which only size and padding token matter: the data is tokens."""
    kind, name = check_tokenizer_name(spec)
    package = {"huggingface": "transformers", "sentencepiece": "sentencepiece"}.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise SettingError("--tokenizer", spec, f"needs the Python package {package}, which is not installed")

    from megatron.core.tokenizers import MegatronTokenizer
    from megatron.core.tokenizers.text.text_tokenizer import TOKENIZER_MAPPING_LIBRARIES

    def build(library: str, path: str | None = None, **options: Any) -> Any:
        return MegatronTokenizer.from_pretrained(path, metadata_path={"library": library}, **options)

    try:
        if kind == "byte":
            return build("byte-level", vocab_size=256, _eos_id=0, _pad_id=-1)
        if kind == "null":
            # null:V has the tokens 0 to V - 1. Releases that call it "null" count one token more than they are told.
            old = "null" in TOKENIZER_MAPPING_LIBRARIES
            return build("null" if old else "null-text", vocab_size=int(name) - old)
        tokenizer = build(kind, str(Path(name).expanduser()) if kind == "sentencepiece" else name)
        _ = tokenizer.eod  # GPTDataset asks for it
    except Exception as error:
        raise SettingError("--tokenizer", spec, f"Megatron-Core cannot build it: {one_line(error)}") from error
    return tokenizer
