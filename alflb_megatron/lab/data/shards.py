"""A corpus as tokens, in shards of a fixed number of documents: by any number of processes, kept when one is killed.

A shard is one file, `shard-00000.npz`: the tokens, the length of each document, and a digest of all that decides them.
It gets its name when it is whole and on the disk, and each of its parts has a checksum (the CRC-32 of a zip file): a
shard that is damaged, or another's, is made anew.

Only `merge` imports torch and Megatron-Core. That takes seconds, and a process that cuts text into tokens needs
neither.
"""

from __future__ import annotations

import errno
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
from typing import Any, NamedTuple

import numpy as np

from alflb_megatron.lab.data.corpus import ROWS, Corpus
from alflb_megatron.lab.data.vocabulary import Vocabulary, load, threads

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
    """Of all that decides the content of a shard: one with another is another's."""

    def __len__(self) -> int:
        """Shards in all."""
        return -(-len(self.corpus) // self.size)

    def documents(self, number: int) -> range:
        """The documents of a shard."""
        return range(number * self.size, min((number + 1) * self.size, len(self.corpus)))

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard-{number:05d}.npz"


class Counts(NamedTuple):
    """Documents that were read, those of them that hold text, and their tokens."""

    read: int = 0
    documents: int = 0
    tokens: int = 0


def with_ending(prefix: Path, ending: str) -> Path:
    """`prefix` with `ending` after its whole name, dots and all."""
    return prefix.with_name(prefix.name + ending)


def put(part: Path, path: Path) -> None:
    """Moves a file to where it is looked for, when its content is on the disk."""
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, path)


# -- one shard ---------------------------------------------------------------------------------------------------------


def write_shard(work: Work, number: int, tokenizer: Any) -> Counts:
    """Makes a shard unless it is there and whole.

    Each document that is more than blank becomes its tokens and the one that ends a text.

    Raises ValueError for a row of the corpus that has no text.
    """
    held, path = work.documents(number), work.shard(number)
    lengths = read_shard(work, number)[1] if path.exists() else None
    if lengths is None:
        texts = (text for text in work.corpus.documents(held.start, held.stop) if text and not text.isspace())
        type_ = np.min_scalar_type(work.vocabulary.size - 1)
        documents = [
            np.array([*encoding.ids, work.vocabulary.eod], type_)
            for batch in _in_lists(texts, ROWS)
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ]
        tokens = np.concatenate([np.empty(0, type_), *documents])
        lengths = np.array([len(document) for document in documents], np.int64)
        # Of another name in every process: one of a killed run may still be on its way out.
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with part.open("wb") as stream:
            np.savez(stream, tokens=tokens, lengths=lengths, digest=np.array(work.digest))
        put(part, path)
    return Counts(len(held), len(lengths), int(lengths.sum()))


def read_shard(work: Work, number: int) -> tuple[Any, Any]:
    """The tokens [T] and the lengths int64 [documents] of a shard that is whole; None, None for any other."""
    try:
        with np.load(work.shard(number), allow_pickle=False) as shard:
            if shard.zip.testzip() is None and shard["digest"].item() == work.digest:
                return shard["tokens"], shard["lengths"]
    except Exception:  # a damaged zip file or array fails in many ways
        pass
    return None, None


def _in_lists(items: Iterator[str], size: int) -> Iterator[list[str]]:
    """`items` in lists of `size`, the last one shorter."""
    while batch := list(islice(items, size)):
        yield batch


# -- all shards --------------------------------------------------------------------------------------------------------


def write_shards(work: Work, workers: int) -> Iterator[Counts]:
    """Makes all shards, in this process or in `workers` of them; yields their counts as they come.

    Raises:
        ValueError: a row of the corpus has no text.
        BrokenProcessPool: a process was killed.
    """
    if workers == 1:
        tokenizer = load(work.tokenizer)
        for number in range(len(work)):
            yield write_shard(work, number, tokenizer)
        return
    context = multiprocessing.get_context("spawn")  # threads of `tokenizers` and `datasets` do not survive a fork
    pool = ProcessPoolExecutor(min(workers, len(work)), context, initializer=_start, initargs=(work,))
    numbers = iter(range(len(work)))
    try:
        # A few at a time: a million shards that wait would be a million objects.
        waiting: set[Future[Counts]] = {pool.submit(_write, n) for n in islice(numbers, 2 * workers)}
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


def _write(number: int) -> Counts:
    return write_shard(_work, number, _tokenizer)


# -- in Megatron's format ----------------------------------------------------------------------------------------------


def merge(work: Work, prefix: Path) -> str:
    """All shards, in order, as one indexed dataset at `prefix`; the NumPy type of its tokens. The shards stay."""
    from alflb_megatron.hosts import cpu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their advice about packages that tokens do not need
        cpu.prepare()  # before Megatron-Core is imported
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    token_type = DType.optimal_dtype(work.vocabulary.size)  # uint16 below 65,500, int32 from there
    builder: Any = IndexedDatasetBuilder(str(with_ending(prefix, ".bin")), dtype=token_type)
    for number in range(len(work)):
        tokens, lengths = read_shard(work, number)
        if tokens is None:
            raise OSError(errno.EIO, "damaged since it was made; the same command makes it again", work.shard(number))
        start = 0
        for length in lengths.tolist():
            builder.add_document(tokens[start : start + length], [length])
            start += length
    builder.finalize(str(with_ending(prefix, ".idx")))
    return np.dtype(token_type).name


__all__ = ["BrokenProcessPool", "Counts", "Work", "merge", "put", "with_ending", "write_shards"]
