"""Data sets of the Hugging Face hub, through the `datasets` library: WikiText-103 and FineWeb-Edu."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alflb_megatron.lab.data.corpus import Corpus, Source, open_parquet
from alflb_megatron.lab.data.digests import fingerprint
from alflb_megatron.lab.data.errors import cause
from alflb_megatron.settings import SettingError


class Hub(NamedTuple):
    """A data set of the Hugging Face hub: its repository and the configuration that is taken by default."""

    repository: str
    config: str


HUB = {
    "wikitext-103": Hub("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "fineweb-edu": Hub("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}


def find_hub(name: str, config: str, split: str, revision: str, text_field: str) -> Source:
    """A data set in `HUB`. Of WikiText a document is an article.

    Without a limit it is downloaded into the cache of `datasets` where it is not there; with one, of other sets than
    WikiText, as many rows as are needed.
    """
    import datasets

    hub = HUB[name]

    def find() -> Any:
        return datasets.load_dataset_builder(hub.repository, config or hub.config, revision=revision or None)

    builder = _of_hub(name, find)
    # The hash is the commit, also where the data set comes out of the cache without a network.
    identity = {"hub": name, "config": builder.config.name, "split": split, "revision": builder.hash}

    def load(limit: int, scratch: Path) -> Corpus:
        if limit and name != "wikitext-103":
            head = scratch / f"head-{fingerprint({**identity, 'column': text_field, 'limit': limit})[:16]}.parquet"
            if not head.exists():
                _download_head(builder.as_streaming_dataset(split), text_field, limit, head)
            return Corpus(open_parquet([head], text_field, scratch), text_field)
        builder.download_and_prepare()
        rows = builder.as_dataset(split).select_columns([text_field])
        bounds = articles(rows, text_field) if name == "wikitext-103" else None
        return Corpus(rows, text_field, bounds=bounds).first(limit)

    return Source({**identity, "text_field": text_field}, [], lambda *to: _of_hub(name, lambda: load(*to)))


def _of_hub(name: str, call: Callable[[], Any]) -> Any:
    """What `call` returns; SettingError where the network, the hub or the cache fails, or lacks a name."""
    try:
        return call()
    except SettingError:
        raise
    except Exception as error:
        how = "needs a network, or the data set in the cache of `datasets`; a local folder needs neither"
        raise SettingError("SOURCE", name, f"cannot be loaded: {cause(error)}; {how}") from error


def _download_head(stream: Any, text_field: str, limit: int, path: Path) -> None:
    """Writes the first `limit` texts of a stream to a parquet file, all of it or nothing."""
    import pyarrow
    from pyarrow import parquet

    part = path.with_suffix(".part")
    schema = pyarrow.schema({text_field: pyarrow.string()})
    with parquet.ParquetWriter(part, schema) as writer:
        for batch in stream.select_columns([text_field]).take(limit).iter(batch_size=1000):
            writer.write_table(pyarrow.table({text_field: batch[text_field]}, schema))
    os.replace(part, path)


_TITLE = re.compile(r" = (?!= ).+ =\s*")


def articles(rows: Any, column: str) -> np.ndarray[Any, Any]:
    """Where the articles of WikiText's rows begin, int64 [articles + 1].

    A row is one line of the file. An article begins with its title, ` = Title = ` between two blank rows; the titles
    of its sections have more signs.
    """
    starts: list[int] = []
    title, last = False, ""  # of the row before
    for first in range(0, len(rows), 10_000):
        for number, row in enumerate(rows[first : first + 10_000][column], first):
            if title and not row.strip():
                starts.append(number - 1)
            title, last = not last.strip() and _TITLE.fullmatch(row) is not None, row
    return np.array([0, *starts[1:], len(rows)], dtype=np.int64)  # what precedes the first title is with it
