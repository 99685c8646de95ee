"""The text that a model is trained on: made by `alflb data prepare`, read by `alflb train`.

How data walks through the room, a module a step. `alflb data prepare` makes tokens of text:

    preparation   its settings, and where its files lie
    corpus, hub   the documents of a source: one's own files, or a data set of the Hugging Face hub, by `datasets`
    vocabulary    the tokenizer: trained on them, or one of `transformers`
    shards        documents to tokens, by many processes, kept when one is killed; then one .bin and .idx
    prepare       these in their order, what is refused, and the command
    manifest      PREFIX.json, written last, and `alflb data check`

`alflb train` makes batches of tokens, by `open_data` below:

    text, indexed   its two kinds of source: text byte by byte, and a .bin and .idx, by Megatron-Core
    samples         from there on the same for both: windows, their order, batches, micro-batches

`digests` and `errors` are what both use.

`open_data` takes the value of `--data` and returns the training and the validation split, one `TextData` each:

- `stdlib`: the source text of the running Python's standard library, one token a byte (256 tokens);
- `package:NAME==VERSION`: that of an installed package, say `package:sympy==1.14.0`, which comes with torch; the
  version may be left out;
- a text file or a folder of text files, also one token a byte;
- the PREFIX of Megatron's own indexed dataset (`PREFIX.bin` and `PREFIX.idx`), read by Megatron-Core's `GPTDataset`.

The global batch of step n (from 0) is always samples [n G, (n + 1) G) of the training split, G the global batch size,
whatever the data-parallel and micro-batch sizes: resuming needs nothing but the step.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alflb_megatron.lab.data.errors import one_line
from alflb_megatron.settings import SettingError

if TYPE_CHECKING:
    from alflb_megatron.lab.data.samples import Batch, Sample, TextData, collate, micro_batches

__all__ = ["Batch", "Sample", "TextData", "collate", "micro_batches", "open_data"]


def __getattr__(name: str) -> Any:
    # When they are asked for: they import torch, and a process that only cuts text into tokens does not need it.
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.samples"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_data(
    source: str,
    *,
    tokenizer: str = "byte",
    seq_length: int,
    vocab_size: int,
    seed: int,
    train_samples: int = 0,
    validation_samples: int = 0,
    cache_dir: Path | None = None,
) -> tuple[TextData, TextData]:
    """Opens `--data`: the training and the validation split, with no text in common.

    Of a folder (and of stdlib and packages) about one file in 20 is validation, chosen by the SHA-256 of its
    relative path; of a single file the last 5 % of its bytes; of an indexed dataset the last 5 % of its sequences,
    as `--split 95,5,0` of Megatron-LM takes them. In a folder, hidden files and folders are passed over; files that
    are not UTF-8 text, or that hold a zero byte, are left out and counted in `description`. Texts are joined by one
    zero byte and held in memory, one copy a process.

    The order depends on `seed` and on nothing of the run's length; `train_samples` and `validation_samples` only put
    into `description` how many times the run reads the split. The first epoch of an indexed dataset has Megatron-LM's
    own order for that seed and split; later epochs permute its samples. Validation has one order for all seeds and
    epochs.

    With torch.distributed initialised, opening an indexed dataset is collective: Megatron-Core lets rank 0 write the
    index files, then the others read them. They go to a folder in `cache_dir`, or else in PREFIX/cache, which all ranks
    must share.

    Raises SettingError that names `--data` or `--tokenizer`, the value and what is allowed.
    """
    from alflb_megatron.lab.data.indexed import open_indexed, prefix_of
    from alflb_megatron.lab.data.text import open_text

    try:
        prefix = prefix_of(source)
        if prefix is not None:
            splits = open_indexed(source, prefix, tokenizer, vocab_size, seq_length, seed, cache_dir)
        else:
            splits = open_text(source, tokenizer, vocab_size, seq_length, seed)
    except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: a ~ of nobody's
        raise SettingError("--data", source, f"cannot be read: {one_line(error)}") from error
    for data, samples in zip(splits, (train_samples, validation_samples), strict=True):
        data.description += f", {len(data)} samples" + (f", read {samples / len(data):.3g} times" if samples else "")
    return splits
