"""A corpus as tokens, in shards of a fixed number of documents: by any number of processes, kept when one is killed.

A shard is `shard-00000.bin`, `.idx` and `.json`. The last, its seal, is written when the two others are whole: it
holds their SHA-256 and a digest of all that decides them. A shard without a seal that holds is made anew.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from alflb_megatron.lab.data.corpus import ROWS, Corpus
from alflb_megatron.lab.data.vocabulary import Vocabulary, load, sha256, threads
from alflb_megatron.lab.records.files import read_json, write_json

ENDINGS = (".bin", ".idx")


@dataclass(frozen=True)
class Work:
    """What every shard is made from, and where to: sent to each process once."""

    corpus: Corpus
    tokenizer: Path
    vocabulary: Vocabulary
    folder: Path
    size: int
    """Documents in a shard."""
    digest: str
    """Of all that decides the bytes of a shard: a seal with another one is another's."""

    def __len__(self) -> int:
        """Shards in all."""
        return -(-len(self.corpus) // self.size)

    def shard(self, number: int) -> Path:
        """The path prefix of a shard."""
        return self.folder / f"shard-{number:05d}"


def with_ending(prefix: Path, ending: str) -> Path:
    """`prefix` with `ending` after its whole name, dots and all."""
    return prefix.with_name(prefix.name + ending)


def token_type(vocabulary: int) -> Any:
    """The NumPy type that Megatron-Core holds tokens of such a vocabulary in: uint16 below 65,500, int32 from there."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocabulary)


def write_shard(work: Work, number: int, tokenizer: Any) -> dict[str, Any]:
    """Makes a shard unless it is there and whole; returns its seal.

    Each document that is more than blank becomes its tokens and the one that ends a text; the others are counted.

    Raises ValueError for a row of the corpus that has no text.
    """
    prefix, name = work.shard(number), with_ending(work.shard(number), ".json")
    seal = _seal(prefix, work.digest)
    if seal is not None:
        return seal
    import torch

    builder_class = _builder_class()
    name.unlink(missing_ok=True)
    # Of another name in every process: one of a killed run may still be on its way out.
    part = prefix.with_name(f".{prefix.name}.{os.getpid()}")
    first = number * work.size
    read = min(first + work.size, len(work.corpus)) - first
    documents = tokens = 0
    builder = builder_class(str(with_ending(part, ".bin")), dtype=token_type(work.vocabulary.size))
    texts = (text for text in work.corpus.documents(first, first + read) if text and not text.isspace())
    for batch in _in_lists(texts, ROWS):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            builder.add_item(torch.tensor([*encoding.ids, work.vocabulary.eod]))
            builder.end_document()
            documents, tokens = documents + 1, tokens + len(encoding.ids) + 1
    builder.finalize(str(with_ending(part, ".idx")))
    seal = {"digest": work.digest, "read": read, "documents": documents, "tokens": tokens}
    seal["sha256"] = {ending: sha256(with_ending(part, ending)) for ending in ENDINGS}
    for ending in ENDINGS:
        put(with_ending(part, ending), with_ending(prefix, ending))
    write_json(name, seal)
    return seal


def _in_lists(items: Iterator[str], size: int) -> Iterator[list[str]]:
    """`items` in lists of `size`, the last one shorter."""
    while batch := list(islice(items, size)):
        yield batch


def put(part: Path, path: Path) -> None:
    """Moves a file to where it is looked for, when its content is on the disk."""
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, path)


def _seal(prefix: Path, digest: str) -> dict[str, Any] | None:
    """The seal of a shard that is whole and was made from the same; None for any other."""
    try:
        seal: dict[str, Any] = read_json(with_ending(prefix, ".json"))
        held = {ending: sha256(with_ending(prefix, ending)) for ending in ENDINGS}
        return seal if seal["digest"] == digest and seal["sha256"] == held else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _builder_class() -> Any:
    from alflb_megatron.hosts import cpu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their advice about packages that tokens do not need
        cpu.prepare()  # before Megatron-Core is imported
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    return IndexedDatasetBuilder


def write_shards(work: Work, workers: int) -> Iterator[dict[str, Any]]:
    """Makes all shards, in this process or in `workers` of them; yields the seals as they come.

    Raises:
        ValueError: a row of the corpus has no text.
        BrokenProcessPool: a process was killed.
    """
    if workers == 1:
        tokenizer = load(work.tokenizer)
        for number in range(len(work)):
            yield write_shard(work, number, tokenizer)
        return
    context = multiprocessing.get_context("spawn")  # threads of torch and of datasets do not survive a fork
    pool = ProcessPoolExecutor(min(workers, len(work)), context, initializer=_start, initargs=(work,))
    numbers = iter(range(len(work)))
    try:
        # A few at a time: a million shards that wait would be a million objects.
        waiting: set[Future[dict[str, Any]]] = {pool.submit(_write, n) for n in islice(numbers, 2 * workers)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(_write, n) for n in islice(numbers, len(done))}
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # those at work finish their shard, which is kept


_work: Work
_tokenizer: Any


def _start(work: Work) -> None:
    """What a process does before its first shard."""
    global _work, _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a Ctrl-C the first process tells them
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # A pool whose owner was killed would wait for its next shard for ever.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    threads(1)
    _work, _tokenizer = work, load(work.tokenizer)


def _write(number: int) -> dict[str, Any]:
    return write_shard(_work, number, _tokenizer)


def merge(work: Work, prefix: Path) -> None:
    """All shards, in order, as one indexed dataset at `prefix`. The shards stay."""
    builder = _builder_class()(str(with_ending(prefix, ".bin")), dtype=token_type(work.vocabulary.size))
    gc.freeze()  # add_index collects garbage every time, over a list of all sequences so far among others
    try:
        for number in range(len(work)):
            builder.add_index(str(work.shard(number)))
    finally:
        gc.unfreeze()
    builder.finalize(str(with_ending(prefix, ".idx")))


__all__ = ["BrokenProcessPool", "Work", "merge", "put", "token_type", "with_ending", "write_shards"]
