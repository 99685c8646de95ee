"""The tokenizer of `alflb data prepare`: trained on the text, or a Hugging Face tokenizer by name or folder."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alflb_megatron.lab.data.corpus import Corpus
from alflb_megatron.lab.data.digests import digests
from alflb_megatron.lab.data.errors import need, one_line
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.settings import SettingError

TOKENIZERS = "must be train:VOCABULARY or huggingface:NAME_OR_FOLDER"
END = "<|endoftext|>"
SMALLEST = 257
"""Tokens of the smallest byte-level vocabulary: the 256 bytes and `END`."""

_SPECIAL = ("eos_token", "bos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in a folder: how many tokens it has, the one that ends a document, the SHA-256 of its files."""

    size: int
    eod: int
    files: dict[str, str]


def check_spec(spec: str) -> tuple[str, str]:
    """`--tokenizer` in its two parts; SettingError where it is none of the two kinds."""
    kind, _, name = spec.partition(":")
    if kind not in ("train", "huggingface") or not name:
        raise SettingError("--tokenizer", spec, TOKENIZERS)
    if kind == "train" and (not re.fullmatch(r"[0-9]{1,9}", name) or int(name) < SMALLEST):
        raise SettingError("--tokenizer", spec, f"train: needs a vocabulary of {SMALLEST} tokens or more")
    return kind, name


def make(spec: str, corpus: Corpus, sample: int, folder: Path) -> Vocabulary:
    """Writes the tokenizer `spec` to `folder`, which is replaced: tokenizer.json and tokenizer_config.json.

    A trained one is byte-level BPE with GPT-2's pre-tokenizer, over all documents, or where there are more over
    `sample` of them that lie evenly.

    Raises:
        SettingError: where there is no such tokenizer, or it cannot serve.
    """
    kind, name = check_spec(spec)
    if kind == "train":
        tokenizer, special = _train(int(name), corpus, sample), {"eos_token": END}
    else:
        tokenizer, special = _named(spec, name)
    tokenizer.no_padding()
    tokenizer.no_truncation()  # a document is cut nowhere, whatever length its model takes
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # The one class that all releases of transformers know; what it does is all in tokenizer.json.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    write_json(folder / "tokenizer_config.json", config)
    tokens = tokenizer.get_vocab(with_added_tokens=True)
    return Vocabulary(max(tokens.values()) + 1, tokens[special["eos_token"]], digests(folder))


def load(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` in `folder`; the name of a special token in a text is plain text to it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _train(size: int, corpus: Corpus, sample: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    count = min(sample, len(corpus))

    def texts() -> Iterator[str]:
        for i in range(count):
            number = i * len(corpus) // count
            yield from corpus.documents(number, number + 1)

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # so that no text has an unknown token
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts(), trainer, length=count)
    return tokenizer


def _named(spec: str, name: str) -> tuple[Any, dict[str, str]]:
    """The tokenizer of `transformers` that bears the name, and its special tokens by their roles."""
    need("transformers", "--tokenizer", spec)
    from transformers import AutoTokenizer

    path = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else name, trust_remote_code=False, local_files_only=path.is_dir()
        )
    except Exception as error:  # of the network, the hub, the files
        raise SettingError("--tokenizer", spec, f"transformers cannot load it: {one_line(error)}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise SettingError("--tokenizer", spec, "is not one of the tokenizers library (it has no tokenizer.json)")
    special = {role: str(token) for role in _SPECIAL if (token := getattr(tokenizer, role, None)) is not None}
    # Megatron-Core's HuggingFaceTokenizer ends documents by the separator where there is no end of text.
    end = special.get("eos_token", special.get("sep_token"))
    if end is None:
        raise SettingError("--tokenizer", spec, "has no token that ends a text (eos_token or sep_token)")
    return tokenizer.backend_tokenizer, {**special, "eos_token": end}


def threads(count: int) -> None:
    """Keeps `tokenizers`, and torch where it is not imported yet, to so many threads of this process."""
    os.environ["RAYON_NUM_THREADS"] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
